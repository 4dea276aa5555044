"""A directory of CXI files that several writers may share: names, and what is in finished files."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from peaknet_predict.cxi.file import CxiSummary, read_summary
from peaknet_predict.cxi.journal import JournalContents, read_journal
from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import expanded, sync_directory, sync_name, write_again
from peaknet_predict.types import ANYONE, EventId

logger = logging.getLogger(__name__)


class CxiWriteError(OSError):
    """A file could not be written; the message names the path and what to do next."""


def write_error(path: Path, cause: BaseException, consequence: str) -> CxiWriteError:
    """Return an error that explains a system error, and says what to do next."""
    number = getattr(cause, "errno", None) or errno.EIO
    reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return CxiWriteError(number, f"{reason}. {consequence}{_next_step(number)}", str(path))


def _next_step(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or raise the quota there, then try again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the directory writable (hard links included) or choose another one"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "Create the directory or mount its file system, then try again"
    return "Check the file system, then try again"


class CxiDirectory:
    """The files of one prefix in a directory, as one of its writers sees them.

    A file is written under a temporary name that says whose it is, and gets the next free number
    when it is complete: an existing file is never replaced.

    Parameters
    ----------
    path
        The directory; its last part is created if it is missing.
    prefix
        Finished files are named ``{prefix}_{number}.cxi`` with at least four digits.
    owner
        Identifies this writer among those that share the directory.
    create
        Make the directory if it is missing.

    Attributes
    ----------
    path
        The directory, resolved.
    prefix, owner
        As given.
    known, filtered
        Events in finished files, and events that a journal calls filtered.

    Raises
    ------
    CxiWriteError
        If the directory cannot be created, read or written to.
    """

    def __init__(self, path: str | Path, prefix: str, owner: str | None, create: bool) -> None:
        # Resolved, so that the list stays right when the reader works in another directory.
        self.path = expanded(path).resolve()
        self.prefix = prefix
        self.owner = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
        self.known, self.filtered = KeySet(), KeySet()
        self._finished = re.compile(re.escape(prefix) + r"_(\d{4,})\.cxi")
        self._summaries: dict[str, CxiSummary | None] = {}
        self._journals: dict[str, JournalContents] = {}
        self._journal_sizes: dict[str, int] = {}
        self._doubtful: Path | None = None
        try:
            # No parents: a misspelt path, or one that is not mounted, must not be created.
            if create:
                self.path.mkdir(exist_ok=True)
                sync_name(self.path)
            elif not self.path.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            for name in os.listdir(self.path):
                if name.startswith(f".{prefix}.") and name.endswith(".tmp"):
                    leftover = self.path / name
                    logger.warning(
                        "%s is unfinished: delete it unless a writer is at work", leftover
                    )
            self._look_up()
        except OSError as error:
            raise write_error(self.path, error, "") from error

    def temporary_name(self) -> Path:
        """Return a unique name for an unfinished file."""
        return self.path / f".{self.prefix}.{self.owner}.{secrets.token_hex(4)}.tmp"

    def publish(self, temporary: Path, summary: CxiSummary, ids: Iterable[EventId]) -> Path:
        """Give a finished file with these events the next free number, durably.

        Raises
        ------
        OSError
            If that is not possible, and also if another writer has taken over and deleted it.
        """
        if self._doubtful is not None:
            self._doubtful.unlink(missing_ok=True)
            self._doubtful = None
        path = self._link(temporary)
        try:
            # It may be gone: a writer that has just taken over deletes it, and knows the finished
            # file.
            temporary.unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError:
            # Perhaps not durable, so its events will be written again, but never twice.
            self._doubtful = path
            path.unlink(missing_ok=True)
            self._doubtful = None
            raise
        self._note(path.name, summary, ids)
        return path

    def take_over_from(self, owners: Iterable[str]) -> None:
        """Delete the unfinished files of other writers, and find what they had finished before.

        `ANYONE` stands for all that share directory and prefix.

        Raises
        ------
        CxiWriteError
            If the directory cannot be read or changed.
        """
        try:
            for owner in owners:
                if owner != self.owner:
                    name = owner if owner == ANYONE else glob.escape(owner)
                    pattern = f".{glob.escape(self.prefix)}.{name}.*.tmp"
                    for path in self.path.glob(pattern):
                        path.unlink(missing_ok=True)
            self._look_up()
        except OSError as error:
            raise write_error(self.path, error, "Nothing was written. ") from error

    def look_again(self) -> None:
        """Read what other writers have finished meanwhile; raises as `take_over_from`."""
        self.take_over_from([])

    def summary_of(self, name: str) -> CxiSummary | None:
        """Return what a finished file of any prefix holds; None if that cannot be found out.

        Raises
        ------
        OSError
            If storage fails.
        """
        if name not in self._summaries:
            try:
                self._note(name, *read_summary(self.path / name))
            except FileNotFoundError:
                return None  # it has just been taken away
            except (OSError, KeyError, RuntimeError) as error:
                if getattr(error, "errno", None) is not None:
                    # The storage's fault, not the file's: its events must not be written again.
                    raise
                logger.warning("%s does not say which events are in it (%s)", name, error)
                self._note(name, None, [])
        return self._summaries[name]

    def files_of(self, run: str | None = None) -> dict[Path, CxiSummary]:
        """Return the known finished files of one run or of all, and what they hold."""
        return {
            self.path / name: summary
            for name, summary in sorted(self._summaries.items())
            if summary is not None and run in (None, summary.run) and self._finished.fullmatch(name)
        }

    def journals_of(self, run: str) -> list[JournalContents]:
        """Return the contents of a run's journals, including those with damaged headers."""
        return [journal for journal in self._journals.values() if journal.run in (None, run)]

    def _link(self, temporary: Path) -> Path:
        taken = [
            int(match[1])
            for entry in os.listdir(self.path)
            if (match := self._finished.fullmatch(entry))
        ]
        number = max(taken, default=-1) + 1
        while True:
            path = self.path / f"{self.prefix}_{number:04d}.cxi"
            try:
                # A link fails if the name exists; a rename would replace the other file.
                os.link(temporary, path)
            except FileExistsError:
                # A network file system repeats a call whose answer was lost.
                if not path.samefile(temporary):
                    number += 1
                    continue
            return path

    def _note(self, name: str, summary: CxiSummary | None, ids: Iterable[EventId]) -> None:
        self._summaries[name] = summary
        if self._finished.fullmatch(name):
            for key in ids:
                self.known.add(key)

    def _look_up(self) -> None:
        """Read files and journals that have not been read yet.

        Their events are acknowledged without being written again, and a writer may have died before
        its last name or line was on disk.
        """
        names = sorted(os.listdir(self.path))
        finished = [name for name in names if self._finished.fullmatch(name)]
        begins = f"{self.prefix}_journal_"
        journals = [name for name in names if name.startswith(begins) and name.endswith(".jsonl")]
        if not {*finished, *journals} <= {*self._summaries, *self._journals}:
            sync_directory(self.path)
        for name in finished:
            self.summary_of(name)
        for name in journals:
            self._read_journal(name)

    def _read_journal(self, name: str) -> None:
        size = (self.path / name).stat().st_size
        if self._journal_sizes.get(name) == size:
            return
        # Lines that a writer adds meanwhile are not on disk yet.
        content = write_again(self.path / name)
        journal, size = read_journal(content), len(content)
        if journal.damaged and name not in self._journals:
            logger.error(
                "%s is damaged in %d lines: events that they call filtered are not counted",
                *(self.path / name, journal.damaged),
            )
        self._journals[name], self._journal_sizes[name] = journal, size
        self.filtered.update(journal.filtered)
