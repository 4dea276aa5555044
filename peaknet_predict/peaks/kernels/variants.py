"""The CUDA kernels of `PeakFinder`: which variants there are, and all of them for a device.

`pack.cu` makes bit masks of what a network gives, `label.cu` finds the components of bit masks.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FLOATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Dtypes of logits and their part of the kernels' names."""

LOGIT_LAYOUTS = ("planar", "interleaved", "strided")
CLASS_LAYOUTS = ("planar", "strided")
CLASS_BYTES = (1, 2, 4, 8)

_LABEL_NAMES = ("peaknet_label", "peaknet_label_large")

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
    """Compile and load all kernels for a device, see `peaknet_predict.cuda.compile_kernels`."""
    from peaknet_predict import cuda  # where it is used: CuPy may not be installed

    started = time.monotonic()
    folder = Path(__file__).parent
    pack = cuda.read_source(folder / "pack.cu")
    by_name = cuda.compile_kernels(pack, _names_of_pack(), device_index)
    label = cuda.read_source(folder / "label.cu")
    by_name |= cuda.compile_kernels(label, _LABEL_NAMES, device_index)
    labelling = [by_name[name] for name in _LABEL_NAMES]
    shared_bytes = cuda.room_for_dynamic_memory(labelling, device_index)
    for kernel in labelling:
        cuda.allow_dynamic_memory(kernel, shared_bytes, device_index)
    log.info("loading the kernels of the peak finder took %.1f s", time.monotonic() - started)
    return Kernels(by_name, shared_bytes)


def _names_of_pack() -> list[str]:
    names = [f"peaknet_pack_upsampled_{dtype}" for dtype in FLOATS.values()]
    names += [f"peaknet_pack_logits_{d}_{lay}" for d in FLOATS.values() for lay in LOGIT_LAYOUTS]
    names += [f"peaknet_pack_classes_{size}_{lay}" for size in CLASS_BYTES for lay in CLASS_LAYOUTS]
    return names


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
