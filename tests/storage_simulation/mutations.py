"""Faults that were in the code, to be planted in it again: the simulation has to find each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from peaknet_predict.cxi.filtered import FilteredEvents
from peaknet_predict.cxi.witness import Witness
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.replay import SpoolError, SpoolReader
from peaknet_predict.queues.segment import OpenSegment
from peaknet_predict.queues.spool import Spool
from tests.storage_simulation import cxi_on_disk


@contextlib.contextmanager
def _planted(*patches: Any) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for patch in patches:
            undo.enter_context(patch)
        yield


def damaged_file() -> AbstractContextManager[None]:
    """A write that fails inside HDF5 is swallowed, and the file is not read back."""

    def attempt(self: Witness, call: Callable[..., int], *args: Any) -> None:
        with contextlib.suppress(Exception):
            call(*args)

    return _planted(
        mock.patch.object(Witness, "_attempt", attempt),
        mock.patch("peaknet_predict.cxi.publisher.verify_cxi_file"),
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
    )
}
