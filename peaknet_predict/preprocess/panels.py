"""Steps that move pixels without changing them: crop, pad, cut into patches, merge panels.

Shape legend: B events, P panels of an event, H rows, W columns, M peaks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.preprocess.base import Shape, Transform, event_shape
from peaknet_predict.types import Peaks


class _Window(Transform):
    """Common to `Crop` and `Pad`: a frame of a fixed size, at an offset to the input."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be positive, not {height} and {width}")
        self.height, self.width = height, width

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return (P, height, width), see `Transform.output_shape`."""
        self.offset(shape_PHW)
        return shape_PHW[0], self.height, self.width

    def offset(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return the row and column of the input's frame that becomes (0, 0)."""
        raise NotImplementedError

    def to_original(self, peaks_M3: Peaks, input_shape_PHW: Shape) -> Peaks:
        """Add the offset, see `Transform.to_original`."""
        return peaks_M3 + np.array([0, *self.offset(input_shape_PHW)], dtype=np.float64)


class Crop(_Window):
    """Cut every panel to a fixed size.

    Parameters
    ----------
    height, width
        Pixels to keep.
    style
        'top-left' keeps rows and columns from 0; 'center' cuts equally on both sides (with an odd
        number of pixels, one more at the bottom and right).
    allow_crop
        Whether pixels may be left out, and their peaks with them. By default panels larger than the
        crop are an error, and their events are refused.
    """

    def __init__(
        self,
        height: int,
        width: int,
        style: Literal["top-left", "center"] = "top-left",
        allow_crop: bool = False,
    ) -> None:
        super().__init__(height, width)
        if style not in ("top-left", "center"):
            raise ValueError(f"style of Crop is 'top-left' or 'center', not {style!r}")
        self.style = style
        self.allow_crop = allow_crop

    def offset(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return the first row and column to keep; raise ValueError for panels that do not fit."""
        _, height, width = shape_PHW
        if height < self.height or width < self.width:
            raise ValueError(
                f"panels of {height}x{width} are smaller than the crop to {self.height}x"
                f"{self.width}: put Pad(height={max(height, self.height)}, "
                f"width={max(width, self.width)}) before it, or instead of it"
            )
        if not self.allow_crop and (height, width) != (self.height, self.width):
            lost = 1 - self.height * self.width / (height * width)
            raise ValueError(
                f"the crop to {self.height}x{self.width} leaves out {lost:.0%} of a panel of "
                f"{height}x{width}, and the peaks there: take PadToMultiple or Patchify"
                f"(height={self.height}, width={self.width}) instead, or set allow_crop: true"
            )
        if self.style == "top-left":
            return 0, 0
        return (height - self.height) // 2, (width - self.width) // 2

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Cut images and mask; views, nothing is copied."""
        y, x = self.offset(event_shape(images_BPHW))
        rows, columns = slice(y, y + self.height), slice(x, x + self.width)
        return images_BPHW[..., rows, columns], valid_BPHW[..., rows, columns]


class Pad(_Window):
    """Enlarge every panel to a fixed size with zeros, which are invalid pixels.

    Parameters
    ----------
    height, width
        Pixels of the enlarged panel.
    style
        'center' adds equally on both sides (with an odd number of pixels, one more at the bottom
        and right); 'bottom-right' adds there only.
    """

    def __init__(
        self, height: int, width: int, style: Literal["center", "bottom-right"] = "center"
    ) -> None:
        super().__init__(height, width)
        if style not in ("center", "bottom-right"):
            raise ValueError(f"style of Pad is 'center' or 'bottom-right', not {style!r}")
        self.style = style

    def offset(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return minus the padding at top and left; raise ValueError for too large panels."""
        _, height, width = shape_PHW
        if height > self.height or width > self.width:
            raise ValueError(
                f"panels of {height}x{width} are larger than the padding to {self.height}x"
                f"{self.width}: enlarge it to Pad(height={max(height, self.height)}, "
                f"width={max(width, self.width)}), or take PadToMultiple instead"
            )
        if self.style == "bottom-right":
            return 0, 0
        return -((self.height - height) // 2), -((self.width - width) // 2)

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pad the images with 0 and the mask with False."""
        shape_PHW = event_shape(images_BPHW)
        y, x = self.offset(shape_PHW)
        left, right = -x, self.width - shape_PHW[2] + x
        top, bottom = -y, self.height - shape_PHW[1] + y
        padding = (left, right, top, bottom)
        return F.pad(images_BPHW, padding), F.pad(valid_BPHW, padding, value=False)


class PadToMultiple(Transform):
    """Enlarge every panel with zeros, invalid pixels, to whole multiples of a number of pixels.

    They are added at the bottom and right, so coordinates stay. PeakNet takes panels whose sides
    are multiples of 32: with this step it takes those of any detector.

    Parameters
    ----------
    multiple
        Pixels of which height and width become multiples.
    """

    def __init__(self, multiple: int = 32) -> None:
        super().__init__()
        if multiple < 1:
            raise ValueError(f"multiple must be positive, not {multiple}")
        self.multiple = multiple

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pad the images with 0 and the mask with False."""
        _, height, width = event_shape(images_BPHW)
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad(images_BPHW, padding), F.pad(valid_BPHW, padding, value=False)

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return the enlarged shape, see `Transform.output_shape`."""
        panels, height, width = shape_PHW
        return panels, height + -height % self.multiple, width + -width % self.multiple


class Patchify(Transform):
    """Cut every panel into patches without overlap; each patch is a panel from then on.

    Panels are filled up with zeros (invalid pixels) at the bottom and right to whole patches. The
    patches of a panel follow one another in raster order.

    Parameters
    ----------
    height, width
        Pixels of a patch.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be positive, not {height} and {width}")
        self.height, self.width = height, width

    def _grid(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return how many patches a panel has along y and x."""
        return -(-shape_PHW[1] // self.height), -(-shape_PHW[2] // self.width)

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Cut images and mask: (B, P, H, W) to (B, P*ny*nx, height, width)."""
        shape_PHW = event_shape(images_BPHW)
        ny, nx = self._grid(shape_PHW)
        fill = Pad(ny * self.height, nx * self.width, style="bottom-right")
        images_BPHW, valid_BPHW = fill(images_BPHW, valid_BPHW)
        split = (-1, shape_PHW[0], ny, self.height, nx, self.width)
        return (
            images_BPHW.reshape(split).transpose(3, 4).flatten(1, 3),
            valid_BPHW.reshape(split).transpose(3, 4).flatten(1, 3),
        )

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return (P*ny*nx, height, width), see `Transform.output_shape`."""
        ny, nx = self._grid(shape_PHW)
        return shape_PHW[0] * ny * nx, self.height, self.width

    def to_original(self, peaks_M3: Peaks, input_shape_PHW: Shape) -> Peaks:
        """Put the patches together again, see `Transform.to_original`."""
        ny, nx = self._grid(input_shape_PHW)
        panel_M, patch_M = np.divmod(peaks_M3[:, 0], ny * nx)
        row_M, column_M = np.divmod(patch_M, nx)
        y_M = peaks_M3[:, 1] + row_M * self.height
        x_M = peaks_M3[:, 2] + column_M * self.width
        return np.stack([panel_M, y_M, x_M], axis=1)


class MergeBatchChannelDims(Transform):
    """Make every panel an image of one channel: (B, P, H, W) to (B*P, 1, H, W).

    Image ``n`` is panel ``n % P`` of event ``n // P``.
    """

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Merge events and panels of images and mask."""
        return images_BPHW.flatten(0, 1).unsqueeze(1), valid_BPHW.flatten(0, 1).unsqueeze(1)
