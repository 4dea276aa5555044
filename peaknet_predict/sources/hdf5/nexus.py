"""Where NeXus, CXI and DECTRIS files keep their frames, detectors and beams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError

CXI_DATA = "/entry_1/data_1/data"
"""Where the CXI format, and so Cheetah, OM and psocake, have the frames."""

NUMBERED = re.compile(r"data_\d{6}")
"""Names that DECTRIS file writers give the pieces of a series; each holds some of its events."""


def text(value: Any) -> str:
    """Return an attribute as text: files hold bytes, strings, and arrays of one of either."""
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0] if value.size else ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def texts(value: Any) -> list[str]:
    """Return an attribute or dataset as a list of texts."""
    return [text(one) for one in np.asarray(value).reshape(-1)]


def is_class(item: Any, *classes: str) -> bool:
    """Return whether an object is a group of one of these NeXus classes."""
    return isinstance(item, h5py.Group) and text(item.attrs.get("NX_class", "")) in classes


def join(*parts: str) -> str:
    """Return the path of an object in a file."""
    return "/" + "/".join(part.strip("/") for part in parts if part.strip("/"))


def entry_of(name: str) -> str:
    """Return the first group on the way to a dataset: the measurement that it belongs to."""
    return name.strip("/").partition("/")[0]


def find_frames(opened: LinkedFile) -> list[str]:
    """Return the paths of the datasets that hold the frames of a file; several follow each other.

    The CXI format's own path comes first, then the signal of a NeXus file's default plot or only
    plot, then the data of the only detector.

    Raises
    ------
    ValueError
        If no rule finds frames, or several find different ones.
    """
    if opened.find(CXI_DATA) is not None:
        return [CXI_DATA]
    groups = _default_plot(opened) or list(_plots(opened))
    found = [names for group in groups if (names := frames_of_group(opened, group))]
    if not found:
        groups = [group for entry in opened.root for group in detectors(opened, entry)]
        found = [names for group in groups if (names := frames_of_group(opened, group))]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(", ".join(names[:3]) for names in found)
    cause = f"has several sets of frames ({listed})" if found else "has no frames at a usual place"
    raise ValueError(
        f"{opened.path} {cause}; name the dataset with the option data. " + opened.inventory()
    )


def frames_of_group(opened: LinkedFile, group: str) -> list[str]:
    """Return the datasets with frames of an NXdata group, none if it has no frames."""
    node = opened.find(group)
    if not isinstance(node, h5py.Group):
        return []
    signal = text(node.attrs.get("signal", ""))
    if not signal:
        # Before 2014, the signal carried the attribute itself.
        marked = [name for name in node if _has_signal(opened, join(group, name))]
        signal = marked[0] if len(marked) == 1 else ""
    numbered = sorted(name for name in node if NUMBERED.fullmatch(name))
    if numbered and (not signal or NUMBERED.fullmatch(signal)):
        return [join(group, name) for name in numbered]
    name = join(group, signal or "data")
    item = opened.find(name)
    return [name] if isinstance(item, h5py.Dataset) and item.ndim >= 2 else []


def _has_signal(opened: LinkedFile, name: str) -> bool:
    try:
        item = opened.find(name)
    except UnreadableError:
        return False
    return isinstance(item, h5py.Dataset) and "signal" in item.attrs


def _default_plot(opened: LinkedFile) -> list[str]:
    """Return the group that the attributes ``default`` lead to."""
    path, node = "", opened.root
    seen: set[str] = set()
    while "default" in node.attrs and path not in seen:
        seen.add(path)
        name = text(node.attrs["default"])
        path = name if name.startswith("/") else join(path, name)
        node = opened.find(path)
        if not isinstance(node, h5py.Group):
            return []
        if is_class(node, "NXdata"):
            return [path]
    return []


def _plots(opened: LinkedFile) -> Iterator[str]:
    """Yield the NXdata groups of a file, and DECTRIS's group where it has no class."""
    for entry in opened.root:
        node = _group(opened, entry)
        for name in node if node is not None else ():
            path = join(entry, name)
            item = _group(opened, path)
            if item is None:
                continue
            if is_class(item, "NXdata") or any(NUMBERED.fullmatch(one) for one in item):
                yield path


def _group(opened: LinkedFile, name: str) -> h5py.Group | None:
    try:
        item = opened.find(name)
    except UnreadableError:
        return None
    return item if isinstance(item, h5py.Group) else None


def find_groups(opened: LinkedFile, entry: str, nx_class: str, names: str) -> list[str]:
    """Return the groups of a NeXus class in an entry, down to two levels.

    Parameters
    ----------
    opened
        The file.
    entry
        Group to look in.
    nx_class
        The class.
    names
        Pattern of names that such groups have where files leave the class out.
    """
    found = []
    levels = [entry]
    for _ in range(3):
        deeper = []
        for path in levels:
            node = _group(opened, path)
            for name in node if node is not None else ():
                item = _group(opened, join(path, name))
                if item is None:
                    continue
                deeper.append(join(path, name))
                known = "NX_class" in item.attrs
                if is_class(item, nx_class) or (not known and re.fullmatch(names, name)):
                    found.append(join(path, name))
        levels = deeper
    return found


def detectors(opened: LinkedFile, entry: str) -> list[str]:
    """Return the groups of the detectors of an entry."""
    return find_groups(opened, entry, "NXdetector", r"detector(_\d+)?")
