"""PeakNet: a segmentation network that separates Bragg peak pixels from all others.

Wang et al., "PeakNet: an autonomous Bragg peak finder with deep neural networks",
arXiv:2303.15301; this is the later network with a ConvNeXtV2 backbone (`convnextv2`), a BiFPN
(`bifpn`) and the head below. Names and shapes of the parameters are those of its weight files.

Shape legend: N panels of a batch, C classes (or channels), H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from peaknet_predict.models.bifpn import BiFPN, resize_bilinear
from peaknet_predict.models.convnextv2 import ConvNextV2
from peaknet_predict.models.weights import load_weights


class LateralLayer(nn.Module):
    """Head of one level: to the finest level's resolution, one convolution for each doubling."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, num_doublings: int
    ) -> None:
        super().__init__()
        self.num_doublings = num_doublings
        # The finest level needs no enlargement, but it is convolved too.
        num_layers = max(num_doublings, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    in_channels if layer == 0 else out_channels,
                    out_channels,
                    kernel_size=3,
                    padding=1,
                ),
                nn.GroupNorm(num_groups, out_channels),
                nn.GELU(),
            )
            for layer in range(num_layers)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Bring (N, C, H, W) features to the finest level's resolution."""
        for layer in self.layers:
            x_NCHW = layer(x_NCHW)
            if self.num_doublings:
                x_NCHW = resize_bilinear(x_NCHW, 2.0)
        return x_NCHW


class PeakNet(nn.Module):
    """The network: preprocessed panels in, logits per pixel out.

    A pixel belongs to a peak where class 1 has the largest logit.

    Parameters
    ----------
    hidden_sizes
        Channels of the backbone's stages.
    depths
        Blocks of the backbone's stages.
    bifpn_features
        Channels of the pyramid.
    bifpn_blocks
        Blocks of the pyramid.
    bifpn_base_level
        Number of the pyramid's finest level in the names of a weight file (``m4``, ``q5``).
    head_channels
        Channels of the segmentation head.
    head_groups
        Groups of its GroupNorm layers.
    num_classes
        C; 2 for background and peak.
    learned_upsample
        Whether the last enlargement adds a transposed convolution to the bilinear resizing.
    weights
        Weight file, see `load_weights`. Without one the parameters are random: fit for training,
        not for prediction.

    Attributes
    ----------
    weights_sha256
        SHA-256 of the weight file in hexadecimal; None while the parameters are random.
    weight_aliases
        Prefixes of parameter names in the reference's weight files, where they differ.
    size_multiple
        H and W must be multiples of this: the stride of the coarsest level, 32 for four stages.
        Otherwise a level would not be half as large as the one below, and they could not be added.

    Raises
    ------
    ValueError
        If `hidden_sizes` and `depths` differ in length, or name fewer than two stages.
    """

    weight_aliases: Mapping[str, str] = MappingProxyType(
        {"head_upsample_layer.0.": "head_upsample_layer."}
    )

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        bifpn_features: int = 256,
        bifpn_blocks: int = 1,
        bifpn_base_level: int = 4,
        head_channels: int = 256,
        head_groups: int = 32,
        num_classes: int = 2,
        learned_upsample: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if len(hidden_sizes) != len(depths) or len(depths) < 2:
            raise ValueError(
                "hidden_sizes and depths list the same stages, at least two; "
                f"got {len(hidden_sizes)} sizes and {len(depths)} depths"
            )
        self.backbone = ConvNextV2(hidden_sizes, depths)
        self.size_multiple = self.backbone.strides[-1]
        self.backbone_to_bifpn = nn.ModuleList(
            nn.Conv2d(size, bifpn_features, kernel_size=1) for size in hidden_sizes
        )
        self.bifpn = BiFPN(bifpn_features, len(hidden_sizes), bifpn_blocks, bifpn_base_level)
        # Each stage halves the resolution once more.
        self.seg_lateral_layers = nn.ModuleList(
            LateralLayer(bifpn_features, head_channels, head_groups, num_doublings=level)
            for level in range(len(hidden_sizes))
        )
        self.head_segmask = nn.Conv2d(head_channels, num_classes, kernel_size=1)
        self.head_upsample_layer = (
            nn.ConvTranspose2d(head_channels, num_classes, kernel_size=6, stride=4, padding=1)
            if learned_upsample
            else None
        )
        self.weights_sha256 = load_weights(self, weights) if weights is not None else None

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Classify every pixel.

        Parameters
        ----------
        images_N1HW
            (N, 1, H, W) floats, normalised per event; H and W multiples of `size_multiple`.

        Returns
        -------
        Tensor
            (N, C, H, W) logits, in autocast's dtype where that is on.

        Raises
        ------
        ValueError
            If the input has another shape.
        """
        summed_NCHW = self._summed_features(images_N1HW)
        logits_NCHW = resize_bilinear(self.head_segmask(summed_NCHW), self.backbone.strides[0])
        if self.head_upsample_layer is not None:
            logits_NCHW = logits_NCHW + self.head_upsample_layer(summed_NCHW)
        return logits_NCHW

    def add_to_peak_logit(self, shift: float) -> None:
        """Shift the logits of all classes but background, at every pixel, by changing the biases.

        Once only, at the bilinear enlargement: the learned one is added to it.
        """
        assert self.head_segmask.bias is not None
        with torch.no_grad():
            self.head_segmask.bias[1:] += shift

    @property
    def coarse_stride(self) -> int | None:
        """The s of `coarse_logits`; None if they do not determine the logits of `forward`."""
        if self.head_upsample_layer is not None or self.head_segmask.out_channels != 2:
            return None
        return int(self.backbone.strides[0])

    def coarse_logits(self, images_N1HW: Tensor) -> Tensor:
        """Classify at the resolution of the finest level, before the bilinear enlargement.

        Parameters
        ----------
        images_N1HW
            As for `forward`.

        Returns
        -------
        Tensor
            (N, 2, H/s, W/s) logits; `forward` returns their bilinear enlargement by s, which is
            `coarse_stride`.

        Raises
        ------
        ValueError
            If the input has another shape.
        """
        logits_NCHW: Tensor = self.head_segmask(self._summed_features(images_N1HW))
        return logits_NCHW

    def _summed_features(self, images_N1HW: Tensor) -> Tensor:
        """Return what the classifier sees: the pyramid's levels, enlarged and added."""
        self.check_images(images_N1HW)
        features = self.backbone(images_N1HW)
        pyramid = self.bifpn(
            [adapt(x) for adapt, x in zip(self.backbone_to_bifpn, features, strict=True)]
        )
        laterals = [layer(x) for layer, x in zip(self.seg_lateral_layers, pyramid, strict=True)]
        # From coarse to fine, as the reference adds them, so that even the last bits agree.
        summed_NCHW: Tensor = laterals[-1]
        for lateral_NCHW in reversed(laterals[:-1]):
            summed_NCHW = summed_NCHW + lateral_NCHW
        return summed_NCHW

    def check_images(self, images_N1HW: Tensor) -> None:
        """Raise a ValueError, which names the remedy, for images that PeakNet cannot take."""
        if images_N1HW.ndim != 4 or images_N1HW.shape[1] != 1:
            raise ValueError(
                f"PeakNet takes panels of shape (N, 1, H, W), not {tuple(images_N1HW.shape)}: "
                "end the preprocessing with MergeBatchChannelDims"
            )
        self.check_shape(*images_N1HW.shape[2:])

    def check_shape(self, height: int, width: int) -> None:
        """Raise a ValueError, which names the remedy, for panels of a size PeakNet cannot take."""
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            up_height, up_width = (
                -(-height // multiple) * multiple,
                -(-width // multiple) * multiple,
            )
            raise ValueError(
                f"PeakNet takes panels whose height and width are multiples of {multiple}, not "
                f"{height}x{width}: put Pad(height={up_height}, width={up_width}) or "
                f"PadToMultiple({multiple}) into the preprocessing"
            )
