"""The data sets of benchmarks.accuracy.simulated_shots: images whose peaks are known.

Two programs make them, which share no code but for the geometry of a flat detector: the NumPy
`Simulator` of peaknet_predict.sources, whose shots no network of ours is trained on, and the
training simulator, in a domain that is kept from training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.accuracy.detector_geometry import Geometry, simulator_geometry
from benchmarks.accuracy.ideal import Ideal
from peaknet_predict.sources import Simulator
from peaknet_predict.types import Image, Peaks


@dataclass(slots=True)
class Shot:
    """One event and its truth.

    Attributes
    ----------
    image_PHW
        (P, H, W) detector counts.
    peaks_M3, snr_M
        Planted peaks, see `Peaks`, and their signal-to-noise ratios (M,), sigmas; down to 1.
    photon_energy_ev
        eV; NaN where the data set has no geometry.
    ignored_PHW
        bool: pixels where a finder may list a peak or not, or None for nowhere. Planted peaks there
        are not asked for.
    """

    image_PHW: Image
    peaks_M3: Peaks
    snr_M: npt.NDArray[np.float64]
    photon_energy_ev: float
    ignored_PHW: npt.NDArray[np.bool_] | None = None


@dataclass(slots=True)
class DataSet:
    """Shots of one kind.

    Attributes
    ----------
    name
        For tables.
    hits, blanks
        Events with a crystal, and events without.
    geometry
        Where its pixels are; None where every shot has another geometry.
    cell
        a, b, c in Angstrom, alpha, beta, gamma in degrees; None where every shot has another.
    ideal
        Finders that are told background, noise and bad pixels, for the hits and for the blanks;
        None where these are not known.
    """

    name: str
    hits: list[Shot]
    blanks: list[Shot]
    geometry: Geometry | None = None
    cell: tuple[float, float, float, float, float, float] | None = None
    ideal: tuple[Ideal, Ideal] | None = None


CELL = (93.0, 93.0, 131.0, 90.0, 90.0, 120.0)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # The size, pixels, distance and shape of the real shots in shared/realdata.
    "cspad": {
        "panels": 32,
        "height": 185,
        "width": 388,
        "pixel_size_m": 109.92e-6,
        "distance_m": 0.130,
        "dtype": "int32",
    },
    # Photon counting: no noise but the photons', most pixels empty.
    "low_counts": {
        "dtype": "uint16",
        "gain_adu_per_photon": 1.0,
        "readout_noise_adu": 0.05,
        "background": 0.05,
        "water_ring": 0.3,
        "spot_photons": 30.0,
    },
    # A thick jet: forty times the default's background.
    "strong_background": {"background": 40.0, "water_ring": 160.0, "spot_photons": 1200.0},
    # One large panel with wide pixels, like a CCD camera's.
    "big_panel": {
        "panels": 1,
        "height": 1920,
        "width": 1920,
        "pixel_size_m": 89e-6,
        "distance_m": 0.1,
        "dtype": "uint16",
        "gain_adu_per_photon": 20.0,
        "readout_noise_adu": 8.0,
    },
}
"""Parameters of `Simulator`, where they differ from its defaults, by data set."""


def simulated(name: str, events: int, seed: int) -> DataSet:
    """Make one of `SETTINGS` with as many hits, and as many blanks."""
    settings: dict[str, Any] = {"cell": CELL, **SETTINGS[name]}
    # Other noise for the blanks.
    hits = Simulator(events, seed=seed, hit_fraction=1.0, **settings)
    blanks = Simulator(events, seed=seed + 1, hit_fraction=0.0, **settings)
    geometry = simulator_geometry(
        *(settings.get(key, default) for key, default in _GEOMETRY_DEFAULTS.items())
    )
    gain = settings.get("gain_adu_per_photon", 30.0)
    rounding = 0.0 if settings.get("dtype", "float32") == "float32" else 1.0 / 12.0
    noise = float(np.sqrt(settings.get("readout_noise_adu", 9.0) ** 2 + rounding)) / gain
    shots = _shots(hits), _shots(blanks)
    # The background is the same in all events; the bad pixels are those of each seed.
    background_PHW = hits.background_photons
    ideal = tuple(
        Ideal.of([shot.image_PHW for shot in some], background_PHW, noise, gain) for some in shots
    )
    return DataSet(name, *shots, geometry, settings["cell"], (ideal[0], ideal[1]))


_GEOMETRY_DEFAULTS: dict[str, Any] = {
    "panels": 4,
    "height": 512,
    "width": 512,
    "pixel_size_m": 75e-6,
    "distance_m": 0.08,
}
"""Those of `Simulator`."""


def _shots(simulator: Simulator) -> list[Shot]:
    shots = []
    for idx in range(len(simulator)):
        image, photon_energy = simulator.event(idx)
        truth = simulator.planted_peaks(idx)
        shots.append(Shot(image, truth.peaks, truth.snr, photon_energy))
    return shots


def held_out(events: int, seed: int, device: str) -> DataSet:
    """Make shots of the domain that the training simulator keeps from training."""
    # Imported here: the other data sets need none of it.
    from peaknet_predict.simulation.shots import ShotSimulator

    kinds = {}
    for kind, hit_fraction, own_seed in (("hits", 1.0, seed), ("blanks", 0.0, seed + 1)):
        simulator = ShotSimulator(4, 512, 512, hit_fraction, own_seed, domain="held_out")
        kinds[kind] = [_labelled(simulator, k, torch.device(device)) for k in range(events)]
    return DataSet("held_out", kinds["hits"], kinds["blanks"])


def _labelled(simulator: Any, index: int, device: torch.device) -> Shot:
    from peaknet_predict.simulation.labels import BACKGROUND, IGNORED

    shots = simulator.shots(index, 1, device)
    peaks_M4 = shots.peaks_M4.cpu().numpy().astype(np.float64)
    labels_PHW = shots.labels_BPHW[0].cpu().numpy()
    ignored_PHW = labels_PHW == IGNORED
    # A spot of which too little was measured to tell is neither asked for nor false.
    for panel, y, x in np.rint(peaks_M4[:, 1:]).astype(np.int64):
        if labels_PHW[panel, y, x] == BACKGROUND:
            ignored_PHW[panel, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
    return Shot(
        shots.images_BPHW[0].cpu().numpy(),
        peaks_M4[:, 1:],
        shots.snr_M.cpu().numpy().astype(np.float64),
        float("nan"),
        ignored_PHW,
    )


DATA_SETS: dict[str, Callable[[int, int, str], DataSet]] = {
    "held_out": held_out,
    **{
        name: lambda events, seed, _, name=name: simulated(name, events, seed)  # type: ignore[misc]
        for name in SETTINGS
    },
}
"""Makers by name: number of hits and of blanks, seed, device."""
