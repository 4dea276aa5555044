"""From raw detector frames to the network's input, on the device, and the peaks' way back.

A chain of small modules, each of which maps ``(images, valid)`` to ``(images, valid)``:

- images are float32; a NaN or infinite pixel stays so up to `InstanceNorm`, which leaves it out of
  the statistics and puts the mean in its place;
- ``valid`` is False for pixels that are no measurement: NaN, infinite or padding.

Nothing here waits for the device or depends on the data in its shapes, so the whole chain compiles
with the network. Shape legend: B events, P panels of an event, N = B*P, H rows, W columns, M peaks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.types import Peaks

Shape = tuple[int, int, int]
"""(P, H, W) of an event."""


class Prepared(NamedTuple):
    """What the network gets.

    Attributes
    ----------
    images_N1HW
        (N, 1, H, W) float32, finite.
    valid_N1HW
        (N, 1, H, W) bool; False where the pixel is padding, or was NaN or infinite.
    bad_pixels_B
        (B,) int64, NaN or infinite pixels in each event's original frame.
    """

    images_N1HW: Tensor
    valid_N1HW: Tensor
    bad_pixels_B: Tensor


class Transform(nn.Module):
    """One step of the preprocessing; as it stands, the step that changes nothing.

    Subclasses override what they change.
    """

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Transform float32 images and the bool mask of their valid pixels."""
        return images_BPHW, valid_BPHW

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return what becomes of an event of this shape.

        Raises
        ------
        ValueError
            If the step cannot take the shape.
        """
        return shape_PHW

    def to_original(self, peaks_M3: Peaks, input_shape_PHW: Shape) -> Peaks:
        """Move peaks (panel, y, x) from this step's output back to its input of that shape."""
        return peaks_M3


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
        'top-left' keeps rows and columns from 0; 'center' cuts equally on both sides (of an odd
        number of pixels one more at the bottom and right).
    """

    def __init__(
        self, height: int, width: int, style: Literal["top-left", "center"] = "top-left"
    ) -> None:
        super().__init__(height, width)
        if style not in ("top-left", "center"):
            raise ValueError(f"style of Crop is 'top-left' or 'center', not {style!r}")
        self.style = style

    def offset(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return the first row and column that stay; ValueError for panels that are too small."""
        _, height, width = shape_PHW
        if height < self.height or width < self.width:
            raise ValueError(
                f"panels of {height}x{width} are smaller than the crop to {self.height}x"
                f"{self.width}: put Pad(height={max(height, self.height)}, "
                f"width={max(width, self.width)}) before it, or instead of it"
            )
        if self.style == "top-left":
            return 0, 0
        return (height - self.height) // 2, (width - self.width) // 2

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Cut images and mask; views, nothing is copied."""
        y, x = self.offset(_event_shape(images_BPHW))
        rows, columns = slice(y, y + self.height), slice(x, x + self.width)
        return images_BPHW[..., rows, columns], valid_BPHW[..., rows, columns]


class Pad(_Window):
    """Enlarge every panel to a fixed size with zeros, which are invalid pixels.

    Parameters
    ----------
    height, width
        Pixels of the enlarged panel.
    style
        'center' adds equally on both sides (of an odd number of pixels one more at the bottom and
        right); 'bottom-right' adds there only.
    """

    def __init__(
        self, height: int, width: int, style: Literal["center", "bottom-right"] = "center"
    ) -> None:
        super().__init__(height, width)
        if style not in ("center", "bottom-right"):
            raise ValueError(f"style of Pad is 'center' or 'bottom-right', not {style!r}")
        self.style = style

    def offset(self, shape_PHW: Shape) -> tuple[int, int]:
        """Return minus the padding at top and left; ValueError for panels that are too large."""
        _, height, width = shape_PHW
        if height > self.height or width > self.width:
            raise ValueError(
                f"panels of {height}x{width} are larger than the padding to {self.height}x"
                f"{self.width}: put Crop(height={min(height, self.height)}, "
                f"width={min(width, self.width)}) before it, or enlarge it"
            )
        if self.style == "bottom-right":
            return 0, 0
        return -((self.height - height) // 2), -((self.width - width) // 2)

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pad the images with 0 and the mask with False."""
        shape_PHW = _event_shape(images_BPHW)
        y, x = self.offset(shape_PHW)
        left, right = -x, self.width - shape_PHW[2] + x
        top, bottom = -y, self.height - shape_PHW[1] + y
        padding = (left, right, top, bottom)
        return F.pad(images_BPHW, padding), F.pad(valid_BPHW, padding, value=False)


class InstanceNorm(Transform):
    """Bring each event to mean 0 and variance 1, over all its panels together.

    ``(x - mean) / sqrt(var + eps)`` with the biased variance, in float32. Pixels that are NaN or
    infinite take no part and become 0, the mean. Padded pixels do take part, with the value 0: so
    the weights were trained.

    Parameters
    ----------
    eps
        Added to the variance, square detector counts.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise the images; the mask stays."""
        # Not `valid`: that leaves out the padding too.
        finite_BPHW = torch.isfinite(images_BPHW)
        over = (1, 2, 3)
        # An event without a single good pixel must not divide by zero.
        count_B111 = finite_BPHW.sum(dim=over, keepdim=True).clamp(min=1).to(torch.float32)
        images_BPHW = torch.where(finite_BPHW, images_BPHW, 0.0)
        mean_B111 = images_BPHW.sum(dim=over, keepdim=True) / count_B111
        # Deviations before squares: detector offsets of 1e4 would leave no digits in float32.
        deviation_BPHW = torch.where(finite_BPHW, images_BPHW - mean_B111, 0.0)
        variance_B111 = deviation_BPHW.square().sum(dim=over, keepdim=True) / count_B111
        return deviation_BPHW * torch.rsqrt(variance_B111 + self.eps), valid_BPHW


class Patchify(Transform):
    """Cut every panel into patches without overlap, each a panel of its own from then on.

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
        shape_PHW = _event_shape(images_BPHW)
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


class Preprocess(nn.Module):
    """The chain of transforms, from raw frames to the network's input.

    Parameters
    ----------
    transforms
        In order. Parity with trained weights: `Crop` or `Pad`, `InstanceNorm`,
        `MergeBatchChannelDims`. The last is always `MergeBatchChannelDims`; `Crop` and `Pad` stand
        before `InstanceNorm`, `Patchify` anywhere before the end.

    Raises
    ------
    ValueError
        If the transforms stand in an order that gives the network something else.
    """

    def __init__(self, transforms: list[Transform]) -> None:
        super().__init__()
        _check_order(transforms)
        self.transforms = nn.ModuleList(transforms)

    def forward(self, images_BPHW: Tensor) -> Prepared:
        """Prepare a batch.

        Parameters
        ----------
        images_BPHW
            (B, P, H, W) of any real dtype, detector counts.

        Raises
        ------
        ValueError
            If a transform cannot take the panels' size.
        """
        if images_BPHW.ndim != 4:
            raise ValueError(
                f"a batch of events has the shape (B, P, H, W), not {tuple(images_BPHW.shape)}"
            )
        # First of all, so that raw counts of 2 or 4 bytes travel and everything else is float32
        # (few operations know uint16).
        images_BPHW = images_BPHW.to(torch.float32)
        valid_BPHW = torch.isfinite(images_BPHW)
        bad_pixels_B = (~valid_BPHW).sum(dim=(1, 2, 3))
        for transform in self.transforms:
            images_BPHW, valid_BPHW = transform(images_BPHW, valid_BPHW)
        # Without an InstanceNorm bad pixels are still there.
        images_N1HW = torch.where(torch.isfinite(images_BPHW), images_BPHW, 0.0)
        return Prepared(images_N1HW, valid_BPHW, bad_pixels_B)

    def output_shape(self, shape_PHW: Shape) -> Shape:
        """Return the shape of a prepared event, (panels, height, width), without making one.

        Raises
        ------
        ValueError
            If a transform cannot take the shape; the message names the remedy.
        """
        return self._shapes(shape_PHW)[-1]

    def to_original(
        self, peaks_M3: Peaks, input_shape_PHW: Shape
    ) -> tuple[Peaks, npt.NDArray[np.bool_]]:
        """Move the peaks of one event from prepared panels back to its original frame.

        Parameters
        ----------
        peaks_M3
            (M, 3) float64: panel of the prepared event, y, x.
        input_shape_PHW
            Shape of the original event.

        Returns
        -------
        peaks, keep_M
            The peaks of the original frame, (sum of keep_M, 3) float64; and (M,) bool, which of the
            given ones they are. Left out are peaks whose centre lies in padding.
        """
        peaks_M3 = np.asarray(peaks_M3, dtype=np.float64).reshape(-1, 3)
        input_shapes = self._shapes(input_shape_PHW)[:-1]
        keep_M = np.ones(len(peaks_M3), dtype=np.bool_)
        for transform, shape_PHW in reversed(list(zip(self.transforms, input_shapes, strict=True))):
            assert isinstance(transform, Transform)
            peaks_M3 = transform.to_original(peaks_M3, shape_PHW)
            # A pixel reaches half its size to each side of its centre. Checked at every step:
            # beyond the border of one patch, `Patchify` would find pixels of the next.
            upper_3 = np.array(shape_PHW) - 0.5
            keep_M &= np.all((peaks_M3 >= -0.5) & (peaks_M3 < upper_3), axis=1)
        return peaks_M3[keep_M], keep_M

    def _shapes(self, shape_PHW: Shape) -> list[Shape]:
        """Return the event's shape before the first transform and after each."""
        shapes = [shape_PHW]
        for transform in self.transforms:
            assert isinstance(transform, Transform)
            shapes.append(transform.output_shape(shapes[-1]))
        return shapes


def _event_shape(images_BPHW: Tensor) -> Shape:
    _, panels, height, width = images_BPHW.shape
    return panels, height, width


def _check_order(transforms: list[Transform]) -> None:
    names = [type(transform).__name__ for transform in transforms]
    chain = " -> ".join(names) or "nothing"
    for transform, name in zip(transforms, names, strict=True):
        if not isinstance(transform, Transform):
            raise ValueError(f"{name} is not a Transform of peaknet_predict.preprocess")
    if names.count("MergeBatchChannelDims") != 1 or names[-1] != "MergeBatchChannelDims":
        raise ValueError(
            f"transforms must end with MergeBatchChannelDims, and have no other; got {chain}"
        )
    if names.count("InstanceNorm") > 1:
        raise ValueError(f"one InstanceNorm is enough: remove the others from {chain}")
    if "InstanceNorm" in names:
        for name in names[names.index("InstanceNorm") + 1 :]:
            if name in ("Crop", "Pad"):
                raise ValueError(
                    f"{name} stands after InstanceNorm, whose statistics must be those of the "
                    f"network's input: move {name} before it in {chain}"
                )
