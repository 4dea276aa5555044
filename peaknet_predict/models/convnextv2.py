"""The ConvNeXtV2 backbone: an image to feature maps at strides 4, 8, 16 and 32.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
arXiv:2301.00808; the block without GRN is from Liu et al., "A ConvNet for the 2020s",
arXiv:2201.03545. Parameter names are those of the published PeakNet weight files, which follow
Hugging Face's `ConvNextV2Backbone`.

Shape legend: N panels of a batch, C channels, H rows, W columns. ``NHWC`` tensors have their
channels last, as the linear layers of a block need them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
"""Added to the variance in every LayerNorm of PeakNet (arXiv:2201.03545, reference code)."""

GRN_EPS = 1e-6
_STEM_STRIDE = 4
_DOWNSAMPLING = 2


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, with statistics in float32.

    Parameters
    ----------
    num_channels
        C.
    channels_last
        Whether tensors are (N, H, W, C), or (N, C, H, W) as convolutions have them.
    """

    def __init__(self, num_channels: int, channels_last: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; shape and dtype stay."""
        x_NHWC = x if self.channels_last else x.permute(0, 2, 3, 1)
        # In float32 under autocast too: the variance of many channels loses digits in bfloat16.
        normed_NHWC = F.layer_norm(
            x_NHWC.float(),
            self.weight.shape,
            self.weight.float(),
            self.bias.float(),
            LAYER_NORM_EPS,
        ).to(x.dtype)
        return normed_NHWC if self.channels_last else normed_NHWC.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Global Response Normalization (GRN), arXiv:2301.00808, equations 1 to 3 and algorithm 1.

    Each channel is scaled by its L2 norm over the image, relative to the mean norm of all channels,
    so that channels compete; a learned scale and shift and a residual follow.

    Parameters
    ----------
    num_channels
        C.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        # Zeros, as in the paper: a fresh layer is the identity.
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, num_channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, num_channels))

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Scale the channels of (N, H, W, C); shape and dtype stay."""
        # Sums of squares over a whole image need float32.
        x32_NHWC = x_NHWC.float()
        norm_N11C: Tensor = torch.linalg.vector_norm(x32_NHWC, dim=(1, 2), keepdim=True)
        relative_N11C = norm_N11C / (norm_N11C.mean(dim=-1, keepdim=True) + GRN_EPS)
        scaled_NHWC = self.weight.float() * (x32_NHWC * relative_N11C) + self.bias.float()
        return (scaled_NHWC + x32_NHWC).to(x_NHWC.dtype)


class ConvNextV2Block(nn.Module):
    """One residual block: depthwise 7x7, then a two-layer perceptron per pixel.

    Parameters
    ----------
    num_channels
        C; the perceptron is four times as wide inside.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(
            num_channels, num_channels, kernel_size=7, padding=3, groups=num_channels
        )
        self.layernorm = ChannelNorm(num_channels, channels_last=True)
        self.pwconv1 = nn.Linear(num_channels, 4 * num_channels)
        self.grn = GlobalResponseNorm(4 * num_channels)
        self.pwconv2 = nn.Linear(4 * num_channels, num_channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Transform features; shape (N, C, H, W) stays."""
        x_NHWC: Tensor = self.layernorm(self.dwconv(x_NCHW).permute(0, 2, 3, 1))
        x_NHWC = self.pwconv2(self.grn(F.gelu(self.pwconv1(x_NHWC))))
        return x_NCHW + x_NHWC.permute(0, 3, 1, 2)


class _Embeddings(nn.Module):
    """The stem: non-overlapping 4x4 patches to vectors."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(1, num_channels, _STEM_STRIDE, stride=_STEM_STRIDE)
        self.layernorm = ChannelNorm(num_channels)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        features_NCHW: Tensor = self.layernorm(self.patch_embeddings(images_N1HW))
        return features_NCHW


class Stage(nn.Module):
    """The step down to a resolution (except in the first stage) and its blocks."""

    def __init__(self, in_channels: int, num_channels: int, depth: int, downsample: bool) -> None:
        super().__init__()
        self.downsampling_layer = nn.Sequential()
        if downsample:
            self.downsampling_layer.append(ChannelNorm(in_channels))
            self.downsampling_layer.append(
                nn.Conv2d(in_channels, num_channels, _DOWNSAMPLING, stride=_DOWNSAMPLING)
            )
        self.layers = nn.Sequential(*(ConvNextV2Block(num_channels) for _ in range(depth)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Transform (N, C, H, W) features of the previous stage."""
        features_NCHW: Tensor = self.layers(self.downsampling_layer(x_NCHW))
        return features_NCHW


class _Encoder(nn.Module):
    """Exists for the names: weight files say ``encoder.stages``."""

    def __init__(self, hidden_sizes: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        in_sizes = (hidden_sizes[0], *hidden_sizes[:-1])
        self.stages = nn.ModuleList(
            Stage(in_size, size, depth, downsample=stage > 0)
            for stage, (in_size, size, depth) in enumerate(
                zip(in_sizes, hidden_sizes, depths, strict=True)
            )
        )


class ConvNextV2(nn.Module):
    """The backbone with one normalised output per stage.

    Parameters
    ----------
    hidden_sizes
        Channels of each stage.
    depths
        Blocks of each stage.
    """

    def __init__(self, hidden_sizes: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.embeddings = _Embeddings(hidden_sizes[0])
        self.encoder = _Encoder(hidden_sizes, depths)
        self.hidden_states_norms = nn.ModuleDict(
            {f"stage{stage}": ChannelNorm(size) for stage, size in enumerate(hidden_sizes, start=1)}
        )
        self.strides = tuple(_STEM_STRIDE * _DOWNSAMPLING**s for s in range(len(hidden_sizes)))
        self.apply(_init_weights)

    def forward(self, images_N1HW: Tensor) -> list[Tensor]:
        """Extract features.

        Parameters
        ----------
        images_N1HW
            (N, 1, H, W); H and W multiples of ``strides[-1]``.

        Returns
        -------
        list of Tensor
            From fine to coarse: (N, hidden_sizes[s], H / strides[s], W / strides[s]).
        """
        features_NCHW = self.embeddings(images_N1HW)
        outputs = []
        for stage, norm in zip(self.encoder.stages, self.hidden_states_norms.values(), strict=True):
            features_NCHW = stage(features_NCHW)
            # The next stage continues from the features before this norm.
            outputs.append(norm(features_NCHW))
        return outputs


def _init_weights(module: nn.Module) -> None:
    """Draw weights as arXiv:2201.03545 does: normal with standard deviation 0.02, no bias."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
