"""CXI files with peak lists, as CrystFEL (`indexamajig --peaks=cxi`) and Cheetah read them.

The panels of an event are stacked into one slab, because CrystFEL finds no peaks in files with a
dimension for panels. A file of N events holds::

    /cxi_version                                 160
    /entry_1/data_1/data                         (N, P*H, W), the original pixels and dtype
    /entry_1/data_1/mask                         (P*H, W) uint32, 1 = bad; (N, P*H, W) where the
                                                 events of the file differ in it
    /entry_1/result_1/nPeaks                     (N,) int32, never above the width of the lists
    /entry_1/result_1/peakXPosRaw, peakYPosRaw   (N, max_peaks) float64, fast and slow scan
    /entry_1/result_1/peakTotalIntensity, peakMaximumValue, peakSNR    (N, max_peaks) float64
    /entry_1/instrument_1/source_1/energy        (N,) float64, joules
    /LCLS/photon_energy_eV                       (N,) float64
    /entry_1/peaknet_predict/stream, rank, idx, numPeaksFound, truncated, badPixels        (N,)
    /entry_1/peaknet_predict/saturation          (N,) float64, counts, NaN where it is not known
    /entry_1/peaknet_predict/threshold           (N,) float64, log odds, NaN where it is not known
    /entry_1/peaknet_predict/provenance          (N,) text, JSON: what the peaks depend on
    /entry_1/peaknet_predict/peakSaturated       (N, max_peaks) uint8, 1 = has a saturated pixel

A peak (panel, y, x) is at X = x, Y = panel * H + y: 0-based pixel indices of the slab, pixel
centres on integers. CrystFEL adds the half pixel of its own convention when it reads them; nothing
is added here. The peaks of an event are listed strongest first, zeros fill the rest of the row.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from peaknet_predict import __version__
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.photon_energy import JOULES_PER_EV

CXI_VERSION = 160

DATA = "entry_1/data_1/data"
MASK = "entry_1/data_1/mask"
PEAKS = "entry_1/result_1"
OWN = "entry_1/peaknet_predict"
ENERGY_EV = "LCLS/photon_energy_eV"

COLUMNS = ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity", "peakMaximumValue", "peakSNR")


class Contents(NamedTuple):
    """All of a file but its images: what is written is what is looked for when it is read back."""

    attributes: dict[str, dict[str, Any]]
    tables: dict[str, npt.NDArray[Any]]


def contents_of(rows: Sequence[CxiRow], max_peaks: int, run: str, writer: str) -> Contents:
    """Return what a file that a writer of a run makes of these events holds beside its images."""
    results = [row.result for row in rows]
    energy_eV = np.array([result.photon_energy for result in results], dtype=np.float64)
    tables: dict[str, npt.NDArray[Any]] = {
        "cxi_version": np.array(CXI_VERSION),
        "entry_1/instrument_1/source_1/energy": energy_eV * JOULES_PER_EV,
        ENERGY_EV: energy_eV,
        f"{PEAKS}/nPeaks": np.array([row.table.shape[1] for row in rows], dtype=np.int32),
        f"{OWN}/stream": np.array([r.id.stream for r in results], dtype=object),
        f"{OWN}/rank": np.array([r.id.rank for r in results], dtype=np.int64),
        f"{OWN}/idx": np.array([r.id.idx for r in results], dtype=np.int64),
        f"{OWN}/numPeaksFound": np.array([len(r.peaks) for r in results], dtype=np.int32),
        f"{OWN}/truncated": np.array([row.truncated for row in rows], dtype=np.uint8),
        f"{OWN}/saturation": np.array([r.saturation for r in results], dtype=np.float64),
        f"{OWN}/threshold": np.array([row.threshold for row in rows], dtype=np.float64),
        f"{OWN}/provenance": np.array([r.provenance or "" for r in results], dtype=object),
        f"{OWN}/badPixels": np.array([r.bad_pixels for r in results], dtype=np.int64),
    }
    for k, name in enumerate(COLUMNS):
        tables[f"{PEAKS}/{name}"] = _padded([row.table[k] for row in rows], max_peaks)
    tables[f"{OWN}/peakSaturated"] = _padded(
        [row.saturated.astype(np.uint8) for row in rows], max_peaks
    )
    attributes: dict[str, dict[str, Any]] = {
        "/": {
            "NX_class": "NXroot",
            "default": "entry_1",
            "creator": "peaknet-predict",
            "creator_version": __version__,
        },
        "entry_1": {"NX_class": "NXentry", "default": "data_1"},
        "entry_1/data_1": {"NX_class": "NXdata", "signal": "data", "panels": rows[0].kind[0][0]},
        DATA: {"interpretation": "image"},
        PEAKS: {"NX_class": "NXcollection"},
        f"{PEAKS}/peakXPosRaw": {"units": "fast-scan pixel index, pixel centres on integers"},
        f"{PEAKS}/peakYPosRaw": {"units": "slow-scan pixel index, pixel centres on integers"},
        "entry_1/instrument_1": {"NX_class": "NXinstrument"},
        "entry_1/instrument_1/source_1": {"NX_class": "NXsource"},
        "entry_1/instrument_1/source_1/energy": {"units": "J"},
        "LCLS": {"NX_class": "NXcollection"},
        ENERGY_EV: {"units": "eV"},
        OWN: {"NX_class": "NXcollection", "run": run, "writer": writer},
    }
    return Contents(attributes, tables)


def _padded(lists: Sequence[npt.NDArray[Any]], width: int) -> npt.NDArray[Any]:
    table = np.zeros((len(lists), width), dtype=lists[0].dtype)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return table


def shared_mask(rows: Sequence[CxiRow]) -> npt.NDArray[np.uint32] | None:
    """Return the mask that all these events have, (P*H, W), 1 where a pixel is bad; or None."""
    first = rows[0].bad
    for row in rows[1:]:
        if row.bad is not first and (
            row.bad is None or first is None or not np.array_equal(row.bad, first)
        ):
            return None
    return mask_of(rows[0])


def mask_of(row: CxiRow) -> npt.NDArray[np.uint32]:
    """Return an event's mask, (P*H, W): 1 where a pixel is bad."""
    if row.bad is None:
        return np.zeros(row.slab.shape, dtype=np.uint32)
    return row.bad.astype(np.uint32)
