"""The operators of the fast PeakNet, for CPU and GPU.

Each is a `torch.library` operator ``peaknet::name``, so that `torch.compile` takes it as it is.
This module has the plain PyTorch implementations: they define what the operators compute, run on
any device, and serve tests as the reference for the GPU kernels. On CUDA the launchers in
`triton_*` and `cuda_*` replace them.

Shape legend: N panels of a batch, H rows, W columns, C channels, M = N·H·W pixels; all features
have their channels last. F features of the pyramid, K hidden channels of a perceptron, T strips of
a panel, see `strip`.
Features and matrices have the network's dtype; vectors, sums and statistics are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.models.bifpn import resize_bilinear
from peaknet_predict.models.convnextv2 import GRN_EPS, LAYER_NORM_EPS


def strip(channels: int) -> int:
    """Return the number of a panel's pixels whose energy `expand` adds up.

    It is the number that one block of threads passes over: with few channels it keeps the weights
    meanwhile.
    """
    return 1024 if channels <= 384 else 128


@torch.library.custom_op("peaknet::stem", mutates_args=())
def stem(
    images_N1HW: Tensor, weight_C16: Tensor, bias_C: Tensor, scale_C: Tensor, shift_C: Tensor
) -> Tensor:
    """Turn patches of 4x4 pixels into normalised vectors: (N, H/4, W/4, C)."""
    size = len(weight_C16)
    patches_NCHW = F.conv2d(
        images_N1HW.float(), weight_C16.float().view(size, 1, 4, 4), bias_C, stride=4
    )
    normed_NHWC = F.layer_norm(
        patches_NCHW.permute(0, 2, 3, 1), (size,), scale_C, shift_C, LAYER_NORM_EPS
    )
    return normed_NHWC.to(weight_C16.dtype).contiguous()


@stem.register_fake
def _(
    images_N1HW: Tensor, weight_C16: Tensor, bias_C: Tensor, scale_C: Tensor, shift_C: Tensor
) -> Tensor:
    n, _, height, width = images_N1HW.shape
    return weight_C16.new_empty(n, height // 4, width // 4, len(weight_C16))


@torch.library.custom_op("peaknet::depthwise", mutates_args=())
def depthwise(
    x_NHWC: Tensor, weight_49C: Tensor, scale_C: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its 7x7 kernel, scale and add.

    With bfloat16 features ``weight_49C`` is float16, and features beyond 65504, the largest
    float16, count as that. Returns the result and what normalises it: (M, 2) float32, 1 / std and
    -mean / std over the channels of each pixel. A kernel may take these of the rounded result, and
    spread a NaN to other pixels of its row.
    """
    channels = x_NHWC.shape[-1]
    kernel_C177 = (weight_49C.float() * scale_C).t().reshape(channels, 1, 7, 7)
    convolved_NCHW = F.conv2d(
        x_NHWC.permute(0, 3, 1, 2).float(), kernel_C177, bias_C, padding=3, groups=channels
    )
    convolved_NHWC = convolved_NCHW.permute(0, 2, 3, 1)
    variance_M, mean_M = torch.var_mean(convolved_NHWC.reshape(-1, channels), 1, correction=0)
    factor_M = torch.rsqrt(variance_M + LAYER_NORM_EPS)
    moments_M2 = torch.stack([factor_M, -mean_M * factor_M], dim=1)
    return convolved_NHWC.to(x_NHWC.dtype).contiguous(), moments_M2


@depthwise.register_fake
def _(x_NHWC: Tensor, weight_49C: Tensor, scale_C: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x_NHWC.numel() // x_NHWC.shape[-1]
    return torch.empty_like(x_NHWC), x_NHWC.new_empty(pixels, 2, dtype=torch.float32)


@torch.library.custom_op("peaknet::expand", mutates_args=())
def expand(
    x_NHWC: Tensor, moments_M2: Tensor, weight_KC: Tensor, column_sums_K: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Normalise over the channels, multiply, and apply GELU: the first layer of the perceptron.

    The normalisation is applied to the product: (x - mean) / std · W = (x·W - mean · sum(W)) / std.
    Returns (N, H, W, K) and its energy (N, T, K) float32: sums of squares over strips of pixels.
    """
    panels, height, width, channels = x_NHWC.shape
    factor_M1, offset_M1 = moments_M2[:, :1], moments_M2[:, 1:]
    product_MK = x_NHWC.view(-1, channels).float() @ weight_KC.float().t()
    hidden_MK = F.gelu(product_MK * factor_M1 + offset_M1 * column_sums_K + bias_K)
    pixels = height * width
    length = strip(channels)
    squares_NPK = F.pad(hidden_MK.view(panels, pixels, -1).square(), (0, 0, 0, -pixels % length))
    energy_NTK = squares_NPK.view(panels, -1, length, len(weight_KC)).sum(2)
    return hidden_MK.view(panels, height, width, -1).to(x_NHWC.dtype), energy_NTK


@expand.register_fake
def _(
    x_NHWC: Tensor, moments_M2: Tensor, weight_KC: Tensor, column_sums_K: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    panels, height, width, channels = x_NHWC.shape
    size = len(weight_KC)
    strips = -(-height * width // strip(channels))
    energy = x_NHWC.new_empty(panels, strips, size, dtype=torch.float32)
    return x_NHWC.new_empty(panels, height, width, size), energy


@torch.library.custom_op("peaknet::response", mutates_args=())
def response(energy_NTK: Tensor, weight_K: Tensor) -> Tensor:
    """Return the factor by which GRN scales each channel of each panel: (N, K) float32."""
    norm_NK = energy_NTK.sum(1).sqrt()
    return 1 + weight_K * norm_NK / (norm_NK.mean(1, keepdim=True) + GRN_EPS)


@response.register_fake
def _(energy_NTK: Tensor, weight_K: Tensor) -> Tensor:
    return energy_NTK.new_empty(energy_NTK.shape[0], energy_NTK.shape[2])


@torch.library.custom_op("peaknet::contract", mutates_args=())
def contract(
    hidden_NHWK: Tensor, scale_NK: Tensor, weight_CK: Tensor, bias_C: Tensor, residual_NHWC: Tensor
) -> Tensor:
    """Scale the channels, multiply and add: the second layer of the perceptron, (N, H, W, C).

    A kernel may round the product to the features' dtype before it adds.
    """
    scaled_NHWK = (hidden_NHWK.float() * scale_NK[:, None, None, :]).to(hidden_NHWK.dtype)
    product_NHWC = scaled_NHWK.float() @ weight_CK.float().t()
    return (product_NHWC + bias_C + residual_NHWC.float()).to(residual_NHWC.dtype)


@contract.register_fake
def _(
    hidden_NHWK: Tensor, scale_NK: Tensor, weight_CK: Tensor, bias_C: Tensor, residual_NHWC: Tensor
) -> Tensor:
    return torch.empty_like(residual_NHWC)


@torch.library.custom_op("peaknet::standardise", mutates_args=())
def standardise(x_NHWC: Tensor) -> Tensor:
    """Give each pixel's channels mean 0 and variance 1: a LayerNorm without its affine part."""
    return F.layer_norm(x_NHWC.float(), x_NHWC.shape[-1:], eps=LAYER_NORM_EPS).to(x_NHWC.dtype)


@standardise.register_fake
def _(x_NHWC: Tensor) -> Tensor:
    return torch.empty_like(x_NHWC)


@torch.library.custom_op("peaknet::standardise_patches", mutates_args=())
def standardise_patches(x_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Do `standardise`; return the result and a copy in patches of 2x2: (N, H/2, W/2, 4 C)."""
    n, height, width, channels = x_NHWC.shape
    normed_NHWC = F.layer_norm(x_NHWC.float(), (channels,), eps=LAYER_NORM_EPS).to(x_NHWC.dtype)
    split = normed_NHWC.view(n, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
    patches = split.reshape(n, height // 2, width // 2, 4 * channels)
    return normed_NHWC, patches.clone()  # an operator's results share no memory


@standardise_patches.register_fake
def _(x_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    n, height, width, channels = x_NHWC.shape
    return torch.empty_like(x_NHWC), x_NHWC.new_empty(n, height // 2, width // 2, 4 * channels)


@torch.library.custom_op("peaknet::node", mutates_args=())
def node(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    """Compute one node of the BiFPN: fuse two or three features, transform, add the first again.

    ``other_NHWC`` has half or twice as many rows and columns and is resized; ``fusion`` has a
    factor for each of the three. A kernel may round what is transformed to the features' dtype
    before it adds.
    """
    fused_NHWC = fusion[0] * same_NHWC.float()
    if middle_NHWC is not None:
        fused_NHWC = fused_NHWC + fusion[1] * middle_NHWC.float()
    factor = same_NHWC.shape[1] / other_NHWC.shape[1]
    resized_NHWC = resize_bilinear(other_NHWC.permute(0, 3, 1, 2).float(), factor)
    fused_NHWC = fused_NHWC + fusion[2] * resized_NHWC.permute(0, 2, 3, 1)
    product_NHWC = fused_NHWC.to(same_NHWC.dtype).float() @ weight_CC.float().t()
    normed_NHWC = F.layer_norm(product_NHWC, scale_C.shape, scale_C, shift_C, LAYER_NORM_EPS)
    return (F.gelu(normed_NHWC) + same_NHWC.float()).to(same_NHWC.dtype)


@node.register_fake
def _(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    return torch.empty_like(same_NHWC)


@torch.library.custom_op("peaknet::base_node", mutates_args=())
def base_node(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    """Compute the BiFPN's finest node on the way down from the backbone's features: (N, H, W, F).

    Two products take the place of the adapter before the node: what the node transforms is
    x · inner + resized, and what it adds again is x · outer + added. ``coarse_NHWF``
    (N, H/2, W/2, F) is the level above, already multiplied, and is resized. A kernel may take it
    for granted that neither product has a mean over F (the columns of ``inner_FC`` add up to 0),
    and round what is resized to the features' dtype.
    """
    resized_NFHW = resize_bilinear(coarse_NHWF.permute(0, 3, 1, 2).float(), 2.0)
    x_NHWC = x_NHWC.float()
    product_NHWF = x_NHWC @ inner_FC.float().t() + resized_NFHW.permute(0, 2, 3, 1)
    normed_NHWF = F.layer_norm(product_NHWF, scale_F.shape, scale_F, shift_F, LAYER_NORM_EPS)
    own_NHWF = x_NHWC @ outer_FC.float().t() + added_F
    return (F.gelu(normed_NHWF) + own_NHWF).to(coarse_NHWF.dtype).contiguous()


@base_node.register_fake
def _(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    return coarse_NHWF.new_empty(*x_NHWC.shape[:3], len(scale_F))


@torch.library.custom_op("peaknet::group_norm", mutates_args=())
def group_norm(
    x_NHWC: Tensor, added_C: Tensor, num_groups: int, weight_C: Tensor, bias_C: Tensor, eps: float
) -> Tensor:
    """Return GroupNorm of ``x + added`` as a factor and a term for x: (N, 2, C) float32.

    ``added_C`` is the bias of the convolution before, which is spared a pass of its own.
    """
    panels, _, _, channels = x_NHWC.shape
    shifted_NHWC = x_NHWC.float() + added_C
    x_NPGK = shifted_NHWC.view(panels, -1, num_groups, channels // num_groups)
    variance_NG, mean_NG = torch.var_mean(x_NPGK, dim=(1, 3), correction=0)
    per_group = channels // num_groups
    factor_NC = torch.rsqrt(variance_NG + eps).repeat_interleave(per_group, 1) * weight_C
    term_NC = bias_C + (added_C - mean_NG.repeat_interleave(per_group, 1)) * factor_NC
    return torch.stack([factor_NC, term_NC], dim=1)


@group_norm.register_fake
def _(
    x_NHWC: Tensor, added_C: Tensor, num_groups: int, weight_C: Tensor, bias_C: Tensor, eps: float
) -> Tensor:
    return x_NHWC.new_empty(x_NHWC.shape[0], 2, x_NHWC.shape[3], dtype=torch.float32)


@torch.library.custom_op("peaknet::activate_upsampled", mutates_args=())
def activate_upsampled(x_NHWC: Tensor, affine_N2C: Tensor) -> Tensor:
    """Apply a factor and a term, then GELU, and double rows and columns: (N, 2H, 2W, C)."""
    activated_NHWC = activate(x_NHWC, affine_N2C)
    resized_NCHW = resize_bilinear(activated_NHWC.permute(0, 3, 1, 2), 2.0)
    return resized_NCHW.permute(0, 2, 3, 1).contiguous().to(x_NHWC.dtype)


@activate_upsampled.register_fake
def _(x_NHWC: Tensor, affine_N2C: Tensor) -> Tensor:
    panels, height, width, channels = x_NHWC.shape
    return x_NHWC.new_empty(panels, 2 * height, 2 * width, channels)


@torch.library.custom_op("peaknet::classify", mutates_args=())
def classify(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_2C: Tensor, bias_2: Tensor, added: Tensor | None
) -> Tensor:
    """Apply factor and term, GELU and the classifier: (N, H, W, 2) float32.

    ``added``, of the same shape or of half as many rows and columns and then enlarged, is added.
    """
    logits_NHW2 = activate(x_NHWC, affine_N2C) @ weight_2C.t() + bias_2
    if added is None:
        return logits_NHW2
    if added.shape[1] != x_NHWC.shape[1]:
        added = resize_bilinear(added.permute(0, 3, 1, 2), 2.0).permute(0, 2, 3, 1)
    return logits_NHW2 + added


@classify.register_fake
def _(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_2C: Tensor, bias_2: Tensor, added: Tensor | None
) -> Tensor:
    return x_NHWC.new_empty(*x_NHWC.shape[:3], 2, dtype=torch.float32)


def activate(x_NHWC: Tensor, affine_N2C: Tensor) -> Tensor:
    """Apply factor and term of `group_norm`, and GELU: float32, of the same shape."""
    factor_N11C, term_N11C = affine_N2C[:, :, None, None, :].unbind(1)
    return F.gelu(x_NHWC.float() * factor_N11C + term_N11C)
