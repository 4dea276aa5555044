"""The tensors that `PeakFinder.enqueue` is given, and whether it can take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.peaks.kernels.variants import FLOATS, PIXEL_DTYPES


@dataclass(frozen=True, slots=True, eq=False)
class FinderInput:
    """The arguments of `PeakFinder.enqueue`, which describes them."""

    logits: Tensor | None
    class_map: Tensor | None
    upsampling: int
    valid: Tensor | None
    pixels: Tensor | None

    @property
    def source(self) -> Tensor:
        """What the mask is made of."""
        source = self.class_map if self.logits is None else self.logits
        if source is None or (self.logits is not None and self.class_map is not None):
            raise TypeError("peaks are found in logits or in a class map: pass one of them")
        return source

    def check(self, max_panels: int, height: int, width: int, device: torch.device) -> None:
        """Raise TypeError or ValueError if the finder cannot take these tensors."""
        num_panels = self.source.shape[0] if self.source.ndim else 0
        if num_panels > max_panels:
            raise ValueError(f"{num_panels} panels; this finder was made for up to {max_panels}")
        shape_NHW = (num_panels, height, width)
        if self.logits is not None:
            _require_dtype("logits", self.logits, set(FLOATS))
            self._check_shape_of_logits(self.logits, shape_NHW)
        if self.class_map is not None:
            if self.class_map.is_floating_point() or self.class_map.is_complex():
                raise TypeError(
                    f"a class map holds integers or booleans, not {self.class_map.dtype}: "
                    "pass logits as logits"
                )
            _require_shape("class_map", self.class_map, shape_NHW)
        if self.valid is not None:
            _require_dtype("valid", self.valid, {torch.bool, torch.uint8})
            _require_shape("valid", self.valid, shape_NHW)
        if self.pixels is not None:
            _require_dtype("pixels", self.pixels, set(PIXEL_DTYPES))
            _require_shape("pixels", self.pixels, shape_NHW)
        for tensor in (self.logits, self.class_map, self.valid, self.pixels):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"a tensor is on {tensor.device}, this finder on {device}")

    def _check_shape_of_logits(self, logits: Tensor, shape_NHW: tuple[int, int, int]) -> None:
        num_panels, height, width = shape_NHW
        if self.upsampling == 1:
            if logits.ndim != 4 or logits.shape[1] < 2:
                raise ValueError(
                    f"logits have the shape (N, C, H, W) with C >= 2, not {tuple(logits.shape)}"
                )
            _require_shape("logits without their classes", logits[:, 0], shape_NHW)
        elif self.upsampling == 4:
            if height % 4 or width % 4:
                raise ValueError(f"panels of {height} x {width} are not four times anything")
            _require_shape("logits", logits, (num_panels, 2, height // 4, width // 4))
        else:
            raise ValueError(f"upsampling is {self.upsampling}; it can be 1 or 4")


def _require_dtype(name: str, tensor: Tensor, allowed: set[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(sorted(map(str, allowed)))
        raise TypeError(f"{name} may be {names}, not {tensor.dtype}")


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the shape {shape}, not {tuple(tensor.shape)}")
