"""Launches the Triton kernels of the head's operators; imported where there is a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast.triton_common import on_its_device, power_of_two
from peaknet_predict.models.fast.triton_kernels import head as kernels

_SUMS_TILE = 512


@ops.group_norm.register_kernel("cuda")
@on_its_device
def _group_norm(
    x_NHWC: Tensor, added_C: Tensor, num_groups: int, weight_C: Tensor, bias_C: Tensor, eps: float
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    pixels = height * width
    tiles = triton.cdiv(pixels, _SUMS_TILE)
    power = power_of_two(channels)
    sums = x_NHWC.new_empty(n * tiles, 2, channels, dtype=torch.float32)
    kernels.channel_sums_kernel[(n * tiles,)](
        x_NHWC,
        sums,
        pixels,
        C=channels,
        C_P=power,
        TILE=_SUMS_TILE,
        ROWS=min(_SUMS_TILE // 4, max(1, 2048 // power)),
        num_warps=2,
    )
    affine = x_NHWC.new_empty(n, 2, channels, dtype=torch.float32)
    kernels.group_norm_kernel[(n,)](
        sums,
        added_C,
        weight_C,
        bias_C,
        affine,
        tiles,
        pixels,
        eps,
        C=channels,
        GROUPS=num_groups,
        ROWS=8,
        num_warps=4,
    )
    return affine


@ops.activate_upsampled.register_kernel("cuda")
@on_its_device
def _activate_upsampled(x_NHWC: Tensor, affine_N2C: Tensor) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    power = power_of_two(channels)
    rows = max(1, 8192 // power)
    activated = torch.empty_like(x_NHWC)
    kernels.activate_kernel[(n * triton.cdiv(height * width, rows),)](
        x_NHWC, affine_N2C, activated, height * width, C=channels, C_P=power, ROWS=rows, num_warps=4
    )
    out = x_NHWC.new_empty(n, 2 * height, 2 * width, channels)
    kernels.upsample_kernel[(n * triton.cdiv(4 * height * width, rows),)](
        activated, out, 2 * height, 2 * width, C=channels, C_P=power, ROWS=rows, num_warps=4
    )
    return out


@ops.classify.register_kernel("cuda")
@on_its_device
def _classify(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_2C: Tensor, bias_2: Tensor, added: Tensor | None
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    power = power_of_two(channels)
    rows = max(1, 8192 // power)
    out = x_NHWC.new_empty(n, height, width, 2, dtype=torch.float32)
    kernels.classify_kernel[(n * triton.cdiv(height * width, rows),)](
        x_NHWC,
        affine_N2C,
        weight_2C,
        bias_2,
        out if added is None else added,
        out,
        height,
        width,
        HAS_ADDED=added is not None,
        ENLARGE=added is not None and added.shape[1] != height,
        C=channels,
        C_P=power,
        ROWS=rows,
        num_warps=4,
    )
    return out
