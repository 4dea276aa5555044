"""PeakNet with the same weights and the same answer, laid out for the memory of a GPU.

The plain `PeakNet` defines the network; this module computes it with few passes over memory.
Features have their channels last throughout, and adjacent linear steps are multiplied together in
float32 when the weights are loaded:

- the affine part of a LayerNorm before a matrix goes into the matrix and its bias;
- so does the bias of GRN, and the scale per channel that PeakNet's "depthwise" 1x1 convolution is;
- the fusion weights of the BiFPN become numbers;
- the classifier comes before the last enlargement: it works on each pixel alone and the
  enlargement on each channel alone, so their order does not matter;
- a learned last enlargement becomes 36 taps of each coarse pixel (`enlarge_ops`).

Shape legend: as in `ops`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from peaknet_predict.models.bifpn import BiFPNBlock, resize_bilinear
from peaknet_predict.models.convnextv2 import ChannelNorm, ConvNextV2Block, Stage
from peaknet_predict.models.fast import enlarge_ops, ops
from peaknet_predict.models.fast.backbone import (
    FastBlock,
    FastDownsampling,
    FastLinear,
    FastStem,
    adapter_weights,
)
from peaknet_predict.models.fast.head import FastLateral, classifier, odds_and_taps
from peaknet_predict.models.fast.pyramid import FastPyramidBlock
from peaknet_predict.models.peaknet import LateralLayer, PeakNet


class FastPeakNet(nn.Module):
    """A loaded `PeakNet` rewritten for speed.

    Parameters
    ----------
    net
        The network; its parameters are copied. It has two classes (see `unsupported`).
    dtype
        Of matrices and features: bfloat16 on GPUs, float32 to compare with the plain network.

    Attributes
    ----------
    coarse_stride
        Panel pixels per pixel of `coarse_logits`; None where the last enlargement is learned,
        because coarse logits then do not determine the others.
    """

    def __init__(self, net: PeakNet, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        reason = unsupported(net)
        if reason is not None:
            raise ValueError(f"this PeakNet cannot be rewritten: {reason}")
        self.check_shape = net.check_shape
        self._check_images = net.check_images
        self.coarse_stride = net.coarse_stride
        backbone = net.backbone
        with torch.no_grad():
            embeddings = backbone.embeddings
            self.stem = FastStem(embeddings.patch_embeddings, embeddings.layernorm, dtype)
            stages = [cast(Stage, stage) for stage in backbone.encoder.stages]
            self.stages = nn.ModuleList(
                nn.Sequential(
                    *(FastBlock(cast(ConvNextV2Block, block), dtype) for block in stage.layers)
                )
                for stage in stages
            )
            self.downsamplings = nn.ModuleList(
                FastDownsampling(
                    cast(ChannelNorm, stage.downsampling_layer[0]),
                    cast(nn.Conv2d, stage.downsampling_layer[1]),
                    dtype,
                )
                for stage in stages[1:]
            )
            norms, convs = backbone.hidden_states_norms.values(), net.backbone_to_bifpn
            base_adapter, *adapters = (
                adapter_weights(cast(ChannelNorm, norm), cast(nn.Conv2d, conv))
                for norm, conv in zip(norms, convs, strict=True)
            )
            self.adapters = nn.ModuleList(FastLinear(*adapter, dtype) for adapter in adapters)
            self.pyramid = nn.Sequential(
                *(
                    FastPyramidBlock(
                        cast(BiFPNBlock, block),
                        len(stages),
                        dtype,
                        base_adapter if i == 0 else None,
                    )
                    for i, block in enumerate(net.bifpn.blocks)
                )
            )
            self.learned = net.head_upsample_layer is not None
            weight_KC, bias_K = odds_and_taps(net) if self.learned else classifier(net)
            # The bias counts once.
            biases = [bias_K, *(torch.zeros_like(bias_K) for _ in stages[1:])]
            self.laterals = nn.ModuleList(
                FastLateral(cast(LateralLayer, lateral), weight_KC, bias, self.learned, dtype)
                for lateral, bias in zip(net.seg_lateral_layers, biases, strict=True)
            )

    def coarse_logits(self, images_N1HW: Tensor) -> Tensor:
        """Classify at a quarter of the resolution.

        Parameters
        ----------
        images_N1HW
            As for `PeakNet.forward`.

        Returns
        -------
        Tensor
            (N, 2, H/4, W/4) float32 logits, as `PeakNet.coarse_logits` returns them.

        Raises
        ------
        ValueError
            If the input has another shape.
        """
        return self._coarse(images_N1HW).permute(0, 3, 1, 2)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Classify every pixel: (N, 2, H, W) logits; see `PeakNet.forward`.

        They are float32; where the last enlargement is learned float16, unless the network
        computes in float32, and then those of background are 0 and those of peak the log odds.
        """
        if self.learned:
            logits_N2HW: Tensor = enlarge_ops.enlarge(self._coarse(images_N1HW))
            return logits_N2HW
        return resize_bilinear(self.coarse_logits(images_N1HW), self.coarse_stride or 1)

    def _coarse(self, images_N1HW: Tensor) -> Tensor:
        """Return the input of the final enlargement, (N, H/4, W/4, K): see `FastLateral`."""
        self._check_images(images_N1HW)
        x_NHWC = self.stem(images_N1HW)
        features: list[Tensor] = []
        # One normalisation serves the pyramid and the next stage; their affine parts differ.
        for blocks, downsample in zip(self.stages[:-1], self.downsamplings, strict=True):
            feature_NHWC, patches = ops.standardise_patches(blocks(x_NHWC))
            features.append(feature_NHWC)
            x_NHWC = downsample(patches)
        features.append(ops.standardise(self.stages[-1](x_NHWC)))
        # The finest level's adapter is part of the pyramid.
        adapted = [adapt(x) for adapt, x in zip(self.adapters, features[1:], strict=True)]
        pyramid = self.pyramid([features[0], *adapted])
        sum_NHWK: Tensor | None = None
        for lateral, x in zip(reversed(self.laterals), reversed(pyramid), strict=True):
            sum_NHWK = lateral(x, sum_NHWK)
        assert sum_NHWK is not None
        return sum_NHWK


def unsupported(net: PeakNet) -> str | None:
    """Return why a PeakNet cannot be rewritten; None if it can."""
    if net.head_segmask.out_channels != 2:
        return f"it has {net.head_segmask.out_channels} classes, and the kernels know two"
    sizes = [adapter.in_channels for adapter in net.backbone_to_bifpn]
    if any(cast(int, size) % 8 for size in sizes):
        return f"its hidden sizes are {sizes}, and the kernels take multiples of 8"
    channels = net.head_segmask.in_channels
    if channels & (channels - 1):
        return f"its head has {channels} channels, and the kernels take powers of two"
    return None
