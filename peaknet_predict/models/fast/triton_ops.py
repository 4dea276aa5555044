"""Launches the kernels of `triton_kernels` for the operators of `ops`, where there is a GPU.

Tile sizes are fixed by the number of channels, as measured on an H200 (docs/benchmarks): trying
them out at start would take longer than it gains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

from peaknet_predict.models.fast import ops
from peaknet_predict.models.fast import triton_kernels as kernels

P = ParamSpec("P")
R = TypeVar("R")

_SUMS_TILE = 512


def _on_its_device(operator: Callable[P, R]) -> Callable[P, R]:
    """Make the device of an operator's first tensor current: Triton launches on that one."""

    @functools.wraps(operator)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(cast(Tensor, args[0]).device):
            return operator(*args, **kwargs)

    return launched


def _power(size: int) -> int:
    return int(triton.next_power_of_2(size))


@ops.stem.register_kernel("cuda")
@_on_its_device
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
        C=size,
        C_P=_power(size),
        ROWS=tile,
        num_warps=4,
    )
    return out


@_on_its_device
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
@_on_its_device
def _response(energy_NTK: Tensor, weight_K: Tensor) -> Tensor:
    n, tiles, size = energy_NTK.shape
    scale = energy_NTK.new_empty(n, size)
    power = _power(size)
    kernels.response_kernel[(n,)](
        energy_NTK,
        weight_K,
        scale,
        tiles,
        L=size,
        L_P=power,
        ROWS=max(1, min(_power(tiles), 16384 // power)),
        num_warps=16,
    )
    return scale


@_on_its_device
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
        block = max(16, _power(channels + 1) // 2)
        rest = max(16, _power(channels - block)) if channels > block else 0
    return {
        "ROWS": 128,
        "BLOCK_C": block,
        "REST_C": rest,
        "BLOCK_K": 64 if channels % 32 == 0 else 32,
        "num_warps": 8 if block + rest > 128 else 4,
        "num_stages": 4,
    }


@ops.standardise.register_kernel("cuda")
@_on_its_device
def _standardise(x_NHWC: Tensor) -> Tensor:
    out = torch.empty_like(x_NHWC)
    _launch_standardise(x_NHWC, out, None)
    return out


@ops.standardise_patches.register_kernel("cuda")
@_on_its_device
def _standardise_patches(x_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    n, height, width, channels = x_NHWC.shape
    out = torch.empty_like(x_NHWC)
    patches = x_NHWC.new_empty(n, height // 2, width // 2, 4 * channels)
    _launch_standardise(x_NHWC, out, patches)
    return out, patches


def _launch_standardise(x_NHWC: Tensor, out_NHWC: Tensor, patches: Tensor | None) -> None:
    channels = x_NHWC.shape[-1]
    pixels = x_NHWC.numel() // channels
    power = _power(channels)
    rows = max(1, 4096 // power)
    kernels.standardise_kernel[(triton.cdiv(pixels, rows),)](
        x_NHWC,
        out_NHWC,
        out_NHWC if patches is None else patches,
        pixels,
        x_NHWC.shape[2],
        C=channels,
        C_P=power,
        ROWS=rows,
        PATCHES=patches is not None,
        num_warps=4,
    )


@_on_its_device
def node(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    """Do `ops.node` for any number of features; `cuda_ops` has a faster kernel for some."""
    n, height, width, channels = same_NHWC.shape
    _, other_height, other_width, _ = other_NHWC.shape
    out = torch.empty_like(same_NHWC)
    power = _power(channels)
    config = node_config(power)
    kernels.node_kernel[(n * triton.cdiv(height * width, config["ROWS"]),)](
        same_NHWC,
        same_NHWC if middle_NHWC is None else middle_NHWC,
        other_NHWC,
        weight_CC,
        scale_C,
        shift_C,
        out,
        *fusion,
        height,
        width,
        other_height,
        other_width,
        HAS_MIDDLE=middle_NHWC is not None,
        UP=other_height < height,
        C=channels,
        C_P=power,
        **config,
    )
    return out


def node_config(channels: int) -> dict[str, Any]:
    """Return tile sizes, warps and stages of `node` for so many channels."""
    return {
        "ROWS": 64,
        "BLOCK_K": min(64, max(16, channels)),
        "num_warps": 4,
        "num_stages": 2,
    }


@_on_its_device
def base_node(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    """Do `ops.base_node` for any sizes; `cuda_ops` has a faster kernel for some."""
    n, height, width, channels = x_NHWC.shape
    features = len(scale_F)
    out = coarse_NHWF.new_empty(n, height, width, features)
    rows = 64
    kernels.base_node_kernel[(n * triton.cdiv(height * width, rows),)](
        x_NHWC,
        coarse_NHWF,
        inner_FC,
        outer_FC,
        scale_F,
        shift_F,
        added_F,
        out,
        height,
        width,
        C=channels,
        F=features,
        F_P=max(16, _power(features)),
        ROWS=rows,
        BLOCK_K=32,
        num_warps=8 if features > 128 else 4,
        num_stages=2,
    )
    return out


@ops.group_norm.register_kernel("cuda")
@_on_its_device
def _group_norm(
    x_NHWC: Tensor, added_C: Tensor, num_groups: int, weight_C: Tensor, bias_C: Tensor, eps: float
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    pixels = height * width
    tiles = triton.cdiv(pixels, _SUMS_TILE)
    power = _power(channels)
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
@_on_its_device
def _activate_upsampled(x_NHWC: Tensor, affine_N2C: Tensor) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    power = _power(channels)
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
@_on_its_device
def _classify(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_2C: Tensor, bias_2: Tensor, added: Tensor | None
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    power = _power(channels)
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
