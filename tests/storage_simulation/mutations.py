"""Faults that were in the code, to be planted in it again: the simulation has to find each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from peaknet_predict.cxi import publisher
from peaknet_predict.cxi.file import write_cxi_file
from peaknet_predict.cxi.filtered import FilteredEvents
from peaknet_predict.process.files import write_all
from peaknet_predict.queues.clock import RunningClock
from peaknet_predict.queues.foreign_streams import ForeignStreams
from peaknet_predict.queues.framing import Kind
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.replay import SpoolError, SpoolReader
from peaknet_predict.queues.segment import OpenSegment
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.streams import StreamBook
from tests.storage_simulation import cxi_on_disk


@contextlib.contextmanager
def _planted(*patches: Any) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for patch in patches:
            undo.enter_context(patch)
        yield


def damaged_file() -> AbstractContextManager[None]:
    """A write that fails inside HDF5 is swallowed, and the file is not read back."""

    def forgiving(*args: Any) -> None:
        with contextlib.suppress(OSError):
            write_cxi_file(*args)

    return _planted(
        mock.patch.object(publisher, "write_cxi_file", forgiving),
        mock.patch.object(publisher, "verify_cxi_file"),
    )


def settled_before_quarantined() -> AbstractContextManager[None]:
    """A rejected event is settled although its line is not on disk."""
    keep = Quarantine.keep

    def at_once(self: Quarantine, *args: Any) -> bool:
        keep(self, *args)
        return True

    return _planted(mock.patch.object(Quarantine, "keep", at_once))


def quarantined_twice() -> AbstractContextManager[None]:
    """After a restart, nobody looks for what the quarantine has already."""
    return _planted(mock.patch.object(Quarantine, "look_up", return_value={}))


def rotation_without_sync() -> AbstractContextManager[None]:
    """A new segment begins before the old one has been synced, which then counts as if it were."""

    def seal(self: OpenSegment) -> None:
        self._is_sealed = True
        self.synced = self.size

    return _planted(mock.patch.object(OpenSegment, "seal", seal))


def silent_truncation() -> AbstractContextManager[None]:
    """Where a segment is damaged, it is taken to end."""
    read = SpoolReader._read

    def forgiving(self: Any, number: int, until: int | None) -> None:
        with contextlib.suppress(SpoolError):
            read(self, number, until)

    return _planted(mock.patch.object(SpoolReader, "_read", forgiving))


def failed_sync_forgotten() -> AbstractContextManager[None]:
    """A sync that failed is tried again on the same file, and believed."""

    def sync(self: OpenSegment, file: int, size: int) -> None:
        if self.synced < size:
            self._fs.fdatasync(file)
            self.synced = size
            self._mark.advance(synced=(self.number, size))

    return _planted(mock.patch.object(OpenSegment, "_sync", sync))


def tail_taken_for_synced() -> AbstractContextManager[None]:
    """What a restart finds behind the mark is left where it is, and counts as on disk."""
    take_over = Spool._take_over

    def believing(self: Spool, found: Any) -> None:
        found.synced = found.end
        take_over(self, found)

    return _planted(mock.patch.object(Spool, "_take_over", believing))


def filtered_in_memory() -> AbstractContextManager[None]:
    """Filtered events are counted in memory only."""

    def record(self: FilteredEvents) -> list[Any]:
        recorded, self._waiting = self._waiting, []
        return recorded

    return _planted(mock.patch.object(FilteredEvents, "record", record))


def name_without_sync() -> AbstractContextManager[None]:
    """A finished file's events are acknowledged before its name is on disk."""
    return _planted(
        mock.patch.dict(cxi_on_disk.EXCHANGED, {"sync_directory": lambda *args, **more: None})
    )


def quarantined_without_sync() -> AbstractContextManager[None]:
    """A rejected event is settled before its data are on disk."""

    def write(path: Any, data: bytes, private: bool = False, fs: Any = None) -> None:
        file = fs.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        write_all(file, data, fs)
        fs.close(file)

    return _planted(mock.patch("peaknet_predict.queues.quarantine.write_whole", write))


def end_after_a_pause() -> AbstractContextManager[None]:
    """While a queue's own process is stopped, its producers count as silent."""
    return _planted(mock.patch.object(RunningClock, "__call__", lambda self: self._clock()))


def stream_waits_for_those_who_closed() -> AbstractContextManager[None]:
    """A producer that comes back to a stream that has ended makes the others close it again."""
    reopen = StreamBook.open

    def anew(self: StreamBook, producer: str, of: int, now: float) -> None:
        if producer not in self._heard:
            self._begin_if_ended()
        reopen(self, producer, of, now)

    return _planted(mock.patch.object(StreamBook, "open", anew))


def producers_forgotten() -> AbstractContextManager[None]:
    """Who has opened and closed a stream is left out where the disk was full at that moment."""

    def books(self: Spool, books: dict[str, Any]) -> None:
        self.replay.books = books
        self._try_append(Kind.BOOKS, books)

    return _planted(mock.patch.object(Spool, "books", books))


def stream_renamed_by_a_retry() -> AbstractContextManager[None]:
    """An item that psana-ray offers again, because the queue is full, begins another stream."""
    name_for = ForeignStreams.name_for

    def renaming(self: ForeignStreams, identity: tuple[int, int] | None) -> str:
        name = name_for(self, identity)
        self.accept(identity)
        return name

    return _planted(mock.patch.object(ForeignStreams, "name_for", renaming))


def stream_name_given_twice() -> AbstractContextManager[None]:
    """A queue that has forgotten psana-ray's latest items gives their identities to others."""
    restore = ForeignStreams.restore

    def in_the_same_life(self: ForeignStreams, *args: Any) -> None:
        restore(self, *args)
        self._life -= 1

    return _planted(mock.patch.object(ForeignStreams, "restore", in_the_same_life))


def spool_never_compacted() -> AbstractContextManager[None]:
    """One event that is not settled keeps all segments after it."""
    return _planted(mock.patch.object(Spool, "_compact", return_value=None))


PLANTED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    planted.__name__: planted
    for planted in (
        damaged_file,
        settled_before_quarantined,
        quarantined_twice,
        rotation_without_sync,
        silent_truncation,
        failed_sync_forgotten,
        tail_taken_for_synced,
        filtered_in_memory,
        name_without_sync,
        quarantined_without_sync,
        end_after_a_pause,
        stream_waits_for_those_who_closed,
        producers_forgotten,
        stream_renamed_by_a_retry,
        stream_name_given_twice,
        spool_never_compacted,
    )
}
