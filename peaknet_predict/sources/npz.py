"""Events from NumPy's npz archives: one event per file, or a stack of events in a file."""

from __future__ import annotations

import logging
import socket
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from peaknet_predict.sources.base import (
    SKIP_HINT,
    EventSource,
    SkippedFile,
    check_first,
    resolve_paths,
    unreadable,
)
from peaknet_predict.sources.energies import (
    Energies,
    check_photon_energy_ev,
    energies_from_table,
    explain_energies,
    to_ev,
)
from peaknet_predict.sources.masks import Bits, Mask
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)

ENERGY_KEY = "photon_energy"
"""Name of the array with the photon energy."""

MAX_PANELS = 256
"""Panels of the largest detectors, twice over."""

MASK_KEY = "mask"
"""Name of the array that marks bad pixels."""

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises for an archive, or an array of it, that cannot be read."""

_Headers = dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]


@dataclass(frozen=True)
class _File:
    """One file.

    Attributes
    ----------
    path
        The file.
    shape, dtype
        Of its array.
    energies
        (N,) eV, NaN where there is none.
    mask
        Name of its mask, empty without one.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    energies: Energies
    mask: str


class NpzSource(EventSource):
    """Images of npz files, in the files' own dtype; pixels that a mask declares bad are masked.

    Nothing pickled is ever loaded.

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
    photon_energy_unit
        Unit of that array: eV, keV, J, angstrom, nm, pm or m.
    stacked
        False: a file is one event, (P, H, W) or (H, W). True: it holds N of them, (N, P, H, W) or
        (N, H, W), and is loaded as a whole when its turn comes.
    mask
        Name of the array that marks bad pixels, of the shape of an image, or of the whole stack;
        "auto" takes `MASK_KEY` where a file has it, "none" uses none.
    mask_good, mask_bad
        Bits that a good pixel of the mask has, and bits that only bad ones have, as in CrystFEL's
        geometry files. By default any bit marks a bad pixel.
    skip_unreadable
        Leave out files that cannot be read, instead of refusing to start. They are counted.

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
        photon_energy_unit: str = "eV",
        stacked: bool = False,
        mask: str = "auto",
        mask_good: int | None = None,
        mask_bad: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        check_photon_energy_ev(photon_energy_ev)
        self._key = key
        self._stacked = stacked
        self._mask = mask
        self._bits = Bits(mask_good, mask_bad)
        self._energy = (photon_energy_ev, photon_energy_unit)
        self._files: list[_File] = []
        self.skipped: list[SkippedFile] = []
        paths = resolve_paths(path)
        for file in paths:
            try:
                self._files.append(self._inspect(file))
            except ValueError as error:
                if not skip_unreadable:
                    hint = SKIP_HINT if len(paths) > 1 else ""
                    raise ValueError(f"{error}{hint}") from error
                self.skipped.append(SkippedFile(file, str(error), None))
                logger.warning("%s is left out: %s", file, error)
        if not self._files:
            raise ValueError(f"none of {len(paths)} files can be read: {self.skipped[0].reason}")
        if all(np.isnan(file.energies).all() for file in self._files) and len(self) > 0:
            raise ValueError(
                f"{self._files[0].path} has no array {ENERGY_KEY!r}: give photon_energy_ev. "
                + _inventory(self._files[0].path)
            )

    def check(self) -> None:
        """Make sure that this process can read the files, see `EventSource.check`."""
        gone = [file.path for file in self._files if not file.path.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(self._files)} files are not there on {socket.gethostname()}, "
                f"the first is {gone[0]}"
            )
        for file in self._files:
            problem = explain_energies(file.energies, f"{file.path}: {ENERGY_KEY}")
            if problem is not None:
                raise ValueError(f"{problem}; say with photon_energy_unit what it is")
        first = self._files[0]
        self._read_mask(first)
        *panels, slow, fast = first.shape[self._stacked :]
        if panels and panels[0] > MAX_PANELS:
            logger.warning(
                "%s: %s is taken for %d panels of %dx%d. If its last axis counts the panels, "
                "transpose it first: (panels, slow, fast)",
                *(first.path, self._key, panels[0], slow, fast),
            )
        logger.info(
            "%s and %d more: events %d in %s (panels %d, slow %d, fast %d; %s); %s",
            first.path,
            len(self._files) - 1,
            len(self),
            self._key,
            panels[0] if panels else 1,
            slow,
            fast,
            first.dtype,
            f"bad pixels from {first.mask}" if first.mask else "no mask of bad pixels",
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
                yield from self._events_of(file, start, idx)
            idx += num_events

    def _events_of(self, file: _File, start: int, idx: int) -> Iterator[tuple[int, Image, float]]:
        records = range(start, len(file.energies))
        try:
            images, bad = self._load(file), self._read_mask(file)
        except _DAMAGED as error:
            for record in records:
                yield idx + record, unreadable(file.path, record, error), np.nan
            return
        for record in records:
            # A copy, so that an event that is kept does not hold the whole stack in memory.
            image = images[record].copy() if self._stacked else images
            if bad is not None:
                per_event = self._stacked and bad.shape == images.shape
                image = np.ma.MaskedArray(image, bad[record].copy() if per_event else bad)
            yield idx + record, image, float(file.energies[record])

    def _load(self, file: _File) -> Image:
        images: Image = _read(file.path, self._key)
        if images.shape != file.shape:
            raise ValueError(f"its shape was {file.shape} and is {images.shape} now")
        return images

    def _read_mask(self, file: _File) -> Mask | None:
        """Return the mask of a file, of the shape of its array or of an image of it."""
        if not file.mask:
            return None
        bad = self._bits.find_bad(_read(file.path, file.mask))
        self._bits.check_share(bad, f"{file.path}: the mask {file.mask}")
        return bad

    def _inspect(self, path: Path) -> _File:
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
        energies = self._energies(path, arrays, num_events)
        return _File(path, shape, dtype, energies, self._name_of_mask(path, arrays))

    def _energies(self, path: Path, arrays: _Headers, num_events: int) -> Energies:
        """Return the photon energies of a file's events, eV."""
        photon_energy_ev, unit = self._energy
        if photon_energy_ev is not None:
            return np.full(num_events, photon_energy_ev)
        if ENERGY_KEY not in arrays:
            logger.warning("%s holds no photon energy", path)
            return np.full(num_events, np.nan)
        where = f"{path}: {ENERGY_KEY}"
        try:
            values = _read(path, ENERGY_KEY)
        except _DAMAGED as error:
            raise ValueError(f"{where} is unreadable: {error}") from error
        return to_ev(energies_from_table(values, num_events, where), unit, where)

    def _name_of_mask(self, path: Path, arrays: _Headers) -> str:
        """Return the name of a file's mask, empty without one."""
        if self._mask == "none" or (self._mask == "auto" and MASK_KEY not in arrays):
            if MASK_KEY in arrays and not self._files:
                logger.warning("%s: the mask %s is not used", path, MASK_KEY)
            return ""
        name = MASK_KEY if self._mask == "auto" else self._mask
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}. " + _inventory(path))
        shape, dtype = arrays[name]
        data_shape, _ = arrays[self._key]
        if dtype.kind not in "biuf" or shape not in (data_shape, data_shape[self._stacked :]):
            raise ValueError(
                f"{path}: the mask {name} has shape {shape} and dtype {dtype}, which does not fit "
                f"{self._key} {data_shape}; name another one, or go without it: mask: none"
            )
        return name


def _read(path: Path, key: str) -> npt.NDArray[Any]:
    with np.load(path, allow_pickle=False) as archive:
        array: npt.NDArray[Any] = archive[key]
    return array


def _headers(path: Path) -> _Headers:
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
