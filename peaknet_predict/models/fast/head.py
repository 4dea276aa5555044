"""The head's part of the fast PeakNet, made from the plain network's `LateralLayer`.

Shape legend: as in `ops`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.fast import enlarge_ops, ops
from peaknet_predict.models.fast.weights import Weights, bias_of
from peaknet_predict.models.peaknet import LateralLayer, PeakNet


class FastLateral(Weights):
    """The head of one level, up to the final enlargement, added to another level's.

    That is (N, h, w, 2) float32 logits; or, where the last enlargement is learned, log odds and
    taps as `enlarge_ops.project` makes them. The last doubling is left out: it commutes with
    either matrix, and is done where the sum of the levels that need it is added to the finest.

    Parameters
    ----------
    lateral
        The plain network's.
    weight_KC, bias_K
        The classifier, or the matrix of `odds_and_taps`.
    learned
        Whether the last enlargement is learned.
    dtype
        Of the matrices.
    """

    def __init__(
        self,
        lateral: LateralLayer,
        weight_KC: Tensor,
        bias_K: Tensor,
        learned: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_layers = len(lateral.layers)
        for i, layers in enumerate(lateral.layers):
            layers = cast(nn.Sequential, layers)
            conv, norm = cast(nn.Conv2d, layers[0]), cast(nn.GroupNorm, layers[1])
            self._matrix(f"weight{i}", conv.weight, dtype)
            weight = self.get_buffer(f"weight{i}").to(memory_format=torch.channels_last)
            self.register_buffer(f"weight{i}", weight, persistent=False)
            self._vector(f"bias{i}", bias_of(conv))
            self._vector(f"norm_weight{i}", norm.weight)
            self._vector(f"norm_bias{i}", norm.bias)
            self.num_groups, self.eps = int(norm.num_groups), float(norm.eps)
        self.learned = learned
        if learned:
            self._matrix("classifier", weight_KC, dtype)
        else:
            self._vector("classifier", weight_KC)
        self._vector("classifier_bias", bias_K)

    def forward(self, x_NHWC: Tensor, added_NHWK: Tensor | None) -> Tensor:
        """Classify one level's features, and add the coarser levels' results."""
        affine_N2C = x_NHWC  # of the layer before; there is always one before it is used
        for i in range(self.num_layers):
            if i > 0:
                x_NHWC = ops.activate_upsampled(x_NHWC, affine_N2C)
            x_NHWC = _conv3x3(x_NHWC, self.get_buffer(f"weight{i}"))
            affine_N2C = ops.group_norm(
                x_NHWC,
                self.get_buffer(f"bias{i}"),
                self.num_groups,
                self.get_buffer(f"norm_weight{i}"),
                self.get_buffer(f"norm_bias{i}"),
                self.eps,
            )
        classify = enlarge_ops.project if self.learned else ops.classify
        out_NHWK: Tensor = classify(
            x_NHWC,
            affine_N2C,
            self.get_buffer("classifier"),
            self.get_buffer("classifier_bias"),
            added_NHWK,
        )
        return out_NHWK


def classifier(net: PeakNet) -> tuple[Tensor, Tensor]:
    """Return weight (2, C) and bias (2) of the classifier."""
    return net.head_segmask.weight.flatten(1), bias_of(net.head_segmask)


def odds_and_taps(net: PeakNet) -> tuple[Tensor, Tensor]:
    """Return weight (K, C) and bias (K) of log odds and taps, as `enlarge_ops.enlarge` takes them.

    Only the difference of the two classes decides, so one number stands for two logits.
    """
    learned = net.head_upsample_layer
    assert learned is not None
    assert learned.bias is not None
    weight_2C, bias_2 = classifier(net)
    weight_KC = weight_2C.new_zeros(enlarge_ops.ODDS_CHANNELS, weight_2C.shape[1])
    weight_KC[0] = weight_2C[1] - weight_2C[0]
    taps_KC = (learned.weight[:, 1] - learned.weight[:, 0]).flatten(1).t()
    weight_KC[1 : 1 + len(taps_KC)] = taps_KC
    bias_K = bias_2.new_zeros(enlarge_ops.ODDS_CHANNELS)
    # A constant is the same before and after the enlargement.
    bias_K[0] = bias_2[1] - bias_2[0] + learned.bias[1] - learned.bias[0]
    return weight_KC, bias_K


def _conv3x3(x_NHWC: Tensor, weight_OCHW: Tensor) -> Tensor:
    out_NCHW = F.conv2d(x_NHWC.permute(0, 3, 1, 2), weight_OCHW, padding=1)
    return out_NCHW.permute(0, 2, 3, 1).contiguous()
