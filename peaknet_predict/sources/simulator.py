"""A simulator of serial crystallography: detector readouts whose Bragg peaks are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from peaknet_predict.sources.base import EventSource, check_first
from peaknet_predict.sources.detector import (
    DetectorReadout,
    TiledDetector,
    polarisation,
    smooth_scattering,
)
from peaknet_predict.sources.diffraction import (
    Crystal,
    Floats,
    random_rotation,
    wavelength_angstrom,
)
from peaknet_predict.sources.energies import check_photon_energy_ev
from peaknet_predict.sources.gaussian_spots import SPOT_RADIUS_PX, SPOT_SIGMA_PX, GaussianSpots
from peaknet_predict.types import Image, Peaks

B_FACTOR = 20.0
"""Temperature factor, square Angstrom; usual for protein crystals at room temperature."""

CRYSTAL_SPREAD = 0.5
"""Standard deviation of the logarithm of the diffracting power from shot to shot. Crystals differ
in size, are hit off-centre, and pulses differ in energy."""

MAX_JITTER_RMS = 4.0
"""Photon energies are clipped at this many rms from the nominal one, so that the table of
reflections covers the detector in every shot."""

# Purposes of random streams. Seed, purpose and, where there is one, event name a stream.
_CRYSTAL, _DEFECTS, _SHOT, _NOISE = range(4)


@dataclass(slots=True)
class PlantedPeaks:
    """The truth of one event: every spot that a peak finder could be expected to find.

    A spot is listed if its centre lies on a panel, at least one pixel inside the centres of the
    outermost pixels, and its `snr` is at least 1. Bad pixels are ignored; overlapping spots are
    listed as if each were alone.

    Attributes
    ----------
    peaks
        (M, 3) float64, panel, y, x of the centres, see `peaknet_predict.types.Peaks`.
    snr
        (M,) float64: expected height of the brightest pixel of the spot above the background, in
        standard deviations of a pixel that holds the same background but no spot. The variance is
        that of the Poisson distributed background plus that of the readout. It leaves out the
        noise of the photons of the spot itself, as the local statistics of a peak finder do.
    """

    peaks: Peaks
    snr: Floats


class _Shot(NamedTuple):
    """One event before the detector adds noise."""

    photon_energy: float
    spots: GaussianSpots


class Simulator(EventSource):
    """Still shots of randomly oriented crystals on a flat detector of several panels.

    Each event depends on `seed` and its own number alone, so that any event, and its truth, can be
    made again anywhere and in any order (with the same NumPy, whose generators may change between
    versions).

    A hit is one crystal in a uniformly random orientation. Reflections close to the Ewald sphere
    become Gaussian spots at sub-pixel positions. |F|^2 follows Wilson statistics; temperature
    factor, partiality, polarisation and a log-normal factor for the shot scale the intensity. The
    photons of every pixel, background included, are Poisson distributed without approximation;
    gain, readout noise, hot and dead pixels follow.

    Parameters
    ----------
    num_events
        Events of one pass.
    panels, height, width
        Shape of an image: panels on a near-square grid around the beam, rows and columns of each.
    seed
        Seed of the run: crystal, bad pixels and all events.
    pixel_size_m
        Edge of a pixel, metres.
    distance_m
        Sample to detector, metres.
    photon_energy_ev
        Mean photon energy, eV.
    photon_energy_jitter
        Relative rms of the photon energy from shot to shot.
    cell
        a, b, c in Angstrom, alpha, beta, gamma in degrees; primitive. The default resembles
        thermolysin.
    hit_fraction
        Probability that an event has a crystal, 0 to 1.
    peak_width
        Gaussian width of a reciprocal lattice point, inverse Angstrom; combines mosaicity,
        bandwidth and divergence. A larger width gives more spots.
    spot_photons
        Photons of a full reflection at zero scattering angle: the mean over the reflections of a
        shot of median brightness.
    background
        Photons per pixel, at the beam, from scattering without structure.
    water_ring
        Additional photons per pixel at the crest of the water ring (d = 3.1 Angstrom).
    gain_adu_per_photon
        ADU.
    readout_noise_adu
        Rms, ADU.
    hot_pixels, dead_pixels
        Fraction of pixels with a large constant signal, and of pixels that always read 0. They are
        the same pixels in all events.
    dtype
        Of the images. Integers are rounded and clipped to their range, so that 'uint16' loses the
        readout noise below 0.

    Raises
    ------
    ValueError
        If a number lies outside its range or the cell is impossible.
    """

    def __init__(
        self,
        num_events: int = 1000,
        panels: int = 4,
        height: int = 512,
        width: int = 512,
        seed: int = 0,
        pixel_size_m: float = 75e-6,
        distance_m: float = 0.08,
        photon_energy_ev: float = 9500.0,
        photon_energy_jitter: float = 0.002,
        cell: tuple[float, float, float, float, float, float] = (93, 93, 131, 90, 90, 120),
        hit_fraction: float = 0.5,
        peak_width: float = 1.2e-4,
        spot_photons: float = 200.0,
        background: float = 1.0,
        water_ring: float = 4.0,
        gain_adu_per_photon: float = 30.0,
        readout_noise_adu: float = 9.0,
        hot_pixels: float = 1e-4,
        dead_pixels: float = 5e-4,
        dtype: Literal["float32", "uint16", "int32"] = "float32",
    ) -> None:
        _check("at least 1", lambda v: v >= 1, panels=panels, height=height, width=width)
        _check(
            "positive",
            lambda v: 0.0 < v < np.inf,
            pixel_size_m=pixel_size_m,
            distance_m=distance_m,
            peak_width=peak_width,
            gain_adu_per_photon=gain_adu_per_photon,
        )
        check_photon_energy_ev(photon_energy_ev)
        _check(
            "0 or more",
            lambda v: 0.0 <= v < np.inf,
            num_events=num_events,
            seed=seed,
            spot_photons=spot_photons,
            background=background,
            water_ring=water_ring,
            readout_noise_adu=readout_noise_adu,
        )
        _check(
            "between 0 and 1",
            lambda v: 0.0 <= v <= 1.0,
            hit_fraction=hit_fraction,
            hot_pixels=hot_pixels,
            dead_pixels=dead_pixels,
            hot_and_dead_pixels=hot_pixels + dead_pixels,
        )
        _check(
            "between 0 and 0.1",
            lambda v: 0.0 <= v <= 0.1,
            photon_energy_jitter=photon_energy_jitter,
        )
        if dtype not in ("float32", "uint16", "int32"):
            raise ValueError(f"dtype must be 'float32', 'uint16' or 'int32'; got {dtype!r}")

        self._num_events = num_events
        self._seed = seed
        self._photon_energy_ev = photon_energy_ev
        self._photon_energy_jitter = photon_energy_jitter
        self._hit_fraction = hit_fraction
        self._spot_photons = spot_photons

        self._detector = TiledDetector(panels, height, width, pixel_size_m, distance_m)
        # Computed once: the jitter moves the ring by much less than its width.
        self._background_PHW = smooth_scattering(
            self._detector, wavelength_angstrom(photon_energy_ev), background, water_ring
        )
        highest_ev = photon_energy_ev * (1.0 + MAX_JITTER_RMS * photon_energy_jitter)
        half_angle = self._detector.max_two_theta() / 2.0
        max_q = 2.0 * np.sin(half_angle) / wavelength_angstrom(highest_ev) + 4.0 * peak_width
        self._crystal = Crystal(cell, max_q, peak_width, B_FACTOR, self._rng(_CRYSTAL))

        self._readout = DetectorReadout(
            self._detector.shape,
            gain_adu_per_photon,
            readout_noise_adu,
            hot_pixels,
            dead_pixels,
            dtype,
            self._rng(_DEFECTS),
        )

    def _rng(self, purpose: int, *event: int) -> np.random.Generator:
        # SFC64 is NumPy's fastest; independent streams come from the seed sequence.
        sequence = np.random.SeedSequence(self._seed, spawn_key=(purpose, *event))
        return np.random.Generator(np.random.SFC64(sequence))

    def __len__(self) -> int:
        return self._num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass, see `EventSource.events`."""
        check_first(first, len(self))
        return ((idx, *self.event(idx)) for idx in range(first, len(self)))

    def event(self, idx: int) -> tuple[Image, float]:
        """Make one event.

        Parameters
        ----------
        idx
            Number of the event, 0 ... ``len(self) - 1``.

        Returns
        -------
        image, photon_energy
            (P, H, W) in `dtype`, ADU; and eV.

        Raises
        ------
        IndexError
            If there is no such event.
        """
        shot = self._shot(idx)
        image_PHW = self._readout.read(self._expected(shot), self._rng(_NOISE, idx))
        return image_PHW, shot.photon_energy

    def expected_photons(self, idx: int) -> Floats:
        """Return the noise-free image of an event: photons before Poisson noise, gain and defects.

        Returns
        -------
        ndarray
            (P, H, W) | float64, photons.
        """
        return self._expected(self._shot(idx))

    @property
    def background_photons(self) -> Floats:
        """(P, H, W) | float64, photons expected without a crystal, the same in every event."""
        return self._background_PHW.copy()

    def planted_peaks(self, idx: int) -> PlantedPeaks:
        """Return the peaks of an event, without making its image.

        Raises
        ------
        IndexError
            If there is no such event.
        """
        spots = self._shot(idx).spots
        _, height, width = self._detector.shape
        inside_M = (spots.y_M >= 1) & (spots.y_M <= height - 2)
        inside_M &= (spots.x_M >= 1) & (spots.x_M <= width - 2)
        y_M, x_M = spots.brightest_pixels()
        # Spots outside are clipped here and dropped below.
        y_M, x_M = np.clip(y_M, 0, height - 1), np.clip(x_M, 0, width - 1)
        variance_M = self._background_PHW[spots.panel_M, y_M, x_M]
        variance_M = variance_M + self._readout.noise_photons**2
        # Without noise, the ratio of every spot is huge rather than infinite.
        snr_M = spots.heights() / np.sqrt(np.maximum(variance_M, np.finfo(np.float64).tiny))
        planted_M = inside_M & (snr_M >= 1.0)
        peaks_M3 = np.stack([spots.panel_M, spots.y_M, spots.x_M], axis=1)
        return PlantedPeaks(peaks=peaks_M3[planted_M], snr=snr_M[planted_M])

    def _shot(self, idx: int) -> _Shot:
        if not 0 <= idx < self._num_events:
            raise IndexError(f"event {idx} of a simulator of {self._num_events} events")
        rng = self._rng(_SHOT, idx)
        hit = rng.random() < self._hit_fraction
        jitter = np.clip(rng.standard_normal(), -MAX_JITTER_RMS, MAX_JITTER_RMS)
        photon_energy = float(self._photon_energy_ev * (1.0 + self._photon_energy_jitter * jitter))
        if not hit:
            return _Shot(photon_energy, GaussianSpots.none())

        reflections = self._crystal.diffract(random_rotation(rng), photon_energy)
        brightness = self._spot_photons * np.exp(CRYSTAL_SPREAD * rng.standard_normal())
        sigma_M = rng.uniform(*SPOT_SIGMA_PX, size=len(reflections.intensity_M))
        direction_x_M = reflections.k_out_M3[:, 0] * wavelength_angstrom(photon_energy)
        photons_M = brightness * reflections.intensity_M * polarisation(direction_x_M)
        # Tails of spots just outside a panel reach into it.
        y_M, x_M = self._detector.project(reflections.k_out_M3)
        spot, panel_M, y_M, x_M = self._detector.to_panels(y_M, x_M, margin=SPOT_RADIUS_PX)
        spots = GaussianSpots(panel_M, y_M, x_M, sigma_M[spot], photons_M[spot])
        return _Shot(photon_energy, spots)

    def _expected(self, shot: _Shot) -> Floats:
        photons_PHW = self._background_PHW.copy()
        shot.spots.add_to(photons_PHW)
        return photons_PHW


def _check(requirement: str, holds: Callable[[float], bool], **values: float) -> None:
    """Raise a `ValueError` that names the first value that does not meet the requirement."""
    for name, value in values.items():
        if not holds(value):
            raise ValueError(f"{name} must be {requirement}; got {value}")
