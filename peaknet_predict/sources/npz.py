"""Events from NumPy's npz archives: a file an event, or a stack of events in a file."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

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

ENERGY_KEY = "photon_energy"
"""Name of the array with the photon energy, eV."""

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for an archive, or an array of it, that cannot be read."""


class _File(NamedTuple):
    """One file: shape of its array, photon energies of its events, (N,) in eV."""

    path: Path
    shape: tuple[int, ...]
    energies: npt.NDArray[np.float64]


class NpzSource(EventSource):
    """Images of npz files, in the files' own dtype; nothing pickled is ever loaded.

    Parameters
    ----------
    path
        File, glob pattern, or a list of them, see `resolve_paths`. Events are numbered through all
        files in that order.
    key
        Name of the array in the file.
    photon_energy_ev
        Photon energy of all events, eV. None takes the array `ENERGY_KEY` of each file: a number,
        or with `stacked` one for each event.
    stacked
        False: a file is one event, (P, H, W) or (H, W). True: it holds N of them, (N, P, H, W) or
        (N, H, W), and is loaded as a whole when its turn comes.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file is not npz, lacks the array, has another shape or dtype than described, or if no
        file has a photon energy and none is given.
    """

    def __init__(
        self,
        path: str | list[str],
        key: str = "data",
        photon_energy_ev: float | None = None,
        stacked: bool = False,
    ) -> None:
        check_photon_energy_ev(photon_energy_ev)
        self._key = key
        self._stacked = stacked
        self._files = [self._inspect(file, photon_energy_ev) for file in resolve_paths(path)]
        if all(np.isnan(file.energies).all() for file in self._files) and len(self) > 0:
            raise ValueError(
                f"{self._files[0].path} has no array {ENERGY_KEY!r}: give photon_energy_ev. "
                + _inventory(self._files[0].path)
            )

    def __len__(self) -> int:
        return sum(len(file.energies) for file in self._files)

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass, see `EventSource.events`; one file is in memory at a time."""
        check_first(first, len(self))
        return self._read_from(first)

    def _read_from(self, first: int) -> Iterator[tuple[int, Image, float]]:
        idx = 0
        for file in self._files:
            num_events = len(file.energies)
            start = max(first - idx, 0)
            if start < num_events:
                images = self._load(file)
                for record in range(start, num_events):
                    if isinstance(images, Exception):
                        yield idx + record, unreadable(file.path, record, images), np.nan
                    else:
                        # A copy, lest one event that is kept hold the memory of all.
                        image = images[record].copy() if self._stacked else images
                        yield idx + record, image, float(file.energies[record])
            idx += num_events

    def _load(self, file: _File) -> Image | Exception:
        try:
            with np.load(file.path, allow_pickle=False) as archive:
                images: Image = archive[self._key]
        except _DAMAGED as error:
            return error
        if images.shape != file.shape:
            return ValueError(f"its shape was {file.shape} and is {images.shape} now")
        return images

    def _inspect(self, path: Path, photon_energy_ev: float | None) -> _File:
        arrays = _headers(path)
        if self._key not in arrays:
            raise ValueError(f"{path} has no array {self._key!r}. " + _inventory(path))
        shape, dtype = arrays[self._key]
        if dtype.kind not in "iuf":
            raise ValueError(f"{path}: {self._key} has dtype {dtype}, not real numbers")
        if len(shape) - self._stacked not in (2, 3):
            wanted = "(N, P, H, W) or (N, H, W)" if self._stacked else "(P, H, W) or (H, W)"
            hint = "; if its first axis counts events, set stacked" if len(shape) == 4 else ""
            raise ValueError(f"{path}: {self._key} has shape {shape}; expected {wanted}{hint}")
        num_events = shape[0] if self._stacked else 1
        if photon_energy_ev is not None:
            energies = np.full(num_events, photon_energy_ev)
        elif ENERGY_KEY in arrays:
            try:
                with np.load(path, allow_pickle=False) as archive:
                    values = archive[ENERGY_KEY]
            except _DAMAGED as error:
                raise ValueError(f"{path}: {ENERGY_KEY} is unreadable: {error}") from error
            energies = energies_from_table(values, num_events, f"{path}: {ENERGY_KEY}")
        else:
            logger.warning("%s holds no photon energy", path)
            energies = np.full(num_events, np.nan)
        return _File(path, shape, energies)


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Return shape and dtype of every array of a file, without reading the arrays."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith(".npy"):
                    continue
                with archive.open(name) as member:
                    version = npy.read_magic(member)
                    read = (
                        npy.read_array_header_1_0
                        if version == (1, 0)
                        else npy.read_array_header_2_0
                    )
                    shape, _, dtype = read(member)
                arrays[name.removesuffix(".npy")] = (shape, dtype)
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be opened as npz: {error}") from error
    return arrays


def _inventory(path: Path) -> str:
    """Describe the arrays of a file, for error messages."""
    arrays = _headers(path)
    if not arrays:
        return "It has no arrays at all"
    lines = [f"{name} {shape} {dtype}" for name, (shape, dtype) in arrays.items()]
    return "It has the arrays:\n  " + "\n  ".join(lines)
