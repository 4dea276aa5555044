"""Files that are complete or absent, whatever dies while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path
from typing import Any, Protocol


class FileSystem(Protocol):
    """The functions of `os` that are used, so that tests can simulate a disk."""

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """Return a new file descriptor."""

    def close(self, fd: int, /) -> None:
        """Give a descriptor back."""

    def dup(self, fd: int, /) -> int:
        """Return a second descriptor of an open file."""

    def read(self, fd: int, length: int, /) -> bytes:
        """Return up to ``length`` bytes from the descriptor's position."""

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        """Return up to ``length`` bytes from an offset."""

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """Write some of the data at an offset; return how much."""

    def write(self, fd: int, data: bytes | memoryview, /) -> int:
        """Write some of the data; return how much."""

    def ftruncate(self, fd: int, length: int, /) -> None:
        """Set a file's length."""

    def fdatasync(self, fd: int, /) -> None:
        """Like `fsync`, without metadata that reading does not need, such as times."""

    def fsync(self, fd: int, /) -> None:
        """Return once a file, or the names in a directory, would survive a power cut."""

    def replace(self, src: str, dst: str) -> None:
        """Rename a file; it replaces one of the new name."""

    def link(self, src: str, dst: str) -> None:
        """Give a file a second name; fail if that name exists."""

    def unlink(self, path: str) -> None:
        """Remove a name."""

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory."""

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        """Make a directory."""

    def stat(self, path: str) -> Any:
        """Return at least ``st_size`` and ``st_mode``."""


_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and ``$VARIABLE`` or ``${VARIABLE}`` in a path, as a shell does.

    Every path that a user names is expanded, in the process that was given it: values of a
    configuration and quoted options have not been through a shell.

    Raises
    ------
    ValueError
        If a variable is not set, or there is no such user. Otherwise directories with such names
        would be made.
    """
    text = os.fspath(path)
    whole = os.path.expandvars(os.path.expanduser(text))
    if (variable := _VARIABLE.search(whole)) is not None:
        raise ValueError(
            f"the path {text!r} names {variable[0]}, and this environment has no such variable: "
            "set it, or write the path out"
        )
    if whole.startswith("~"):
        raise ValueError(
            f"the path {text!r} names the home directory of a user who is not known here: write "
            "the path out, or put ./ before a name that does begin with ~"
        )
    return Path(whole)


def write_whole(
    path: str | Path, data: bytes | memoryview, private: bool = False, fs: FileSystem = os
) -> None:
    """Write a file so that its name always stands for all of it, or for the previous file.

    When this returns, the file survives a power cut.

    Parameters
    ----------
    path
        The file; replaced if it exists.
    data
        All of its bytes.
    private
        Make it readable and writable by its owner only.
    fs
        Where.

    Raises
    ------
    OSError
        If that is not possible. The previous file is then still there, unless only the sync of the
        directory failed.
    """
    path = Path(path)
    temporary = str(path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = fs.open(temporary, flags, 0o600 if private else 0o666)
        try:
            write_all(file, data, fs)
            fs.fsync(file)
        finally:
            fs.close(file)
        fs.replace(temporary, str(path))
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        raise
    sync_directory(path.parent, fs)


def write_all(file: int, data: bytes | memoryview, fs: FileSystem = os) -> None:
    """Write all of the data to an open file; a single write may be incomplete."""
    view = memoryview(data)
    while len(view):
        view = view[fs.write(file, view) :]


def write_all_at(file: int, data: bytes, offset: int, fs: FileSystem = os) -> None:
    """Write all of the data at an offset of an open file."""
    written = 0
    while written < len(data):
        written += fs.pwrite(file, data[written:], offset + written)


def read_all(path: str | Path, fs: FileSystem = os) -> bytes:
    """Return a file's bytes."""
    file = fs.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := fs.read(file, 2**24):
            parts.append(part)
        return b"".join(parts)
    finally:
        fs.close(file)


def write_again(path: str | Path, fs: FileSystem = os) -> bytes:
    """Return what is in a file once it survives a power cut, even if its writer died before a sync.

    After a failed sync the system may hold bytes that it will never write, and syncing succeeds:
    only bytes that are written again are synced again. A file of another user is only synced.
    """
    content = again = read_all(path, fs)
    try:
        file = fs.open(str(path), os.O_WRONLY | os.O_CLOEXEC)
    except PermissionError:
        file, again = fs.open(str(path), os.O_RDONLY | os.O_CLOEXEC), b""
    try:
        write_all_at(file, again, 0, fs)
        fs.fsync(file)
    finally:
        fs.close(file)
    return content


def make_private_directory(directory: Path, fs: FileSystem = os) -> None:
    """Make a directory, and missing ones above it; only its owner may enter."""
    missing = []
    path = directory
    while not _exists(path, fs):
        missing.append(path)
        path = path.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            fs.mkdir(str(path), 0o700 if path == directory else 0o777)
    # Existing ones too: their maker may have died before their names were on disk.
    for path in (directory, *directory.parents):
        sync_name(path, fs)


def sync_name(path: Path, fs: FileSystem = os) -> None:
    """Make a file's name survive a power cut, if its directory may be read."""
    with contextlib.suppress(PermissionError):
        sync_directory(path.parent, fs)


def _exists(path: Path, fs: FileSystem) -> bool:
    try:
        fs.stat(str(path))
    except FileNotFoundError:
        return False
    return True


def sync_directory(directory: str | Path, fs: FileSystem = os) -> None:
    """Make the names in a directory survive a power cut.

    Raises
    ------
    OSError
        If that fails, except on a file system that cannot sync directories.
    """
    descriptor = fs.open(str(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fs.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        fs.close(descriptor)
