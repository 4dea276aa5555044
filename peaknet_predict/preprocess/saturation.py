"""Saturated pixels that read like bad ones: whether an event may have lost its strongest peaks.

Many detectors mark dead pixels with the largest value of their dtype. Where saturated pixels read
the same, ``bad_values: auto`` leaves out the cores of the strongest peaks. The two differ in their
surroundings: background beside dead pixels and gaps, a peak around a saturated core.

Shape legend: P panels, H rows and W columns of an event, K bytes of a mask as bits, S pixels of a
sample, C components.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from peaknet_predict.pixels import Bits, unpack_mask
from peaknet_predict.types import Event

log = logging.getLogger(__name__)

_SIGMAS = 5.0
"""Standard deviations above the event's median from which on a pixel is bright."""

_BRIGHT_SHARE = 0.5
"""Least share of bright pixels around a saturated core. At the edge of a gap, a peak beside it
makes a few of very many pixels bright."""

_MIN_AROUND = 3
"""Fewest measured pixels around a core for a decision."""

_NORMAL = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""

_SAMPLE = 2**14
_CHECKED_AT_ONCE, _THEN_EVERY_S = 10, 1.0
"""Events that are all looked at, and the time between two of those after them: labelling a large
event takes some 100 ms."""

_EIGHT = np.ones((1, 3, 3), np.bool_)


class SaturationReport:
    """Logs when pixels left out as bad look saturated: at the first event, the tenth, ...

    A pixel counts once: what was bad before is dead, and a peak beside it is a chance.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], Bits] = {}
        self._checked = 0
        self._check_at = 0.0
        self._events = 0
        self._next = 1

    def add(self, event: Event, bad_bits: Bits, marks: tuple[float, ...]) -> None:
        """Look at an event's bad pixels.

        Parameters
        ----------
        event
            The event.
        bad_bits
            (K,) uint8: its bad pixels, as `peaknet_predict.pixels.pack_mask` writes them.
        marks
            Values that mark bad pixels of its dtype.
        """
        seen = self._seen.setdefault(event.image.shape, np.zeros_like(bad_bits))
        fresh = bad_bits & ~seen
        seen |= bad_bits
        now = time.monotonic()
        if not fresh.any() or (self._checked >= _CHECKED_AT_ONCE and now < self._check_at):
            return
        self._checked += 1
        self._check_at = now + _THEN_EVERY_S
        value, pixels = _count_saturated(event.image, bad_bits, fresh, marks)
        if not pixels:
            return
        self._events += 1
        if self._events < self._next:
            return
        self._next *= 10
        log.warning(
            "event %s: %d pixels that read %.12g are left out as bad, but lie inside bright spots: "
            "they look saturated, and without them the strongest peaks are lost. If saturated "
            "pixels of this detector read so, set bad_values: none, and give a mask for its bad "
            "pixels (event number %d with such pixels)",
            *(event.id, pixels, value, self._events),
        )


def _count_saturated(
    image: npt.NDArray[Any], bad_bits: Bits, fresh: Bits, marks: tuple[float, ...]
) -> tuple[float, int]:
    """Return the highest mark among fresh bad pixels, and how many of these look saturated."""
    shape_PHW = image.shape if image.ndim == 3 else (1, *image.shape)
    counts_PHW = image.reshape(shape_PHW)
    new_PHW = unpack_mask(fresh, shape_PHW)
    values = counts_PHW[new_PHW]
    if image.dtype.kind == "f":
        # Counts beyond float16 become infinite; and float16 cannot be compared with 65535.
        values, marks = values.astype(np.float64), (*marks, np.inf)
    else:
        # A detector of fewer bits than its dtype has (DECTRIS's bit depth), masked by its source.
        highest = int(values.max())
        marks += (highest,) if highest >= 255 and highest & (highest + 1) == 0 else ()
    found = [mark for mark in marks if mark > 0 and (values == mark).any()]
    if not found:
        return 0.0, 0
    value = max(found)
    good_PHW = ~unpack_mask(bad_bits, shape_PHW)
    core_PHW = new_PHW & (counts_PHW == value)
    bright_PHW = good_PHW & (counts_PHW > _bright_level(counts_PHW[good_PHW]))
    labels_PHW, num = ndimage.label(core_PHW, np.pad(_EIGHT, ((1, 1), (0, 0), (0, 0))))
    # Each pixel around a core has the core's label; between two cores, the higher one.
    around_PHW = np.where(core_PHW, 0, ndimage.maximum_filter(labels_PHW, footprint=_EIGHT))
    measured_C = np.bincount(around_PHW[good_PHW], minlength=num + 1)
    bright_C = np.bincount(around_PHW[bright_PHW], minlength=num + 1)
    is_saturated_C = (measured_C >= _MIN_AROUND) & (bright_C >= _BRIGHT_SHARE * measured_C)
    is_saturated_C[0] = False
    return value, int(np.bincount(labels_PHW.ravel(), minlength=num + 1)[is_saturated_C].sum())


def _bright_level(counts: npt.NDArray[Any]) -> float:
    """Return the counts above which a pixel is bright, for the measured pixels of an event."""
    sample_S = counts[:: 1 + len(counts) // _SAMPLE].astype(np.float64)
    if not sample_S.size:
        return np.inf
    median = float(np.median(sample_S))
    away = _NORMAL * float(np.median(np.abs(sample_S - median)))
    return median + _SIGMAS * max(away, float(np.sqrt(max(median, 1.0))))
