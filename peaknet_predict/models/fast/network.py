"""PeakNet with the same weights and the same answer, laid out for the memory of a GPU.

The plain `PeakNet` says what the network is; this says how to compute it with few passes over
memory. Features have their channels last throughout, and what is linear and next to each other is
multiplied together when the weights are loaded, in float32:

- the affine part of a LayerNorm before a matrix goes into the matrix and its bias;
- so does the bias of GRN, and the scale per channel that PeakNet's "depthwise" 1x1 convolution is;
- the fusion weights of the BiFPN become numbers;
- the classifier comes before the last enlargement: it works on each pixel alone and the
  enlargement on each channel alone, so their order does not matter.

Shape legend: as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.bifpn import BiFPNBlock, SeparableConv, resize_bilinear
from peaknet_predict.models.convnextv2 import ChannelNorm, ConvNextV2Block, Stage
from peaknet_predict.models.fast import ops
from peaknet_predict.models.peaknet import LateralLayer, PeakNet


class _Weights(nn.Module):
    """Holds tensors that are not trained: matrices in the network's dtype, vectors in float32."""

    def _matrix(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        self._hold(name, value.detach().to(dtype, copy=True))

    def _vector(self, name: str, value: Tensor) -> None:
        self._hold(name, value.detach().to(torch.float32, copy=True))

    def _hold(self, name: str, value: Tensor) -> None:
        # A copy, for the parameters of the plain network may be rounded later, in place.
        self.register_buffer(name, value.contiguous(), persistent=False)


def _behind_norm(norm: ChannelNorm, weight_OC: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer that does the affine part of a norm before it."""
    return weight_OC * norm.weight, bias_O + weight_OC @ norm.bias


class _Stem(_Weights):
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: ChannelNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrix("weight", conv.weight.flatten(1), dtype)
        self._vector("bias", _bias(conv))
        self._vector("norm_weight", norm.weight)
        self._vector("norm_bias", norm.bias)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        out: Tensor = ops.stem(
            images_N1HW, self.weight, self.bias, self.norm_weight, self.norm_bias
        )
        return out


class _Block(_Weights):
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
        self._vector("kernel_bias", _bias(block.dwconv))
        weight, bias = _behind_norm(block.layernorm, block.pwconv1.weight, block.pwconv1.bias)
        self._matrix("weight1", weight, dtype)
        # Of the rounded weights, so that what is subtracted is what the product contains.
        self._vector("column_sums1", self.weight1.float().sum(1))
        self._vector("bias1", bias)
        self._vector("response_weight", block.grn.weight.flatten())
        self._matrix("weight2", block.pwconv2.weight, dtype)
        self._vector("bias2", block.pwconv2.bias + block.pwconv2.weight @ block.grn.bias.flatten())

    def forward(self, x_NHWC: Tensor) -> Tensor:
        convolved_NHWC, moments_M2 = ops.depthwise(
            x_NHWC, self.kernel, self.kernel_scale, self.kernel_bias
        )
        hidden_NHWK, energy_NTK = ops.expand(
            convolved_NHWC, moments_M2, self.weight1, self.column_sums1, self.bias1
        )
        scale_NK = ops.response(energy_NTK, self.response_weight)
        out: Tensor = ops.contract(hidden_NHWK, scale_NK, self.weight2, self.bias2, x_NHWC)
        return out


def _adapter(norm: ChannelNorm, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the affine part of a norm and a 1x1 convolution."""
    return _behind_norm(norm, conv.weight.flatten(1), _bias(conv))


class _Linear(_Weights):
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrix("weight", weight, dtype)
        self._matrix("bias", bias, dtype)

    def forward(self, standardised_NHWC: Tensor) -> Tensor:
        return F.linear(standardised_NHWC, self.weight, self.bias)


class _Downsampling(_Weights):
    """The affine part of a norm and a 2x2 convolution with stride 2, which sees patches of 2x2."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: ChannelNorm, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight_OHWC = (conv.weight * norm.weight[:, None, None]).permute(0, 2, 3, 1)
        bias = _bias(conv) + torch.einsum("ochw,c->o", conv.weight, norm.bias)
        self._matrix("weight", weight_OHWC.flatten(1), dtype)
        self._matrix("bias", bias, dtype)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight, self.bias)


class _BaseNode(_Weights):
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
        # Resizing and product commute, so that the level above is multiplied where it is small. The
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


class _PyramidBlock(_Weights):
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


class _Lateral(_Weights):
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
            self._vector(f"bias{i}", _bias(conv))
            self._vector(f"norm_weight{i}", norm.weight)
            self._vector(f"norm_bias{i}", norm.bias)
            self.num_groups, self.eps = int(norm.num_groups), float(norm.eps)
        self._vector("classifier", weight_2C)
        self._vector("classifier_bias", bias_2)

    def forward(self, x_NHWC: Tensor, added_NHW2: Tensor | None) -> Tensor:
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


class FastPeakNet(nn.Module):
    """A loaded `PeakNet` rewritten for speed.

    Parameters
    ----------
    net
        The network; its parameters are copied. It has two classes and no learned upsampling (see
        `unsupported`).
    dtype
        Of matrices and features: bfloat16 on GPUs, float32 to compare with the plain network.

    Attributes
    ----------
    coarse_stride
        Pixels of the panel in one of `coarse_logits`.
    """

    def __init__(self, net: PeakNet, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        reason = unsupported(net)
        if reason is not None:
            raise ValueError(f"this PeakNet has no fast form: {reason}")
        self.check_shape = net.check_shape
        self._check_images = net.check_images
        self.coarse_stride = net.coarse_stride
        backbone = net.backbone
        with torch.no_grad():
            embeddings = backbone.embeddings
            self.stem = _Stem(embeddings.patch_embeddings, embeddings.layernorm, dtype)
            stages = [cast(Stage, stage) for stage in backbone.encoder.stages]
            self.stages = nn.ModuleList(
                nn.Sequential(
                    *(_Block(cast(ConvNextV2Block, block), dtype) for block in stage.layers)
                )
                for stage in stages
            )
            self.downsamplings = nn.ModuleList(
                _Downsampling(
                    cast(ChannelNorm, stage.downsampling_layer[0]),
                    cast(nn.Conv2d, stage.downsampling_layer[1]),
                    dtype,
                )
                for stage in stages[1:]
            )
            norms, convs = backbone.hidden_states_norms.values(), net.backbone_to_bifpn
            base_adapter, *adapters = (
                _adapter(cast(ChannelNorm, norm), cast(nn.Conv2d, conv))
                for norm, conv in zip(norms, convs, strict=True)
            )
            self.adapters = nn.ModuleList(_Linear(*adapter, dtype) for adapter in adapters)
            self.pyramid = nn.Sequential(
                *(
                    _PyramidBlock(
                        cast(BiFPNBlock, block),
                        len(stages),
                        dtype,
                        base_adapter if i == 0 else None,
                    )
                    for i, block in enumerate(net.bifpn.blocks)
                )
            )
            classifier = net.head_segmask
            # The bias counts once.
            bias_2 = _bias(classifier)
            biases = [bias_2, *(torch.zeros_like(bias_2) for _ in stages[1:])]
            self.laterals = nn.ModuleList(
                _Lateral(cast(LateralLayer, lateral), classifier.weight.flatten(1), bias, dtype)
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
        logits_NHW2: Tensor | None = None
        for lateral, x in zip(reversed(self.laterals), reversed(pyramid), strict=True):
            logits_NHW2 = lateral(x, logits_NHW2)
        assert logits_NHW2 is not None
        return logits_NHW2.permute(0, 3, 1, 2)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Classify every pixel: (N, 2, H, W) float32 logits; see `PeakNet.forward`."""
        return resize_bilinear(self.coarse_logits(images_N1HW), self.coarse_stride or 1)


def unsupported(net: PeakNet) -> str | None:
    """Say why a PeakNet has no fast form; None if it has one."""
    if net.coarse_stride is None:
        return "it has a learned upsampling or more than two classes"
    sizes = [adapter.in_channels for adapter in net.backbone_to_bifpn]
    if any(cast(int, size) % 8 for size in sizes):
        return f"its hidden sizes are {sizes}, and the kernels take multiples of 8"
    channels = net.head_segmask.in_channels
    if channels & (channels - 1):
        return f"its head has {channels} channels, and the kernels take powers of two"
    return None


def _transform(block: BiFPNBlock, name: str) -> tuple[Tensor, ChannelNorm]:
    """Return the matrix of a node, its scale per channel included, and the norm behind it."""
    layers = cast(nn.Sequential, block.conv[name])
    conv, norm = cast(SeparableConv, layers[0]), cast(ChannelNorm, layers[1])
    weight_FF = conv.pointwise_conv.weight.flatten(1) * conv.depthwise_conv.weight.flatten()
    return weight_FF, norm


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(0)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _conv3x3(x_NHWC: Tensor, weight_OCHW: Tensor) -> Tensor:
    out_NCHW = F.conv2d(x_NHWC.permute(0, 3, 1, 2), weight_OCHW, padding=1)
    return out_NCHW.permute(0, 2, 3, 1).contiguous()
