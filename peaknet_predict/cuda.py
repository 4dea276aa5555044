"""CUDA kernels through CuPy: their sources read, compiled, kept on disk and launched.

Imported only where there is a GPU: CuPy may not be installed elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peaknet_predict.process.files import write_whole

try:
    import cupy
    from cupy.cuda import nvrtc
except ImportError as error:
    raise ImportError(
        "kernels on a GPU need CuPy: install the extra for the CUDA version of your torch (see "
        "torch.version.cuda), pip install 'peaknet-predict[cuda12]' or "
        "pip install 'peaknet-predict[cuda13]'",
        name=error.name,
    ) from error

HOPPER = (9, 0)
"""Compute capability of the GPUs for which `compile_for_hopper` compiles."""

_STANDARD = "-std=c++17"


def read_source(path: Path) -> str:
    """Return a source with the files beside it that it includes: the compiler looks for none."""
    code = path.read_text(encoding="utf-8")
    return re.sub(
        r'#include "(\w+\.cuh)"', lambda included: read_source(path.with_name(included[1])), code
    )


def compile_kernels(
    code: str, names: Sequence[str], device_index: int, defines: Sequence[str] = ()
) -> dict[str, Any]:
    """Compile and load kernels for a device, whichever it is.

    Everything that may wait for the device happens here, so that launches never do. CuPy keeps the
    machine code on disk: only the first process on a machine compiles.

    Parameters
    ----------
    code
        As `read_source` returns it.
    names
        Of the kernels, ``extern "C"``.
    device_index
        Of the GPU.
    defines
        Definitions such as ``"CHANNELS=96"``.

    Returns
    -------
    dict
        CuPy's kernels by name.
    """
    options = (_STANDARD, *(f"-D{define}" for define in defines))
    with cupy.cuda.Device(device_index):
        return _load(cupy.RawModule(code=code, options=options), names)


def compile_for_hopper(
    code: str, names: Sequence[str], device_index: int, defines: Sequence[str] = ()
) -> dict[str, Any]:
    """Do `compile_kernels` for a GPU of compute capability 9.0, with all of its instructions.

    CuPy compiles for 9.0 without those that only 9.0 has (``sm_90a``), so the compiler is called
    here.

    Raises
    ------
    RuntimeError
        If the code does not compile; the message is the compiler's.
    """
    options = (_STANDARD, "-arch=sm_90a", *(f"-D{define}" for define in defines))
    with cupy.cuda.Device(device_index):
        return _load(cupy.RawModule(path=str(_machine_code(code, options))), names)


def room_for_dynamic_memory(kernels: Sequence[Any], device_index: int) -> int:
    """Return how many bytes of dynamic shared memory a block of each kernel may have at most."""
    with cupy.cuda.Device(device_index) as device:
        most = int(device.attributes["MaxSharedMemoryPerBlockOptin"])
        return most - max(int(kernel.shared_size_bytes) for kernel in kernels)


def allow_dynamic_memory(kernel: Any, shared_bytes: int, device_index: int) -> None:
    """Let a kernel be launched with up to so many bytes of dynamic shared memory a block."""
    with cupy.cuda.Device(device_index):
        kernel.max_dynamic_shared_size_bytes = shared_bytes


def _load(module: Any, names: Sequence[str]) -> dict[str, Any]:
    kernels = {name: module.get_function(name) for name in names}
    for kernel in kernels.values():
        _ = kernel.num_regs  # loads the function now rather than at its first launch
    return kernels


def _machine_code(code: str, options: tuple[str, ...]) -> Path:
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
    # Whole or not there: another process may look for it at this moment.
    write_whole(path, cubin, private=True)
    return path


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    threads: int,
    arguments: Sequence[Any],
    stream: torch.cuda.Stream,
    shared_bytes: int = 0,
) -> None:
    """Enqueue a kernel on a stream of torch's.

    Parameters
    ----------
    kernel
        One of those that `compile_kernels` returns.
    grid, threads
        Blocks, and threads in each.
    arguments
        Addresses as `pointer` makes them, and NumPy scalars: CuPy passes a scalar by its size, and
        a wrong size would shift all that follow.
    stream
        Where to enqueue it.
    shared_bytes
        Dynamic shared memory of a block.
    """
    with cupy.cuda.Device(stream.device_index), cupy.cuda.Stream.from_external(stream):
        kernel(grid, (threads,), tuple(arguments), shared_mem=shared_bytes)


def pointer(tensor: Tensor | None) -> np.uint64:
    """Return the address of a tensor's first element, or null."""
    return np.uint64(0 if tensor is None else tensor.data_ptr())


def pointers(*tensors: Tensor | None) -> tuple[np.uint64, ...]:
    """Return the addresses of several tensors."""
    return tuple(pointer(tensor) for tensor in tensors)
