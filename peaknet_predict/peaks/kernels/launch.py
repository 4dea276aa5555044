"""The CUDA kernels of `PeakFinder`: compiled for a device once in a process, and launched.

`pack.cu` makes bit masks of what a network gives, `label.cu` finds the components of bit masks.
This module is the only one that imports CuPy.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import cupy
except ImportError as error:
    raise ImportError(
        "finding peaks on a GPU needs CuPy: install the extra for the CUDA version of your torch "
        "(see torch.version.cuda), pip install 'peaknet-predict[cuda12]' or "
        "pip install 'peaknet-predict[cuda13]'"
    ) from error

log = logging.getLogger(__name__)

FLOATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Dtypes of logits and their part of the kernels' names."""

LOGIT_LAYOUTS = ("planar", "interleaved", "strided")
CLASS_LAYOUTS = ("planar", "strided")
CLASS_BYTES = (1, 2, 4, 8)

PIXEL_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.uint16: 2,
    torch.int16: 3,
    torch.uint32: 4,
    torch.int32: 5,
    torch.float32: 6,
    torch.float64: 7,
}
"""Dtypes of raw pixels and their numbers in `Pixels::at` of intensity.cuh."""


@dataclass(frozen=True)
class Kernels:
    """Kernels by name, and how much dynamic shared memory a block of `peaknet_label` may have."""

    by_name: dict[str, Any]
    shared_bytes: int


@functools.cache
def load(device_index: int) -> Kernels:
    """Compile and load all kernels for a device.

    Everything that may wait for the device happens here, so that launches never do. CuPy keeps the
    compiled code on disk: only the first process on a machine compiles.
    """
    started = time.monotonic()
    with cupy.cuda.Device(device_index) as device:
        by_name = _compile(_read("pack.cu"), _names_of_pack())
        label = _read("label.cu").replace('#include "intensity.cuh"', _read("intensity.cuh"))
        by_name |= _compile(label, ["peaknet_label", "peaknet_label_large"])
        static_bytes = max(
            by_name[name].shared_size_bytes for name in ("peaknet_label", "peaknet_label_large")
        )
        shared_bytes = device.attributes["MaxSharedMemoryPerBlockOptin"] - static_bytes
        for name in ("peaknet_label", "peaknet_label_large"):
            by_name[name].max_dynamic_shared_size_bytes = shared_bytes
    log.info("loading the kernels of the peak finder took %.1f s", time.monotonic() - started)
    return Kernels(by_name, shared_bytes)


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _names_of_pack() -> list[str]:
    names = [f"peaknet_pack_upsampled_{dtype}" for dtype in FLOATS.values()]
    names += [f"peaknet_pack_logits_{d}_{lay}" for d in FLOATS.values() for lay in LOGIT_LAYOUTS]
    names += [f"peaknet_pack_classes_{size}_{lay}" for size in CLASS_BYTES for lay in CLASS_LAYOUTS]
    return names


def _compile(code: str, names: list[str]) -> dict[str, Any]:
    module = cupy.RawModule(code=code, options=("-std=c++17",))
    kernels = {name: module.get_function(name) for name in names}
    for kernel in kernels.values():
        _ = kernel.num_regs  # loads the function now rather than at its first launch
    return kernels


def launch(
    kernel: Any,
    blocks: int,
    threads: int,
    arguments: list[Any],
    stream: torch.cuda.Stream,
    shared_bytes: int = 0,
) -> None:
    """Enqueue a kernel on a stream of torch's.

    Arguments are as `pointer`, `u32`, `i32` and `i64` make them: CuPy passes a NumPy scalar by its
    size, and a wrong size would shift all that follow.
    """
    with cupy.cuda.Device(stream.device_index), cupy.cuda.Stream.from_external(stream):
        kernel((blocks,), (threads,), tuple(arguments), shared_mem=shared_bytes)


def pointer(tensor: Tensor | None) -> np.uint64:
    """Return the address of a tensor's first element, or null."""
    return np.uint64(0 if tensor is None else tensor.data_ptr())


u32 = np.uint32
i32 = np.int32
i64 = np.int64


def layout_of(tensor: Tensor) -> str:
    """Name the fastest layout that a tensor has: (N, C, H, W) logits or an (N, H, W) class map."""
    # Groups of eight pixels are read as blocks, which must be aligned wherever a row begins.
    block = 16 if tensor.element_size() > 1 else 8
    channel = 1 if tensor.ndim == 4 else None
    rows_align = tensor.data_ptr() % block == 0 and all(
        stride * tensor.element_size() % block == 0
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size > 1 and dim != channel and dim != tensor.ndim - 1
    )
    if not rows_align:
        return "strided"
    step = tensor.stride(-1)
    if channel is None:
        return "planar" if step == 1 else "strided"
    if step == 1 and tensor.stride(channel) * tensor.element_size() % block == 0:
        return "planar"
    if step == 2 and tensor.shape[channel] == 2 and tensor.stride(channel) == 1:
        return "interleaved"
    return "strided"
