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

from peaknet_predict.cxi.file import read_ids
from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import sync_directory, write_whole
from peaknet_predict.types import ANYONE, EventId

logger = logging.getLogger(__name__)

LIST_NAME = "files.lst"


class CxiWriteError(OSError):
    """A file could not be written; the message names the path and what to do next."""


def write_error(path: Path, cause: BaseException, consequence: str) -> CxiWriteError:
    """Return the error for a cause of the system's: what it means, and what to do next."""
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
        Names this writer among those that share the directory.
    create
        Make the directory if it is missing.

    Attributes
    ----------
    path
        The directory, resolved.
    known
        Events in finished files.
    list_is_stale
        Whether `update_list` has failed since a file was finished.

    Raises
    ------
    CxiWriteError
        If the directory cannot be created, read or written to.
    """

    def __init__(self, path: str | Path, prefix: str, owner: str | None, create: bool) -> None:
        # Resolved, so that the list stays right when the reader works in another directory.
        self.path = Path(path).resolve()
        self.known = KeySet()
        self.list_is_stale = False
        self._prefix = prefix
        self._owner = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._finished = re.compile(re.escape(prefix) + r"_(\d{4,})\.cxi")
        self._looked_at: set[str] = set()
        try:
            # No parents: a path that is misspelt or not mounted must not be made up.
            if create:
                self.path.mkdir(exist_ok=True)
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
        if len(self.known):
            logger.info(
                "%s: %d events are in finished files and will not be written again",
                self.path,
                len(self.known),
            )

    def temporary_name(self) -> Path:
        """Return a name for an unfinished file that no other has."""
        return self.path / f".{self._prefix}.{self._owner}.{secrets.token_hex(4)}.tmp"

    def publish(self, temporary: Path, ids: Iterable[EventId]) -> Path:
        """Give a finished file with these events the next free number, durably.

        Raises
        ------
        OSError
            If that is not possible, and also if another writer has taken over and deleted it.
        """
        taken = [
            int(match[1])
            for entry in os.listdir(self.path)
            if (match := self._finished.fullmatch(entry))
        ]
        number = max(taken, default=-1) + 1
        while True:
            path = self.path / f"{self._prefix}_{number:04d}.cxi"
            try:
                # A link fails where the name exists; a rename would replace the other file.
                os.link(temporary, path)
                break
            except FileExistsError:
                number += 1
        try:
            # It may be gone: who has just taken over deletes it, and has found the finished file.
            temporary.unlink(missing_ok=True)
            sync_directory(self.path)
        except OSError:
            # Not known to be durable, so its events will be written again: not twice, though.
            path.unlink(missing_ok=True)
            raise
        self._looked_at.add(path.name)
        for key in ids:
            self.known.add(key)
        return path

    def fence(self, owners: Iterable[str]) -> None:
        """Delete the unfinished files of other writers, and find what they had finished before.

        `ANYONE` stands for all that share directory and prefix.

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
                    for path in self.path.glob(pattern):
                        path.unlink(missing_ok=True)
            self._look_up()
        except OSError as error:
            raise write_error(self.path, error, "Nothing was written. ") from error

    def update_list(self) -> None:
        """Write the names of all CXI files of the directory, for ``indexamajig -i``.

        Raises
        ------
        CxiWriteError
            If the list cannot be written; the CXI files are complete without it.
        """
        self.list_is_stale = True
        path = self.path / LIST_NAME
        try:
            listed: list[Path] | None = None
            # Another writer may finish a file and write the list between our two steps. Whoever
            # writes last looks again, so no file is missed.
            while (found := sorted(self.path.glob("*.cxi"))) != listed:
                write_whole(path, "".join(f"{file}\n" for file in found).encode())
                listed = found
        except OSError as error:
            raise write_error(path, error, "The CXI files are complete. ") from error
        self.list_is_stale = False

    def _look_up(self) -> None:
        """Read which events are in finished files that have not been looked at yet."""
        for name in sorted(os.listdir(self.path)):
            if name in self._looked_at or not self._finished.fullmatch(name):
                continue
            path = self.path / name
            try:
                for key in read_ids(path):
                    self.known.add(key)
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
