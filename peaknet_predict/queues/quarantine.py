"""Where events go that cannot be processed: one file each, with the reason, up to a size.

The directory is made with the first of them. ``index.jsonl`` has a line for every one, also for
those whose data no longer had room. An event counts as quarantined once its line is on disk.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from peaknet_predict.queues.records import Opaque
from peaknet_predict.queues.wire import described, printable
from peaknet_predict.types import Event, EventId, Result, identity_problem

log = logging.getLogger(__name__)

INDEX_NAME = "index.jsonl"
_TEXT = 10_000  # characters kept of an object that is no array
_PARTS = 100  # of a list, that are kept
_FAILURES = 2  # in one go, after which the disk is left in peace until the next
# Of a file, that say nothing about the disk: it would never be written.
_OWN_ERRORS = frozenset({errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.EOVERFLOW})


@dataclass(slots=True)
class _Waiting:
    key: EventId
    reason: str
    record: Any
    losses: int
    at: float
    has_file: bool = False  # or has to do without one
    file: str | None = None
    line: tuple[int, bytes] | None = None  # where in the index it has been tried, and what

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
        Most bytes of data kept. Beyond it an event leaves its line in the index alone.
    queue
        Names the queue whose events come here, apart from every other.
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
        # Resolved, so that it does not matter whose working directory it is.
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

    def keep(self, key: EventId, reason: str, record: Any, losses: int = 0) -> bool:
        """Write an event's data and reason.

        Parameters
        ----------
        key
            Its identity.
        reason
            Why it is here, in words.
        record
            An `Event`, a `Result`, or whatever came in its place: any object at all.
        losses
            How many readers it has cost.

        Returns
        -------
        bool
            Whether it is on disk. If not, `problem` says why, and a later `retry` its key.
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
        """Write what could not be written before; return what is on disk now and was not."""
        self._write_waiting()
        done, self._done = self._done, []
        return done

    def kept(self) -> set[EventId]:
        """Return which events of this queue are on disk.

        Raises
        ------
        OSError
            If the index is there and cannot be read.
        """
        return {
            EventId(line["stream"], line["rank"], line["idx"])
            for line in read_index(self.directory, self._fs)
            if line.get("queue") == self._queue
        }

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
        if not waiting.has_file and waiting.record is not None:
            if self._used + waiting.nbytes <= self._max_bytes:
                waiting.file = self._write_file(waiting)
            waiting.has_file = True
        self._write_line(waiting)

    def _write_file(self, waiting: _Waiting) -> str | None:
        """Write an event's data; return the file's name, or None if there can be no such file."""
        key = waiting.key
        stem = re.sub(r"[^a-zA-Z0-9.#@-]", "_", f"{key.stream}_{key.rank}_{key.idx}")[-150:]
        # One event of a queue has one name: written again after a crash, it is the same file.
        name = f"{stem}.{zlib.crc32(repr((self._queue, key)).encode()):08x}.h5"
        attributes = {**key._asdict(), "reason": waiting.reason, "losses": waiting.losses}
        try:
            data = _as_hdf5(attributes, waiting.record)
        except Exception:  # HDF5 and NumPy have many kinds, and none may hold up what follows
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
        # Appended in one write, because other queues may have lines in the same index.
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

        After a sync that failed, the bytes may be on their way nowhere: only what is written again
        is synced again.
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


def _as_hdf5(attributes: dict[str, Any], record: Any) -> bytes:
    """Return an HDF5 file of whatever a record consists of."""
    import h5py

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for field, value in attributes.items():
            file.attrs[field] = _text(value) if isinstance(value, str) else value
        for field, value in _parts(record).items():
            if not isinstance(value, np.ndarray) or not _wrote_array(file, field, value):
                file.attrs[field] = _text(value)
            elif isinstance(value, np.ma.MaskedArray):
                file[f"{field}_mask"] = np.ma.getmaskarray(value)
    return image.getvalue()


def _wrote_array(file: Any, field: str, value: np.ndarray[Any, Any]) -> bool:
    try:
        file[field] = value
    except Exception:  # a dtype that HDF5 has not
        return False
    return True


def _text(value: Any) -> str:
    """Return the text of an object, with everything escaped that an attribute cannot hold."""
    if isinstance(value, str):
        return printable(value[:_TEXT])[:_TEXT]
    if isinstance(value, float | Opaque):
        return str(value)[:_TEXT]
    return described(value, _TEXT)


def _parts(record: Any) -> dict[str, Any]:
    """Return what a record consists of, by name."""
    if isinstance(record, Event | Result):
        parts = {"image": record.image, "photon_energy": record.photon_energy}
        if record.bad_bits is not None:
            parts["bad_bits"] = record.bad_bits
        if isinstance(record, Result):
            parts["peaks"] = record.peaks
        return parts
    payload = getattr(record, "payload", record)
    if isinstance(payload, list | tuple):
        items = {f"item_{k}": part for k, part in enumerate(payload[:_PARTS])}
        return items | {"items": len(payload)}
    return {"item": payload}


def read_index(directory: str | Path, fs: FileSystem = os) -> list[dict[str, Any]]:
    """Return the lines of a quarantine's index; none if nothing was ever kept there.

    A line that was being written when a machine lost its power is left out: its event was not
    quarantined, and is in the queue again.
    """
    path = expanded(directory) / INDEX_NAME
    try:
        content = read_all(path, fs)
    except FileNotFoundError:
        return []
    lines = []
    for number, text in enumerate(content.split(b"\n"), 1):
        try:
            line = json.loads(text) if text else None
        except ValueError:
            log.warning("%s: line %d was not written to its end", path, number)
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
