"""The backbone's parts of the fast PeakNet, each made from the plain network's part.

Shape legend: as in `ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.convnextv2 import ChannelNorm, ConvNextV2Block
from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast.weights import Weights, behind_norm, bias_of


class FastStem(Weights):
    """Patches of 4x4 pixels to normalised vectors."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: ChannelNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrix("weight", conv.weight.flatten(1), dtype)
        self._vector("bias", bias_of(conv))
        self._vector("norm_weight", norm.weight)
        self._vector("norm_bias", norm.bias)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Return (N, H/4, W/4, C) features of images."""
        out: Tensor = ops.stem(
            images_N1HW, self.weight, self.bias, self.norm_weight, self.norm_bias
        )
        return out


class FastBlock(Weights):
    """A block of the backbone in four passes: depthwise, expand, the responses of GRN, contract."""

    kernel: Tensor
    kernel_scale: Tensor
    kernel_bias: Tensor
    weight1: Tensor
    column_sums1: Tensor
    bias1: Tensor
    response_weight: Tensor
    weight2: Tensor
    bias2: Tensor

    def __init__(self, block: ConvNextV2Block, dtype: torch.dtype) -> None:
        super().__init__()
        kernel_49C = block.dwconv.weight.flatten(1).t()
        # A power of two: it changes no digit.
        self._vector("kernel_scale", kernel_49C.abs().sum(0).clamp_min(1e-30).log2().ceil().exp2())
        kernel_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        self._matrix("kernel", kernel_49C / self.kernel_scale, kernel_dtype)
        self._vector("kernel_bias", bias_of(block.dwconv))
        weight, bias = behind_norm(block.layernorm, block.pwconv1.weight, block.pwconv1.bias)
        self._matrix("weight1", weight, dtype)
        # From the rounded weights, so that exactly what the product contains is subtracted.
        self._vector("column_sums1", self.weight1.float().sum(1))
        self._vector("bias1", bias)
        self._vector("response_weight", block.grn.weight.flatten())
        self._matrix("weight2", block.pwconv2.weight, dtype)
        self._vector("bias2", block.pwconv2.bias + block.pwconv2.weight @ block.grn.bias.flatten())

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Transform features; shape and dtype stay."""
        convolved_NHWC, moments_M2 = ops.depthwise(
            x_NHWC, self.kernel, self.kernel_scale, self.kernel_bias
        )
        hidden_NHWK, energy_NTK = ops.expand(
            convolved_NHWC, moments_M2, self.weight1, self.column_sums1, self.bias1
        )
        scale_NK = ops.response(energy_NTK, self.response_weight)
        out: Tensor = ops.contract(hidden_NHWK, scale_NK, self.weight2, self.bias2, x_NHWC)
        return out


class FastLinear(Weights):
    """A matrix product over the channels of each pixel."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrix("weight", weight, dtype)
        self._matrix("bias", bias, dtype)

    def forward(self, standardised_NHWC: Tensor) -> Tensor:
        """Multiply features that `ops.standardise` returned."""
        return F.linear(standardised_NHWC, self.weight, self.bias)


class FastDownsampling(Weights):
    """The affine part of a norm and a 2x2 convolution with stride 2, which sees patches of 2x2."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: ChannelNorm, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight_OHWC = (conv.weight * norm.weight[:, None, None]).permute(0, 2, 3, 1)
        bias = bias_of(conv) + torch.einsum("ochw,c->o", conv.weight, norm.bias)
        self._matrix("weight", weight_OHWC.flatten(1), dtype)
        self._matrix("bias", bias, dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """Multiply patches that `ops.standardise_patches` returned."""
        return F.linear(patches, self.weight, self.bias)


def adapter_weights(norm: ChannelNorm, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the affine part of a norm and a 1x1 convolution."""
    return behind_norm(norm, conv.weight.flatten(1), bias_of(conv))
