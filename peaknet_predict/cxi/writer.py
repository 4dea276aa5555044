"""Writing results to CXI files: which event goes into which file, and when a file is full.

`layout` describes what is in a file; `directory` how files get their names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Literal

from peaknet_predict.cxi.account import RunAccount
from peaknet_predict.cxi.directory import CxiDirectory, CxiWriteError, write_error
from peaknet_predict.cxi.filtered import FilteredEvents
from peaknet_predict.cxi.journal import Journal
from peaknet_predict.cxi.publisher import FilePublisher
from peaknet_predict.cxi.row import CxiRow, check_identity, make_row
from peaknet_predict.process.stopping import uninterrupted
from peaknet_predict.types import EventId, Result

logger = logging.getLogger(__name__)

__all__ = ["CxiWriteError", "CxiWriter"]


class CxiWriter:
    """Writes results to CXI files; a file appears under its name only when it is complete.

    Events are kept in memory until a file is full, so a file that cannot be written costs no event:
    they stay, and the next call tries again. A file is written under a temporary name, synced to
    disk, read back, and then given the next free number; an existing file is never replaced, even
    if two writers share directory and prefix. No signal interrupts any of this.

    An event is written once: the events in finished files of this prefix are known from the start,
    and looked up again in `take_over_from`. Events with too few peaks are recorded in a journal
    beside the files, many at a time.

    Parameters
    ----------
    directory
        Where the files go; its last part is created if it is missing.
    prefix
        Files are named ``{prefix}_{number}.cxi`` with at least four digits.
    events_per_file
        Events of a full file.
    min_peaks
        Events with fewer peaks are counted and left out.
    max_peaks
        Width of the peak lists. An event with more peaks keeps the strongest, and is marked as
        truncated. 2048 is the width that Cheetah uses.
    compression
        Of the pixels; ``"gzip"`` takes about five times as long as ``"none"``.
    max_file_bytes
        A file is written before its pixels would exceed this, which limits the memory used.
    create
        Make the directory if it is missing. If False, a file system that is not mounted is not
        mistaken for an empty directory, in which everything would be written again.
    run
        Names the run. Writers of one run share their lists of files and their balance; another run
        in the same directory has its own.
    owner
        Identifies this writer among those that share the directory.
    still_ours
        Returns which events may still be written here. Called when a file is complete, just before
        it gets its name: an event that another writer has by now must not be in two files.

    Attributes
    ----------
    statistics
        Counts up to now.
    account
        Keeps them, and writes balances.

    Raises
    ------
    CxiWriteError
        If the directory cannot be created or written to.
    ValueError
        If a parameter is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        prefix: str = "peaks",
        *,
        events_per_file: int = 100,
        min_peaks: int = 0,
        max_peaks: int = 2048,
        compression: Literal["none", "gzip"] = "none",
        max_file_bytes: int = 2 * 1024**3,
        create: bool = True,
        run: str = "",
        owner: str | None = None,
        still_ours: Callable[[Collection[EventId]], Collection[EventId]] = lambda ids: ids,
    ) -> None:
        if not re.fullmatch(r"[^./][^/]*", prefix) or not prefix.isprintable():
            raise ValueError(f"{prefix!r} is not a file name to start with")
        if min(events_per_file, max_peaks, max_file_bytes) < 1 or min_peaks < 0:
            raise ValueError("only min_peaks may be 0; the other numbers start at 1")
        if compression not in ("none", "gzip"):
            raise ValueError(f"compression is 'none' or 'gzip', not {compression!r}")
        self._directory = CxiDirectory(directory, prefix, owner, create)
        journal = Journal(self._directory.path, prefix, run, self._directory.owner)
        self._filtered = FilteredEvents(journal)
        self._publisher = FilePublisher(self._directory, run, max_peaks, compression, still_ours)
        self._events_per_file = events_per_file
        self._min_peaks = min_peaks
        self._max_peaks = max_peaks
        self._max_file_bytes = max_file_bytes
        self._rows: dict[EventId, CxiRow] = {}
        self._settled: list[EventId] = []
        self._closed = False
        self.account = RunAccount(self._directory, journal, run, resumed=not create)
        self.statistics = self.account.statistics

    def __enter__(self) -> CxiWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of events in memory that are in no finished file."""
        return len(self._rows)

    @uninterrupted()
    def add(self, result: Result) -> list[EventId]:
        """Take one event, and write a file when one is full.

        An event of another shape or dtype than those in memory starts another file. Its arrays are
        kept until they are written: do not change them.

        Returns
        -------
        list of EventId
            Events that no longer need to be kept: they are in a finished file of this or another
            writer, or on record as filtered.

        Raises
        ------
        CxiWriteError
            If a file could not be written. This event is then not taken, and earlier ones stay in
            memory: pass it again once the cause is gone.
        ValueError
            If the event cannot be written at all: its identity, the shape or dtype of the image, or
            a peak outside of it. Nothing else is affected.
        """
        if self._closed:
            raise ValueError("this writer is closed")
        key, statistics, directory = result.id, self.statistics, self._directory
        check_identity(key)
        if key in self._rows or key in self._filtered:
            statistics.duplicates += 1
        elif key in directory.known or key in directory.filtered:
            statistics.duplicates += 1
            self._settled.append(key)
        elif len(result.peaks) < self._min_peaks:
            self._filtered.add(key)
        else:
            self._add_row(make_row(result, self._max_peaks))
        statistics.taken += 1
        return self._take_settled()

    @uninterrupted()
    def take_over_from(self, owners: Iterable[str]) -> list[EventId]:
        """Take over from writers that fell silent: call it before `add`-ing what they had.

        `ANYONE` among the ``owners`` stands for all that share directory and prefix.

        Their unfinished files are deleted, so a writer that was only suspended can no longer finish
        one; what they had finished before is known from now on. Returns and raises as `flush`.
        """
        self._directory.take_over_from(owners)
        return self._take_settled()

    @uninterrupted()
    def record_filtered(self, at_once: bool = False) -> list[EventId]:
        """Record filtered events if there are many, or if one has waited for a second.

        Call it regularly, because only recorded events are settled; with ``at_once``, all are
        recorded. Returns and raises as `flush`.
        """
        if at_once or self._filtered.due:
            self._record()
        return self._take_settled()

    @uninterrupted()
    def flush(self) -> list[EventId]:
        """Write the events in memory to a file, full or not, and record filtered ones.

        Returns
        -------
        list of EventId
            Events that no longer need to be kept, as `add` returns them.

        Raises
        ------
        CxiWriteError
            If that is not possible; the events stay in memory.
        """
        self._write_file()
        self._record()
        return self._take_settled()

    @uninterrupted()
    def close(self) -> list[EventId]:
        """Write what is in memory and the lists of files; a second call does nothing.

        Returns and raises as `flush`. After an error the writer stays open, so that closing can be
        tried again.
        """
        if self._closed:
            return []
        self._write_file()
        self._record()
        self._directory.look_again()
        self._publisher.update_lists()
        self.account.count_elsewhere()
        self._closed = True
        return self._take_settled()

    def _take_settled(self) -> list[EventId]:
        settled, self._settled = self._settled, []
        return settled

    def _record(self) -> None:
        try:
            recorded = self._filtered.record()
        except OSError as error:
            stay = "The filtered events stay in memory. "
            raise write_error(self._directory.path, error, stay) from error
        for key in recorded:
            self._directory.filtered.add(key)
        self.statistics.filtered += len(recorded)
        self._settled += recorded

    def _add_row(self, row: CxiRow) -> None:
        key = row.result.id
        if self._rows and not self._has_room_for(row):
            self._write_file()
        self._rows[key] = row
        if len(self._rows) >= self._events_per_file:
            try:
                self._write_file()
            except CxiWriteError:
                if self._rows.pop(key, None) is not None:  # or it was handed over
                    raise

    def _has_room_for(self, row: CxiRow) -> bool:
        held = sum(other.slab.nbytes for other in self._rows.values())
        first = next(iter(self._rows.values()))
        return row.kind == first.kind and held + row.slab.nbytes <= self._max_file_bytes

    def _write_file(self) -> None:
        """Write all events in memory to one file, and forget them once it is finished."""
        while self._rows:
            rows = list(self._rows.values())
            published = self._publisher.publish(rows)
            if isinstance(published, Path):
                self._settled += self._rows
                self._rows = {}
                self.account.count_file(published, rows)
                return
            # Other writers have these; the rest goes into a separate file.
            for key in published:
                del self._rows[key]
            self.statistics.handed_over += len(published)
            logger.warning("%d events were given to another writer meanwhile", len(published))
