"""One event, checked and ready to be written: its slab, its mask, its peaks by their strength.

An event that no file can hold is refused here, so that writing a file fails only because of
storage.

Shape legend: P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peaknet_predict.cxi.integrate import integrate_peaks
from peaknet_predict.photon_energy import explain_implausible, is_plausible
from peaknet_predict.pixels import bits_problem
from peaknet_predict.types import EventId, Image, Result, identity_problem

_INT64 = np.iinfo(np.int64)
_MAX_SLAB_BYTES = 2**32 - 1  # HDF5's limit for a chunk, and a frame is one


@dataclass(slots=True)
class CxiRow:
    """One event, ready to be written.

    Attributes
    ----------
    result
        The event as received.
    slab
        (P*H, W), its pixels.
    bad
        (P*H, W) bool, True where a pixel is bad; None if none is.
    table
        (5, M) float64, columns `peaknet_predict.cxi.layout.COLUMNS` of the peaks that are listed.
    saturated
        (M,) bool, True for peaks with a saturated pixel.
    """

    result: Result
    slab: Image
    bad: npt.NDArray[np.bool_] | None
    table: npt.NDArray[np.float64]
    saturated: npt.NDArray[np.bool_]

    @property
    def threshold(self) -> float:
        """The operating point of its peaks, log odds; NaN if it is not known."""
        provenance = self.result.provenance
        return float("nan") if provenance is None else float(json.loads(provenance)["threshold"])

    @property
    def kind(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """What all events of one file share; an image (H, W) is one of a single panel."""
        shape = self.result.image.shape
        return (shape if len(shape) == 3 else (1, *shape)), self.slab.dtype

    @property
    def truncated(self) -> bool:
        """Whether some of the event's peaks are not listed."""
        return bool(self.table.shape[1] < len(self.result.peaks))


def check_identity(key: EventId) -> None:
    """Raise ValueError, with a printable name, for an identity that no file can hold."""
    problem = identity_problem(key)
    if problem is not None:
        raise ValueError(f"event of stream {key.stream!a:.80}: {problem}")


def make_row(result: Result, max_peaks: int) -> CxiRow:
    """Check, integrate and order one event.

    Raises
    ------
    ValueError
        If the event cannot be written, with its name and the reason.
    """
    check_identity(result.id)
    try:
        return _make_row(result, max_peaks)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"event {result.id}: {error}") from error


def _make_row(result: Result, max_peaks: int) -> CxiRow:
    image = result.image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"its image is no ndarray, but {type(image).__name__}")
    if image.ndim not in (2, 3) or image.size == 0 or image.dtype.kind not in "iuf":
        raise ValueError(
            f"cannot write an image of shape {image.shape} and dtype {image.dtype} to CXI: "
            "expected (P, H, W) or (H, W) real numbers"
        )
    if image.nbytes > _MAX_SLAB_BYTES:
        raise ValueError(f"cannot write an image of {image.nbytes} bytes to CXI: 4 GiB is too much")
    if not _fits(result.bad_pixels):
        raise ValueError("its number of bad pixels is no integer of 64 bits")
    energy = float(result.photon_energy)
    # Peaks without an energy (0 or NaN) are still useful; a wrong energy misleads.
    if energy > 0 and not is_plausible(energy):
        raise ValueError(explain_implausible(energy))
    _check_provenance(result.provenance)
    if result.bad_bits is not None and result.bad_bits.size:  # empty: no pixel is bad
        problem = bits_problem(result.bad_bits, image.shape)
        if problem is not None:
            raise ValueError(problem)
    bad = result.bad_mask()
    if result.peaks.dtype.kind not in "iuf":
        raise ValueError(f"its peaks are of dtype {result.peaks.dtype}, not real numbers")
    intensities = integrate_peaks(image, result.peaks, bad, result.saturation)
    height, width = image.shape[-2:]
    panel, y, x = result.peaks.T
    if (panel != np.rint(panel)).any():
        raise ValueError(f"a peak is in panel {panel[panel != np.rint(panel)][0]}, which is none")
    # Strongest first: a reader with shorter lists than ours keeps the best ones.
    order = np.argsort(-intensities.total, kind="stable")[:max_peaks]
    table = np.stack(
        [x, panel * height + y, intensities.total, intensities.maximum, intensities.snr]
    )
    return CxiRow(
        result=result,
        slab=np.ascontiguousarray(image.reshape(-1, width)),
        bad=None if bad is None else bad.reshape(-1, width),
        table=np.ascontiguousarray(table[:, order], dtype=np.float64),
        saturated=intensities.saturated[order],
    )


def _check_provenance(provenance: Any) -> None:
    if provenance is None:
        return
    try:
        float(json.loads(provenance.encode())["threshold"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its provenance is no JSON with a threshold: {error}") from error


def _fits(value: Any) -> bool:
    try:
        return bool(_INT64.min <= operator.index(value) <= _INT64.max)
    except TypeError:
        return False
