"""HDF5 files and what their links lead to, opened for reading, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py

# Registers the filters that detectors and beamlines compress with (bitshuffle, LZ4, Zstandard...),
# in every process that opens a file.
import hdf5plugin  # noqa: F401

logger = logging.getLogger(__name__)

_MAX_LINKS = 16  # links to links; more than this many form a circle
_LISTED = 40  # lines of an inventory
_VISITED = 5000  # objects looked at for it
_UNLIMITED = 2**62  # sizes from here on stand for 'as much as there is'


class UnreadableError(ValueError):
    """A file, or something it refers to, cannot be read; the message says why."""


def open_file(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, even one that is still being written in SWMR mode.

    Raises
    ------
    UnreadableError
        If it cannot be opened.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        cause = error
    with contextlib.suppress(OSError):
        return h5py.File(path, "r", swmr=True)
    raise UnreadableError(f"{path} {_why_not_opened(path, cause)}")


def _why_not_opened(path: Path, error: OSError) -> str:
    """Explain why a file cannot be opened, without HDF5's advice on files being written.

    HDF5 advises clearing its flags with a tool that damages a live file.
    """
    text = str(error)
    if not path.exists():
        return "is not there any more"
    if path.is_dir():
        return "is a folder, not an HDF5 file"
    if not os.access(path, os.R_OK):
        return "may not be read by this user; check its permissions"
    size = path.stat().st_size
    if size == 0:
        return "cannot be opened as HDF5: it is empty, not written yet or its writer failed"
    if error.errno == errno.EAGAIN or any(
        words in text for words in ("unable to lock", "already open for", "h5clear")
    ):
        return (
            "is still being written by another program, and not in a mode that others can read "
            "meanwhile (SWMR); wait until it is finished or leave it out"
        )
    if "truncated" in text:
        return (
            f"is truncated: only {size} bytes are there, and it says that it has more. It is still "
            "being written or copied, or its writer died"
        )
    return f"cannot be opened as HDF5: {text.splitlines()[0] if text else error!r}"


class LinkedFile:
    """An HDF5 file, opened for reading, and the files that its links lead to.

    Links are followed here, one by one. HDF5 itself would open any file they name, anywhere, and
    does not distinguish a broken link from a missing name.

    Parameters
    ----------
    path
        The file.
    allow_external
        Follow links to files outside the folder of ``path``.

    Raises
    ------
    UnreadableError
        If the file cannot be opened.
    """

    def __init__(self, path: Path, allow_external: bool = False) -> None:
        self.path = path
        self._allow_external = allow_external
        self._files = {path: open_file(path)}
        self.root: h5py.File = self._files[path]

    def __enter__(self) -> LinkedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def find(self, name: str, file: h5py.File | None = None) -> Any:
        """Return the group or dataset of a name; None if there is no such name.

        ``file`` is the file to look in if that is another one than `root`.

        Raises
        ------
        UnreadableError
            If a link on the way leads nowhere, or out of the folder without permission.
        """
        return self._follow(self.root if file is None else file, name, 0)

    def dataset(self, name: str) -> h5py.Dataset:
        """Return a dataset.

        Raises
        ------
        UnreadableError
            If a link on the way leads nowhere.
        ValueError
            If there is no such dataset.
        """
        found = self.find(name)
        if not isinstance(found, h5py.Dataset):
            raise ValueError(f"{self.path} has no dataset {name!r}. " + self.inventory())
        return found

    def _follow(self, start: Any, name: str, depth: int) -> Any:
        node = start.file if name.startswith("/") else start
        if depth > _MAX_LINKS:
            raise UnreadableError(f"{self.path}: the link to {name} leads in a circle")
        for part in name.split("/"):
            if part in ("", "."):
                continue
            link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
            if link is None:
                return None
            if isinstance(link, h5py.HardLink):
                node = node[part]
                continue
            here = f"{node.file.filename}: {node.name.rstrip('/')}/{part}"
            if isinstance(link, h5py.ExternalLink):
                target = f"{link.path} in {link.filename}"
                try:
                    node = self._follow(
                        self.open_beside(link.filename, node.file), link.path, depth + 1
                    )
                except UnreadableError as error:
                    raise UnreadableError(f"{here} is a link to {target}: {error}") from error
            else:
                target = link.path
                node = self._follow(node, link.path, depth + 1)
            if node is None:
                raise UnreadableError(f"{here} is a link to {target}, which is not there")
        return node

    def open_beside(self, name: str, file: h5py.File) -> h5py.File:
        """Open the file that a link or a virtual dataset of another file names; once.

        Raises
        ------
        UnreadableError
            If it is not there, cannot be opened, or lies outside the folder without permission.
        """
        path = self.resolve(name, Path(file.filename))
        if path not in self._files:
            self._files[path] = open_file(path)
        return self._files[path]

    def resolve(self, name: str, referrer: Path) -> Path:
        """Return the path of the file that ``referrer`` names, as HDF5 looks for it.

        Raises
        ------
        UnreadableError
            If it is not there, or lies outside the folder without permission.
        """
        folder = referrer.absolute().parent
        candidates = [folder / name, referrer.resolve().parent / name]
        if os.path.isabs(name):
            # HDF5 also looks beside the file, in case both have moved.
            candidates.append(folder / os.path.basename(name))
        # Lexically: an HDF5 link may be a trap; a symbolic link in the folder is the owner's.
        paths = [Path(os.path.normpath(candidate)) for candidate in candidates]
        found = next((path for path in paths if path.exists()), None)
        if found is None:
            raise UnreadableError(f"{paths[0]} is not there")
        inside = {self.path.absolute().parent, self.path.resolve().parent}
        if not self._allow_external and not any(found.is_relative_to(one) for one in inside):
            raise UnreadableError(
                f"{found} lies outside the folder of {self.path}; if you trust this file, set "
                "allow_external: true"
            )
        return found

    def check_raw_files(self, dataset: h5py.Dataset, where: str) -> None:
        """Raise an error if a dataset keeps its values in raw files that may not or cannot be read.

        HDF5 looks for raw files in the working directory unless the environment says otherwise.
        """
        for name, offset, size in dataset.external or ():
            prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "")
            prefix = prefix.replace("${ORIGIN}", str(Path(dataset.file.filename).parent))
            path = Path(prefix, name).absolute()
            if not self._allow_external:
                raise UnreadableError(
                    f"{where} keeps its values in the file {path}; if you trust this file, set "
                    "allow_external: true"
                )
            if not path.is_file() or (size < _UNLIMITED and path.stat().st_size < offset + size):
                raise UnreadableError(
                    f"{where} keeps its values in the file {path}, which is not there or too "
                    "short; HDF5_EXTFILE_PREFIX=${ORIGIN} makes HDF5 look beside the file itself"
                )

    def linked(self) -> set[Path]:
        """Return the other files that links and virtual datasets have led to so far."""
        return set(self._files) - {self.path}

    def inventory(self) -> str:
        """Describe datasets and links, for error messages."""
        lines = list(self._listing())
        if not lines:
            return "It has no datasets at all"
        more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        return "It has the datasets:\n  " + "\n  ".join(lines[:_LISTED]) + more

    def _listing(self) -> Iterator[str]:
        groups, visited = [self.root], 0
        known = set()
        while groups and visited < _VISITED:
            group = groups.pop()
            # A hard link may lead back to a group on the way.
            where = h5py.h5o.get_info(group.id)
            if (where.fileno, where.addr) in known:
                continue
            known.add((where.fileno, where.addr))
            deeper = []
            for name in group:
                visited += 1
                path = f"{group.name.rstrip('/')}/{name}"
                link = group.get(name, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    yield f"{path} {self._describe_link(path, link)}"
                    continue
                item = group[name]
                if isinstance(item, h5py.Dataset):
                    yield f"{path} {item.shape} {item.dtype}"
                elif isinstance(item, h5py.Group):
                    deeper.append(item)
            groups += reversed(deeper)

    def _describe_link(self, path: str, link: Any) -> str:
        target = f"{link.filename}:{link.path}" if hasattr(link, "filename") else link.path
        try:
            item = self.find(path)
        except UnreadableError:
            return f"-> {target} (broken)"
        what = f"{item.shape} {item.dtype}" if isinstance(item, h5py.Dataset) else "(group)"
        return f"-> {target} {what}"


def check_filters(dataset: h5py.Dataset, where: str) -> None:
    """Raise an error that names the filter unless this process can decompress a dataset.

    Without the filter every single frame would be unreadable.
    """
    properties = dataset.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            plugins = os.environ.get("HDF5_PLUGIN_PATH", "not set")
            raise UnreadableError(
                f"{where} is compressed with HDF5 filter {code} "
                f"({name.decode(errors='replace') or 'unnamed'}), which this process (on "
                f"{socket.gethostname()}) does not have. Set HDF5_PLUGIN_PATH, here {plugins}, to "
                "a folder with that filter for the process that reads"
            )


def add_plugins(folders: str) -> None:
    """Let HDF5 look for filters in these folders too, which another process has looked in.

    Parameters
    ----------
    folders
        As in the environment variable ``HDF5_PLUGIN_PATH``.
    """
    known = {h5py.h5pl.get(k) for k in range(h5py.h5pl.size())}
    for folder in filter(None, folders.split(os.pathsep)):
        if os.fsencode(folder) not in known:
            h5py.h5pl.append(os.fsencode(folder))
