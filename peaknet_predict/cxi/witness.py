"""A file object for HDF5 whose errors are not lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, Protocol

_MOST_METADATA = 2**20  # bytes of one write that HDF5 may want to read again: no images


class PlainFile(Protocol):
    """The file operations that HDF5 uses. Reads and writes are complete."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file."""

    def write(self, buffer: memoryview) -> int:
        """Write all of the buffer."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as in any file."""

    def tell(self) -> int:
        """Return the position as any file."""

    def truncate(self, size: int) -> int:
        """Set the length."""


class Witness:
    """The file object given to HDF5: it remembers the first exception, and raises none.

    HDF5 swallows exceptions from a file object's methods. After a failed write it cannot close its
    objects either: h5py prints such errors but does not raise them (a broken file looks finished),
    and the process may crash later (seen with HDF5 2.0 on a full disk). So HDF5 is told that all is
    well, nothing more is written, and the error is raised after HDF5 has closed the file.

    Parameters
    ----------
    file
        The file itself, whose reads and writes are whole.

    Attributes
    ----------
    error
        What went wrong first; None if nothing has.
    """

    def __init__(self, file: PlainFile) -> None:
        self.error: BaseException | None = None
        self._file = file
        # The position and the length of the file, as HDF5 sees them.
        self._position = self._size = 0
        # What HDF5 thinks it has written since the error: it crashes if it reads zeros instead.
        self._unwritten: list[tuple[int, bytes]] = []

    def read(self, size: int = -1) -> bytes:
        """Is never called; h5py knows file objects by it."""
        raise NotImplementedError

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file."""
        view = memoryview(buffer).cast("B")
        self._attempt(self._file.readinto, view)
        if self.error is not None:
            self._read_unwritten(view)
        self._position += len(view)
        return len(view)

    def write(self, buffer: memoryview) -> int:
        """Write all of the buffer."""
        view = memoryview(buffer).cast("B")
        self._attempt(self._file.write, view)
        if self.error is not None and len(view) <= _MOST_METADATA:
            self._unwritten.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as in any file."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        self._attempt(self._file.seek, offset, whence)
        return self._position

    def tell(self) -> int:
        """Return the position as any file."""
        self._attempt(self._file.tell)
        return self._position

    def truncate(self, size: int) -> int:
        """Set the length."""
        self._size = size
        self._attempt(self._file.truncate, size)
        return size

    def flush(self) -> None:
        """Do nothing: the file has no buffer, and the caller syncs it."""

    def _attempt(self, call: Callable[..., int], *args: Any) -> None:
        if self.error is None:
            try:
                call(*args)
            except BaseException as error:  # a KeyboardInterrupt would be swallowed as well
                # Its traceback would keep h5py's objects alive to the end of the process, which
                # then crashes.
                self.error = error.with_traceback(None)

    def _read_unwritten(self, view: memoryview) -> None:
        begin, end = self._position, self._position + len(view)
        with contextlib.suppress(OSError, ValueError):
            self._file.seek(begin)
            self._file.readinto(view)
        for offset, data in self._unwritten:
            first, last = max(begin, offset), min(end, offset + len(data))
            if first < last:
                view[first - begin : last - begin] = data[first - offset : last - offset]
