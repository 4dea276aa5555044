"""CXI files with peak lists, as CrystFEL (`indexamajig --peaks=cxi`) and Cheetah read them.

The panels of an event are stacked into one slab, because CrystFEL finds no peaks in files with a
dimension for panels. A file of N events holds::

    /cxi_version                                 160
    /entry_1/data_1/data                         (N, P*H, W), the original pixels and dtype
    /entry_1/data_1/mask                         (N, P*H, W) uint32, 1 = bad; only in files that
                                                 have a pixel that is NaN or infinite
    /entry_1/result_1/nPeaks                     (N,) int32, never above the width of the lists
    /entry_1/result_1/peakXPosRaw, peakYPosRaw   (N, max_peaks) float64, fast and slow scan
    /entry_1/result_1/peakTotalIntensity, peakMaximumValue, peakSNR    (N, max_peaks) float64
    /entry_1/instrument_1/source_1/energy        (N,) float64, joules
    /LCLS/photon_energy_eV                       (N,) float64
    /entry_1/peaknet_predict/stream, rank, idx, numPeaksFound, truncated, badPixels        (N,)

A peak (panel, y, x) is at X = x, Y = panel * H + y: 0-based pixel indices of the slab, pixel
centres on integers. CrystFEL adds the half pixel of its own convention when it reads them; nothing
is added here. The peaks of an event are listed strongest first, zeros fill the rest of the row.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.integrate import integrate_peaks
from peaknet_predict.types import EventId, Image, Peaks, Result

logger = logging.getLogger(__name__)

CXI_VERSION = 160
JOULES_PER_EV = 1.602176634e-19
"""Exact: the elementary charge in coulombs (SI, 2019)."""
LIST_NAME = "files.lst"

_COLUMNS = ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity", "peakMaximumValue", "peakSNR")


class CxiWriteError(OSError):
    """A file could not be written; the message names the path and what to do next."""


def _write_error(path: Path, cause: BaseException, consequence: str) -> CxiWriteError:
    number = getattr(cause, "errno", None) or errno.EIO
    reason = getattr(cause, "strerror", None) or str(cause)
    return CxiWriteError(number, f"{reason}. {consequence}{_next_step(number)}", str(path))


def _next_step(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or raise the quota there, then try again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the directory writable (hard links included) or choose another one"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "Create the directory or mount its file system, then try again"
    return "Check the file system, then try again"


@dataclass(slots=True)
class CxiStatistics:
    """What became of the events given to a writer: taken = written + filtered + still in memory.

    Attributes
    ----------
    taken
        Events that `CxiWriter.add` accepted.
    written
        Events in finished files.
    filtered
        Events left out because they have fewer than `min_peaks` peaks.
    truncated
        Written events of which only the strongest `max_peaks` peaks are listed.
    without_energy
        Written events without a photon energy above zero: CrystFEL cannot index them.
    files
        Finished files, in order.
    """

    taken: int = 0
    written: int = 0
    filtered: int = 0
    truncated: int = 0
    without_energy: int = 0
    files: list[Path] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """One event, ready to be written."""

    result: Result
    slab: Image  # (P*H, W)
    table: npt.NDArray[np.float64]  # (5, M): `_COLUMNS` of the peaks that are listed
    has_bad_pixels: bool

    @property
    def truncated(self) -> bool:
        return bool(self.table.shape[1] < len(self.result.peaks))


class CxiWriter:
    """Writes results to CXI files; a file appears under its name only when it is complete.

    Events gather in memory until a file is full, so that a file that cannot be written costs no
    event: they stay, and the next call tries again. A file is written under a temporary name,
    synced to disk and then given the next free number; an existing file is never replaced, even if
    two writers share directory and prefix.

    Parameters
    ----------
    directory
        Where the files go; its last part is created if it is missing.
    prefix
        Files are named ``{prefix}_{number}.cxi`` with at least four digits.
    events_per_file
        Events of a full file.
    min_peaks
        Events with fewer peaks are counted and left out.
    max_peaks
        Width of the peak lists. Of an event with more peaks the strongest are kept, and the event
        is marked as truncated. 2048 is the width that Cheetah uses.
    compression
        Of the pixels; ``"gzip"`` takes about five times as long as ``"none"``.
    max_file_bytes
        A file is written when its pixels would exceed this: the bound on the memory used.

    Attributes
    ----------
    statistics
        Counts up to now.

    Raises
    ------
    CxiWriteError
        If the directory cannot be created or written to.
    ValueError
        If a parameter is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        prefix: str = "peaks",
        *,
        events_per_file: int = 100,
        min_peaks: int = 0,
        max_peaks: int = 2048,
        compression: Literal["none", "gzip"] = "none",
        max_file_bytes: int = 2 * 1024**3,
    ) -> None:
        if not re.fullmatch(r"[^./\0][^/\0]*", prefix):
            raise ValueError(f"{prefix!r} is not a file name to start with")
        if min(events_per_file, max_peaks, max_file_bytes) < 1 or min_peaks < 0:
            raise ValueError(
                "events_per_file, max_peaks and max_file_bytes start at 1, min_peaks at 0"
            )
        if compression not in ("none", "gzip"):
            raise ValueError(f"compression is 'none' or 'gzip', not {compression!r}")
        # Resolved, so that the list stays right when the reader works in another directory.
        self._directory = Path(directory).resolve()
        self._prefix = prefix
        self._events_per_file = events_per_file
        self._min_peaks = min_peaks
        self._max_peaks = max_peaks
        self._compression = compression
        self._max_file_bytes = max_file_bytes
        self._rows: list[_Row] = []
        self._settled: list[EventId] = []
        self._list_is_stale = False
        self._closed = False
        self.statistics = CxiStatistics()
        try:
            # No parents: a path that is misspelt or not mounted must not be made up.
            self._directory.mkdir(exist_ok=True)
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _write_error(self._directory, error, "") from error
        for name in os.listdir(self._directory):
            if name.startswith(f".{prefix}.") and name.endswith(".tmp"):
                leftover = self._directory / name
                logger.warning("%s is unfinished: delete it unless a writer is at work", leftover)

    def __enter__(self) -> CxiWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of events in memory, in no finished file yet."""
        return len(self._rows)

    def add(self, result: Result) -> list[EventId]:
        """Take one event, and write a file when one is full.

        An event whose panels differ in number, shape or dtype from those in memory starts another
        file. The event's arrays are kept until they are written: do not change them.

        Parameters
        ----------
        result
            The event.

        Returns
        -------
        list of EventId
            Events that nobody needs to keep any longer: filtered, or in a finished file.

        Raises
        ------
        CxiWriteError
            If a file could not be written. This event is then not taken, earlier ones stay in
            memory: give it again once the cause is gone.
        ValueError
            If the event cannot be written at all: the shape or dtype of the image or a peak outside
            of it. Nothing else is affected.
        """
        if self._closed:
            raise ValueError("this writer is closed")
        if len(result.peaks) < self._min_peaks:
            self.statistics.taken += 1
            self.statistics.filtered += 1
            self._settled.append(result.id)
            return self._take_settled()
        row = self._make_row(result)
        if self._rows and not self._has_room_for(row):
            self._write_file()
        self._rows.append(row)
        self.statistics.taken += 1
        if len(self._rows) >= self._events_per_file:
            try:
                self._write_file()
            except CxiWriteError:
                self._rows.pop()
                self.statistics.taken -= 1
                raise
        return self._take_settled()

    def flush(self) -> list[EventId]:
        """Write the events in memory to a file, full or not.

        Returns
        -------
        list of EventId
            As `add`.

        Raises
        ------
        CxiWriteError
            If the file could not be written; its events stay in memory.
        """
        if self._rows:
            self._write_file()
        return self._take_settled()

    def close(self) -> list[EventId]:
        """Write what is in memory and the list of files; a second call does nothing.

        Returns
        -------
        list of EventId
            As `add`.

        Raises
        ------
        CxiWriteError
            As `flush`. The writer stays open, so that closing can be tried again.
        """
        if self._rows:
            self._write_file()
        if self._list_is_stale:
            self._update_list()
        self._closed = True
        return self._take_settled()

    def _take_settled(self) -> list[EventId]:
        settled, self._settled = self._settled, []
        return settled

    def _has_room_for(self, row: _Row) -> bool:
        held = sum(other.slab.nbytes for other in self._rows)
        return (
            _kind(row.result) == _kind(self._rows[0].result)
            and held + row.slab.nbytes <= self._max_file_bytes
        )

    def _make_row(self, result: Result) -> _Row:
        """Check, integrate and order one event."""
        image = result.image
        if image.ndim not in (2, 3) or image.size == 0 or image.dtype.kind not in "iuf":
            raise ValueError(
                f"event {result.id}: cannot write an image of shape {image.shape} and dtype "
                f"{image.dtype} to CXI: expected (P, H, W) or (H, W) real numbers"
            )
        try:
            intensities = integrate_peaks(image, result.peaks)
        except ValueError as error:
            raise ValueError(f"event {result.id}: {error}") from error
        height, width = image.shape[-2:]
        panel, y, x = result.peaks.T
        # Strongest first: a reader with a shorter list than ours keeps the best, too.
        order = np.argsort(-intensities.total, kind="stable")[: self._max_peaks]
        table = np.stack(
            [x, panel * height + y, intensities.total, intensities.maximum, intensities.snr]
        )
        return _Row(
            result=result,
            slab=image.reshape(-1, width),
            table=table[:, order],
            has_bad_pixels=image.dtype.kind == "f" and not bool(np.isfinite(image).all()),
        )

    def _write_file(self) -> None:
        """Write all events in memory to one file, and forget them once it is finished."""
        rows = self._rows
        temporary = self._directory / f".{self._prefix}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "xb+", buffering=0) as raw:
                _write_hdf5(raw, rows, self._max_peaks, self._compression)
                os.fsync(raw.fileno())
            path = self._publish(temporary)
        except (OSError, RuntimeError) as error:
            stay = f"The {len(rows)} events of the file stay in memory. "
            raise _write_error(self._directory, error, stay) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._rows = []
        self._count(path, rows)
        self._settled += [row.result.id for row in rows]
        try:
            self._update_list()
        except CxiWriteError as error:
            # The events are safe; the list is made anew with the next file, or in close().
            logger.warning("%s", error)

    def _count(self, path: Path, rows: list[_Row]) -> None:
        statistics = self.statistics
        without_energy = sum(not row.result.photon_energy > 0 for row in rows)
        if without_energy and not statistics.without_energy:
            logger.warning("%s: events without photon energy, which CrystFEL cannot index", path)
        statistics.written += len(rows)
        statistics.truncated += sum(row.truncated for row in rows)
        statistics.without_energy += without_energy
        statistics.files.append(path)

    def _publish(self, temporary: Path) -> Path:
        """Give a finished file the next free number, durably."""
        pattern = re.compile(re.escape(self._prefix) + r"_(\d{4,})\.cxi")
        taken = [
            int(match[1])
            for entry in os.listdir(self._directory)
            if (match := pattern.fullmatch(entry))
        ]
        number = max(taken, default=-1) + 1
        while True:
            path = self._directory / f"{self._prefix}_{number:04d}.cxi"
            try:
                # A link fails where the name exists; a rename would replace the other file.
                os.link(temporary, path)
                break
            except FileExistsError:
                number += 1
        try:
            temporary.unlink()
            _sync_directory(self._directory)
        except OSError:
            # Not known to be durable, so its events will be written again: not twice, though.
            path.unlink(missing_ok=True)
            raise
        return path

    def _update_list(self) -> None:
        """Write the names of all CXI files of the directory, for ``indexamajig -i``."""
        self._list_is_stale = True
        path = self._directory / LIST_NAME
        temporary = self._directory / f".{LIST_NAME}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            listed: list[Path] | None = None
            # Another writer may finish a file and write the list between our two steps. Whoever
            # writes last looks again, so no file is missed.
            while (found := sorted(self._directory.glob("*.cxi"))) != listed:
                with open(temporary, "x", encoding="utf-8") as stream:
                    stream.writelines(f"{file}\n" for file in found)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
                listed = found
        except OSError as error:
            raise _write_error(path, error, "The CXI files are complete. ") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._list_is_stale = False


def _kind(result: Result) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return what all events of one file share; an image (H, W) is one of a single panel."""
    shape = result.image.shape
    return (shape if len(shape) == 3 else (1, *shape)), result.image.dtype


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)


class _CarefulFile:
    """An open file for HDF5 that remembers the first error instead of raising it.

    When a write fails, HDF5 cannot close its objects: h5py prints such errors but does not raise
    them (a broken file looks finished), and the process may crash later (seen with HDF5 2.0 on a
    full disk). So HDF5 is told that all is well, and the error is raised after it has let go.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Read bytes; here because h5py knows file objects by it."""
        return self._raw.read(size)

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file; what a failed write left out reads as zeros."""
        view = memoryview(buffer).cast("B")
        data = self._raw.read(len(view)) or b""
        view[:] = data.ljust(len(view), b"\0")
        return len(view)

    def write(self, buffer: memoryview) -> int:
        """Write all of the buffer, or remember why not."""
        view = memoryview(buffer).cast("B")
        length = len(view)
        try:
            # One write may stop short of the end; after an error nothing more is written.
            while self.error is None and len(view):
                view = view[self._raw.write(view) :]
        except OSError as error:
            self.error = error
        return length

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as any file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position as any file."""
        return self._raw.tell()

    def truncate(self, size: int) -> int:
        """Set the length, or remember why not."""
        try:
            self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
        return size

    def flush(self) -> None:
        """Do nothing: the file has no buffer, and syncing is the caller's."""


def _write_hdf5(raw: BinaryIO, rows: list[_Row], max_peaks: int, compression: str) -> None:
    """Write one complete file of events of one kind."""
    careful = _CarefulFile(raw)
    with h5py.File(careful, "w") as file:
        file.attrs["NX_class"] = "NXroot"
        file.attrs["default"] = "entry_1"
        file.attrs["creator"] = "peaknet-predict"
        file.attrs["creator_version"] = _version()
        file["cxi_version"] = CXI_VERSION
        entry = _group(file, "entry_1", "NXentry")
        entry.attrs["default"] = "data_1"
        _write_images(_group(entry, "data_1", "NXdata"), rows, compression)
        _write_peaks(_group(entry, "result_1", "NXcollection"), rows, max_peaks)

        energy_eV = np.array([row.result.photon_energy for row in rows], dtype=np.float64)
        instrument = _group(entry, "instrument_1", "NXinstrument")
        source = _group(instrument, "source_1", "NXsource")
        source["energy"] = energy_eV * JOULES_PER_EV
        source["energy"].attrs["units"] = "J"
        lcls = _group(file, "LCLS", "NXcollection")
        lcls["photon_energy_eV"] = energy_eV
        lcls["photon_energy_eV"].attrs["units"] = "eV"

        own = _group(entry, "peaknet_predict", "NXcollection")
        results = [row.result for row in rows]
        own.create_dataset("stream", data=[r.id.stream for r in results], dtype=h5py.string_dtype())
        own["rank"] = np.array([r.id.rank for r in results], dtype=np.int64)
        own["idx"] = np.array([r.id.idx for r in results], dtype=np.int64)
        own["numPeaksFound"] = np.array([len(r.peaks) for r in results], dtype=np.int32)
        own["truncated"] = np.array([row.truncated for row in rows], dtype=np.uint8)
        own["badPixels"] = np.array([r.bad_pixels for r in results], dtype=np.int64)
    if careful.error is not None:
        raise careful.error


def _write_images(group: h5py.Group, rows: list[_Row], compression: str) -> None:
    shape = (len(rows), *rows[0].slab.shape)
    chunks = (1, *rows[0].slab.shape)  # an indexing job reads frame by frame
    fast_gzip = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    group.attrs["signal"] = "data"
    group.attrs["panels"] = _kind(rows[0].result)[0][0]
    data = group.create_dataset(
        "data",
        shape=shape,
        dtype=rows[0].slab.dtype,
        chunks=chunks,
        **(fast_gzip if compression == "gzip" else {}),
    )
    data.attrs["interpretation"] = "image"
    for i, row in enumerate(rows):
        data[i] = row.slab
    if any(row.has_bad_pixels for row in rows):
        # uint32 with 1 = invalid, as the CXI format has it. Mostly zeros: always compressed.
        mask = group.create_dataset(
            "mask", shape=shape, dtype=np.uint32, chunks=chunks, **fast_gzip
        )
        for i, row in enumerate(rows):
            if row.has_bad_pixels:
                mask[i] = ~np.isfinite(row.slab)


def _write_peaks(group: h5py.Group, rows: list[_Row], max_peaks: int) -> None:
    group["nPeaks"] = np.array([row.table.shape[1] for row in rows], dtype=np.int32)
    for k, name in enumerate(_COLUMNS):
        column = np.zeros((len(rows), max_peaks), dtype=np.float64)
        for i, row in enumerate(rows):
            column[i, : row.table.shape[1]] = row.table[k]
        group.create_dataset(name, data=column, compression="gzip", shuffle=True)
    group["peakXPosRaw"].attrs["units"] = "fast-scan pixel index, pixel centres on integers"
    group["peakYPosRaw"].attrs["units"] = "slow-scan pixel index, pixel centres on integers"


def _group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def _version() -> str:
    try:
        return importlib.metadata.version("peaknet-predict")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class CxiEvent:
    """One event as it stands in a file.

    Attributes
    ----------
    id
        Identity of the event.
    image
        (P, H, W): the original pixels and dtype.
    mask
        (P, H, W) bool, True = bad, or None if all pixels of the file's events are finite.
    peaks
        (M, 3) float64, see `Peaks`; strongest first. y carries the rounding of the sum with the
        panel's offset, some 1e-13 pixels.
    intensity
        (M,) float64, detector counts above background.
    photon_energy
        eV.
    num_peaks_found
        Peaks before the cut to the width of the lists.
    truncated
        Whether there was such a cut.
    bad_pixels
        Number of pixels that the peak finder left out.
    """

    id: EventId
    image: Image
    mask: npt.NDArray[np.bool_] | None
    peaks: Peaks
    intensity: npt.NDArray[np.float64]
    photon_energy: float
    num_peaks_found: int
    truncated: bool
    bad_pixels: int


def read_cxi(path: str | Path) -> Iterator[CxiEvent]:
    """Read the events of a file that `CxiWriter` wrote, one at a time, in order.

    Parameters
    ----------
    path
        The file.

    Yields
    ------
    CxiEvent
        The next event.

    Raises
    ------
    OSError
        If the file cannot be opened.
    KeyError
        If something that `CxiWriter` writes is not in it.
    """
    with h5py.File(path, "r") as file:
        images, own = file["entry_1/data_1"], file["entry_1/peaknet_predict"]
        result = file["entry_1/result_1"]
        data, mask = images["data"], images.get("mask")
        num_events, rows, width = data.shape
        panels = int(images.attrs["panels"])
        shape_PHW = (panels, rows // panels, width)
        energy_eV = file["LCLS/photon_energy_eV"][:]
        streams = own["stream"].asstr()[:]
        for i in range(num_events):
            count = int(result["nPeaks"][i])
            x, slab_y, intensity = (result[name][i, :count] for name in _COLUMNS[:3])
            panel = np.rint(slab_y) // shape_PHW[1]
            yield CxiEvent(
                id=EventId(str(streams[i]), int(own["rank"][i]), int(own["idx"][i])),
                image=data[i].reshape(shape_PHW),
                mask=None if mask is None else mask[i].reshape(shape_PHW) != 0,
                peaks=np.stack([panel, slab_y - panel * shape_PHW[1], x], axis=1),
                intensity=intensity,
                photon_energy=float(energy_eV[i]),
                num_peaks_found=int(own["numPeaksFound"][i]),
                truncated=bool(own["truncated"][i]),
                bad_pixels=int(own["badPixels"][i]),
            )
