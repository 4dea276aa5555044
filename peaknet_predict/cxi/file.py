"""One CXI file: written from events, and read.

What is in a file is described in `peaknet_predict.cxi.layout`.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.cxi.frames import index_of_event, open_cxi, panels_in, read_peak_list
from peaknet_predict.cxi.layout import (
    DATA,
    ENERGY_EV,
    MASK,
    OWN,
    PEAKS,
    Contents,
    mask_of,
    shared_mask,
)
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.cxi.witness import Witness
from peaknet_predict.types import EventId, Image, Peaks


class _CarefulFile:
    """An open file whose reads and writes are complete, even if a system call is not."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file; beyond its end it reads zeros."""
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
        """Seek as in any file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position as any file."""
        return self._raw.tell()

    def truncate(self, size: int) -> int:
        """Set the length."""
        return self._raw.truncate(size)


def write_cxi_file(
    raw: BinaryIO, rows: Sequence[CxiRow], contents: Contents, compression: str
) -> None:
    """Write one complete file of events of one kind.

    Parameters
    ----------
    raw
        The file, open, empty and without a buffer.
    rows
        Its events.
    contents
        What `contents_of` says of them.
    compression
        Of the pixels, ``none`` or ``gzip``.

    Raises
    ------
    BaseException
        Anything that went wrong with the file, even a KeyboardInterrupt. The file is then useless.
    """
    witness = Witness(_CarefulFile(raw))
    try:
        with h5py.File(witness, "w") as file:
            _write(file, rows, contents, compression)
    except Exception:
        if witness.error is None:
            raise
    if witness.error is not None:
        raise witness.error


def _write(file: Any, rows: Sequence[CxiRow], contents: Contents, compression: str) -> None:
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
    provenance
        What the peaks depend on, as JSON; empty if that is not known.
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
    provenance: str


@dataclass(frozen=True, slots=True)
class CxiSummary:
    """What a writer needs to know about a finished file, besides its events' identities.

    Attributes
    ----------
    run, writer
        Names of the run and of the process that wrote it.
    shape_PHW
        Of its events.
    num_events
        How many it has.
    truncated, without_energy
        How many events have more peaks than are listed; how many have no photon energy above zero.
    """

    run: str
    writer: str
    shape_PHW: tuple[int, int, int]
    num_events: int
    truncated: int
    without_energy: int


def read_summary(path: str | Path) -> tuple[CxiSummary, list[EventId]]:
    """Read what a file holds, and its events' identities; raises as `read_cxi` does."""
    with open_cxi(path) as file:
        own, data = file[OWN], file[DATA]
        columns = own["stream"].asstr()[:], own["rank"][:], own["idx"][:]
        ids = [EventId(str(s), int(r), int(i)) for s, r, i in zip(*columns, strict=True)]
        summary = CxiSummary(
            run=str(own.attrs["run"]),
            writer=str(own.attrs["writer"]),
            shape_PHW=_shape_of(data),
            num_events=len(ids),
            truncated=int(np.count_nonzero(own["truncated"][:])),
            without_energy=int(np.count_nonzero(~(file[ENERGY_EV][:] > 0))),
        )
        return summary, ids


def read_ids(path: str | Path) -> list[EventId]:
    """Return the identities of a file's events; raises as `read_cxi` does."""
    return read_summary(path)[1]


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
        shape_PHW = _shape_of(data)
        energy_eV = file[ENERGY_EV][:]
        streams, provenances = own["stream"].asstr()[:], own["provenance"].asstr()[:]
        for i in range(len(data)):
            x, slab_y = read_peak_list(result, i)
            panel = np.rint(slab_y) // shape_PHW[1]
            yield CxiEvent(
                id=EventId(str(streams[i]), int(own["rank"][i]), int(own["idx"][i])),
                image=data[i].reshape(shape_PHW),
                mask=mask[index_of_event(mask, data, i)].reshape(shape_PHW) != 0,
                peaks=np.stack([panel, slab_y - panel * shape_PHW[1], x], axis=1),
                intensity=result["peakTotalIntensity"][i, : len(x)],
                saturated=own["peakSaturated"][i, : len(x)] != 0,
                photon_energy=float(energy_eV[i]),
                num_peaks_found=int(own["numPeaksFound"][i]),
                truncated=bool(own["truncated"][i]),
                bad_pixels=int(own["badPixels"][i]),
                provenance=str(provenances[i]),
            )


def _shape_of(data: Any) -> tuple[int, int, int]:
    """Return the shape of the events in a dataset of slabs."""
    panels = panels_in(data)
    return panels, data.shape[1] // panels, data.shape[2]
