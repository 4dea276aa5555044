"""The bidirectional feature pyramid (BiFPN): features of all resolutions exchanged.

Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object Detection", arXiv:1911.09070, section
3; with the fast normalised fusion of its section 3.3. PeakNet's version differs in details that its
weight files fix: a residual around every node, LayerNorm and GELU instead of BatchNorm and Swish,
and "depthwise" convolutions of kernel size 1.

Shape legend: N panels of a batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.convnextv2 import ChannelNorm

_FUSION_EPS = 1e-5


def resize_bilinear(x_NCHW: Tensor, scale: float) -> Tensor:
    """Resize H and W by `scale`, in float32 whatever the dtype; pixel areas stay aligned."""
    return F.interpolate(
        x_NCHW.float(), scale_factor=scale, mode="bilinear", align_corners=False
    ).to(x_NCHW.dtype)


class SeparableConv(nn.Module):
    """A scale per channel and a 1x1 convolution: PeakNet's depthwise kernels have one pixel."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(
            num_features, num_features, kernel_size=1, groups=num_features, bias=False
        )
        self.pointwise_conv = nn.Conv2d(num_features, num_features, kernel_size=1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Mix the channels of (N, C, H, W) features; the shape stays."""
        features_NCHW: Tensor = self.pointwise_conv(self.depthwise_conv(x_NCHW))
        return features_NCHW


class BiFPNBlock(nn.Module):
    """One top-down and one bottom-up pass over the pyramid.

    Parameters
    ----------
    num_features
        C, the same at all levels.
    num_levels
        Levels of the pyramid, at least 2.
    base_level
        Number of the finest level; only in the names of the parameters.
    """

    w_q_mask: Tensor

    def __init__(self, num_features: int, num_levels: int, base_level: int) -> None:
        super().__init__()
        self.base_level = base_level
        # A row for each fusion: of w_m from the coarsest pair of levels to the finest, of w_q from
        # fine to coarse.
        self.w_m = nn.Parameter(torch.ones(num_levels - 1, 2))
        self.w_q = nn.Parameter(torch.ones(num_levels - 1, 3))
        mask = torch.ones(num_levels - 1, 3, dtype=torch.bool)
        # At the top, input and middle node are the same tensor, which counts once.
        mask[-1, 0] = False
        self.register_buffer("w_q_mask", mask)

        levels = range(base_level, base_level + num_levels)
        names = [f"m{level}" for level in levels[:-1]] + [f"q{level}" for level in levels[1:]]
        self.conv = nn.ModuleDict(
            {
                name: nn.Sequential(
                    SeparableConv(num_features), ChannelNorm(num_features), nn.GELU()
                )
                for name in names
            }
        )

    def fusion_weights(self) -> tuple[Tensor, Tensor]:
        """Return the factors of ``w_m`` (levels - 1, 2) and ``w_q`` (levels - 1, 3), normalised."""
        # Fast normalised fusion: cheaper than a softmax and close to it (arXiv:1911.09070).
        w_m = F.relu(self.w_m)
        w_m = w_m / (w_m.sum(dim=1, keepdim=True) + _FUSION_EPS)
        w_q = F.relu(self.w_q) * self.w_q_mask
        w_q = w_q / (w_q.sum(dim=1, keepdim=True) + _FUSION_EPS)
        return w_m, w_q

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Exchange features between the levels.

        Parameters
        ----------
        pyramid
            From fine to coarse, each (N, C, H, W) with half the H and W of the previous one.

        Returns
        -------
        list of Tensor
            The same shapes.
        """
        w_m, w_q = self.fusion_weights()
        top = len(pyramid) - 1

        # Top-down; `middle` is filled from the coarsest level to the finest.
        middle = [pyramid[top]]
        for row, level in enumerate(reversed(range(top))):
            fused = w_m[row, 0] * pyramid[level] + w_m[row, 1] * resize_bilinear(middle[-1], 2.0)
            middle.append(self.conv[f"m{self.base_level + level}"](fused) + pyramid[level])
        middle.reverse()

        # Bottom-up.
        outputs = [middle[0]]
        for row, level in enumerate(range(1, top + 1)):
            fused = (
                w_q[row, 0] * pyramid[level]
                + w_q[row, 1] * middle[level]
                + w_q[row, 2] * resize_bilinear(outputs[-1], 0.5)
            )
            outputs.append(self.conv[f"q{self.base_level + level}"](fused) + pyramid[level])
        return outputs


class BiFPN(nn.Module):
    """Several `BiFPNBlock` in a row.

    Parameters
    ----------
    num_features
        C, the same at all levels.
    num_levels
        Levels of the pyramid, at least 2.
    num_blocks
        How many blocks.
    base_level
        Number of the finest level; only in the names of the parameters.
    """

    def __init__(
        self, num_features: int, num_levels: int, num_blocks: int, base_level: int
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(BiFPNBlock(num_features, num_levels, base_level) for _ in range(num_blocks))
        )

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Apply all blocks; takes and returns what `BiFPNBlock.forward` does."""
        outputs: list[Tensor] = self.blocks(pyramid)
        return outputs
