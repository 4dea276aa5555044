"""The pyramid's parts of the fast PeakNet, made from the plain network's `BiFPNBlock`.

Shape legend: as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.bifpn import BiFPNBlock, SeparableConv
from peaknet_predict.models.convnextv2 import ChannelNorm
from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast.weights import Weights


class _BaseNode(Weights):
    """The finest node on the way down and the adapter before it: no other node reads that level."""

    inner: Tensor
    coarse: Tensor
    bias: Tensor
    outer: Tensor
    added: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(
        self,
        block: BiFPNBlock,
        fusion: list[float],
        adapter: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        weight_FF, norm = _transform(block, f"m{block.base_level}")
        adapter_FC, bias_F = adapter
        same, other = fusion
        # Resizing and product commute, so the level above is multiplied while it is small. The
        # normalisation takes the mean over the features away: it is left out at once.
        self._matrix("inner", same * _centred(weight_FF @ adapter_FC), dtype)
        self._matrix("coarse", other * _centred(weight_FF), dtype)
        self._matrix("bias", same * _centred(weight_FF @ bias_F), dtype)
        self._matrix("outer", adapter_FC, dtype)
        self._vector("added", bias_F)
        self._vector("norm_weight", norm.weight)
        self._vector("norm_bias", norm.bias)

    def forward(self, x_NHWC: Tensor, above_NHWC: Tensor) -> Tensor:
        out: Tensor = ops.base_node(
            x_NHWC,
            F.linear(above_NHWC, self.coarse, self.bias),
            self.inner,
            self.outer,
            self.norm_weight,
            self.norm_bias,
            self.added,
        )
        return out


class FastPyramidBlock(Weights):
    """A block of the BiFPN: a node for each level on the way down and on the way up.

    ``base_adapter`` is weight (F, C) and bias (F) of the finest level's adapter, if the first of
    the block's inputs are the backbone's features, see `_BaseNode`.
    """

    def __init__(
        self,
        block: BiFPNBlock,
        num_levels: int,
        dtype: torch.dtype,
        base_adapter: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.top = num_levels - 1
        w_m, w_q = block.fusion_weights()
        # By level: on the way down to all but the top, on the way up to all but the base.
        self.down_fusion = [w_m[self.top - 1 - level].tolist() for level in range(self.top)]
        self.up_fusion = [w_q[level].tolist() for level in range(self.top)]
        self.base = (
            None
            if base_adapter is None
            else _BaseNode(block, self.down_fusion[0], base_adapter, dtype)
        )
        for level in range(self.top):
            if level > 0 or self.base is None:
                self._add(f"down{level}", block, f"m{block.base_level + level}", dtype)
            self._add(f"up{level + 1}", block, f"q{block.base_level + level + 1}", dtype)

    def _add(self, name: str, block: BiFPNBlock, source: str, dtype: torch.dtype) -> None:
        weight_FF, norm = _transform(block, source)
        self._matrix(f"{name}_weight", weight_FF, dtype)
        self._vector(f"{name}_norm_weight", norm.weight)
        self._vector(f"{name}_norm_bias", norm.bias)

    def _node(
        self,
        name: str,
        same_NHWC: Tensor,
        middle_NHWC: Tensor | None,
        other_NHWC: Tensor,
        fusion: list[float],
    ) -> Tensor:
        out: Tensor = ops.node(
            same_NHWC,
            middle_NHWC,
            other_NHWC,
            fusion,
            self.get_buffer(f"{name}_weight"),
            self.get_buffer(f"{name}_norm_weight"),
            self.get_buffer(f"{name}_norm_bias"),
        )
        return out

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Exchange features between the levels, see `BiFPNBlock.forward`."""
        middle = {self.top: pyramid[self.top]}
        for level in reversed(range(self.top)):
            if level == 0 and self.base is not None:
                middle[0] = self.base(pyramid[0], middle[1])
                continue
            same, other = self.down_fusion[level]
            fusion = [same, 0.0, other]
            middle[level] = self._node(
                f"down{level}", pyramid[level], None, middle[level + 1], fusion
            )
        outputs = [middle[0]]
        for level in range(1, self.top + 1):
            same, mid, other = self.up_fusion[level - 1]
            # At the top the middle feature is the input itself.
            at_top = level == self.top
            outputs.append(
                self._node(
                    f"up{level}",
                    pyramid[level],
                    None if at_top else middle[level],
                    outputs[-1],
                    [same + mid, 0.0, other] if at_top else [same, mid, other],
                )
            )
        return outputs


def _transform(block: BiFPNBlock, name: str) -> tuple[Tensor, ChannelNorm]:
    """Return the matrix of a node, its scale per channel included, and the norm behind it."""
    layers = cast(nn.Sequential, block.conv[name])
    conv, norm = cast(SeparableConv, layers[0]), cast(ChannelNorm, layers[1])
    weight_FF = conv.pointwise_conv.weight.flatten(1) * conv.depthwise_conv.weight.flatten()
    return weight_FF, norm


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(0)
