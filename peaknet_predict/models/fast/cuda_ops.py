"""Launches the CUDA kernels of the fast PeakNet; imported where there is a GPU.

`depthwise.cu` is for any GPU with bfloat16. `expand.cu`, `expand_wide.cu`, `contract.cu`,
`contract_resident.cu`, `node.cu` and `base_node.cu` use the matrix units of Hopper (compute
capability 9.0) and take some sizes only; for all else the kernels of `triton_ops` do the same.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import nvrtc
from torch import Tensor

from peaknet_predict.models.convnextv2 import LAYER_NORM_EPS
from peaknet_predict.models.fast import ops, triton_ops
from peaknet_predict.process.files import write_whole

_HOPPER = (9, 0)
_GROUP = 128  # threads that multiply together on Hopper
_ROWS = 64  # of a tile there
_ALIGNMENT = 1024


def _read(name: str) -> str:
    """Return a source with the files that it includes, for the compiler looks for none."""
    code = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return re.sub(r'#include "(\w+\.cuh)"', lambda included: _read(included[1]), code)


def _pointer(tensor: Tensor | None) -> np.uint64:
    return np.uint64(0 if tensor is None else tensor.data_ptr())


def _pointers(*tensors: Tensor | None) -> tuple[np.uint64, ...]:
    return tuple(_pointer(tensor) for tensor in tensors)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    threads: int,
    arguments: tuple[Any, ...],
    like: Tensor,
    shared_bytes: int = 0,
) -> None:
    """Enqueue a kernel on torch's current stream of a tensor's device."""
    stream = torch.cuda.current_stream(like.device)
    with cupy.cuda.Device(stream.device_index), cupy.cuda.Stream.from_external(stream):
        kernel(grid, (threads,), arguments, shared_mem=shared_bytes)


def _device_index(tensor: Tensor) -> int:
    return tensor.get_device()


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _is_hopper(tensor: Tensor) -> bool:
    return torch.cuda.get_device_capability(tensor.device) == _HOPPER


@functools.cache
def _hopper_kernel(
    name: str, defines: tuple[str, ...], shared_bytes: int, device_index: int
) -> Any:
    """Compile ``peaknet_<name>`` of ``<name>.cu`` with definitions such as ``"CHANNELS=96"``.

    CuPy compiles for compute capability 9.0 without the instructions that only 9.0 has
    (``sm_90a``), so the compiler is called here.
    """
    code = _read(f"{name}.cu")
    options = ("-std=c++17", "-arch=sm_90a", *(f"-D{define}" for define in defines))
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(path=str(_compiled(code, options)))
        kernel = module.get_function(f"peaknet_{name}")
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel


def _compiled(code: str, options: tuple[str, ...]) -> Path:
    """Return the machine code's file, which is kept where CuPy keeps its own."""
    key = repr((code, options, nvrtc.getVersion()))
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"peaknet_{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if path.exists():
        return path
    program = nvrtc.createProgram(code, "peaknet.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
        cubin = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, cubin)  # another process may look for it at this moment
    return path


# --- depthwise ---

_DEPTHWISE_THREADS = 256
_DEPTHWISE_CHANNELS = 32
_DEPTHWISE_ROWS = 16
# Columns of a tile, and what a pixel costs on an H200: a narrow one reads more of its border twice.
_DEPTHWISE_COSTS = {16: 1.25, 32: 1.0}


@functools.cache
def _depthwise_kernels(channels: int, device_index: int) -> dict[str, Any]:
    sizes = tuple(f"-DBYTES_{columns}={_depthwise_bytes(columns)}" for columns in _DEPTHWISE_COSTS)
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(
            code=_read("depthwise.cu"), options=("-std=c++17", f"-DCHANNELS={channels}", *sizes)
        )
        kernels = {"moments": module.get_function("peaknet_moments")}
        for columns in _DEPTHWISE_COSTS:
            kernel = module.get_function(f"peaknet_depthwise_{columns}")
            kernel.max_dynamic_shared_size_bytes = _depthwise_bytes(columns)
            kernels[f"depthwise_{columns}"] = kernel
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
    # Every block of the network begins here, and the kernels take nothing else.
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
    kernels = _depthwise_kernels(channels, _device_index(x_NHWC))
    across = {columns: -(-width // columns) for columns in _DEPTHWISE_COSTS}
    columns = min(across, key=lambda columns: across[columns] * columns * _DEPTHWISE_COSTS[columns])
    tiles = -(-height // _DEPTHWISE_ROWS) * across[columns]
    _launch(
        kernels[f"depthwise_{columns}"],
        (groups * tiles, n),
        _DEPTHWISE_THREADS,
        (
            *_pointers(x_NHWC, weight_49C, scale_C, bias_C, out, sums),
            np.int32(height),
            np.int32(width),
        ),
        x_NHWC,
        _depthwise_bytes(columns),
    )
    _launch(
        kernels["moments"],
        (-(-pixels // 256),),
        256,
        (_pointer(sums), _pointer(moments), np.int64(pixels), np.float32(LAYER_NORM_EPS)),
        x_NHWC,
    )
    return out, moments


# --- expand ---

_EXPAND_COLUMNS = 128
_EXPAND_MOST_CHANNELS = 384  # whose weights fit into shared memory beside the tiles
_WIDE_COLUMNS, _WIDE_GROUPS, _WIDE_STAGES = 256, 2, 4
_WIDE_BYTES = (
    _WIDE_STAGES * 2 * 64 * (_WIDE_GROUPS * _ROWS + _WIDE_COLUMNS) + 8 * _WIDE_COLUMNS + _ALIGNMENT
)


def expand_shape(channels: int) -> tuple[int, int]:
    """Return groups of warps in a block, and blocks on a multiprocessor, for so many channels."""
    if channels > 192:
        return 2, 1
    return 1, 3 if channels <= 96 else 2


def _expand_bytes(channels: int, groups: int) -> int:
    weights, tiles = 2 * _EXPAND_COLUMNS * channels, groups * 2 * _ROWS * channels
    staging, terms = groups * 2 * _ROWS * 64, 8 * _EXPAND_COLUMNS
    return weights + tiles + staging + terms + _ALIGNMENT


@ops.expand.register_kernel("cuda")
def _expand(
    x_NHWC: Tensor, moments_M2: Tensor, weight_KC: Tensor, column_sums_K: Tensor, bias_K: Tensor
) -> tuple[Tensor, Tensor]:
    n, height, width, channels = x_NHWC.shape
    size, pixels = len(weight_KC), height * width
    strip = ops.strip(channels)
    is_wide = channels > _EXPAND_MOST_CHANNELS
    misfit = channels % 64 or pixels % strip if is_wide else channels % 32
    if misfit or not _is_hopper(x_NHWC):
        return triton_ops.expand(x_NHWC, moments_M2, weight_KC, column_sums_K, bias_K)
    strips = -(-pixels // strip)
    hidden = x_NHWC.new_empty(n, height, width, size)
    energy = x_NHWC.new_empty(n, strips, size, dtype=torch.float32)
    tensors = x_NHWC, moments_M2, weight_KC, column_sums_K, bias_K, hidden, energy
    if is_wide:
        _launch(
            _hopper_kernel(
                "expand_wide", (f"CHANNELS={channels}",), _WIDE_BYTES, _device_index(x_NHWC)
            ),
            (size // _WIDE_COLUMNS * strips * n,),
            _GROUP * _WIDE_GROUPS,
            (*_pointers(*tensors), np.int32(size)),
            x_NHWC,
            _WIDE_BYTES,
        )
        return hidden, energy
    groups, blocks = expand_shape(channels)
    shared_bytes = _expand_bytes(channels, groups)
    is_even = int(pixels % _ROWS == 0)
    defines = (
        f"CHANNELS={channels}",
        f"GROUPS={groups}",
        f"BLOCKS={blocks}",
        f"EVEN={is_even}",
    )
    _launch(
        _hopper_kernel("expand", defines, shared_bytes, _device_index(x_NHWC)),
        (size // _EXPAND_COLUMNS, strips, n),
        _GROUP * groups,
        (
            *_pointers(*tensors),
            np.int32(pixels),
            np.int32(size),
            np.int32(strip),
        ),
        x_NHWC,
        shared_bytes,
    )
    return hidden, energy


# --- contract ---


_MOST_SHARED_BYTES = 227 * 1024  # of a block on Hopper
_RESIDENT_CHANNELS = 96  # whose weights stay in shared memory
_RESIDENT_GROUPS = 3
_RESIDENT_BYTES = (
    2 * 4 * _RESIDENT_CHANNELS**2
    + _RESIDENT_GROUPS
    * (4 * 2 * 64 * _ROWS + 4 * 16 * (2 * _RESIDENT_CHANNELS + 16) + 4 * 4 * _RESIDENT_CHANNELS)
    + _ALIGNMENT
)


def contract_shape(channels: int) -> tuple[int, int, int] | None:
    """Return columns, groups of warps and stages of a block for so many channels, if it can be."""
    for shape in ((192, 3, 4), (256, 2, 4)):
        if channels % shape[0] == 0 and _contract_bytes(channels, *shape) <= _MOST_SHARED_BYTES:
            return shape
    return None


def _contract_bytes(channels: int, columns: int, groups: int, stages: int) -> int:
    ring, scales = stages * 2 * 64 * (groups * _ROWS + columns), groups * 4 * 4 * channels
    return ring + scales + _ALIGNMENT


@ops.contract.register_kernel("cuda")
def _contract(
    hidden_NHWK: Tensor, scale_NK: Tensor, weight_CK: Tensor, bias_C: Tensor, residual_NHWC: Tensor
) -> Tensor:
    n, height, width, channels = residual_NHWC.shape
    shape = contract_shape(channels)
    misfit = height * width % _ROWS or (shape is None and channels != _RESIDENT_CHANNELS)
    if misfit or not _is_hopper(hidden_NHWK):
        return triton_ops.contract(hidden_NHWK, scale_NK, weight_CK, bias_C, residual_NHWC)
    out = torch.empty_like(residual_NHWC)
    rows = n * height * width
    tensors = hidden_NHWK, scale_NK, weight_CK, bias_C, residual_NHWC, out
    if shape is None:
        tiles = rows // _ROWS
        share = -(-tiles // (_RESIDENT_GROUPS * _multiprocessors(hidden_NHWK)))
        _launch(
            _hopper_kernel("contract_resident", (), _RESIDENT_BYTES, _device_index(hidden_NHWK)),
            (-(-tiles // (_RESIDENT_GROUPS * share)),),
            _GROUP * _RESIDENT_GROUPS,
            (
                *_pointers(*tensors),
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
    _launch(
        _hopper_kernel("contract", defines, shared_bytes, _device_index(hidden_NHWK)),
        (channels // columns * -(-rows // (groups * _ROWS)),),
        _GROUP * groups,
        (
            *_pointers(*tensors),
            np.int64(rows),
            np.int32(height * width),
        ),
        hidden_NHWK,
        shared_bytes,
    )
    return out


# --- node ---

_NODE_FEATURES = 256
_NODE_GROUPS = 3
_NODE_BYTES = (
    2 * _NODE_FEATURES * (_NODE_FEATURES + _NODE_GROUPS * _ROWS) + 8 * _NODE_FEATURES + _ALIGNMENT
)  # all that a block can have


@ops.node.register_kernel("cuda")
def _node(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    n, height, width, features = same_NHWC.shape
    # The kernel divides by the width through a reciprocal, which 1 has none of.
    if features != _NODE_FEATURES or width == 1 or not _is_hopper(same_NHWC):
        return triton_ops.node(
            same_NHWC, middle_NHWC, other_NHWC, fusion, weight_CC, scale_C, shift_C
        )
    _, other_height, other_width, _ = other_NHWC.shape
    out = torch.empty_like(same_NHWC)
    device = _device_index(same_NHWC)
    defines = (f"HAS_MIDDLE={int(middle_NHWC is not None)}", f"EPS={LAYER_NORM_EPS}f")
    _launch(
        _hopper_kernel("node", defines, _NODE_BYTES, device),
        (_multiprocessors(same_NHWC),),
        _GROUP * _NODE_GROUPS,
        (
            *_pointers(same_NHWC, middle_NHWC, other_NHWC, weight_CC, scale_C, shift_C, out),
            *(np.float32(factor) for factor in fusion),
            np.int32(n),
            np.int32(height),
            np.int32(width),
            np.int32(other_height),
            np.int32(other_width),
            np.uint32(-(-(2**32) // width)),
        ),
        same_NHWC,
        _NODE_BYTES,
    )
    return out


# --- base node ---

_BASE_NODE_MOST_CHANNELS = 96  # whose two matrices fit into shared memory beside the tiles
_BASE_NODE_PIXELS = 16  # of a row, which a warp takes together


def _base_node_bytes(channels: int) -> int:
    weights, tiles = 2 * 2 * _NODE_FEATURES * channels, 2 * _NODE_GROUPS * 2 * _ROWS * channels
    staging, terms = _NODE_GROUPS * _ROWS * _NODE_FEATURES, 12 * _NODE_FEATURES
    return weights + tiles + staging + terms + _ALIGNMENT


@ops.base_node.register_kernel("cuda")
def _base_node(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    if (
        len(scale_F) != _NODE_FEATURES
        or channels % 32
        or channels > _BASE_NODE_MOST_CHANNELS
        or width % _BASE_NODE_PIXELS
        or height * width % _ROWS
        or not _is_hopper(x_NHWC)
    ):
        return triton_ops.base_node(
            x_NHWC, coarse_NHWF, inner_FC, outer_FC, scale_F, shift_F, added_F
        )
    out = coarse_NHWF.new_empty(n, height, width, _NODE_FEATURES)
    device = _device_index(x_NHWC)
    defines = (f"CHANNELS={channels}", f"EPS={LAYER_NORM_EPS}f")
    shared_bytes = _base_node_bytes(channels)
    _launch(
        _hopper_kernel("base_node", defines, shared_bytes, device),
        (_multiprocessors(x_NHWC),),
        _GROUP * _NODE_GROUPS,
        (
            *_pointers(x_NHWC, coarse_NHWF, inner_FC, outer_FC, scale_F, shift_F, added_F, out),
            np.int32(n),
            np.int32(height),
            np.int32(width),
        ),
        x_NHWC,
        shared_bytes,
    )
    return out
