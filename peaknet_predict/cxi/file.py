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

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.photon_energy import JOULES_PER_EV
from peaknet_predict.types import EventId, Image, Peaks, Result

CXI_VERSION = 160

COLUMNS = ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity", "peakMaximumValue", "peakSNR")


@dataclass(slots=True)
class CxiRow:
    """One event, ready to be written."""

    result: Result
    slab: Image  # (P*H, W)
    table: npt.NDArray[np.float64]  # (5, M): `COLUMNS` of the peaks that are listed
    has_bad_pixels: bool

    @property
    def truncated(self) -> bool:
        """Whether some of the event's peaks are not listed."""
        return bool(self.table.shape[1] < len(self.result.peaks))


def kind_of(result: Result) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return what all events of one file share; an image (H, W) is one of a single panel."""
    shape = result.image.shape
    return (shape if len(shape) == 3 else (1, *shape)), result.image.dtype


class _CarefulFile:
    """An open file for HDF5 that remembers the first error instead of raising it.

    When a write fails, HDF5 cannot close its objects: h5py prints such errors but does not raise
    them (a broken file looks finished), and the process may crash later (seen with HDF5 2.0 on a
    full disk). So HDF5 is told that all is well, and the error is raised after it has let go.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.error: BaseException | None = None

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
        except BaseException as error:  # an interrupt in here would crash HDF5 as well
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


def write_cxi_file(raw: BinaryIO, rows: list[CxiRow], max_peaks: int, compression: str) -> None:
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


def _write_images(group: h5py.Group, rows: list[CxiRow], compression: str) -> None:
    shape = (len(rows), *rows[0].slab.shape)
    chunks = (1, *rows[0].slab.shape)  # an indexing job reads frame by frame
    fast_gzip = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    group.attrs["signal"] = "data"
    group.attrs["panels"] = kind_of(rows[0].result)[0][0]
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


def _write_peaks(group: h5py.Group, rows: list[CxiRow], max_peaks: int) -> None:
    group["nPeaks"] = np.array([row.table.shape[1] for row in rows], dtype=np.int32)
    for k, name in enumerate(COLUMNS):
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


def read_ids(path: str | Path) -> list[EventId]:
    """Return the identities of a file's events; raises as `read_cxi` does."""
    with h5py.File(path, "r") as file:
        own = file["entry_1/peaknet_predict"]
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
            x, slab_y, intensity = (result[name][i, :count] for name in COLUMNS[:3])
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
