"""Launches the CUDA kernels of the backbone's operators; imported where there is a GPU.

`depthwise.cu` is for any GPU with bfloat16. `expand.cu`, `expand_wide.cu`, `contract.cu` and
`contract_resident.cu` use the matrix units of Hopper (compute capability 9.0) and take only some
sizes; the kernels of `triton_backbone` do the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peaknet_predict import cuda
from peaknet_predict.models.convnextv2 import LAYER_NORM_EPS
from peaknet_predict.models.fast import ops, triton_backbone
from peaknet_predict.models.fast.cuda_common import (
    ALIGNMENT,
    GROUP,
    MOST_SHARED_BYTES,
    ROWS,
    hopper_kernel,
    is_hopper,
    launch,
    multiprocessors,
    source,
)

_DEPTHWISE_THREADS = 256
_DEPTHWISE_CHANNELS = 32
_DEPTHWISE_ROWS = 16
# Columns of a tile, and what a pixel costs on an H200: a narrow one reads more of its border twice.
_DEPTHWISE_COSTS = {16: 1.25, 32: 1.0}


@functools.cache
def _depthwise_kernels(channels: int, device_index: int) -> dict[str, Any]:
    sizes = (f"BYTES_{columns}={_depthwise_bytes(columns)}" for columns in _DEPTHWISE_COSTS)
    kernels = cuda.compile_kernels(
        source("depthwise"),
        ["peaknet_moments", *(f"peaknet_depthwise_{columns}" for columns in _DEPTHWISE_COSTS)],
        device_index,
        (f"CHANNELS={channels}", *sizes),
    )
    for columns in _DEPTHWISE_COSTS:
        kernel = kernels[f"peaknet_depthwise_{columns}"]
        cuda.allow_dynamic_memory(kernel, _depthwise_bytes(columns), device_index)
    return kernels


def _depthwise_bytes(columns: int) -> int:
    """Return the shared memory of a block, as `depthwise.cu` lays it out (and checks)."""
    pairs = (_DEPTHWISE_ROWS + 6) * (columns + 8) // 2
    planes = _DEPTHWISE_CHANNELS // 8 * (8 * ((pairs + 3) // 8 * 8 + 4) + 8)
    copies = -(-pairs // (_DEPTHWISE_THREADS // 4)) * _DEPTHWISE_THREADS * 8
    return 4 * (max(planes, copies) + _DEPTHWISE_CHANNELS * 7 * 9)


@ops.depthwise.register_kernel("cuda")
def _depthwise(
    x_NHWC: Tensor, weight_49C: Tensor, scale_C: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    # Every block of the network starts here; the kernels take nothing else.
    if x_NHWC.dtype != torch.bfloat16 or not x_NHWC.is_contiguous():
        raise TypeError(
            f"the fast PeakNet's kernels take contiguous bfloat16 features, not {x_NHWC.dtype}: "
            "make it with FastPeakNet(net), without another dtype"
        )
    n, height, width, channels = x_NHWC.shape
    if height * width * channels >= 2**31:
        raise ValueError(
            f"a panel of {height}x{width} with {channels} channels is too large for the kernels: "
            "split it, or set fast: false"
        )
    groups = -(-channels // _DEPTHWISE_CHANNELS)
    pixels = n * height * width
    out = torch.empty_like(x_NHWC)
    sums = x_NHWC.new_empty(groups, 2, pixels, dtype=torch.float32)
    moments = x_NHWC.new_empty(pixels, 2, dtype=torch.float32)
    kernels = _depthwise_kernels(channels, x_NHWC.get_device())
    across = {columns: -(-width // columns) for columns in _DEPTHWISE_COSTS}
    columns = min(across, key=lambda columns: across[columns] * columns * _DEPTHWISE_COSTS[columns])
    tiles = -(-height // _DEPTHWISE_ROWS) * across[columns]
    launch(
        kernels[f"peaknet_depthwise_{columns}"],
        (groups * tiles, n),
        _DEPTHWISE_THREADS,
        (
            *cuda.pointers(x_NHWC, weight_49C, scale_C, bias_C, out, sums),
            np.int32(height),
            np.int32(width),
        ),
        x_NHWC,
        _depthwise_bytes(columns),
    )
    launch(
        kernels["peaknet_moments"],
        (-(-pixels // 256),),
        256,
        (cuda.pointer(sums), cuda.pointer(moments), np.int64(pixels), np.float32(LAYER_NORM_EPS)),
        x_NHWC,
    )
    return out, moments


_EXPAND_COLUMNS = 128
_EXPAND_MOST_CHANNELS = 384  # whose weights fit into shared memory beside the tiles
_WIDE_COLUMNS, _WIDE_GROUPS, _WIDE_STAGES = 256, 2, 4
_WIDE_BYTES = (
    _WIDE_STAGES * 2 * 64 * (_WIDE_GROUPS * ROWS + _WIDE_COLUMNS) + 8 * _WIDE_COLUMNS + ALIGNMENT
)


def expand_shape(channels: int) -> tuple[int, int]:
    """Return groups of warps in a block, and blocks on a multiprocessor, for so many channels."""
    if channels > 192:
        return 2, 1
    return 1, 3 if channels <= 96 else 2


def _expand_bytes(channels: int, groups: int) -> int:
    weights, tiles = 2 * _EXPAND_COLUMNS * channels, groups * 2 * ROWS * channels
    staging, terms = groups * 2 * ROWS * 64, 8 * _EXPAND_COLUMNS
    return weights + tiles + staging + terms + ALIGNMENT


@ops.expand.register_kernel("cuda")
def _expand(
    x_NHWC: Tensor, moments_M2: Tensor, weight_KC: Tensor, column_sums_K: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    n, height, width, channels = x_NHWC.shape
    size, pixels = len(weight_KC), height * width
    strip = ops.strip(channels)
    is_wide = channels > _EXPAND_MOST_CHANNELS
    misfit = channels % 64 or pixels % strip if is_wide else channels % 32
    if misfit or not is_hopper(x_NHWC):
        return triton_backbone.expand(x_NHWC, moments_M2, weight_KC, column_sums_K, bias_K)
    strips = -(-pixels // strip)
    hidden = x_NHWC.new_empty(n, height, width, size)
    energy = x_NHWC.new_empty(n, strips, size, dtype=torch.float32)
    tensors = x_NHWC, moments_M2, weight_KC, column_sums_K, bias_K, hidden, energy
    if is_wide:
        launch(
            hopper_kernel(
                "expand_wide", (f"CHANNELS={channels}",), _WIDE_BYTES, x_NHWC.get_device()
            ),
            (size // _WIDE_COLUMNS * strips * n,),
            GROUP * _WIDE_GROUPS,
            (*cuda.pointers(*tensors), np.int32(size)),
            x_NHWC,
            _WIDE_BYTES,
        )
        return hidden, energy
    groups, blocks = expand_shape(channels)
    shared_bytes = _expand_bytes(channels, groups)
    is_even = int(pixels % ROWS == 0)
    defines = (
        f"CHANNELS={channels}",
        f"GROUPS={groups}",
        f"BLOCKS={blocks}",
        f"EVEN={is_even}",
    )
    launch(
        hopper_kernel("expand", defines, shared_bytes, x_NHWC.get_device()),
        (size // _EXPAND_COLUMNS, strips, n),
        GROUP * groups,
        (
            *cuda.pointers(*tensors),
            np.int32(pixels),
            np.int32(size),
            np.int32(strip),
        ),
        x_NHWC,
        shared_bytes,
    )
    return hidden, energy


_RESIDENT_CHANNELS = 96  # whose weights stay in shared memory
_RESIDENT_GROUPS = 3
_RESIDENT_BYTES = (
    2 * 4 * _RESIDENT_CHANNELS**2
    + _RESIDENT_GROUPS
    * (4 * 2 * 64 * ROWS + 4 * 16 * (2 * _RESIDENT_CHANNELS + 16) + 4 * 4 * _RESIDENT_CHANNELS)
    + ALIGNMENT
)


def contract_shape(channels: int) -> tuple[int, int, int] | None:
    """Return columns, groups of warps and stages of a block for so many channels, if it can be."""
    for shape in ((192, 3, 4), (256, 2, 4)):
        if channels % shape[0] == 0 and _contract_bytes(channels, *shape) <= MOST_SHARED_BYTES:
            return shape
    return None


def _contract_bytes(channels: int, columns: int, groups: int, stages: int) -> int:
    ring, scales = stages * 2 * 64 * (groups * ROWS + columns), groups * 4 * 4 * channels
    return ring + scales + ALIGNMENT


@ops.contract.register_kernel("cuda")
def _contract(
    hidden_NHWK: Tensor, scale_NK: Tensor, weight_CK: Tensor, bias_C: Tensor, residual_NHWC: Tensor
) -> Tensor:
    n, height, width, channels = residual_NHWC.shape
    shape = contract_shape(channels)
    misfit = height * width % ROWS or (shape is None and channels != _RESIDENT_CHANNELS)
    if misfit or not is_hopper(hidden_NHWK):
        return triton_backbone.contract(hidden_NHWK, scale_NK, weight_CK, bias_C, residual_NHWC)
    out = torch.empty_like(residual_NHWC)
    rows = n * height * width
    tensors = hidden_NHWK, scale_NK, weight_CK, bias_C, residual_NHWC, out
    if shape is None:
        tiles = rows // ROWS
        share = -(-tiles // (_RESIDENT_GROUPS * multiprocessors(hidden_NHWK)))
        launch(
            hopper_kernel("contract_resident", (), _RESIDENT_BYTES, hidden_NHWK.get_device()),
            (-(-tiles // (_RESIDENT_GROUPS * share)),),
            GROUP * _RESIDENT_GROUPS,
            (
                *cuda.pointers(*tensors),
                np.int64(rows),
                np.int32(height * width),
                np.int32(share),
            ),
            hidden_NHWK,
            _RESIDENT_BYTES,
        )
        return out
    columns, groups, stages = shape
    shared_bytes = _contract_bytes(channels, columns, groups, stages)
    defines = (
        f"CHANNELS={channels}",
        f"COLUMNS={columns}",
        f"GROUPS={groups}",
        f"STAGES={stages}",
    )
    launch(
        hopper_kernel("contract", defines, shared_bytes, hidden_NHWK.get_device()),
        (channels // columns * -(-rows // (groups * ROWS)),),
        GROUP * groups,
        (
            *cuda.pointers(*tensors),
            np.int64(rows),
            np.int32(height * width),
        ),
        hidden_NHWK,
        shared_bytes,
    )
    return out
