"""The head's part of the fast PeakNet, made from the plain network's `LateralLayer`.

Shape legend: as in `ops`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast.weights import Weights, bias_of
from peaknet_predict.models.peaknet import LateralLayer


class FastLateral(Weights):
    """The head of one level, up to the classes: (N, h, w, 2) float32, added to another level's.

    The last doubling is left out: it commutes with the classifier, and is done where the sum of
    the levels that need it is added to the finest.
    """

    def __init__(
        self, lateral: LateralLayer, weight_2C: Tensor, bias_2: Tensor, dtype: torch.dtype
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
        self._vector("classifier", weight_2C)
        self._vector("classifier_bias", bias_2)

    def forward(self, x_NHWC: Tensor, added_NHW2: Tensor | None) -> Tensor:
        """Classify one level's features, and add what the coarser levels say."""
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
        logits: Tensor = ops.classify(
            x_NHWC,
            affine_N2C,
            self.get_buffer("classifier"),
            self.get_buffer("classifier_bias"),
            added_NHW2,
        )
        return logits


def _conv3x3(x_NHWC: Tensor, weight_OCHW: Tensor) -> Tensor:
    out_NCHW = F.conv2d(x_NHWC.permute(0, 3, 1, 2), weight_OCHW, padding=1)
    return out_NCHW.permute(0, 2, 3, 1).contiguous()
