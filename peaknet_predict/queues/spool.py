"""A queue's memory on disk: append-only files that a new life of the queue replays.

A spool is a directory of numbered segments. Each begins with a snapshot of everything but the
records (keys seen, counts, producers and readers) and names the segment that it follows; so a
segment is deleted once all its records are settled and no older segment is left. If a few records
keep many segments, they are moved forward.

Confirmed records have been synced, and a separate file (`MarkFile`) says how far: damage before
that mark is an error, while an incomplete record behind it is dropped. After a failed write or sync
nothing is ever appended to that file again: the spool goes on in a new segment, with everything
that is not known to be on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import (
    FileSystem,
    expanded,
    make_private_directory,
    sync_directory,
)
from peaknet_predict.queues.codec import Buffer, encode
from peaknet_predict.queues.framing import Kind, write_frame
from peaknet_predict.queues.live_records import LiveRecords
from peaknet_predict.queues.records import Entry
from peaknet_predict.queues.replay import SpoolError, SpoolReader, Unsettled, path_of
from peaknet_predict.queues.segment import OpenSegment
from peaknet_predict.queues.synced_mark import DamagedMarkError, MarkFile
from peaknet_predict.types import EventId

__all__ = ["Spool", "SpoolError"]

_SEGMENT_BYTES = 256 * 2**20


class Spool:
    """The journal of one queue.

    Parameters
    ----------
    directory
        Where the segments are; made if missing, readable by its owner only. One queue at a time
        holds it.
    segment_bytes
        How large a segment becomes. The disk holds at most twice the unsettled records, and two
        segments.
    fs
        The file system.

    Attributes
    ----------
    replay
        What was found.

    Raises
    ------
    SpoolError
        If another queue holds it, it cannot be read, something is missing or damaged that had been
        synced, or a new one cannot be written. One that an earlier life of the queue has left may
        have no room yet: then nothing is confirmed until it has.
    """

    def __init__(
        self, directory: str | Path, segment_bytes: int = _SEGMENT_BYTES, fs: FileSystem = os
    ) -> None:
        self.directory = expanded(directory)
        self._segment_bytes = segment_bytes
        self._fs = fs
        try:
            with contextlib.ExitStack() as undo:
                make_private_directory(self.directory, fs)
                self._claimed = self._claim()
                undo.callback(fs.close, self._claimed)
                self._mark = MarkFile(self.directory / "synced", fs)
                undo.callback(self._mark.close)
                self._take_over(SpoolReader(self.directory, self._mark.mark, fs))
                undo.pop_all()
        except DamagedMarkError as error:
            raise SpoolError(
                f"{self.directory}/synced is damaged, so that damage to the latest events cannot "
                "be told from what was being written when the queue died. Restore it from a copy, "
                "or delete it to go on without that check"
            ) from error
        except OSError as error:
            raise SpoolError(
                f"the spool {self.directory} cannot be used: {error}. Make the directory readable "
                "and writable for you, with room, or name another one"
            ) from error

    def put(self, entry: Entry) -> None:
        """Append a record; raises OSError, with nothing appended, if it cannot be written."""
        record = Unsettled(entry, self._order)
        record.size = self._append(Kind.PUT, *_put(record))
        record.number, record.end = self._segment.number, self._segment.size
        self._order += 1
        self._live.add(record)
        self.replay.keys.add(entry.id)
        self.replay.accepted += 1
        self._compact()

    def note(self, entry: Entry) -> None:
        """Append the readers that a record has cost, and why it is to be quarantined."""
        self._try_append(Kind.NOTE, _note(entry))

    def settled(self, key: EventId, quarantined: bool) -> None:
        """Append that a record has been settled; if that fails, it comes again after a crash.

        Its next reader then finds that it has the record already.
        """
        if not self._live.settle(key):
            return
        self.replay.quarantined += quarantined
        if not self._try_append(Kind.SETTLED, [*key, quarantined]):
            self._delete_settled()  # the room is needed now
        self._compact()

    def books(self, books: dict[str, Any]) -> None:
        """Append the state of producers and readers; the next `sync` tries again if that fails."""
        self.replay.books = books
        self._lacks_books = not self._try_append(Kind.BOOKS, books)

    def sync(self) -> None:
        """Return once everything appended so far is on disk; raises OSError if it is not."""
        self.syncing()()
        self._delete_settled()

    def syncing(self) -> Callable[[], None]:
        """Return a function that syncs, in any thread, what has been appended so far.

        It raises OSError if that fails. The next call to this method then begins a new segment,
        with all that is not known to be on disk, and raises OSError itself if that fails.
        """
        if self._segment.is_over:
            self._begin_segment()
        if self._lacks_books:
            try:
                self._append(Kind.BOOKS, json.dumps(self.replay.books).encode(), [])
            except OSError:
                self._segment.seal()  # whatever comes next, its file begins with them
                raise
            self._lacks_books = False
        return self._segment.syncing()

    def tidy(self) -> None:
        """Do what can wait; to be called now and then, even while nothing happens."""
        with contextlib.suppress(OSError):
            if self._segment.is_over:
                self._begin_segment()
            self._mark.sync()
        self._delete_settled()

    @property
    def position(self) -> tuple[int, int]:
        """How much has been appended, or is still to be: segment and bytes."""
        return self._segment.number, self._segment.size + self._lacks_books

    def close(self) -> None:
        """Let go of the files."""
        with contextlib.suppress(OSError):
            self._mark.sync()
        self._segment.close()
        self._mark.close()
        self._fs.close(self._claimed)

    def _claim(self) -> int:
        return _claim(self.directory, self._fs)

    def _take_over(self, found: SpoolReader) -> None:
        """Go on from what was found, in a new segment."""
        self.replay = found.replay
        self._live = LiveRecords(found)
        self._order = found.order
        # The new segment repeats what lies behind the synced part.
        self._segment = OpenSegment(found.last, found.end, found.synced, self._mark, self._fs)
        self._leftovers = found.others
        self._latest = max([found.last, *found.others])
        self._lacks_books = False  # on disk, as they are now
        self._delete_settled()  # makes room
        try:
            self._begin_segment()
        except OSError:
            # A queue that comes back while its disk is full waits for room, as one that runs does.
            if self.replay.books is None:
                raise

    def _try_append(self, kind: Kind, content: Any) -> bool:
        """Append what the next segment's beginning repeats anyway; False if that failed."""
        try:
            if self._segment.is_over:
                return False
            self._append(kind, json.dumps(content).encode(), [])
        except OSError:
            return False
        return True

    def _append(self, kind: Kind, skeleton: bytes, buffers: list[Buffer]) -> int:
        if self._segment.is_over or self._segment.size > self._segment_bytes:
            self._begin_segment()
        size = self._segment.append(kind, skeleton, buffers)
        self._live.resize(*(self._segment.number, self._segment.size))
        return size

    def _begin_segment(self) -> None:
        """Go on in a new segment, which begins with all that is known."""
        # The old one must not grow any more: the new one says where it ends.
        self._segment.seal()
        self._delete_settled()  # makes room
        self._latest += 1
        number, path = self._latest, str(path_of(self.directory, self._latest))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        file = self._fs.open(path, flags, 0o600)
        try:
            size, again = self._write_beginning(file)
            self._fs.fsync(file)
            sync_directory(self.directory, self._fs)
        except OSError:
            self._fs.close(file)
            self._remove(number)
            raise
        try:
            self._mark.advance(synced=(number, size))
            self._mark.sync()
        except OSError:
            # Nobody knows whether it counts: it stays, and the next one follows the old one.
            self._fs.close(file)
            self._leftovers.append(number)
            raise
        self._segment.close()
        self._segment = OpenSegment(number, size, size, self._mark, self._fs, file)
        self._lacks_books = False
        self._live.resize(number, size)
        self._live.repeat(again, number)
        while self._leftovers:
            self._remove(self._leftovers.pop())
        self._delete_settled()

    def _write_beginning(self, file: int) -> tuple[int, list[tuple[Unsettled, int]]]:
        """Write a segment's beginning; return its size, and the records in it with their ends."""
        before, replay, records = self._segment, self.replay, self._live.records
        snapshot = {
            "previous": [before.number, before.synced],
            "keys": replay.keys.to_json(),
            "books": replay.books,
            "accepted": replay.accepted,
            "quarantined": replay.quarantined,
            "order": self._order,
            "unsettled": KeySet(records).to_json(),
            "notes": [_note(one.entry) for one in records.values() if one.is_noted],
        }
        size = write_frame(file, self._fs, Kind.BEGIN, json.dumps(snapshot).encode())
        again = []
        for record in self._live.behind(before.number, before.synced):
            # Its old copy may never reach the disk.
            size += write_frame(file, self._fs, Kind.PUT, *_put(record))
            again.append((record, size))
        return size + write_frame(file, self._fs, Kind.BEGUN, b""), again

    def _compact(self) -> None:
        """Move one record forward if a few of them keep many segments; called with every change."""
        record = self._live.to_move(self._segment.number, self._segment_bytes)
        if record is not None:
            with contextlib.suppress(OSError):
                size = self._append(Kind.PUT, *_put(record))
                self._live.move(record, *(self._segment.number, self._segment.size), size)

    def _delete_settled(self) -> None:
        """Delete the oldest segments, up to the first that is still needed."""
        if self._mark.mark is None:
            return  # there must be a segment before there is a mark
        needed = self._live.first_needed(self._segment.number, self._segment.synced)
        settled = self._live.before(needed)
        if not settled:
            return
        try:
            self._mark.advance(oldest=needed)
            self._mark.sync_both()
        except OSError:
            return
        for number in settled:
            self._remove(number)
            self._live.forget(number)

    def _remove(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._fs.unlink(str(path_of(self.directory, number)))


def _claim(directory: Path, fs: FileSystem) -> int:
    lock = fs.open(str(directory / "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fs.close(lock)
        raise SpoolError(
            f"the spool {directory} belongs to a queue that is alive; every queue needs a "
            "directory of its own"
        ) from error
    return lock


def _note(entry: Entry) -> list[Any]:
    return [*entry.id, entry.losses, entry.lost_by, entry.reason]


def _put(record: Unsettled) -> tuple[bytes, list[Buffer]]:
    """Return the skeleton and the buffers of a record as it is appended."""
    entry = record.entry
    note = [record.order, entry.losses, entry.lost_by, entry.reason]
    skeleton, buffers = encode(entry.record)
    return json.dumps(note).encode() + b"\n" + skeleton, buffers
