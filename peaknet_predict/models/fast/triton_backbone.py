"""Launches the Triton kernels of the backbone's operators; imported where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peaknet_predict.models.convnextv2 import GRN_EPS, LAYER_NORM_EPS
from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast.triton_common import on_its_device, power_of_two
from peaknet_predict.models.fast.triton_kernels import backbone as kernels


@ops.stem.register_kernel("cuda")
@on_its_device
def _stem(
    images_N1HW: Tensor, weight_C16: Tensor, bias_C: Tensor, scale_C: Tensor, shift_C: Tensor
) -> Tensor:
    n, _, height, width = images_N1HW.shape
    rows, columns, size = height // 4, width // 4, len(weight_C16)
    out = weight_C16.new_empty(n, rows, columns, size)
    tile = 128
    kernels.stem_kernel[(n * triton.cdiv(rows * columns, tile),)](
        images_N1HW.contiguous(),
        weight_C16,
        bias_C,
        scale_C,
        shift_C,
        out,
        columns,
        rows * columns,
        EPS=LAYER_NORM_EPS,
        C=size,
        C_P=power_of_two(size),
        ROWS=tile,
        num_warps=4,
    )
    return out


@on_its_device
def expand(
    x_NHWC: Tensor, moments_M2: Tensor, weight_KC: Tensor, column_sums_K: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Do `ops.expand` for any number of channels; `cuda_ops` has a faster kernel for some."""
    n, height, width, channels = x_NHWC.shape
    size, pixels = len(weight_KC), height * width
    strip = ops.strip(channels)
    strips = triton.cdiv(pixels, strip)
    hidden = x_NHWC.new_empty(n, height, width, size)
    energy = x_NHWC.new_empty(n, strips, size, dtype=torch.float32)
    config = expand_config(channels)
    kernels.expand_kernel[(n * strips * triton.cdiv(size, config["BLOCK_L"]),)](
        x_NHWC,
        moments_M2,
        weight_KC,
        column_sums_K,
        bias_K,
        hidden,
        energy,
        pixels,
        C=channels,
        L=size,
        STRIP=strip,
        ROWS=128,  # no more than a strip
        **config,
    )
    return hidden, energy


def expand_config(channels: int) -> dict[str, Any]:
    """Return tile sizes, warps and stages of `expand` for so many channels."""
    if channels >= 512:
        return {"BLOCK_L": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    block_k = 32 if channels % 64 else 64
    return {"BLOCK_L": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}


@ops.response.register_kernel("cuda")
@on_its_device
def _response(energy_NTK: Tensor, weight_K: Tensor) -> Tensor:
    n, tiles, size = energy_NTK.shape
    scale = energy_NTK.new_empty(n, size)
    power = power_of_two(size)
    kernels.response_kernel[(n,)](
        energy_NTK,
        weight_K,
        scale,
        tiles,
        EPS=GRN_EPS,
        L=size,
        L_P=power,
        ROWS=max(1, min(power_of_two(tiles), 16384 // power)),
        num_warps=16,
    )
    return scale


@on_its_device
def contract(
    hidden_NHWK: Tensor, scale_NK: Tensor, weight_CK: Tensor, bias_C: Tensor, residual_NHWC: Tensor
) -> Tensor:
    """Do `ops.contract` for any number of channels; `cuda_ops` has a faster kernel for some."""
    n, height, width, size = hidden_NHWK.shape
    channels, pixels = len(weight_CK), height * width
    out = torch.empty_like(residual_NHWC)
    config = contract_config(channels)
    rows = config["ROWS"]
    blocks = triton.cdiv(channels, config["BLOCK_C"] + config["REST_C"])
    kernels.contract_kernel[(n * triton.cdiv(pixels, rows) * blocks,)](
        hidden_NHWK,
        scale_NK,
        weight_CK,
        bias_C,
        residual_NHWC,
        out,
        pixels,
        K=size,
        C=channels,
        EVEN_ROWS=pixels % rows == 0,
        **config,
    )
    return out


def contract_config(channels: int) -> dict[str, Any]:
    """Return tile sizes, warps and stages of `contract` for so many channels."""
    block = 256 if channels >= 768 else 128
    rest = 0
    if channels < 256:
        block = max(16, power_of_two(channels + 1) // 2)
        rest = max(16, power_of_two(channels - block)) if channels > block else 0
    return {
        "ROWS": 128,
        "BLOCK_C": block,
        "REST_C": rest,
        "BLOCK_K": 64 if channels % 32 == 0 else 32,
        "num_warps": 8 if block + rest > 128 else 4,
        "num_stages": 4,
    }


@ops.standardise.register_kernel("cuda")
@on_its_device
def _standardise(x_NHWC: Tensor) -> Tensor:
    out = torch.empty_like(x_NHWC)
    _launch_standardise(x_NHWC, out, None)
    return out


@ops.standardise_patches.register_kernel("cuda")
@on_its_device
def _standardise_patches(x_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    n, height, width, channels = x_NHWC.shape
    out = torch.empty_like(x_NHWC)
    patches = x_NHWC.new_empty(n, height // 2, width // 2, 4 * channels)
    _launch_standardise(x_NHWC, out, patches)
    return out, patches


def _launch_standardise(x_NHWC: Tensor, out_NHWC: Tensor, patches: Tensor | None) -> None:
    channels = x_NHWC.shape[-1]
    pixels = x_NHWC.numel() // channels
    power = power_of_two(channels)
    rows = max(1, 4096 // power)
    kernels.standardise_kernel[(triton.cdiv(pixels, rows),)](
        x_NHWC,
        out_NHWC,
        out_NHWC if patches is None else patches,
        pixels,
        x_NHWC.shape[2],
        EPS=LAYER_NORM_EPS,
        C=channels,
        C_P=power,
        ROWS=rows,
        PATCHES=patches is not None,
        num_warps=4,
    )
