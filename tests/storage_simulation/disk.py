"""A disk in memory, with the calls of `os`: what is not synced may be lost, torn or reordered.

The model is that of POSIX, in its harshest reading. The bytes of a file survive a power cut if they
were synced after they were written; names, if their directory was synced after they were given or
taken away. Of everything else any part may survive, in sectors of 512 bytes, and each name for
itself. A sync that fails may drop what it was to write, and says so only once. A process that dies
leaves all it has written to the others.
"""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_SECTOR = 512


class PowerCut(BaseException):
    """The machine is off; no code of a program may catch this."""


class Killed(BaseException):
    """The process is dead; no code of a program may catch this."""


class Stat(NamedTuple):
    """What is used of the answer of `os.stat`."""

    st_size: int
    st_mode: int
    st_ino: int


@dataclass(slots=True, eq=False)
class File:
    """A file: its bytes as programs see them, and what of them is on disk."""

    number: int
    data: bytearray = field(default_factory=bytearray)
    on_disk: bytes = b""
    dirty: list[tuple[int, int]] = field(default_factory=list)  # written since the last sync

    def sync(self) -> None:
        """Bring on disk what has been written since the last sync."""
        if self.dirty == [(len(self.on_disk), len(self.data))]:
            self.on_disk += self.data[len(self.on_disk) :]
        elif self.dirty or len(self.data) != len(self.on_disk):
            new = bytearray(self.on_disk[: len(self.data)].ljust(len(self.data), b"\0"))
            for begin, end in self.dirty:
                new[begin:end] = self.data[begin:end]
            self.on_disk = bytes(new)
        self.dirty.clear()

    def lose_power(self, rng: random.Random) -> None:
        """Leave what is on disk, and any part of what is not."""
        kept = rng.choice(("none", "all", "first", "some"))
        sectors = [
            (max(begin, sector), min(end, sector + _SECTOR))
            for begin, end in self.dirty
            for sector in range(begin - begin % _SECTOR, end, _SECTOR)
        ]
        if kept == "none":
            sectors = []
        elif kept == "first":
            sectors = sectors[: rng.randint(0, len(sectors))]
        elif kept == "some":
            sectors = [sector for sector in sectors if rng.random() < 0.5]
        if len(self.data) < len(self.on_disk):
            size = rng.choice((len(self.data), len(self.on_disk)))
        else:
            reached = max((end for _, end in sectors), default=0)
            size = max(len(self.on_disk), min(reached, len(self.data)))
            if rng.random() < 0.3:
                size = rng.randint(size, len(self.data))
        new = bytearray(self.on_disk[:size].ljust(size, b"\0"))
        for begin, end in sectors:
            end = min(end, size, len(self.data))
            if begin < end:
                new[begin:end] = self.data[begin:end]
        self.data, self.on_disk = new, bytes(new)
        self.dirty.clear()


@dataclass(slots=True, eq=False)
class Directory:
    """A directory: its names as programs see them, and on disk."""

    number: int
    names: dict[str, Node] = field(default_factory=dict)
    on_disk: dict[str, Node] = field(default_factory=dict)
    changes: list[tuple[tuple[str, Node | None], ...]] = field(default_factory=list)

    def change(self, *changes: tuple[str, Node | None]) -> None:
        """Give and take names, all at once."""
        self.changes.append(changes)
        _apply(changes, self.names)

    def sync(self) -> None:
        """Bring all names on disk."""
        self.on_disk = dict(self.names)
        self.changes.clear()

    def lose_power(self, rng: random.Random) -> None:
        """Leave what is on disk, and any of the changes that are not."""
        kept = rng.choice(("none", "all", "first", "some"))
        changes = self.changes
        if kept == "none":
            changes = []
        elif kept == "first":
            changes = changes[: rng.randint(0, len(changes))]
        elif kept == "some":
            changes = [change for change in changes if rng.random() < 0.5]
        for change in changes:
            _apply(change, self.on_disk)
        self.names = dict(self.on_disk)
        self.changes.clear()


Node = File | Directory


def _apply(changes: tuple[tuple[str, Node | None], ...], names: dict[str, Node]) -> None:
    for name, node in changes:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """The storage of one machine.

    Parameters
    ----------
    rng
        Decides what survives.

    Attributes
    ----------
    capacity
        Bytes that fit on it; None while there is room for all.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.capacity: int | None = None
        self._numbers = itertools.count(1)
        self.root = Directory(0)

    @property
    def used(self) -> int:
        """How many bytes the files with a name take."""
        return sum(len(file.data) for _, file in self.files())

    def files(self, path: str = "/") -> Iterator[tuple[str, File]]:
        """Iterate over all files below a directory, with their paths."""
        node = self.find(path)
        assert isinstance(node, Directory)
        for name, below in node.names.items():
            full = posixpath.join(path, name)
            if isinstance(below, File):
                yield full, below
            else:
                yield from self.files(full)

    def find(self, path: str) -> Node:
        """Return what a path names."""
        node: Node = self.root
        for name in path.split("/"):
            if not name:
                continue
            if not isinstance(node, Directory):
                raise _error(errno.ENOTDIR, path)
            if name not in node.names:
                raise _error(errno.ENOENT, path)
            node = node.names[name]
        return node

    def parent(self, path: str) -> tuple[Directory, str]:
        """Return the directory that a path is in, and its name there."""
        above, name = posixpath.split(path)
        node = self.find(above)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return node, name

    def new_file(self) -> File:
        """Return a file without a name."""
        return File(next(self._numbers))

    def new_directory(self) -> Directory:
        """Return a directory without a name."""
        return Directory(next(self._numbers))

    def lose_power(self) -> None:
        """Forget what is not on disk, but for some of it."""
        self._lose_power(self.root, set())

    def _lose_power(self, node: Node, seen: set[int]) -> None:
        if node.number in seen:
            return
        seen.add(node.number)
        node.lose_power(self.rng)
        if isinstance(node, Directory):
            for below in node.names.values():
                self._lose_power(below, seen)


def _error(number: int, path: str = "") -> OSError:
    return OSError(number, os.strerror(number), path)


@dataclass(slots=True)
class _Open:
    node: Node
    appends: bool
    position: int = 0


class ProcessDisk:
    """The disk as one process sees it: the calls of `os` that are used, and their faults.

    Parameters
    ----------
    disk
        The disk.
    before
        Called before each call with its name; may raise, and decides which of them fail.

    Attributes
    ----------
    calls
        How many calls there have been.
    """

    def __init__(self, disk: Disk, before: Callable[[str], str | None]) -> None:
        self.calls = 0
        self._disk = disk
        self._before = before
        self._open: dict[int, _Open] = {}
        self._descriptors = itertools.count(3)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """As `os.open`."""
        self._fail("open")
        directory, name = (self._disk.root, "") if path == "/" else self._disk.parent(path)
        node = directory.names.get(name) if name else directory
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            node = self._disk.new_file()
            directory.change((name, node))
        elif flags & os.O_EXCL and flags & os.O_CREAT:
            raise _error(errno.EEXIST, path)
        if flags & os.O_DIRECTORY and not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        if flags & os.O_TRUNC and isinstance(node, File):
            node.data.clear()
        return self._descriptor(_Open(node, bool(flags & os.O_APPEND)))

    def close(self, fd: int, /) -> None:
        """As `os.close`."""
        self._open.pop(fd, None)

    def dup(self, fd: int, /) -> int:
        """As `os.dup`."""
        return self._descriptor(self._open[fd])

    def read(self, fd: int, length: int, /) -> bytes:
        """As `os.read`."""
        opened = self._open[fd]
        data = self.pread(fd, length, opened.position)
        opened.position += len(data)
        return data

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        """As `os.pread`."""
        return bytes(self._file(fd).data[offset : offset + length])

    def write(self, fd: int, data: bytes | memoryview, /) -> int:
        """As `os.write`."""
        opened = self._open[fd]
        if opened.appends:
            opened.position = len(self._file(fd).data)
        written = self._write(fd, data, opened.position, "write")
        opened.position += written
        return written

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """As `os.pwrite`."""
        return self._write(fd, data, offset, "pwrite")

    def ftruncate(self, fd: int, length: int, /) -> None:
        """As `os.ftruncate`."""
        self._fail("ftruncate")
        file = self._file(fd)
        if length > len(file.data):
            file.data.extend(bytes(length - len(file.data)))
        del file.data[length:]
        file.dirty = [(begin, min(end, length)) for begin, end in file.dirty if begin < length]

    def fsync(self, fd: int, /) -> None:
        """As `os.fsync`; of a failure the system may drop what it was to write."""
        node = self._open[fd].node
        fault = self._call("fsync")
        if fault is not None:
            if fault == "drop" and isinstance(node, File):
                node.dirty.clear()
            raise _error(errno.EIO)
        node.sync()

    fdatasync = fsync

    def replace(self, src: str, dst: str) -> None:
        """As `os.replace`, in one directory."""
        self._fail("replace")
        directory, name = self._disk.parent(src)
        assert self._disk.parent(dst)[0] is directory
        directory.change((posixpath.basename(dst), self._disk.find(src)), (name, None))

    def link(self, src: str, dst: str) -> None:
        """As `os.link`."""
        self._fail("link")
        node = self._disk.find(src)
        directory, name = self._disk.parent(dst)
        if name in directory.names:
            raise _error(errno.EEXIST, dst)
        directory.change((name, node))

    def unlink(self, path: str) -> None:
        """As `os.unlink`."""
        self._fail("unlink")
        directory, name = self._disk.parent(path)
        if name not in directory.names:
            raise _error(errno.ENOENT, path)
        directory.change((name, None))

    def listdir(self, path: str) -> list[str]:
        """As `os.listdir`."""
        node = self._disk.find(path)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return list(node.names)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        """As `os.mkdir`."""
        self._fail("mkdir")
        directory, name = self._disk.parent(path)
        if name in directory.names:
            raise _error(errno.EEXIST, path)
        directory.change((name, self._disk.new_directory()))

    def stat(self, path: str) -> Stat:
        """As `os.stat`."""
        node = self._disk.find(path)
        size = len(node.data) if isinstance(node, File) else 0
        return Stat(size, 0o600, node.number)

    def _write(self, fd: int, data: bytes | memoryview, offset: int, name: str) -> int:
        fault = self._call(name)
        if fault == "fail":
            raise _error(errno.EIO)
        file = self._file(fd)
        length = len(data)
        grows = offset + length - len(file.data)
        if grows > 0 and self._disk.capacity is not None:
            room = max(self._disk.capacity - self._disk.used, 0)
            length -= max(grows - room, 0)
            if length <= 0:
                raise _error(errno.ENOSPC)
        if fault == "short" and length > 1:
            length = self._disk.rng.randint(1, length - 1)
        if offset > len(file.data):
            file.data.extend(bytes(offset - len(file.data)))
        file.data[offset : offset + length] = data[:length]
        begin, end = offset, offset + length
        if file.dirty and file.dirty[-1][1] == begin:
            begin = file.dirty.pop()[0]
        file.dirty.append((begin, end))
        return length

    def _file(self, fd: int) -> File:
        node = self._open[fd].node
        assert isinstance(node, File)
        return node

    def _descriptor(self, opened: _Open) -> int:
        descriptor = next(self._descriptors)
        self._open[descriptor] = opened
        return descriptor

    def _fail(self, name: str) -> None:
        if self._call(name) is not None:
            raise _error(errno.EIO)

    def _call(self, name: str) -> str | None:
        self.calls += 1
        return self._before(name)
