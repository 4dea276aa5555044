"""What the launchers of the CUDA kernels have in common: tiles, devices, compiled kernels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peaknet_predict import cuda

GROUP = 128
"""Threads that multiply together on Hopper."""

ROWS = 64
"""Rows of a tile there."""

ALIGNMENT = 1024
"""Bytes by which the tiles in shared memory may have to be moved to be aligned."""

MOST_SHARED_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""


def source(name: str) -> str:
    """Return the code of a ``.cu`` file of this package."""
    return cuda.read_source(Path(__file__).with_name(f"{name}.cu"))


@functools.cache
def hopper_kernel(name: str, defines: tuple[str, ...], shared_bytes: int, device_index: int) -> Any:
    """Return ``peaknet_<name>`` of ``<name>.cu``, compiled with definitions."""
    names = [f"peaknet_{name}"]
    (kernel,) = cuda.compile_for_hopper(source(name), names, device_index, defines).values()
    cuda.allow_dynamic_memory(kernel, shared_bytes, device_index)
    return kernel


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    threads: int,
    arguments: tuple[Any, ...],
    like: Tensor,
    shared_bytes: int = 0,
) -> None:
    """Do `cuda.launch` on torch's current stream of a tensor's device."""
    stream = torch.cuda.current_stream(like.device)
    cuda.launch(kernel, grid, threads, arguments, stream, shared_bytes)


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors a tensor's device has."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def is_hopper(tensor: Tensor) -> bool:
    """Whether a tensor's device has the instructions of the kernels for Hopper."""
    return torch.cuda.get_device_capability(tensor.device) == cuda.HOPPER
