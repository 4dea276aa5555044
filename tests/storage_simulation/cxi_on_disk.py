"""CXI files on the simulated disk: what `peaknet_predict.cxi` uses of the system, exchanged."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any
from unittest import mock

import h5py

from peaknet_predict.cxi.journal import Journal
from peaknet_predict.process import files
from tests.storage_simulation.disk import ProcessDisk, Stat


class _Current:
    """The disk of the process that runs."""

    disk: ProcessDisk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.disk, name)


_current = _Current()


class _System:
    """The module `os`, but that its files are on the simulated disk."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_current.disk if hasattr(ProcessDisk, name) else os, name)

    def access(self, path: Any, mode: int) -> bool:
        return True

    def listdir(self, path: Any) -> list[str]:
        return _current.disk.listdir(str(path))

    def link(self, source: Any, target: Any) -> None:
        _current.disk.link(str(source), str(target))


class SimulatedPath(PurePosixPath):
    """A path on the simulated disk, with what is used of `pathlib.Path`."""

    def resolve(self) -> SimulatedPath:
        return self

    def stat(self) -> Stat:
        return _current.disk.stat(str(self))

    def exists(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    is_dir = is_file = exists

    def mkdir(self, exist_ok: bool = False) -> None:
        with contextlib.suppress(*(FileExistsError,) if exist_ok else ()):
            _current.disk.mkdir(str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*(FileNotFoundError,) if missing_ok else ()):
            _current.disk.unlink(str(self))

    def glob(self, pattern: str) -> Iterator[SimulatedPath]:
        names = _current.disk.listdir(str(self))
        return (self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern))

    def samefile(self, other: SimulatedPath) -> bool:
        return self.stat().st_ino == other.stat().st_ino

    def read_bytes(self) -> bytes:
        return files.read_all(str(self), _current.disk)


class _OpenFile(io.RawIOBase):
    """A file that Python opened."""

    def __init__(self, path: Any, mode: str) -> None:
        flags = {"x": os.O_CREAT | os.O_EXCL, "r": 0}[mode[0]]
        self._fd = _current.disk.open(str(path), flags)
        self._position = 0

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _current.disk.pread(self._fd, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        written = _current.disk.pwrite(self._fd, bytes(data), self._position)
        self._position += written
        return written

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(_current.disk.pread(self._fd, 2**40, 0)) if whence == os.SEEK_END else 0
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        assert size is not None
        _current.disk.ftruncate(self._fd, size)
        return size

    def close(self) -> None:
        if not self.closed:
            _current.disk.close(self._fd)
        super().close()


def _open(path: Any, mode: str = "r", **_: Any) -> Any:
    raw = _OpenFile(path, mode)
    return raw if "b" in mode else io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")


def open_cxi(path: Any) -> Any:
    """Open a CXI file of the simulated disk."""
    return h5py.File(io.BytesIO(SimulatedPath(path).read_bytes()), "r")


def _write_whole(path: Any, data: bytes, private: bool = False, fs: Any = None) -> None:
    files.write_whole(str(path), data, private, fs=_current.disk)


def _write_again(path: Any, fs: Any = None) -> bytes:
    return files.write_again(str(path), fs=_current.disk)


def _sync_directory(directory: Any, fs: Any = None) -> None:
    files.sync_directory(str(directory), fs=_current.disk)


class _Journal(Journal):
    def __init__(self, directory: Any, prefix: str, run: str, writer: str) -> None:
        system: Any = _System()
        super().__init__(directory, prefix, run, writer, fs=system)


EXCHANGED: dict[str, Any] = {
    "Journal": _Journal,
    "os": _System(),
    "Path": SimulatedPath,
    "expanded": SimulatedPath,
    "open": _open,
    "open_cxi": open_cxi,
    "write_whole": _write_whole,
    "write_again": _write_again,
    "sync_directory": _sync_directory,
    "sync_name": lambda path: _sync_directory(path.parent),
}


def _modules() -> list[ModuleType]:
    import peaknet_predict.cxi.writer  # noqa: F401

    return [
        module for name, module in sys.modules.items() if name.startswith("peaknet_predict.cxi.")
    ]


@contextlib.contextmanager
def exchanged() -> Iterator[None]:
    """Let `peaknet_predict.cxi` run on the simulated disk."""
    with contextlib.ExitStack() as undo:
        for module in _modules():
            for name, new in EXCHANGED.items():
                if name == "open" or hasattr(module, name):
                    undo.enter_context(mock.patch.object(module, name, new, create=True))
        yield


def run_as(disk: ProcessDisk) -> None:
    """From now on, files are written and read as this process sees them."""
    _current.disk = disk
