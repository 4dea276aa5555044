"""Events from HDF5 files: CXI, NeXus, DECTRIS, psana's and Cheetah's output, and plain frames."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from peaknet_predict.sources.base import (
    SKIP_HINT,
    EventSource,
    SkippedFile,
    check_first,
    resolve_paths,
    unreadable,
)
from peaknet_predict.sources.energies import check_photon_energy_ev, explain_energies
from peaknet_predict.sources.hdf5.axes import AXES
from peaknet_predict.sources.hdf5.energy import CXI_ENERGY, LCLS_ENERGY, read_energies
from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError, add_plugins
from peaknet_predict.sources.hdf5.layout import Layout, Request, find_layout
from peaknet_predict.sources.hdf5.reader import Reader
from peaknet_predict.sources.masks import Bits
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    """One file.

    Attributes
    ----------
    path
        The file.
    layout
        Its frames.
    energies
        (N,) eV, NaN for an event without one.
    energy_from
        Where they come from, in words.
    masks
        What is done about bad pixels, in words.
    """

    path: Path
    layout: Layout
    energies: npt.NDArray[np.float64]
    energy_from: str
    masks: str

    @property
    def kind(self) -> str:
        """How its axes were interpreted, in words; the same for files that are alike."""
        return f"{self.layout}; photon energy from {self.energy_from}"


class Hdf5Source(EventSource):
    """Frames of HDF5 files, in the files' own dtype; pixels that a mask declares bad are masked.

    Without ``data``, the frames are found where CXI, NeXus and DECTRIS files keep them, see
    ``docs/input-data.md``. Their axes are interpreted as follows, and a log line at the start says
    how:

    ====================================  ========================  ===========
    dataset                               option                    image
    ====================================  ========================  ===========
    (H, W), a single event                                          (H, W)
    (N, H, W)                                                       (H, W)
    (N, P, H, W), in a CXI file                                     (P, H, W)
    (N, P, H, W), elsewhere               `axes`                    (P, H, W)
    (N, T, H, W)                          `threshold`               (H, W)
    (N, P*H, W), a slab                   `panel_height` H          (P, H, W)
    several (N_i, H, W)                   `join` events             (H, W)
    P of (N, H, W)                        `join` panels             (P, H, W)
    ====================================  ========================  ===========

    Parameters
    ----------
    path
        File, glob pattern, or a list of them, see `resolve_paths`. Events are numbered through all
        files in that order.
    data
        Path of the dataset in the file, or of the NXdata group that has it; a list for several.
        None looks for it.
    photon_energy
        Path of the dataset with photon energies or wavelengths: a number for the file or one for
        each event. None looks for it.
    photon_energy_unit
        Its unit: eV, keV, J, angstrom, nm, pm or m. None takes the dataset's attribute ``units``,
        and without one the unit that the format prescribes, or eV.
    photon_energy_ev
        Photon energy of all events, eV, for files that hold none or a wrong one.
    panel_height
        Rows of one panel of a slab.
    join
        How several datasets belong together. DECTRIS's ``data_000001``... always hold events.
    axes
        What each axis of the dataset is, if the file does not make it clear: of events, panels,
        thresholds, slow and fast.
    threshold
        Which threshold to read, from 1, of files with several.
    mask
        Path of the mask of bad pixels; "auto" looks for one beside the frames and with the
        detector, "none" uses none.
    mask_good, mask_bad
        Bits that a good pixel of the mask has, and bits that only bad ones have, as in CrystFEL's
        geometry files. By default any bit marks a bad pixel.
    skip_unreadable
        Leave out files that cannot be read, instead of refusing to start. They are counted.
    allow_external
        Follow links to files outside the folder of the file, and read raw files that it names.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file cannot be read, has another layout than described, or an ambiguous one, or if
        there is no photon energy at all.
    """

    def __init__(
        self,
        path: str | list[str],
        data: str | list[str] | None = None,
        photon_energy: str | None = None,
        photon_energy_unit: str | None = None,
        photon_energy_ev: float | None = None,
        panel_height: int | None = None,
        join: Literal["events", "panels"] | None = None,
        axes: list[str] | None = None,
        threshold: int | None = None,
        mask: str = "auto",
        mask_good: int | None = None,
        mask_bad: int | None = None,
        skip_unreadable: bool = False,
        allow_external: bool = False,
    ) -> None:
        if photon_energy is not None and photon_energy_ev is not None:
            raise ValueError("give either photon_energy (a dataset) or photon_energy_ev, not both")
        if panel_height is not None and (panel_height < 1 or join == "panels"):
            raise ValueError(
                f"panel_height={panel_height} must be at least 1 and does not go with join: panels"
            )
        if isinstance(data, list) and not data:
            raise ValueError("data is an empty list: name at least one dataset")
        _check_axes(axes, threshold)
        check_photon_energy_ev(photon_energy_ev)
        # Folders of filters that this process's environment names; a worker's may not.
        self._plugins = os.environ.get("HDF5_PLUGIN_PATH", "")
        self._request = Request(data, join, axes, threshold, panel_height)
        self._energy = (photon_energy, photon_energy_unit, photon_energy_ev)
        self._mask = (mask, Bits(mask_good, mask_bad))
        self._allow_external = allow_external
        self._files: list[_File] = []
        self.skipped: list[SkippedFile] = []
        linked: dict[Path, Path] = {}
        paths = resolve_paths(path)
        for file in paths:
            try:
                self._inspect(file, skip_unreadable, linked)
            except ValueError as error:
                if not skip_unreadable:
                    hint = (
                        ""
                        if len(paths) == 1 or not isinstance(error, UnreadableError)
                        else SKIP_HINT
                    )
                    raise ValueError(f"{error}{hint}") from error
                self.skipped.append(SkippedFile(file, str(error), None))
        self._check_files(paths, linked)

    def _inspect(self, path: Path, skip: bool, linked: dict[Path, Path]) -> None:
        """Look at a file, and list it among those that are read."""
        photon_energy, unit, photon_energy_ev = self._energy
        with LinkedFile(path, self._allow_external) as opened:
            layout, lost = find_layout(opened, self._request, skip)
            reader = Reader(opened, layout, *self._mask)
            # Reading the masks of many files would take long; the others' are read later.
            reader.check(with_masks=not self._files)
            num = layout.num_events
            if photon_energy_ev is not None:
                energies, origin = np.full(num, photon_energy_ev), "photon_energy_ev"
            else:
                found = read_energies(opened, layout.names[0], photon_energy, unit, num)
                energies, origin = found if found is not None else (np.full(num, np.nan), "nowhere")
            linked.update(dict.fromkeys(opened.linked(), path))
            self._files.append(_File(path, layout, energies, origin, reader.masks))
            self.skipped += lost
            if opened.root.swmr_mode:
                logger.warning(
                    "%s is still being written; this run reads the %d events it has now", path, num
                )

    def _check_files(self, paths: list[Path], linked: dict[Path, Path]) -> None:
        """Raise an error unless the files found so far make a run."""
        for lost in self.skipped:
            logger.warning("%s is left out: %s", lost.path, lost.reason)
        if not self._files:
            raise ValueError(f"none of {len(paths)} files can be read: {self.skipped[0].reason}")
        again = next((path for path in paths if path in linked), None)
        if again is not None:
            raise ValueError(
                f"{again} is named, and {linked[again]} links to it: its events would be processed "
                "twice. Name only the files with the links, e.g. '*_master.h5'"
            )
        if len(self) > 0 and all(np.isnan(file.energies).all() for file in self._files):
            first = self._files[0].path
            looked_at = self._energy[0] or f"{LCLS_ENERGY}, {CXI_ENERGY} and NeXus's beams"
            with LinkedFile(first, self._allow_external) as opened:
                raise ValueError(
                    f"{first} has no photon energy (looked at {looked_at}); name its dataset with "
                    "photon_energy or give photon_energy_ev. " + opened.inventory()
                )
        problem = self._implausible()
        if problem is not None:
            logger.warning("%s", problem)

    def _implausible(self) -> str | None:
        """Say which file has no plausible photon energy; None if every file with any has one."""
        for file in self._files:
            problem = explain_energies(file.energies, f"{file.path}: {file.energy_from}")
            if problem is not None:
                unit = "" if self._energy[2] else "; say with photon_energy_unit what it is"
                return problem + unit
        return None

    def check(self) -> None:
        """Make sure that this process can read the files, see `EventSource.check`."""
        add_plugins(self._plugins)
        gone = [file.path for file in self._files if not file.path.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(self._files)} files are not there on {socket.gethostname()}, "
                f"the first is {gone[0]}"
            )
        problem = self._implausible()
        if problem is not None:
            raise ValueError(problem)
        first = self._files[0]
        with LinkedFile(first.path, self._allow_external) as opened:
            Reader(opened, first.layout, *self._mask).check(with_masks=True)
        kinds: dict[str, list[_File]] = {}
        for file in self._files:
            kinds.setdefault(file.kind, []).append(file)
        for kind, files in kinds.items():
            logger.info("%s", _describe(kind, files))

    def __len__(self) -> int:
        return sum(file.layout.num_events for file in self._files)

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass, see `EventSource.events`; a chunk is in memory at a time."""
        check_first(first, len(self))
        return self._read_from(first)

    def _read_from(self, first: int) -> Iterator[tuple[int, Image, float]]:
        add_plugins(self._plugins)
        idx = 0
        for file in self._files:
            start = max(first - idx, 0)
            for record, image in enumerate(self._images(file, start), start):
                # No pixels, no event: the energy must not make it look like one.
                energy = float(file.energies[record]) if image.ndim else np.nan
                yield idx + record, image, energy
            idx += file.layout.num_events

    def _images(self, file: _File, start: int) -> Iterator[Image]:
        records = range(start, file.layout.num_events)
        if not records:
            return
        try:
            opened = LinkedFile(file.path, self._allow_external)
        except UnreadableError as error:
            # The file was sound when the run began.
            for record in records:
                yield unreadable(file.path, record, error)
            return
        with opened:
            reader = Reader(opened, file.layout, *self._mask)
            for record in records:
                try:
                    yield reader.read(record)
                except UnreadableError as error:
                    yield unreadable(file.path, record, error)


def _describe(kind: str, files: list[_File]) -> str:
    """Log in one line how files that are alike were interpreted."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    events = sum(file.layout.num_events for file in files)
    energies = np.concatenate([file.energies for file in files])
    given = energies[np.isfinite(energies)]
    low, high = (given.min(), given.max()) if given.size else (np.nan, np.nan)
    between = f"{low:.1f} eV" if low == high else f"{low:.1f} to {high:.1f} eV"
    return f"{files[0].path}{more}: events {events} in {kind}, {between}; {files[0].masks}"


def _check_axes(axes: list[str] | None, threshold: int | None) -> None:
    """Raise an error for axes that no dataset with frames has."""
    if axes is None:
        return
    wrong = [axis for axis in axes if axis not in AXES]
    if wrong or len(set(axes)) < len(axes) or not {"slow", "fast"} <= set(axes):
        raise ValueError(
            f"axes is {axes}; it needs slow and fast, and may have events, panels and thresholds, "
            "each at most once"
        )
    if "thresholds" in axes and threshold is None:
        raise ValueError("axes has thresholds: choose one, e.g. threshold: 1")
