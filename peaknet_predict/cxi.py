"""Writing results to CXI files: when a file begins and ends, and how it comes to its name.

What is in a file is described in `cxi_file`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from peaknet_predict.cxi_file import CxiRow, kind_of, read_ids, write_cxi_file
from peaknet_predict.integrate import integrate_peaks
from peaknet_predict.keys import KeySet
from peaknet_predict.types import ANYONE, EventId, Result

logger = logging.getLogger(__name__)

LIST_NAME = "files.lst"


class CxiWriteError(OSError):
    """A file could not be written; the message names the path and what to do next."""


def _write_error(path: Path, cause: BaseException, consequence: str) -> CxiWriteError:
    number = getattr(cause, "errno", None) or errno.EIO
    reason = getattr(cause, "strerror", None) or str(cause)
    return CxiWriteError(number, f"{reason}. {consequence}{_next_step(number)}", str(path))


def _next_step(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or raise the quota there, then try again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the directory writable (hard links included) or choose another one"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "Create the directory or mount its file system, then try again"
    return "Check the file system, then try again"


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
        # Resolved, so that the list stays right when the reader works in another directory.
        self._directory = Path(directory).resolve()
        self._prefix = prefix
        self._events_per_file = events_per_file
        self._min_peaks = min_peaks
        self._max_peaks = max_peaks
        self._compression = compression
        self._max_file_bytes = max_file_bytes
        self._owner = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._still_ours = still_ours
        self._known = KeySet()
        self._looked_at: set[str] = set()
        self._rows: list[CxiRow] = []
        self._settled: list[EventId] = []
        self._list_is_stale = False
        self._closed = False
        self.statistics = CxiStatistics()
        try:
            # No parents: a path that is misspelt or not mounted must not be made up.
            if create:
                self._directory.mkdir(exist_ok=True)
            elif not self._directory.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _write_error(self._directory, error, "") from error
        for name in os.listdir(self._directory):
            if name.startswith(f".{prefix}.") and name.endswith(".tmp"):
                leftover = self._directory / name
                logger.warning("%s is unfinished: delete it unless a writer is at work", leftover)
        try:
            self._look_up()
        except OSError as error:
            raise _write_error(self._directory, error, "") from error
        if len(self._known):
            logger.info(
                "%s: %d events are in finished files and will not be written again",
                self._directory,
                len(self._known),
            )

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
        in_memory = any(row.result.id == result.id for row in self._rows)
        if in_memory or result.id in self._known:
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
        row = self._make_row(result)
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
        try:
            for owner in owners:
                if owner != self._owner:
                    name = owner if owner == ANYONE else glob.escape(owner)
                    pattern = f".{glob.escape(self._prefix)}.{name}.*.tmp"
                    for path in self._directory.glob(pattern):
                        path.unlink(missing_ok=True)
            self._look_up()
        except OSError as error:
            raise _write_error(self._directory, error, "Nothing was written. ") from error
        return self._take_settled()

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
        if self._list_is_stale:
            self._update_list()
        self._closed = True
        return self._take_settled()

    def _take_settled(self) -> list[EventId]:
        settled, self._settled = self._settled, []
        return settled

    def _has_room_for(self, row: CxiRow) -> bool:
        held = sum(other.slab.nbytes for other in self._rows)
        return (
            kind_of(row.result) == kind_of(self._rows[0].result)
            and held + row.slab.nbytes <= self._max_file_bytes
        )

    def _make_row(self, result: Result) -> CxiRow:
        """Check, integrate and order one event."""
        image = result.image
        if image.ndim not in (2, 3) or image.size == 0 or image.dtype.kind not in "iuf":
            raise ValueError(
                f"event {result.id}: cannot write an image of shape {image.shape} and dtype "
                f"{image.dtype} to CXI: expected (P, H, W) or (H, W) real numbers"
            )
        try:
            intensities = integrate_peaks(image, result.peaks)
        except ValueError as error:
            raise ValueError(f"event {result.id}: {error}") from error
        height, width = image.shape[-2:]
        panel, y, x = result.peaks.T
        # Strongest first: a reader with a shorter list than ours keeps the best, too.
        order = np.argsort(-intensities.total, kind="stable")[: self._max_peaks]
        table = np.stack(
            [x, panel * height + y, intensities.total, intensities.maximum, intensities.snr]
        )
        return CxiRow(
            result=result,
            slab=image.reshape(-1, width),
            table=table[:, order],
            has_bad_pixels=image.dtype.kind == "f" and not bool(np.isfinite(image).all()),
        )

    def _write_file(self) -> None:
        """Write all events in memory to one file, and forget them once it is finished."""
        rows = self._rows
        name = f".{self._prefix}.{self._owner}.{secrets.token_hex(4)}.tmp"
        temporary = self._directory / name
        try:
            with open(temporary, "xb+", buffering=0) as raw:
                write_cxi_file(raw, rows, self._max_peaks, self._compression)
                os.fsync(raw.fileno())
            # Asked while the file exists: whoever takes over later deletes it, and the next step
            # then fails.
            lost = {row.result.id for row in rows}
            lost.difference_update(self._still_ours(lost))
            path = None if lost else self._publish(temporary)
        except (OSError, RuntimeError) as error:
            stay = f"The {len(rows)} events of the file stay in memory. "
            raise _write_error(self._directory, error, stay) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if path is None:
            self._hand_over(lost)
            return
        self._rows = []
        self._count(path, rows)
        self._looked_at.add(path.name)
        for row in rows:
            self._known.add(row.result.id)
        self._settled += [row.result.id for row in rows]
        try:
            self._update_list()
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

    def _look_up(self) -> None:
        """Read which events are in finished files that have not been looked at yet."""
        pattern = self._name_pattern()
        for name in sorted(os.listdir(self._directory)):
            if name in self._looked_at or not pattern.fullmatch(name):
                continue
            path = self._directory / name
            try:
                for key in read_ids(path):
                    self._known.add(key)
            except FileNotFoundError:
                continue  # somebody has just taken it away
            except (OSError, KeyError) as error:
                if getattr(error, "errno", None) is not None:
                    # Storage's fault and not the file's. Its events must not be written again.
                    raise
                logger.warning(
                    "%s says not which events are in it (%s): they would be written again",
                    path,
                    error,
                )
            self._looked_at.add(name)

    def _name_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self._prefix) + r"_(\d{4,})\.cxi")

    def _count(self, path: Path, rows: list[CxiRow]) -> None:
        statistics = self.statistics
        without_energy = sum(not row.result.photon_energy > 0 for row in rows)
        if without_energy and not statistics.without_energy:
            logger.warning("%s: events without photon energy, which CrystFEL cannot index", path)
        statistics.written += len(rows)
        statistics.truncated += sum(row.truncated for row in rows)
        statistics.without_energy += without_energy
        statistics.files.append(path)

    def _publish(self, temporary: Path) -> Path:
        """Give a finished file the next free number, durably."""
        pattern = self._name_pattern()
        taken = [
            int(match[1])
            for entry in os.listdir(self._directory)
            if (match := pattern.fullmatch(entry))
        ]
        number = max(taken, default=-1) + 1
        while True:
            path = self._directory / f"{self._prefix}_{number:04d}.cxi"
            try:
                # A link fails where the name exists; a rename would replace the other file.
                os.link(temporary, path)
                break
            except FileExistsError:
                number += 1
        try:
            temporary.unlink()
            _sync_directory(self._directory)
        except OSError:
            # Not known to be durable, so its events will be written again: not twice, though.
            path.unlink(missing_ok=True)
            raise
        return path

    def _update_list(self) -> None:
        """Write the names of all CXI files of the directory, for ``indexamajig -i``."""
        self._list_is_stale = True
        path = self._directory / LIST_NAME
        temporary = self._directory / f".{LIST_NAME}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            listed: list[Path] | None = None
            # Another writer may finish a file and write the list between our two steps. Whoever
            # writes last looks again, so no file is missed.
            while (found := sorted(self._directory.glob("*.cxi"))) != listed:
                with open(temporary, "x", encoding="utf-8") as stream:
                    stream.writelines(f"{file}\n" for file in found)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
                listed = found
        except OSError as error:
            raise _write_error(path, error, "The CXI files are complete. ") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._list_is_stale = False


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)
