"""What `cuda` asks of CuPy, with a CuPy that only takes notes: this machine may have no GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch


class Notes:
    """A CuPy without a GPU."""

    def __init__(self) -> None:
        self.devices: list[int] = []
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.loaded: list[Any] = []
        self.launched: list[Any] = []
        self.broken = False

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[Any]:
        self.devices.append(index)
        yield self
        self.devices.pop()

    attributes = MappingProxyType({"MaxSharedMemoryPerBlockOptin": 232448})

    def module(self, **source: Any) -> Any:
        assert self.devices, "loaded for no device"
        self.loaded.append(source)
        return self

    def get_function(self, name: str) -> Any:
        return Kernel(self, name)


class Kernel:
    num_regs = 32

    def __init__(self, notes: Notes, name: str) -> None:
        self.notes, self.name = notes, name
        self.max_dynamic_shared_size_bytes = 0

    @property
    def shared_size_bytes(self) -> int:
        assert self.notes.devices
        return {"a": 100, "b": 300}[self.name]

    def __call__(self, *call: Any, **more: Any) -> None:
        self.notes.launched.append((self.name, list(self.notes.devices), *call, more))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Notes:
    """Put the notes in CuPy's place, and let `cuda` be imported anew."""
    notes = Notes()
    cupy: Any = ModuleType("cupy")
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.RawModule, cupy.cuda.Device = notes.module, notes.device
    cupy.cuda.Stream = ModuleType("Stream")
    cupy.cuda.Stream.from_external = lambda stream: contextlib.nullcontext()
    nvrtc: Any = ModuleType("cupy.cuda.nvrtc")

    class NVRTCError(Exception):
        pass

    def compile_program(program: str, options: tuple[str, ...]) -> None:
        notes.compiled.append((program, options))
        if notes.broken:
            raise NVRTCError

    nvrtc.NVRTCError = NVRTCError
    nvrtc.getVersion = lambda: (13, 0)
    nvrtc.createProgram = lambda code, name, headers, includes: code
    nvrtc.compileProgram = compile_program
    nvrtc.getCUBIN = lambda program: program.encode()
    nvrtc.getProgramLog = lambda program: "peaknet.cu(1): error: expected a ';'"
    nvrtc.destroyProgram = lambda program: None
    cupy.cuda.nvrtc = nvrtc
    for name, module in (("cupy", cupy), ("cupy.cuda", cupy.cuda), ("cupy.cuda.nvrtc", nvrtc)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "peaknet_predict.cuda", raising=False)
    monkeypatch.setattr("peaknet_predict.cuda", None, raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return notes


def imported() -> Any:
    import importlib

    return importlib.import_module("peaknet_predict.cuda")


def test_a_source_contains_what_it_includes(notes: Notes, tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\nint a;\n#include <cuda.h>\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\nint b = "\\1";\n')
    (tmp_path / "c.cuh").write_text("int c;")
    code = imported().read_source(tmp_path / "a.cu")
    assert code == 'int c;\nint b = "\\1";\n\nint a;\n#include <cuda.h>\n'


def test_every_source_of_ours_is_whole(notes: Notes) -> None:
    root = Path(__file__).parents[2] / "peaknet_predict"
    sources = [path for path in root.rglob("*.cu") if "callbacks" not in path.parts]
    assert len(sources) >= 8
    for path in sources:
        assert '#include "' not in imported().read_source(path), path


def test_kernels_are_compiled_by_cupy_for_their_device(notes: Notes) -> None:
    kernels = imported().compile_kernels("code", ["a", "b"], 3, ["CHANNELS=96"])
    assert notes.loaded == [{"code": "code", "options": ("-std=c++17", "-DCHANNELS=96")}]
    assert list(kernels) == ["a", "b"]
    assert imported().room_for_dynamic_memory(kernels.values(), 3) == 232448 - 300
    imported().allow_dynamic_memory(kernels["a"], 4096, 3)
    assert kernels["a"].max_dynamic_shared_size_bytes == 4096


def test_machine_code_for_hopper_is_kept_on_disk(notes: Notes, tmp_path: Path) -> None:
    for defines in (("N=1",), ("N=1",), ("N=2",)):
        imported().compile_for_hopper("code", ["a"], 0, defines)
    options = ("-std=c++17", "-arch=sm_90a")
    assert notes.compiled == [("code", (*options, "-DN=1")), ("code", (*options, "-DN=2"))]
    kept = sorted((tmp_path / "cache").iterdir())
    assert [path.suffix for path in kept] == [".cubin"] * 2
    assert [path.read_bytes() for path in kept] == [b"code"] * 2
    assert {source["path"] for source in notes.loaded} == {str(path) for path in kept}


def test_code_that_does_not_compile_leaves_nothing_behind(notes: Notes, tmp_path: Path) -> None:
    notes.broken = True
    with pytest.raises(RuntimeError, match="expected a ';'"):
        imported().compile_for_hopper("code", ["a"], 0)
    assert not (tmp_path / "cache").exists()


def test_arguments_arrive_as_they_are(notes: Notes) -> None:
    """CuPy passes a NumPy scalar by its size."""

    class Stream:
        device_index = 2

    tensor = torch.zeros(3)
    arguments = (*imported().pointers(tensor, None), np.int32(5), np.float32(0.5))
    imported().launch(Kernel(notes, "a"), (4, 2), 128, arguments, Stream(), 1024)
    ((name, devices, grid, block, passed, more),) = notes.launched
    assert (name, devices, grid, block, more) == ("a", [2], (4, 2), (128,), {"shared_mem": 1024})
    assert [(type(a), a) for a in passed] == [
        (np.uint64, tensor.data_ptr()),
        (np.uint64, 0),
        (np.int32, 5),
        (np.float32, 0.5),
    ]
