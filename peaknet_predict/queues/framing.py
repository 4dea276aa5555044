"""Records in the files of a spool: a header with lengths and a checksum, then the contents."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from peaknet_predict.process.files import FileSystem, write_all
from peaknet_predict.queues.codec import Buffer

FORMAT = 4
"""Version of what stands in the files."""

_MAGIC = b"PkSp"
_HEAD = struct.Struct("<4sBBxxIQ")  # magic, format, kind, length of the skeleton, of the data
_CHECKSUM = struct.Struct("<I")  # of the header and all that follows it
_BEGINS = _HEAD.size + _CHECKSUM.size
_EARLIER_MAGIC = b"PQ\x03\x00"  # how files of formats 1 and 2 begin


class Kind(IntEnum):
    """What a record says."""

    BEGIN = 0  # all that is known besides the queue's records: the first of a segment
    BEGUN = 1  # the segment's beginning is complete
    PUT = 2
    NOTE = 3  # losses of a record, and why it is to be quarantined
    SETTLED = 4
    BOOKS = 5  # producers and readers


class Frame(NamedTuple):
    """A record as it stands in a file; ``end`` is where the next one begins."""

    kind: Kind
    skeleton: bytes
    data: memoryview
    end: int


def write_frame(
    file: int, fs: FileSystem, kind: Kind, skeleton: bytes, buffers: Sequence[Buffer] = ()
) -> int:
    """Append a record to an open file; return its size in bytes.

    Raises
    ------
    OSError
        If that fails; a part of the record may have been written.
    """
    length = sum(len(buffer) for buffer in buffers)
    head = _HEAD.pack(_MAGIC, FORMAT, kind, len(skeleton), length)
    checksum = zlib.crc32(skeleton, zlib.crc32(head))
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    write_all(file, head + _CHECKSUM.pack(checksum) + skeleton, fs)
    for buffer in buffers:
        write_all(file, buffer, fs)
    return _BEGINS + len(skeleton) + length


def read_frames(path: Path, fs: FileSystem, until: int | None = None) -> Iterator[Frame]:
    """Yield the records of a file in order, up to the first incomplete one.

    Parameters
    ----------
    path
        The file.
    fs
        Where it is.
    until
        Where to stop; by default, at the file's end.
    """
    size = fs.stat(str(path)).st_size if until is None else until
    file = fs.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = 0
        while position < size:
            start = _read(file, _BEGINS, fs)
            if len(start) < _BEGINS or start[:4] != _MAGIC:
                return
            head, checksum = start[: _HEAD.size], _CHECKSUM.unpack_from(start, _HEAD.size)[0]
            _, version, kind, length, data_length = _HEAD.unpack(head)
            end = position + _BEGINS + length + data_length
            if version != FORMAT or end > size:
                return
            body = _read(file, length + data_length, fs)
            if zlib.crc32(body, zlib.crc32(head)) != checksum:
                return
            yield Frame(Kind(kind), body[:length], memoryview(body)[length:], end)
            position = end
    finally:
        fs.close(file)


def format_of(path: Path, fs: FileSystem) -> int | None:
    """Return the format that a file's first record claims; None if it is not a record."""
    file = fs.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        start = _read(file, _HEAD.size, fs)
    finally:
        fs.close(file)
    if start.startswith(_EARLIER_MAGIC):
        return 1
    return start[4] if len(start) == _HEAD.size and start.startswith(_MAGIC) else None


def _read(file: int, length: int, fs: FileSystem) -> bytes:
    """Read this many bytes, or as many as there are."""
    data = fs.read(file, length)
    while 0 < len(data) < length:
        more = fs.read(file, length - len(data))
        if not more:
            break
        data += more
    return data
