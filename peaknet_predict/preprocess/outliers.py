"""Outliers: pixels with impossible counts, found by comparison with the rest of the event.

A stuck pixel of 1e9 among counts of 5 carries no mark. Alone it would raise the standard deviation
of an event of a million pixels to 1e6, and flatten everything else.

Shape legend: B events, P panels of an event, H rows, W columns, S pixels of a sample.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.preprocess.kernels import triton_steps
from peaknet_predict.types import EventId

log = logging.getLogger(__name__)

_RANGE = 2.0**22
"""Distances from the median, in units of the typical one, that no detector covers. Photon counters
have the widest range that we know: a PILATUS counts 2**20 photons in a pixel."""

_NEIGHBOURS = 1000.0
"""A pixel stands alone if its distance is this many times the mean of its eight neighbours'. The
point spread of every sensor gives them more: in a PILATUS frame with spots of 1e6 counts no pixel
has 100 times its neighbours' distance, and in CSPAD frames only stuck pixels have."""

_OF_NEIGHBOURS = (1 + 8 / _NEIGHBOURS) / 9
"""The same for the mean of nine pixels, one of which is the pixel itself."""

_MIN_ALONE = 3000.0
"""Lower bound of a lone pixel's distance, in units of the typical one. Below, a sharp spot on a
photon counter may leave next to nothing in its neighbours."""

_IF_CONSTANT = 1000.0
"""The typical distance where all pixels are equal: against such a background any other pixel stands
alone."""

_SAMPLE = 2**14
"""About how many pixels of each event represent all of them."""


def find_outliers(images_BPHW: Tensor, valid_BPHW: Tensor) -> Tensor:
    """Return which valid pixels cannot be measurements.

    An outlier is farther from the event's median than any detector's range. Or nothing of it shows
    in its neighbours, and it would have a larger share in the event's variance than all pixels of
    which that cannot be said. Strong peaks meet neither condition, however few pixels they have.

    Parameters
    ----------
    images_BPHW
        (B, P, H, W) float32, detector counts.
    valid_BPHW
        (B, P, H, W) bool.

    Returns
    -------
    Tensor
        (B, P, H, W) bool.
    """
    median_B111, typical_B111 = _spread(images_BPHW, valid_BPHW)
    steps = triton_steps(images_BPHW)
    if steps is not None:
        spread = median_B111.flatten(), typical_B111.flatten()
        outlier_BPHW: Tensor = steps.outliers(
            images_BPHW, valid_BPHW, *spread, _RANGE, _MIN_ALONE, _OF_NEIGHBOURS
        )
        return outlier_BPHW
    away_BPHW = (images_BPHW - median_B111).abs_()
    away_BPHW.masked_fill_(~valid_BPHW, 0.0)
    # Steps of less than 1 may be rounding errors; photons and ADU have none.
    outlier_BPHW = away_BPHW > _RANGE * typical_B111.clamp(min=1.0)
    alone_BPHW = away_BPHW > _MIN_ALONE * typical_B111
    # Most events end here on a CPU. Elsewhere, asking would wait for the device.
    on_cpu = images_BPHW.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not alone_BPHW.any():
        return outlier_BPHW
    mean_BPHW = F.avg_pool2d(away_BPHW, kernel_size=3, stride=1, padding=1)
    alone_BPHW &= mean_BPHW < away_BPHW * _OF_NEIGHBOURS
    squares_BPHW = away_BPHW.square_()
    others_BPHW = squares_BPHW.masked_fill(outlier_BPHW | alone_BPHW, 0.0)
    return outlier_BPHW | (alone_BPHW & (squares_BPHW > others_BPHW.sum((1, 2, 3), keepdim=True)))


def _spread(images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return each event's median and the typical distance from it, both (B, 1, 1, 1).

    The typical distance is the median over pixels that differ from the median: 0.67 standard
    deviations for noise, one photon for sparse photons.
    """
    # An odd stride avoids sampling only every other column of an ASIC.
    stride = int(math.sqrt(math.prod(images_BPHW.shape[1:]) / _SAMPLE)) | 1
    valid_BS = valid_BPHW[..., ::stride, ::stride].flatten(1)
    sample_BS = images_BPHW[..., ::stride, ::stride].flatten(1)
    count_B1 = valid_BS.sum(1, keepdim=True)
    # Invalid pixels come last.
    sorted_BS = torch.where(valid_BS, sample_BS, torch.inf).sort(1).values
    median_B1 = _pick(sorted_BS, (count_B1 - 1) // 2)
    away_BS = torch.where(valid_BS, (sample_BS - median_B1).abs(), torch.inf)
    equal_B1 = (away_BS == 0).sum(1, keepdim=True)
    typical_B1 = _pick(away_BS.sort(1).values, equal_B1 + (count_B1 - equal_B1 - 1) // 2)
    typical_B1 = torch.where(equal_B1 < count_B1, typical_B1, _IF_CONSTANT)
    return median_B1[:, :, None, None], typical_B1[:, :, None, None]


def _pick(sorted_BS: Tensor, index_B1: Tensor) -> Tensor:
    """Return one value per row; 0 for an index before the first, the last value beyond the end."""
    picked_B1 = sorted_BS.gather(1, index_B1.clamp(0, sorted_BS.shape[1] - 1))
    return torch.where(index_B1 >= 0, picked_B1, 0.0)


class OutlierReport:
    """Logs that pixels were left out as outliers: at the first event, the tenth, ..."""

    def __init__(self) -> None:
        self._events = 0
        self._next = 1

    def add(self, event: EventId, pixels: int) -> None:
        """Note an event with this many outliers."""
        self._events += 1
        if self._events < self._next:
            return
        self._next *= 10
        log.warning(
            "event %s: %d pixels are so far from all others that they cannot be measurements, and "
            "are left out as bad (event number %d with such pixels). If they are always the same, "
            "put them into a mask, or their value into bad_values",
            event,
            pixels,
            self._events,
        )
