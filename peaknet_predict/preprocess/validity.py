"""Which pixels are measurements: decided once per batch, on the device, from the raw counts.

Shape legend: B events, P panels of an event, H rows, W columns, K bytes of a mask as bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from peaknet_predict.pixels import FLOAT_LIMIT, FLOAT_SENTINELS, sentinels
from peaknet_predict.preprocess.base import Shape

BadValues = Literal["auto", "none"] | list[int | float]
"""Values that mark bad pixels: those of the dtype, none, or those of the dtype and a list."""

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Integers of the same width. A GPU compares no unsigned ones of 2, 4 or 8 bytes, and float32 has
too few digits to tell 2**32 - 1 from its neighbours."""

_ENDS = {
    dtype: sentinels(torch.empty(0, dtype=dtype).numpy().dtype)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_SIGNED)
}

_BITS = tuple(range(8))


class StaticMask(NamedTuple):
    """What is known in advance about a detector's pixels.

    Attributes
    ----------
    bad
        (P, H, W), (H, W) or, of panels stacked into a slab, (P*H, W) bool; True where a pixel is
        bad in every event.
    at_least, at_most
        Counts outside of these bounds are bad, in every pixel.
    values
        Counts that are bad, in every pixel.
    in_images
        Options of a source, for masks that a geometry file takes from the image files: the source
        that reads them must apply them.
    """

    bad: npt.NDArray[np.bool_]
    at_least: float = -math.inf
    at_most: float = math.inf
    values: tuple[float, ...] = ()
    in_images: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Return a digest of all of this: another mask under the same file name has another one."""
        digest = hashlib.sha256(repr((self.bad.shape, *self[1:])).encode())
        digest.update(np.packbits(self.bad).tobytes())
        return digest.hexdigest()


class Validity(nn.Module):
    """Widens raw counts to float32 and decides which of them are measurements.

    A pixel is bad if it is NaN or infinite, if its value marks bad pixels of its dtype
    (`peaknet_predict.pixels`), if the producer declares it bad, or if the static mask does.

    Parameters
    ----------
    bad_values
        ``auto``: the values that mark bad pixels of the images' dtype. ``none``: no finite value
        does. A list: these values (-1 and -2 of PILATUS, say) besides those of ``auto``.
    mask
        What is known about the detector's pixels.
    saturation
        Counts from which on a pixel is saturated. Such pixels are measurements all the same, as for
        CrystFEL: their peaks are listed, and flagged.

    Raises
    ------
    ValueError
        If ``bad_values`` is something else, or ``saturation`` is not a positive number.
    """

    good_PHW: Tensor | None

    def __init__(
        self,
        bad_values: BadValues = "auto",
        mask: StaticMask | None = None,
        saturation: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(bad_values, str) and bad_values not in ("auto", "none"):
            raise ValueError(f"bad_values is {bad_values!r}; give auto, none or a list of numbers")
        self._listed = [] if isinstance(bad_values, str) else list(bad_values)
        if not all(math.isfinite(value) for value in self._listed):
            raise ValueError("NaN and infinity are always bad: leave them out of bad_values")
        if saturation is not None and not (math.isfinite(saturation) and saturation > 0):
            raise ValueError(f"saturation is {saturation}; give the counts of a saturated pixel")
        self.saturation = saturation
        self._mask = mask
        self.in_images = () if mask is None else mask.in_images
        self._use_dtype = bad_values != "none"
        # Not persistent: a mask belongs to a detector, not to a network's weights.
        good = None if mask is None else torch.from_numpy(~mask.bad)
        self.register_buffer("good_PHW", good, persistent=False)

    def check_shape(self, shape_PHW: Shape) -> None:
        """Raise ValueError if the static mask does not fit events of this shape."""
        if self.good_PHW is None:
            return
        panels, height, width = shape_PHW
        shape = tuple(self.good_PHW.shape)
        if shape != shape_PHW and shape != (panels * height, width):
            raise ValueError(
                f"the mask has the shape {shape}, and the event {shape_PHW}: give a mask of this "
                f"detector, of the shape {shape_PHW} or {(panels * height, width)}"
            )

    def contradiction(self, dtype: torch.dtype) -> str | None:
        """Say that images of a dtype mark bad pixels as saturated ones; None if they do not."""
        if self.saturation is None or not self._use_dtype:
            return None
        if self.saturation not in self.marks(dtype):
            return None
        return (
            f"{self.saturation:g} is what saturated pixels read, but in {dtype} it marks bad ones, "
            "which are left out. If it is a measurement, set bad_values: none, and give a mask for "
            "the bad pixels"
        )

    def forward(
        self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Widen and judge the pixels of a batch.

        Parameters
        ----------
        counts_BPHW
            (B, P, H, W) of any real dtype, detector counts.
        bad_bits_BK
            (B, ceil(P*H*W / 8)) uint8, pixels that the producers declare bad, as
            `peaknet_predict.pixels.pack_mask` writes them.

        Returns
        -------
        images_BPHW, valid_BPHW
            (B, P, H, W) float32, and bool, True where the pixel is a measurement.
        """
        images_BPHW = counts_BPHW.to(torch.float32)
        valid_BPHW = self._by_value(counts_BPHW, images_BPHW)
        if self._mask is not None and self.good_PHW is not None:
            valid_BPHW &= self.good_PHW.view(counts_BPHW.shape[1:])
            if self._mask.at_least > -math.inf:
                valid_BPHW &= images_BPHW >= self._mask.at_least
            if self._mask.at_most < math.inf:
                valid_BPHW &= images_BPHW <= self._mask.at_most
            for value in self._mask.values:
                valid_BPHW &= images_BPHW != value
        if bad_bits_BK is not None:
            valid_BPHW &= ~unpack_masks(bad_bits_BK, counts_BPHW.shape)
        return images_BPHW, valid_BPHW

    def _by_value(self, counts_BPHW: Tensor, images_BPHW: Tensor) -> Tensor:
        """Return which pixels' values are those of measurements."""
        if counts_BPHW.dtype.is_floating_point:
            if not self._use_dtype:
                return torch.isfinite(images_BPHW)
            # NaN fails the comparison, too.
            valid_BPHW = images_BPHW.abs() < FLOAT_LIMIT
            for number in (*FLOAT_SENTINELS, *self._listed):
                valid_BPHW &= images_BPHW != number
            return valid_BPHW
        same_BPHW = counts_BPHW.view(_SIGNED.get(counts_BPHW.dtype, counts_BPHW.dtype))
        if not self._use_dtype:
            return torch.ones_like(same_BPHW, dtype=torch.bool)
        first, *others = self._integer_marks(counts_BPHW.dtype)
        highest = torch.iinfo(same_BPHW.dtype).max
        wrap = 2 * (highest + 1)
        valid_BPHW = same_BPHW != (first if first <= highest else first - wrap)
        for mark in others:
            valid_BPHW &= same_BPHW != (mark if mark <= highest else mark - wrap)
        return valid_BPHW

    def marks(self, dtype: torch.dtype) -> tuple[float, ...]:
        """Return the values that mark bad pixels of a dtype, but for ranges of floating point."""
        if not self._use_dtype:
            return ()
        if dtype.is_floating_point:
            return (*FLOAT_SENTINELS, *self._listed)
        return tuple(self._integer_marks(dtype))

    def _integer_marks(self, dtype: torch.dtype) -> list[int]:
        ends = torch.iinfo(dtype)
        listed = [int(v) for v in self._listed if v == int(v) and ends.min <= v <= ends.max]
        return [*_ENDS[dtype], *listed]


def pack_masks(bad_BPHW: Tensor) -> Tensor:
    """Return masks as `peaknet_predict.pixels.pack_mask` writes them, (B, K) uint8."""
    bad_BN = bad_BPHW.flatten(1)
    bad_BN = nn.functional.pad(bad_BN, (0, -bad_BN.shape[1] % 8))
    # Eight bools are one word of eight bytes, each 0 or 1. The factor moves all eight bits into the
    # word's last byte, and no two products meet on the way there.
    words_BK = bad_BN.contiguous().view(torch.int64)
    factor = sum(1 << (56 - 7 * bit) for bit in _BITS)
    return (words_BK * factor).view(torch.uint8)[:, 7::8].contiguous()


def unpack_masks(bits_BK: Tensor, shape_BPHW: torch.Size) -> Tensor:
    """Return the masks, (B, P, H, W) bool, that `pack_masks` made bits of."""
    shifts_8 = torch.tensor(_BITS, dtype=torch.uint8, device=bits_BK.device)
    bits_BN = ((bits_BK.unsqueeze(-1) >> shifts_8) & 1).flatten(1)
    return bits_BN[:, : math.prod(shape_BPHW[1:])].reshape(shape_BPHW).to(torch.bool)
