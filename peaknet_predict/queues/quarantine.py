"""Where events that cannot be processed go: one file each, with the reason, up to a size.

The first of them makes the directory. ``index.jsonl`` has a line for every event, even where there
was no room for its data. An event counts as quarantined once its line is on disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import (
    FileSystem,
    expanded,
    make_private_directory,
    read_all,
    sync_directory,
    write_all,
    write_all_at,
    write_whole,
)
from peaknet_predict.queues.quarantine_file import as_hdf5
from peaknet_predict.queues.wire import described
from peaknet_predict.types import EventId, identity_problem

log = logging.getLogger(__name__)

INDEX_NAME = "index.jsonl"
_LOOK_S = 0.5  # between two tries to read it
_PATIENCE_S = 50.0  # for a queue that comes back: shorter than its clients wait for it
_FAILURES = 2  # in one round, which then ends
# Errors of one file, which could never be written; the disk may be fine.
_OWN_ERRORS = frozenset({errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW})


@dataclass(slots=True)
class _Waiting:
    key: EventId
    reason: str
    record: Any
    losses: int
    at: float
    has_file: bool = False  # or must do without one
    file: str | None = None
    line: tuple[int, bytes] | None = None  # where in the index it was tried, and what was written

    @property
    def nbytes(self) -> int:
        size = getattr(self.record, "nbytes", 0)
        return size if isinstance(size, int) else 0


class Quarantine:
    """A directory of refused events, private to its owner.

    What cannot be written (disk full, directory gone) stays in memory, its data up to the same
    size, and is written with a later `keep` or `retry`.

    Parameters
    ----------
    directory
        Where the files go; made, with its parents, when the first event comes.
    max_bytes
        Most bytes of data kept. Beyond that, an event leaves only its line in the index.
    queue
        Identifies the queue whose events come here.
    fs
        The file system.

    Attributes
    ----------
    problem
        Why the directory cannot be written at the moment; None if it can.
    """

    def __init__(
        self, directory: str | Path, max_bytes: int, queue: str = "", fs: FileSystem = os
    ) -> None:
        # Resolved, so that the working directory does not matter.
        self.directory = expanded(directory).resolve()
        self.problem: str | None = None
        self._max_bytes = max_bytes
        self._queue = queue
        self._fs = fs
        self._used: int | None = None
        self._index_is_named = False  # its name is on disk
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._done: list[EventId] = []
        self._earlier = KeySet()  # events with a line from an earlier life of the queue

    def keep(self, key: EventId, reason: str, record: Any, losses: int = 0) -> bool:
        """Write an event's data and reason.

        Parameters
        ----------
        key
            Its identity.
        reason
            Why it is here, in words.
        record
            An `Event`, a `Result`, or any other object that came in its place.
        losses
            How many readers it has cost.

        Returns
        -------
        bool
            Whether it is on disk. If not, `problem` says why, and a later `retry` returns its key.
        """
        problem = identity_problem(key)
        if problem is not None:
            reason = f"{reason}; its identity {described(tuple(key), 200)} is left out: {problem}"
            key = EventId("", -1, -1)
        waiting = _Waiting(key, reason, record, losses, time.time())
        if self._waiting_bytes + waiting.nbytes > self._max_bytes:
            waiting.record = None
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.nbytes
        self._write_waiting()
        if any(one is waiting for one in self._waiting):
            return False
        self._done.remove(key)
        return True

    def retry(self) -> list[EventId]:
        """Write what could not be written before; return the keys of what is on disk now."""
        self._write_waiting()
        done, self._done = self._done, []
        return done

    def look_up(self, keys: Collection[EventId]) -> dict[EventId, str]:
        """Return which of these events got a line in an earlier life of the queue, and the reason.

        No event gets a second line. The line may be only in the system's memory: it is on disk once
        `keep` has been called for the event again, which writes it again in its place.

        Raises
        ------
        OSError
            If the index is there and cannot be read.
        """
        reasons = {}
        for key, _, line in self._own_lines():
            self._earlier.add(key)
            if key in keys:
                reasons[key] = str(line["reason"])
        return reasons

    def _own_lines(self) -> Iterator[tuple[EventId, tuple[int, bytes], dict[str, Any]]]:
        for place, line in _lines(self.directory, self._fs):
            if line.get("queue") == self._queue:
                yield EventId(line["stream"], line["rank"], line["idx"]), place, line

    def _write_waiting(self) -> None:
        """Write what waits, oldest first; what has no room on the disk holds up nothing smaller."""
        failures = 0
        for _ in range(len(self._waiting)):
            waiting = self._waiting[0]
            try:
                self._write(waiting)
            except OSError as error:
                self._note_problem(error)
                failures += 1
                if failures == _FAILURES:
                    return
                self._waiting.rotate(-1)
                continue
            self._waiting.popleft()
            self._waiting_bytes -= waiting.nbytes
            self._done.append(waiting.key)
        if not self._waiting:
            self.problem = None

    def _note_problem(self, error: OSError) -> None:
        if self.problem is None:
            log.error("quarantine %s: %s", self.directory, error)
        self.problem = (
            f"quarantine {self.directory}: {error}. Make room there, or make it writable; what was "
            "refused stays in the queue until then"
        )
        self._used = None  # by then it may be another directory
        self._index_is_named = False

    def _write(self, waiting: _Waiting) -> None:
        if self._used is None:
            make_private_directory(self.directory, self._fs)
            names = self._fs.listdir(str(self.directory))
            files = [self.directory / name for name in names if name.endswith(".h5")]
            self._used = sum(self._fs.stat(str(file)).st_size for file in files)
        if waiting.line is None and waiting.key in self._earlier:
            places = (place for key, place, _ in self._own_lines() if key == waiting.key)
            waiting.line = next(places, None)
            waiting.has_file = waiting.line is not None  # a file is on disk before its line
        if not waiting.has_file and waiting.record is not None:
            if self._used + waiting.nbytes <= self._max_bytes:
                waiting.file = self._write_file(waiting)
            waiting.has_file = True
        self._write_line(waiting)

    def _write_file(self, waiting: _Waiting) -> str | None:
        """Write an event's data; return the file's name, or None if no file can hold it."""
        key = waiting.key
        stem = re.sub(r"[^a-zA-Z0-9.#@-]", "_", f"{key.stream}_{key.rank}_{key.idx}")[-150:]
        # An event has one name: written again after a crash, it is the same file.
        name = f"{stem}.{zlib.crc32(repr((self._queue, key)).encode()):08x}.h5"
        attributes = {**key._asdict(), "reason": waiting.reason, "losses": waiting.losses}
        try:
            data = as_hdf5(attributes, waiting.record)
        except Exception:  # HDF5 and NumPy raise many kinds of error; none may hold up other events
            log.exception("quarantine %s: the data of event %s", self.directory, key)
            return None
        try:
            write_whole(self.directory / name, data, private=True, fs=self._fs)
        except OSError as error:
            if error.errno not in _OWN_ERRORS:
                raise
            log.error("quarantine %s: the data of event %s: %s", self.directory, key, error)
            return None
        assert self._used is not None
        self._used += waiting.nbytes
        return name

    def _write_line(self, waiting: _Waiting) -> None:
        fs, path = self._fs, str(self.directory / INDEX_NAME)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        # Appended in one write, because other queues may write to the same index.
        index = fs.open(path, flags | os.O_APPEND, 0o600)
        try:
            size = fs.stat(path).st_size
            if waiting.line is None or not self._rewrite_line(waiting, path, size):
                text = _line(waiting, self._queue)
                if size and fs.pread(index, 1, size - 1) != b"\n":
                    text = b"\n" + text  # what a crash cut off must not become part of it
                waiting.line = size, text
                write_all(index, text, fs)
            fs.fsync(index)
        finally:
            fs.close(index)
        if not self._index_is_named:
            sync_directory(self.directory, fs)
            self._index_is_named = True

    def _rewrite_line(self, waiting: _Waiting, path: str, size: int) -> bool:
        """Write a line again whose first write, or its sync, failed; False if it is not there.

        After a failed sync the system may have dropped the bytes: only what is written again is
        synced again.
        """
        assert waiting.line is not None
        offset, text = waiting.line
        index = self._fs.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = self._fs.pread(index, len(text), offset)
            if offset > size or not text.startswith(found):
                return False
            write_all_at(index, text, offset, self._fs)
        finally:
            self._fs.close(index)
        return True


def _line(waiting: _Waiting, queue: str) -> bytes:
    """Return an event's line of the index."""
    line = {**waiting.key._asdict(), "reason": waiting.reason, "losses": waiting.losses}
    line |= {"time": waiting.at, "file": waiting.file, "queue": queue}
    if waiting.file is None:
        line["item"] = described(waiting.record, 1000)
    return (json.dumps(line) + "\n").encode()


def read_index(directory: str | Path, fs: FileSystem = os) -> list[dict[str, Any]]:
    """Return the lines of a quarantine's index; none if nothing was ever kept there.

    A line that was being written when a machine lost its power is left out: its event was not
    quarantined, and is in the queue again.
    """
    return [line for _, line in _lines(expanded(directory), fs)]


def _lines(directory: Path, fs: FileSystem) -> Iterator[tuple[tuple[int, bytes], dict[str, Any]]]:
    """Yield where the lines of an index are, their bytes, and what they say."""
    path = directory / INDEX_NAME
    try:
        content = read_all(path, fs)
    except FileNotFoundError:
        return
    offset = 0
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        try:
            line = json.loads(text) if text.strip() else None
        except ValueError:
            log.warning("%s: line %d was not written to its end", path, number)
            line = None
        if isinstance(line, dict):
            yield (offset, text), line
        offset += len(text)


def kept_earlier(
    quarantine: Quarantine, keys: set[EventId], patience_s: float = _PATIENCE_S
) -> dict[EventId, str]:
    """Return which events a quarantine has from an earlier life of the queue, and why.

    An index that cannot be read for a moment must not be the end of a queue that comes back: Ray
    starts none again whose constructor has failed.

    Raises
    ------
    OSError
        If it cannot be read after ``patience_s`` either.
    """
    deadline = time.monotonic() + patience_s
    while keys:
        try:
            return quarantine.look_up(keys)
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            log.error("quarantine %s cannot be read; waiting: %s", quarantine.directory, error)
            time.sleep(_LOOK_S)
    return {}
