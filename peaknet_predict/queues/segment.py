"""The file of a spool that is being appended to."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence

from peaknet_predict.process.files import FileSystem
from peaknet_predict.queues.codec import Buffer
from peaknet_predict.queues.framing import Kind, write_frame
from peaknet_predict.queues.synced_mark import MarkFile


class OpenSegment:
    """A segment that records are appended to, until a write or a sync of it fails.

    Parameters
    ----------
    number, size, synced
        Which one it is, its bytes, and how many of them are known to be on disk.
    mark
        Records how far the segment has been synced.
    fs
        Where the file is.
    file
        The file, open for appending; None if nothing may be appended, because an earlier life of
        the queue wrote it.

    Attributes
    ----------
    number, size, synced
        As the parameters, up to now.
    """

    def __init__(
        self,
        number: int,
        size: int,
        synced: int,
        mark: MarkFile,
        fs: FileSystem,
        file: int | None = None,
    ) -> None:
        self.number = number
        self.size = size
        self.synced = synced
        self._mark = mark
        self._fs = fs
        self._file = file
        self._lock = threading.Lock()  # syncs come from other threads
        self._sync_failed = False
        self._is_sealed = file is None

    @property
    def is_over(self) -> bool:
        """Whether nothing may be appended any more."""
        return self._is_sealed or self._sync_failed

    def append(self, kind: Kind, skeleton: bytes, buffers: Sequence[Buffer]) -> int:
        """Append a record; return its size. Raises OSError, with nothing appended."""
        assert self._file is not None
        try:
            size = write_frame(self._file, self._fs, kind, skeleton, buffers)
        except OSError:
            # A part of it must not stand before the next record.
            try:
                self._fs.ftruncate(self._file, self.size)
            except OSError:
                self._is_sealed = True
            raise
        self.size += size
        return size

    def syncing(self) -> Callable[[], None]:
        """Return a function that syncs, in any thread, what has been appended so far."""
        assert self._file is not None
        size, file = self.size, self._fs.dup(self._file)

        def sync() -> None:
            try:
                self._sync(file, size)
            finally:
                self._fs.close(file)

        return sync

    def seal(self) -> None:
        """Stop appending; sync what there is if possible, see `synced`."""
        self._is_sealed = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._sync(self._file, self.size)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._fs.close(self._file)

    def _sync(self, file: int, size: int) -> None:
        with self._lock:
            if self.synced >= size:
                return
            if self._sync_failed:
                raise OSError(errno.EIO, "an earlier sync of the same file failed")
            try:
                self._fs.fdatasync(file)
            except OSError:
                # The system may have dropped what it could not write, and reports that only once.
                self._sync_failed = True
                raise
            self.synced = size
            with contextlib.suppress(OSError):
                self._mark.advance(synced=(self.number, size))
