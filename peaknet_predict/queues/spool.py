"""A queue's memory on disk: append-only files that a new life of the queue replays.

A spool is a directory of numbered segments. Each begins with a snapshot of what is known besides
the records (keys seen, counts, producers and readers), so that a segment is deleted once all its
records are settled and none before it is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.queues.codec import Buffer, decode, encode
from peaknet_predict.queues.records import Entry, entry_of
from peaknet_predict.types import EventId

_HEAD = struct.Struct("<2sBxIQI")  # magic, kind, skeleton's length, data's length, CRC of both
_MAGIC = b"PQ"
_PUT, _SETTLED, _BOOKS, _SNAPSHOT, _NOTE = range(5)
_SEGMENT_BYTES = 256 * 2**20
_FORMAT = 2


class SpoolError(RuntimeError):
    """A spool cannot be used; the message says why and what to do."""


@dataclass(slots=True)
class Replay:
    """What a spool knows of the queue's earlier lives."""

    entries: list[Entry] = field(default_factory=list)
    keys: KeySet = field(default_factory=KeySet)
    books: dict[str, Any] | None = None
    accepted: int = 0
    quarantined: int = 0


class Spool:
    """The journal of one queue.

    Parameters
    ----------
    directory
        Where the segments are; made if missing, readable by its owner only. One queue at a time
        holds it.

    Attributes
    ----------
    replay
        What was found.

    Raises
    ------
    SpoolError
        If another queue holds it, it cannot be read or written, or it is damaged anywhere but at
        its end, where a record was being written when the queue died.
    """

    def __init__(self, directory: str | Path, segment_bytes: int = _SEGMENT_BYTES) -> None:
        self.directory = Path(directory)
        self._segment_bytes = segment_bytes
        self._unsettled: dict[EventId, int] = {}  # and the segment that has each
        self._left: dict[int, int] = {}  # unsettled records of each segment
        self.replay = Replay()
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._claim()
            self._number = self._read()
            self._begin_segment()
        except OSError as error:
            raise SpoolError(
                f"the spool {self.directory} cannot be used: {error}. Make the directory readable "
                "and writable for you, with room, or name another one"
            ) from error

    def put(self, entry: Entry) -> None:
        """Append a record; raises OSError, with nothing appended, if it cannot be written."""
        skeleton, buffers = encode(entry.record)
        self._append(_PUT, skeleton, buffers)
        self._note_put(entry)

    def note(self, entry: Entry) -> None:
        """Append the readers that a record has cost, and why it is to be quarantined."""
        note = [*entry.id, entry.losses, entry.lost_by, entry.reason]
        with contextlib.suppress(OSError):
            self._append(_NOTE, json.dumps(note).encode(), [])

    def settled(self, key: EventId, quarantined: bool) -> None:
        """Append that a record has been settled; without room, it would come again after a crash.

        Its next reader would then find that it has it already.
        """
        with contextlib.suppress(OSError):
            self._append(_SETTLED, json.dumps([*key, quarantined]).encode(), [])
        self._note_settled(key, quarantined)
        self._delete_settled()

    def books(self, books: dict[str, Any]) -> None:
        """Append the state of producers and readers."""
        self.replay.books = books
        with contextlib.suppress(OSError):
            self._append(_BOOKS, json.dumps(books).encode(), [])

    def sync(self) -> None:
        """Return once everything appended so far is on disk."""
        self.syncing()()

    def syncing(self) -> Callable[[], None]:
        """Return what another thread has to call to bring on disk what has been appended so far.

        It stays right when a segment ends meanwhile: whatever is in an ended one has been synced.
        """
        file = os.dup(self._file)

        def sync() -> None:
            try:
                os.fdatasync(file)
            finally:
                os.close(file)

        return sync

    @property
    def position(self) -> tuple[int, int]:
        """How much has been appended: segment and bytes."""
        return self._number, self._size

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._file)
        os.close(self._lock)

    def _claim(self) -> int:
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise SpoolError(
                f"the spool {self.directory} belongs to a queue that is alive; every queue needs "
                "a directory of its own"
            ) from error
        return lock

    def _segments(self) -> list[int]:
        return sorted(int(path.stem) for path in self.directory.glob("*.spool"))

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:08d}.spool"

    def _append(self, kind: int, skeleton: bytes, buffers: list[Buffer]) -> None:
        if self._size > self._segment_bytes and kind != _SNAPSHOT:
            self._begin_segment()
        length = sum(len(buffer) for buffer in buffers)
        crc = zlib.crc32(skeleton)
        for buffer in buffers:
            crc = zlib.crc32(buffer, crc)
        head = _HEAD.pack(_MAGIC, kind, len(skeleton), length, crc)
        try:
            for buffer in (head + skeleton, *buffers):
                view = memoryview(buffer)
                while len(view):
                    view = view[os.write(self._file, view) :]
        except OSError:
            # What there is of it must not stand before the next record.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(head) + len(skeleton) + length

    def _begin_segment(self) -> None:
        """Go on in a new segment, which begins with all that is known."""
        number = self._number + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        opened = os.open(self._path(number), flags, 0o600)
        before = getattr(self, "_file", None), self._number, getattr(self, "_size", 0)
        self._file, self._number, self._size = opened, number, 0
        replay = self.replay
        snapshot = {"format": _FORMAT, "keys": replay.keys.to_json(), "books": replay.books}
        snapshot |= {"accepted": replay.accepted, "quarantined": replay.quarantined}
        try:
            self._append(_SNAPSHOT, json.dumps(snapshot).encode(), [])
            os.fsync(opened)
            if before[0] is not None:
                os.fsync(before[0])
            self._sync_directory()
        except OSError:
            os.close(opened)
            self._path(number).unlink(missing_ok=True)
            if before[0] is not None:
                self._file, self._number, self._size = before[0], before[1], before[2]
            raise
        if before[0] is not None:
            os.close(before[0])
        self._delete_settled()

    def _sync_directory(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _note_put(self, entry: Entry) -> None:
        self._unsettled[entry.id] = self._number
        self._left[self._number] = self._left.get(self._number, 0) + 1
        self.replay.keys.add(entry.id)
        self.replay.accepted += 1

    def _note_settled(self, key: EventId, quarantined: bool) -> None:
        number = self._unsettled.pop(key, None)
        if number is not None:
            self._left[number] -= 1
            self.replay.quarantined += quarantined

    def _delete_settled(self) -> None:
        # From the oldest on and no further than the first that is still needed: a later one says
        # what has become of its records.
        while self._oldest < self._number and not self._left.get(self._oldest, 0):
            self._left.pop(self._oldest, None)
            with contextlib.suppress(OSError):
                self._path(self._oldest).unlink(missing_ok=True)
            self._oldest += 1

    def _read(self) -> int:
        """Replay all segments; return the last one's number."""
        segments = self._segments()
        self._oldest = segments[0] if segments else 1
        unsettled: dict[EventId, Entry] = {}
        for number in segments:
            self._number = number
            for kind, skeleton, data in self._records(number, is_last=number == segments[-1]):
                if kind == _PUT:
                    entry = entry_of(decode(skeleton, data))
                    unsettled[entry.id] = entry
                    self._note_put(entry)
                elif kind == _SETTLED:
                    stream, rank, idx, quarantined = json.loads(skeleton)
                    unsettled.pop(EventId(stream, rank, idx), None)
                    self._note_settled(EventId(stream, rank, idx), quarantined)
                elif kind == _NOTE:
                    stream, rank, idx, losses, lost_by, reason = json.loads(skeleton)
                    noted = unsettled.get(EventId(stream, rank, idx))
                    if noted is not None:
                        noted.losses, noted.lost_by, noted.reason = losses, lost_by, reason
                elif kind == _BOOKS:
                    self.replay.books = json.loads(skeleton)
                else:
                    self._take_snapshot(json.loads(skeleton))
        self.replay.entries = list(unsettled.values())
        return segments[-1] if segments else 0

    def _take_snapshot(self, snapshot: dict[str, Any]) -> None:
        if snapshot["format"] != _FORMAT:
            raise SpoolError(
                f"the spool {self.directory} was written by another version of this program "
                f"(format {snapshot['format']}, ours is {_FORMAT}); read it with that one"
            )
        self.replay.keys = KeySet.from_json(snapshot["keys"])
        self.replay.books = snapshot["books"]
        self.replay.accepted = snapshot["accepted"]
        self.replay.quarantined = snapshot["quarantined"]

    def _records(self, number: int, is_last: bool) -> Iterator[tuple[int, bytes, memoryview]]:
        path = self._path(number)
        size = path.stat().st_size
        position = 0
        with open(path, "rb") as file:
            while position < size:
                head = file.read(_HEAD.size)
                magic, kind, length, data_length, crc = (
                    _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0, 0)
                )
                end = position + _HEAD.size + length + data_length
                whole = magic == _MAGIC and end <= size
                body = memoryview(file.read(length + data_length) if whole else b"")
                if not whole or zlib.crc32(body) != crc:
                    if is_last:
                        # Never confirmed: it was being written when the queue died.
                        os.truncate(path, position)
                        return
                    raise SpoolError(
                        f"{path} is damaged at byte {position}; what follows cannot be read. Move "
                        f"{self.directory} away and feed again what is in no file yet"
                    )
                yield kind, bytes(body[:length]), body[length:]
                position = end
