"""Writing results to CXI files: which event goes into which file, and when a file is full.

What is in a file is described in `cxi_file`; how files come to their names, in `cxi_directory`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from peaknet_predict.cxi.directory import CxiDirectory, CxiWriteError, write_error
from peaknet_predict.cxi.file import write_cxi_file
from peaknet_predict.cxi.row import CxiRow, check_identity, make_row
from peaknet_predict.cxi.verify import verify_cxi_file
from peaknet_predict.process.stopping import uninterrupted
from peaknet_predict.types import EventId, Result

logger = logging.getLogger(__name__)

__all__ = ["CxiStatistics", "CxiWriteError", "CxiWriter"]


@dataclass(slots=True)
class CxiStatistics:
    """What became of the events given to a writer.

    ``taken == written + filtered + duplicates + handed_over``, and what is still in memory.

    Attributes
    ----------
    taken
        Events that `CxiWriter.add` accepted.
    written
        Events in finished files.
    filtered
        Events left out because they have fewer than `min_peaks` peaks.
    duplicates
        Events that were in a finished file already, or twice in memory.
    handed_over
        Events that another writer was given, because this one had been silent for too long.
    truncated
        Written events of which only the strongest `max_peaks` peaks are listed.
    without_energy
        Written events without a photon energy above zero: CrystFEL cannot index them.
    files
        Finished files, in order.
    """

    taken: int = 0
    written: int = 0
    filtered: int = 0
    duplicates: int = 0
    handed_over: int = 0
    truncated: int = 0
    without_energy: int = 0
    files: list[Path] = field(default_factory=list)


class CxiWriter:
    """Writes results to CXI files; a file appears under its name only when it is complete.

    Events gather in memory until a file is full, so that a file that cannot be written costs no
    event: they stay, and the next call tries again. A file is written under a temporary name,
    synced to disk and then given the next free number; an existing file is never replaced, even if
    two writers share directory and prefix.

    An event is written once: what finished files of this prefix have is known from the start, and
    looked up again when an event comes that another writer had before (`fence`).

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
        Width of the peak lists. Of an event with more peaks the strongest are kept, and the event
        is marked as truncated. 2048 is the width that Cheetah uses.
    compression
        Of the pixels; ``"gzip"`` takes about five times as long as ``"none"``.
    max_file_bytes
        A file is written when its pixels would exceed this: the bound on the memory used.
    create
        Make the directory if it is missing. Without, a file system that is not mounted is not
        mistaken for a directory without files, in which everything would be written again.
    owner
        Names this writer among those that share the directory.
    still_ours
        Says which events may still be written here. Asked when a file is complete, just before it
        gets its name: an event that another writer has by now must not be in two files.

    Attributes
    ----------
    statistics
        Counts up to now.

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
        owner: str | None = None,
        still_ours: Callable[[Collection[EventId]], Collection[EventId]] = lambda ids: ids,
    ) -> None:
        if not re.fullmatch(r"[^./\0][^/\0]*", prefix):
            raise ValueError(f"{prefix!r} is not a file name to start with")
        if min(events_per_file, max_peaks, max_file_bytes) < 1 or min_peaks < 0:
            raise ValueError(
                "events_per_file, max_peaks and max_file_bytes start at 1, min_peaks at 0"
            )
        if compression not in ("none", "gzip"):
            raise ValueError(f"compression is 'none' or 'gzip', not {compression!r}")
        self._directory = CxiDirectory(directory, prefix, owner, create)
        self._events_per_file = events_per_file
        self._min_peaks = min_peaks
        self._max_peaks = max_peaks
        self._compression = compression
        self._max_file_bytes = max_file_bytes
        self._still_ours = still_ours
        self._rows: list[CxiRow] = []
        self._settled: list[EventId] = []
        self._closed = False
        self.statistics = CxiStatistics()

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
        """Return the number of events in memory, in no finished file yet."""
        return len(self._rows)

    @uninterrupted()
    def add(self, result: Result) -> list[EventId]:
        """Take one event, and write a file when one is full.

        An event whose panels differ in number, shape or dtype from those in memory starts another
        file. The event's arrays are kept until they are written: do not change them.

        Parameters
        ----------
        result
            The event.

        Returns
        -------
        list of EventId
            Events that nobody needs to keep any longer: filtered, or in a finished file, of this
            writer or of an earlier one.

        Raises
        ------
        CxiWriteError
            If a file could not be written. This event is then not taken, earlier ones stay in
            memory: give it again once the cause is gone.
        ValueError
            If the event cannot be written at all: the shape or dtype of the image or a peak outside
            of it. Nothing else is affected.
        """
        if self._closed:
            raise ValueError("this writer is closed")
        check_identity(result.id)
        in_memory = any(row.result.id == result.id for row in self._rows)
        if in_memory or result.id in self._directory.known:
            self.statistics.taken += 1
            self.statistics.duplicates += 1
            if not in_memory:
                self._settled.append(result.id)
            return self._take_settled()
        if len(result.peaks) < self._min_peaks:
            self.statistics.taken += 1
            self.statistics.filtered += 1
            self._settled.append(result.id)
            return self._take_settled()
        row = make_row(result, self._max_peaks)
        if self._rows and not self._has_room_for(row):
            self._write_file()
        self._rows.append(row)
        self.statistics.taken += 1
        if len(self._rows) >= self._events_per_file:
            try:
                self._write_file()
            except CxiWriteError:
                if any(other is row for other in self._rows):  # or it was handed over
                    self._rows.pop()
                    self.statistics.taken -= 1
                raise
        return self._take_settled()

    @uninterrupted()
    def fence(self, owners: Iterable[str]) -> list[EventId]:
        """Take over from writers that fell silent: call it before `add`-ing what they had.

        `ANYONE` among the ``owners`` stands for all that share directory and prefix.

        Their unfinished files go, so that one of them that only slept cannot finish it any more;
        what they had finished before is known from now on.

        Returns
        -------
        list of EventId
            As `add`.

        Raises
        ------
        CxiWriteError
            If the directory cannot be read or changed.
        """
        self._directory.fence(owners)
        return self._take_settled()

    @uninterrupted()
    def flush(self) -> list[EventId]:
        """Write the events in memory to a file, full or not.

        Returns
        -------
        list of EventId
            As `add`.

        Raises
        ------
        CxiWriteError
            If the file could not be written; its events stay in memory.
        """
        if self._rows:
            self._write_file()
        return self._take_settled()

    @uninterrupted()
    def close(self) -> list[EventId]:
        """Write what is in memory and the list of files; a second call does nothing.

        Returns
        -------
        list of EventId
            As `add`.

        Raises
        ------
        CxiWriteError
            As `flush`. The writer stays open, so that closing can be tried again.
        """
        if self._rows:
            self._write_file()
        if self._directory.list_is_stale:
            self._directory.update_list()
        self._closed = True
        return self._take_settled()

    def _take_settled(self) -> list[EventId]:
        settled, self._settled = self._settled, []
        return settled

    def _has_room_for(self, row: CxiRow) -> bool:
        held = sum(other.slab.nbytes for other in self._rows)
        return row.kind == self._rows[0].kind and held + row.slab.nbytes <= self._max_file_bytes

    def _write_file(self) -> None:
        """Write all events in memory to one file, and forget them once it is finished."""
        rows = self._rows
        temporary = self._directory.temporary_name()
        try:
            with open(temporary, "xb+", buffering=0) as raw:
                write_cxi_file(raw, rows, self._max_peaks, self._compression)
                os.fsync(raw.fileno())
            verify_cxi_file(temporary, rows, self._max_peaks)
            # Asked while the file exists: whoever takes over later deletes it, and the next step
            # then fails.
            ids = {row.result.id for row in rows}
            lost = ids.difference(self._still_ours(ids))
            path = None if lost else self._directory.publish(temporary, ids)
        except (OSError, RuntimeError, MemoryError) as error:
            stay = f"The {len(rows)} events of the file stay in memory. "
            raise write_error(self._directory.path, error, stay) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if path is None:
            self._hand_over(lost)
            return
        self._rows = []
        self._count(path, rows)
        self._settled += [row.result.id for row in rows]
        try:
            self._directory.update_list()
        except CxiWriteError as error:
            # The events are safe; the list is made anew with the next file, or in close().
            logger.warning("%s", error)

    def _hand_over(self, lost: set[EventId]) -> None:
        """Leave out what others write; the rest goes into a file of its own."""
        self._rows = [row for row in self._rows if row.result.id not in lost]
        self.statistics.handed_over += len(lost)
        logger.warning("%d events were given to another writer meanwhile", len(lost))
        if self._rows:
            self._write_file()

    def _count(self, path: Path, rows: list[CxiRow]) -> None:
        statistics = self.statistics
        without_energy = sum(not row.result.photon_energy > 0 for row in rows)
        if without_energy and not statistics.without_energy:
            logger.warning("%s: events without photon energy, which CrystFEL cannot index", path)
        statistics.written += len(rows)
        statistics.truncated += sum(row.truncated for row in rows)
        statistics.without_energy += without_energy
        statistics.files.append(path)
