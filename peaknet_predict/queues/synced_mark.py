"""How far a spool has been synced, in a small separate file.

It tells a record that was incomplete when the power failed from one that was damaged later.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

from peaknet_predict.process.files import FileSystem, write_all_at, write_whole

_SLOT = struct.Struct("<4sIQQQQ")  # magic, checksum of what follows, serial number, the mark
_MAGIC = b"PkSy"
_SLOT_BYTES = 512  # a disk writes this much at once, or nothing


class Mark(NamedTuple):
    """What is known to be on disk.

    Attributes
    ----------
    oldest
        First segment that is still needed: all records of those before it have been settled.
    number, size
        The latest segment that may hold confirmed records, and how many bytes of it are on disk.
    """

    oldest: int
    number: int
    size: int


class DamagedMarkError(ValueError):
    """The file exists but cannot be read."""


class MarkFile:
    """A file with two places for a mark, so that writing never overwrites the last synced one.

    Parameters
    ----------
    path
        The file. If it is missing, the first `sync` makes it.
    fs
        Where it is.

    Attributes
    ----------
    mark
        The latest mark; None if the file is missing.

    Raises
    ------
    DamagedMarkError
        If the file is there and cannot be read.
    """

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.mark: Mark | None = None
        self._path = path
        self._fs = fs
        self._lock = threading.Lock()
        self._file: int | None = None
        self._serial = 0
        self._synced_slot = 1
        self._is_synced = True
        try:
            file = fs.open(str(path), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if self._read(file):
                self._file = file
        finally:
            if self._file is None:
                fs.close(file)

    def advance(self, oldest: int = 0, synced: tuple[int, int] = (0, 0)) -> None:
        """Write a new mark; it is on disk after the next `sync`.

        Parameters
        ----------
        oldest
            Segments before this one are not needed any more.
        synced
            Segment and bytes up to which all is on disk.
        """
        with self._lock:
            before = self.mark or Mark(1, 0, 0)
            mark = Mark(max(oldest, before.oldest), *max(synced, before[1:]))
            if mark != before:
                self.mark = mark
                self._write()

    def sync(self) -> None:
        """Return once the mark is on disk."""
        with self._lock:
            if self._file is None:
                content = self._slot().ljust(_SLOT_BYTES, b"\0")
                write_whole(self._path, content + bytes(_SLOT_BYTES), private=True, fs=self._fs)
                self._file = self._fs.open(str(self._path), os.O_RDWR | os.O_CLOEXEC)
                self._synced_slot, self._is_synced = 0, True
            elif not self._is_synced:
                self._write()  # after a failed sync, a good one says nothing about these bytes
                self._fs.fdatasync(self._file)
                self._synced_slot = 1 - self._synced_slot
                self._is_synced = True

    def sync_both(self) -> None:
        """Return once both places have the mark on disk, so that damage to one is harmless."""
        self.sync()
        self._is_synced = False
        self.sync()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._fs.close(self._file)

    def _write(self) -> None:
        self._is_synced = False
        self._serial += 1
        if self._file is not None:
            offset = (1 - self._synced_slot) * _SLOT_BYTES
            write_all_at(self._file, self._slot(), offset, self._fs)

    def _slot(self) -> bytes:
        assert self.mark is not None
        slot = _SLOT.pack(_MAGIC, 0, self._serial, *self.mark)
        return _SLOT.pack(_MAGIC, zlib.crc32(slot), self._serial, *self.mark)

    def _read(self, file: int) -> bool:
        """Find the latest mark in the file; False if the file is empty."""
        content = self._fs.pread(file, 2 * _SLOT_BYTES, 0)
        found = []
        for slot in (0, 1):
            raw = content[slot * _SLOT_BYTES :][: _SLOT.size]
            if len(raw) < _SLOT.size:
                continue
            magic, checksum, serial, *mark = _SLOT.unpack(raw)
            if magic == _MAGIC and zlib.crc32(_SLOT.pack(magic, 0, serial, *mark)) == checksum:
                found.append((serial, slot, Mark(*mark)))
        if content and not found:
            raise DamagedMarkError
        if not found:
            return False
        self._serial, slot, self.mark = max(found)
        # It may never have reached the disk; only what is written again is synced.
        write_all_at(file, self._slot(), slot * _SLOT_BYTES, self._fs)
        self._fs.fdatasync(file)
        self._synced_slot = slot
        return True
