"""One CXI file: written from events, and read.

What is in a file is described in `peaknet_predict.cxi.layout`.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.cxi.layout import (
    COLUMNS,
    DATA,
    ENERGY_EV,
    MASK,
    OWN,
    PEAKS,
    contents_of,
    mask_of,
    open_cxi,
    shared_mask,
)
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.types import EventId, Image, Peaks

T = TypeVar("T")


_MOST_METADATA = 2**20  # bytes of one write that HDF5 may want to read again: no images


class _CarefulFile:
    """An open file whose reads and writes are whole, whatever the system makes of one call."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file; what is behind its end reads as zeros."""
        view = memoryview(buffer).cast("B")
        data = self._raw.read(len(view)) or b""
        view[:] = data.ljust(len(view), b"\0")
        return len(view)

    def write(self, buffer: memoryview) -> int:
        """Write all of the buffer."""
        view = memoryview(buffer).cast("B")
        length = len(view)
        while len(view):
            view = view[self._raw.write(view) :]
        return length

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as any file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position as any file."""
        return self._raw.tell()

    def truncate(self, size: int) -> int:
        """Set the length."""
        return self._raw.truncate(size)


class _Witness:
    """What HDF5 is given for a file: it remembers the first exception, and lets none through.

    HDF5 swallows what the methods of a file object raise. When a write fails it cannot close its
    objects either: h5py prints such errors but does not raise them (a broken file looks finished),
    and the process may crash later (seen with HDF5 2.0 on a full disk). So HDF5 is told that all is
    well, nothing more is written, and the error is raised when HDF5 has let go of the file.
    """

    def __init__(self, file: _CarefulFile) -> None:
        self.error: BaseException | None = None
        self._file = file
        # Where HDF5 believes to be, and how long it believes the file to be.
        self._position = self._size = 0
        # What it believes to have written since the error: it crashes if it reads zeros instead.
        self._unwritten: list[tuple[int, bytes]] = []

    def read(self, size: int = -1) -> bytes:
        """Is never called; h5py knows file objects by it."""
        raise NotImplementedError

    def readinto(self, buffer: memoryview) -> int:
        """As `_CarefulFile.readinto`."""
        view = memoryview(buffer).cast("B")
        self._attempt(self._file.readinto, view)
        if self.error is not None:
            self._read_unwritten(view)
        self._position += len(view)
        return len(view)

    def write(self, buffer: memoryview) -> int:
        """As `_CarefulFile.write`."""
        view = memoryview(buffer).cast("B")
        self._attempt(self._file.write, view)
        if self.error is not None and len(view) <= _MOST_METADATA:
            self._unwritten.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As `_CarefulFile.seek`."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        self._attempt(self._file.seek, offset, whence)
        return self._position

    def tell(self) -> int:
        """As `_CarefulFile.tell`."""
        self._attempt(self._file.tell)
        return self._position

    def truncate(self, size: int) -> int:
        """As `_CarefulFile.truncate`."""
        self._size = size
        self._attempt(self._file.truncate, size)
        return size

    def flush(self) -> None:
        """Do nothing: the file has no buffer, and syncing is the caller's."""

    def _attempt(self, call: Callable[..., int], *args: Any) -> None:
        if self.error is None:
            try:
                call(*args)
            except BaseException as error:  # a KeyboardInterrupt would be swallowed as well
                # Its traceback would keep h5py's objects alive to the end of the process, which
                # then crashes.
                self.error = error.with_traceback(None)

    def _read_unwritten(self, view: memoryview) -> None:
        begin, end = self._position, self._position + len(view)
        with contextlib.suppress(OSError, ValueError):
            self._file.seek(begin)
            self._file.readinto(view)
        for offset, data in self._unwritten:
            first, last = max(begin, offset), min(end, offset + len(data))
            if first < last:
                view[first - begin : last - begin] = data[first - offset : last - offset]


def write_cxi_file(raw: BinaryIO, rows: Sequence[CxiRow], max_peaks: int, compression: str) -> None:
    """Write one complete file of events of one kind.

    Raises
    ------
    BaseException
        Whatever went wrong with the file, a KeyboardInterrupt too. What is in it is then of no use.
    """
    witness = _Witness(_CarefulFile(raw))
    try:
        with h5py.File(witness, "w") as file:
            _write(file, rows, max_peaks, compression)
    except Exception:
        if witness.error is None:
            raise
    if witness.error is not None:
        raise witness.error


def _write(file: Any, rows: Sequence[CxiRow], max_peaks: int, compression: str) -> None:
    contents = contents_of(rows, max_peaks)
    shape = (len(rows), *rows[0].slab.shape)
    chunks = (1, *rows[0].slab.shape)  # an indexing job reads frame by frame
    fast_gzip = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    data = file.create_dataset(
        DATA,
        shape=shape,
        dtype=rows[0].slab.dtype,
        chunks=chunks,
        **(fast_gzip if compression == "gzip" else {}),
    )
    for i, row in enumerate(rows):
        data[i] = row.slab
    # uint32 with 1 = invalid, as the CXI format has it. Mostly zeros: always compressed.
    mask = shared_mask(rows)
    if mask is not None:
        file.create_dataset(MASK, data=mask, chunks=chunks[1:], **fast_gzip)
    else:
        masks = file.create_dataset(MASK, shape=shape, dtype=np.uint32, chunks=chunks, **fast_gzip)
        for i, row in enumerate(rows):
            masks[i] = mask_of(row)
    for name, table in contents.tables.items():
        as_text = {"dtype": h5py.string_dtype()} if table.dtype == object else {}
        as_list = {"compression": "gzip", "shuffle": True} if table.ndim == 2 else {}
        file.create_dataset(name, data=table, **as_text, **as_list)
    for name, attributes in contents.attributes.items():
        file[name].attrs.update(attributes)


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
        (P, H, W) bool, True = bad.
    peaks
        (M, 3) float64, see `Peaks`; strongest first. y carries the rounding of the sum with the
        panel's offset, some 1e-13 pixels.
    intensity
        (M,) float64, detector counts above background.
    saturated
        (M,) bool, which peaks have a saturated pixel.
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
    mask: npt.NDArray[np.bool_]
    peaks: Peaks
    intensity: npt.NDArray[np.float64]
    saturated: npt.NDArray[np.bool_]
    photon_energy: float
    num_peaks_found: int
    truncated: bool
    bad_pixels: int


def read_ids(path: str | Path) -> list[EventId]:
    """Return the identities of a file's events; raises as `read_cxi` does."""
    with open_cxi(path) as file:
        own = file[OWN]
        columns = own["stream"].asstr()[:], own["rank"][:], own["idx"][:]
        return [EventId(str(s), int(r), int(i)) for s, r, i in zip(*columns, strict=True)]


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
    with open_cxi(path) as file:
        data, mask, own, result = file[DATA], file[MASK], file[OWN], file[PEAKS]
        num_events, rows, width = data.shape
        panels = int(data.parent.attrs["panels"])
        shape_PHW = (panels, rows // panels, width)
        energy_eV = file[ENERGY_EV][:]
        streams = own["stream"].asstr()[:]
        for i in range(num_events):
            count = int(result["nPeaks"][i])
            x, slab_y, intensity = (result[name][i, :count] for name in COLUMNS[:3])
            panel = np.rint(slab_y) // shape_PHW[1]
            yield CxiEvent(
                id=EventId(str(streams[i]), int(own["rank"][i]), int(own["idx"][i])),
                image=data[i].reshape(shape_PHW),
                mask=mask[i if mask.ndim == 3 else ()].reshape(shape_PHW) != 0,
                peaks=np.stack([panel, slab_y - panel * shape_PHW[1], x], axis=1),
                intensity=intensity,
                saturated=own["peakSaturated"][i, :count] != 0,
                photon_energy=float(energy_eV[i]),
                num_peaks_found=int(own["numPeaksFound"][i]),
                truncated=bool(own["truncated"][i]),
                bad_pixels=int(own["badPixels"][i]),
            )
