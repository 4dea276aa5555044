"""The rewritten weights of the fast PeakNet's parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peaknet_predict.models.convnextv2 import ChannelNorm


class Weights(nn.Module):
    """Holds tensors that are not trained: matrices in the network's dtype, vectors in float32."""

    def _matrix(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        self._hold(name, value.detach().to(dtype, copy=True))

    def _vector(self, name: str, value: Tensor) -> None:
        self._hold(name, value.detach().to(torch.float32, copy=True))

    def _hold(self, name: str, value: Tensor) -> None:
        # A copy: the plain network's parameters may later be rounded in place.
        self.register_buffer(name, value.contiguous(), persistent=False)


def behind_norm(norm: ChannelNorm, weight_OC: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer merged with the affine part of a norm."""
    return weight_OC * norm.weight, bias_O + weight_OC @ norm.bias


def bias_of(conv: nn.Conv2d) -> Tensor:
    """Return the bias of a convolution that has one."""
    assert conv.bias is not None
    return conv.bias
