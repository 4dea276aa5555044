"""Reads a written file back before it gets its name."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peaknet_predict.cxi.frames import open_cxi
from peaknet_predict.cxi.layout import DATA, MASK, Contents, mask_of, shared_mask
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.types import Image


def verify_cxi_file(path: str | Path, rows: Sequence[CxiRow], contents: Contents) -> None:
    """Read a file back, and compare everything in it with what it was written from.

    Raises
    ------
    OSError
        If the file holds anything else.
    """
    with open_cxi(path) as file:
        for name, attributes in contents.attributes.items():
            found = file.get(name)
            if found is None or any(found.attrs.get(k) != v for k, v in attributes.items()):
                raise _damaged(path, name)
        for name, table in contents.tables.items():
            if name not in file or not _is_same(_read(file[name]), table):
                raise _damaged(path, name)
        shape = (len(rows), *rows[0].slab.shape)
        _verify_images(path, file, DATA, shape, (row.slab for row in rows))
        mask = shared_mask(rows)
        if mask is None:
            _verify_images(path, file, MASK, shape, (mask_of(row) for row in rows))
        elif MASK not in file or not _is_same(_read(file[MASK]), mask):
            raise _damaged(path, MASK)


def _verify_images(
    path: str | Path, file: Any, name: str, shape: tuple[int, ...], slabs: Iterable[Image]
) -> None:
    data = file.get(name)
    # A chunk that was never written would read as zeros.
    if data is None or data.shape != shape or data.id.get_num_chunks() != shape[0]:
        raise _damaged(path, name)
    buffer = np.empty(shape[1:], data.dtype)
    for i, slab in enumerate(slabs):
        if data.compression is None:
            # The same bytes in a third of the time, because HDF5 does not process them.
            data.id.read_direct_chunk((i, 0, 0), out=buffer.reshape(-1).view(np.uint8))
        else:
            data.read_direct(buffer, np.s_[i])
        if not _is_same(buffer, slab):
            raise _damaged(path, f"{name}[{i}]")


def _damaged(path: str | Path, what: str) -> OSError:
    return OSError(errno.EIO, f"read back, {what} is not what was written", str(path))


def _read(dataset: Any) -> npt.NDArray[Any]:
    return np.asarray(dataset.asstr()[()] if dataset.dtype == object else dataset[()])


def _is_same(found: npt.NDArray[Any], meant: npt.NDArray[Any]) -> bool:
    """Whether two arrays have the same bytes; NaN equals itself, and 0 is not -0."""
    if found.shape != meant.shape or found.dtype != meant.dtype:
        return False
    if found.dtype == object:
        return bool(np.array_equal(found, meant))
    return bool(np.array_equal(_bytes(found), _bytes(meant)))


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array's memory as numbers, of eight bytes each where that is possible."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint64 if flat.nbytes % 8 == 0 else np.uint8)
