"""A network and a preprocessing step of your own: copy this folder and change what you like.

Shape legend: B events, P panels of an event, N = B*P panels of a batch, C classes, H rows, W
columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.preprocess import Transform


class SquareRoot(Transform):
    """Take the square root of the counts, so that photon noise is as large everywhere.

    A step gets float32 images and a mask of their valid pixels, and returns both. Bad pixels are
    NaN by then, and NaN they stay; `InstanceNorm` makes them 0. A step that moves pixels also needs
    `output_shape` and `to_original` (see `peaknet_predict.preprocess.Crop`).
    """

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the images; the mask stays. Counts below 0 keep their sign."""
        return images_BPHW.sign() * images_BPHW.abs().sqrt(), valid_BPHW


class SmallUNet(nn.Module):
    """A U-Net of two levels, small enough to train on a CPU.

    Parameters
    ----------
    channels
        Channels of the finer level; the coarser one has twice as many.
    """

    weights_sha256: str | None = None
    """Says that the parameters are random until a file is loaded (`model.init_args.weights`).
    `predict` refuses a network that says so and has no weights."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.fine = _convolutions(1, channels)
        self.coarse = _convolutions(channels, 2 * channels)
        self.merged = _convolutions(3 * channels, channels)
        self.classes = nn.Conv2d(channels, 2, kernel_size=1)

    def check_shape(self, height: int, width: int) -> None:
        """Raise ValueError for panels that it cannot take: such events are refused by name."""
        if height % 2 or width % 2:
            raise ValueError(
                f"SmallUNet takes panels of even height and width, not {height} x {width}: add "
                "peaknet_predict.preprocess.PadToMultiple to the preprocessing"
            )

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Return logits (N, 2, H, W); class 0 is background, class 1 is peak."""
        fine = self.fine(images_N1HW)
        coarse = self.coarse(F.max_pool2d(fine, 2))
        coarse = F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        logits_N2HW: Tensor = self.classes(self.merged(torch.cat([fine, coarse], dim=1)))
        return logits_N2HW


def _convolutions(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.GroupNorm(4, channels_out),
        nn.GELU(),
        nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1),
        nn.GELU(),
    )
