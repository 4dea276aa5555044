"""Events from HDF5 files: CXI, psana's and Cheetah's output, and other layouts of frames."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.photon_energy import JOULES_PER_EV
from peaknet_predict.sources.base import (
    EventSource,
    check_first,
    check_photon_energy_ev,
    energies_from_table,
    resolve_paths,
    unreadable,
)
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)

LCLS_ENERGY = "/LCLS/photon_energy_eV"
"""Where Cheetah and psana's writers put the photon energy, eV; also CrystFEL's usual setting."""

CXI_ENERGY = "/entry_1/instrument_1/source_1/energy"
"""Where the CXI format has the photon energy, in joules (CXI file format, version 1.5, source)."""

EV_PER_UNIT = {"eV": 1.0, "keV": 1e3, "J": 1.0 / JOULES_PER_EV}
"""Units that a dataset's attribute ``units`` may name."""


class _File(NamedTuple):
    """One file: its number of events and their photon energies, (N,) in eV."""

    path: Path
    num_events: int
    energies: npt.NDArray[np.float64]


class Hdf5Source(EventSource):
    """Frames of HDF5 files, one at a time, in the files' own dtype.

    The event axis comes first. The frames' layout follows from the shape of the data:

    =====================================  ====================  ===========
    data                                   `panel_height`        image
    =====================================  ====================  ===========
    one dataset (N, P, H, W), stacked                            (P, H, W)
    one dataset (N, H, W), a single panel                        (H, W)
    one dataset (N, P*H, W), a slab        H                     (P, H, W)
    a list of P datasets (N, H, W)                               (P, H, W)
    =====================================  ====================  ===========

    Parameters
    ----------
    path
        File, glob pattern, or a list of them, see `resolve_paths`. Events are numbered through all
        files in that order.
    data
        Path of the dataset in the file; a list of them if every panel has its own.
    photon_energy
        Path of the dataset with the photon energies, in eV unless its attribute ``units`` says
        ``J`` or ``keV`` (and in joules at the CXI format's own path): a number for the file or one
        for each event. None looks for `LCLS_ENERGY`, then `CXI_ENERGY`.
    photon_energy_ev
        Photon energy of all events, eV, for files that hold none or a wrong one.
    panel_height
        Rows of one panel of a slab.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file is not HDF5, lacks a dataset, has another layout than described, is compressed
        with a filter that is not installed, or if there is no photon energy at all.
    """

    def __init__(
        self,
        path: str | list[str],
        data: str | list[str] = "/entry_1/data_1/data",
        photon_energy: str | None = None,
        photon_energy_ev: float | None = None,
        panel_height: int | None = None,
    ) -> None:
        if photon_energy is not None and photon_energy_ev is not None:
            raise ValueError("give either photon_energy (a dataset) or photon_energy_ev, not both")
        if panel_height is not None and (panel_height < 1 or not isinstance(data, str)):
            raise ValueError(
                f"panel_height={panel_height} must be at least 1 and goes with a single dataset"
            )
        check_photon_energy_ev(photon_energy_ev)
        self._separate = not isinstance(data, str)
        self._datasets = [data] if isinstance(data, str) else list(data)
        if not self._datasets:
            raise ValueError("data is an empty list: name at least one dataset")
        self._panel_height = panel_height
        self._files = [
            self._inspect(file, photon_energy, photon_energy_ev) for file in resolve_paths(path)
        ]
        if all(np.isnan(file.energies).all() for file in self._files) and len(self) > 0:
            looked_at = photon_energy or f"{LCLS_ENERGY} and {CXI_ENERGY}"
            raise ValueError(
                f"{self._files[0].path} has no photon energy (looked at {looked_at}); name its "
                "dataset with photon_energy or give photon_energy_ev. "
                + _inventory(self._files[0].path)
            )

    def __len__(self) -> int:
        return sum(file.num_events for file in self._files)

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass, see `EventSource.events`; one frame is in memory at a time."""
        check_first(first, len(self))
        return self._read_from(first)

    def _read_from(self, first: int) -> Iterator[tuple[int, Image, float]]:
        idx = 0
        for file in self._files:
            start = max(first - idx, 0)
            if start < file.num_events:
                for record, image in enumerate(self._frames(file, start), start):
                    # No pixels, no event: the energy must not make it look like one.
                    energy = float(file.energies[record]) if image.ndim else np.nan
                    yield idx + record, image, energy
            idx += file.num_events

    def _frames(self, file: _File, start: int) -> Iterator[Image]:
        try:
            h5 = h5py.File(file.path, "r")
        except OSError as error:
            # It was sound when the run began and has gone since.
            for record in range(start, file.num_events):
                yield unreadable(file.path, record, error)
            return
        with h5:
            for record in range(start, file.num_events):
                try:
                    panels = [np.asarray(h5[name][record]) for name in self._datasets]
                # h5py has no exception of its own: a damaged chunk is an OSError, a file that has
                # become shorter or lost a dataset one of the others.
                except (OSError, KeyError, IndexError, ValueError, RuntimeError) as error:
                    yield unreadable(file.path, record, error)
                else:
                    yield self._arrange(panels)

    def _arrange(self, panels: list[Image]) -> Image:
        if self._separate:
            return np.stack(panels)
        if self._panel_height is not None:
            return panels[0].reshape(-1, self._panel_height, panels[0].shape[-1])
        return panels[0]

    def _inspect(
        self, path: Path, photon_energy: str | None, photon_energy_ev: float | None
    ) -> _File:
        try:
            h5 = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} cannot be opened as HDF5: {error}") from error
        with h5:
            datasets = [_dataset(h5, name, path) for name in self._datasets]
            shapes = {dataset.shape for dataset in datasets}
            if len(shapes) > 1:
                raise ValueError(
                    f"{path}: the panels' datasets have different shapes: "
                    + ", ".join(f"{d.name} {d.shape}" for d in datasets)
                )
            self._check_layout(path, datasets[0])
            for dataset in datasets:
                _check_filters(path, dataset)
            num_events = int(datasets[0].shape[0])
            if photon_energy_ev is not None:
                energies = np.full(num_events, photon_energy_ev)
            else:
                energies = _energies(h5, path, photon_energy, num_events)
            return _File(path, num_events, energies)

    def _check_layout(self, path: Path, dataset: Any) -> None:
        where = f"{path}: {dataset.name} has shape {dataset.shape}"
        if dataset.dtype.kind not in "iuf":
            raise ValueError(f"{path}: {dataset.name} has dtype {dataset.dtype}, not real numbers")
        single_panels = self._separate or self._panel_height is not None
        if dataset.ndim != 3 and (single_panels or dataset.ndim != 4):
            wanted = "(N, rows, columns)" if single_panels else "(N, P, H, W) or (N, H, W)"
            raise ValueError(f"{where}; expected {wanted}, with the events first")
        if self._panel_height is not None and dataset.shape[1] % self._panel_height:
            raise ValueError(
                f"{where}: its {dataset.shape[1]} rows are not a multiple of "
                f"panel_height={self._panel_height}"
            )


def _dataset(h5: Any, name: str, path: Path) -> Any:
    found = h5.get(name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{path} has no dataset {name!r}. " + _inventory(path))
    return found


def _inventory(path: Path) -> str:
    """Describe the datasets of a file, for error messages."""
    lines: list[str] = []

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            lines.append(f"/{name} {item.shape} {item.dtype}")

    with h5py.File(path, "r") as h5:
        h5.visititems(note)
    if not lines:
        return "It has no datasets at all"
    more = f"\n  and {len(lines) - 40} more" if len(lines) > 40 else ""
    return "It has the datasets:\n  " + "\n  ".join(lines[:40]) + more


def _check_filters(path: Path, dataset: Any) -> None:
    # Without its filter every single frame would be unreadable: better said before the run.
    properties = dataset.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise ValueError(
                f"{path}: {dataset.name} is compressed with HDF5 filter {code} "
                f"({name.decode(errors='replace') or 'unnamed'}), which is not installed; set "
                "HDF5_PLUGIN_PATH to a folder that has it, such as hdf5plugin.PLUGIN_PATH"
            )


def _energies(
    h5: Any, path: Path, photon_energy: str | None, num_events: int
) -> npt.NDArray[np.float64]:
    """Return the photon energies of a file, (N,) in eV, NaN throughout if it has none."""
    if photon_energy is None:
        name = next((n for n in (LCLS_ENERGY, CXI_ENERGY) if n in h5), None)
        if name is None:
            logger.warning("%s holds no photon energy", path)
            return np.full(num_events, np.nan)
    else:
        name = photon_energy
    dataset = _dataset(h5, name, path)
    unit = dataset.attrs.get("units", "J" if dataset.name == CXI_ENERGY else "eV")
    unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    if unit not in EV_PER_UNIT:
        raise ValueError(
            f"{path}: {name} is in {unit!r}; known units are {', '.join(EV_PER_UNIT)}. "
            "Give photon_energy_ev instead"
        )
    return energies_from_table(dataset[()], num_events, f"{path}: {name}") * EV_PER_UNIT[unit]
