"""Bad pixels: how pixel values mark them, and how masks travel.

Dead pixels and gaps carry a value that no pixel counts to: the largest one of an unsigned dtype
(DECTRIS), either end of a signed one. Other programs leave NaN, or give a mask of their own. Masks
travel beside the image as bits, one per pixel.

This module needs neither torch nor Ray. `peaknet_predict.preprocess.validity` applies the same
rules on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint8]
"""(ceil(P*H*W / 8),) uint8: a mask as `pack_mask` makes it."""

FLOAT_LIMIT = 2.0**31
"""Floating-point counts of at least this magnitude are no measurement. It covers the ends of 32-bit
integers, which calibration often widens to float32 (2**32 - 1 becomes 2**32)."""

FLOAT_SENTINELS = (65535.0, -32768.0)
"""The marks of 16-bit integers, widened to floating point. Calibrated counts hardly ever have
exactly one of these values."""


def sentinels(dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the values of an integer dtype that mark bad pixels: the ends of its range.

    Zero, the lower end of unsigned dtypes, is the most frequent count and marks nothing.
    """
    limits = np.iinfo(dtype)
    return (limits.max,) if limits.min == 0 else (limits.min, limits.max)


def count_unmarked_gaps(image: npt.NDArray[Any], marks: Collection[float]) -> int:
    """Return how many pixels look like a counter's gaps, but are not called bad.

    Photon counters write -1, and -2 where a pixel is bad; nothing is below. Counts around a
    subtracted pedestal are negative too, but not so few values.

    Parameters
    ----------
    image
        Detector counts, of any shape.
    marks
        The values that mark bad pixels.
    """
    if image.dtype.kind != "i" or not image.size or image.min() not in (-1, -2):
        return 0
    gaps = sum(int(np.count_nonzero(image == value)) for value in (-1, -2) if value not in marks)
    return gaps if gaps >= image.size / 1000 else 0


def find_bad_pixels(image: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return a mask of the image's shape, True where a pixel's value says that it is bad.

    These are the rules of ``bad_values: auto``, for images that no predictor has judged.

    Parameters
    ----------
    image
        Detector counts, any integer or floating-point dtype, any shape.
    """
    if image.dtype.kind != "f":
        bad = np.zeros(image.shape, np.bool_)
        for end in sentinels(image.dtype):
            bad |= image == end
        return bad
    # In float32, as on the device. NaN fails the comparison as well.
    with np.errstate(over="ignore", invalid="ignore"):
        counts = image.astype(np.float32, copy=False)
        bad = ~(np.abs(counts) < FLOAT_LIMIT)
        for value in FLOAT_SENTINELS:
            bad |= counts == value
    return bad


MAX_BAD = 0.5
"""Fraction of bad pixels beyond which a mask probably uses 1 for good pixels."""


def find_masked(
    values: npt.NDArray[np.integer], good: int | None, bad: int | None
) -> npt.NDArray[np.bool_]:
    """Return where a mask's values say that pixels are bad, by CrystFEL's rule.

    A pixel is bad if it has any bit of ``bad``, or lacks one of ``good``. Without either any value
    but 0 is bad, as in CXI and NeXus.

    Raises
    ------
    ValueError
        If ``good`` and ``bad`` leave no bit to look at.
    """
    if good is None and bad is None:
        return np.asarray(values != 0)
    good, bad = good or 0, bad or 0
    if good == bad == 0:
        raise ValueError(
            "mask_good and mask_bad are 0, so that no bit of the mask means anything: give the "
            "bits of good or of bad pixels, or go without a mask"
        )
    values = values.astype(np.int64, copy=False)
    return np.asarray(((values & bad) != 0) | ((values & good) != good))


def pack_mask(bad: npt.NDArray[np.bool_]) -> Bits:
    """Return a mask as bits: 8 pixels a byte in memory order, the first in the lowest bit."""
    return np.packbits(bad, axis=None, bitorder="little")


def unpack_mask(bits: Bits, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return the mask of a shape that `pack_mask` made bits of."""
    flat = np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little")
    return flat.view(np.bool_).reshape(shape)


def bits_problem(bits: Any, shape: tuple[int, ...]) -> str | None:
    """Say why something is no mask of a shape as `pack_mask` makes it; None if it is one."""
    pixels = int(np.prod(shape))
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.ndim != 1:
        return "its mask is not an array of bytes, with a bit for each pixel"
    if len(bits) != -(-pixels // 8):
        return (
            f"its mask has {len(bits)} bytes; an image of {pixels} pixels needs {-(-pixels // 8)}"
        )
    return None


def split_masked(image: Any) -> tuple[Any, Bits | None]:
    """Split a masked array into its pixels, as they are under the mask, and the mask as bits.

    Anything else comes back as it is, with None; so does a masked array without masked pixels, and
    one whose mask does not fit its pixels.
    """
    if not isinstance(image, np.ma.MaskedArray):
        return image, None
    pixels, mask = np.ma.getdata(image), np.ma.getmaskarray(image)
    if mask.dtype != np.bool_ or mask.shape != pixels.shape:
        return image, None
    return pixels, pack_mask(mask) if mask.any() else None
