"""Reading the frames of one dataset in order, each chunk once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError
from peaknet_predict.sources.hdf5.storage import Storage
from peaknet_predict.types import Image

MAX_BLOCK_BYTES = 2 * 2**30
"""Most memory for the frames of a chunk. Frames of a larger chunk are read in several passes."""

_CHUNKS_OF_SOURCES = 4  # read together where chunks of a virtual dataset's sources are not aligned

READ_ERRORS = (OSError, KeyError, IndexError, ValueError, RuntimeError)
"""What h5py raises for a damaged chunk, or a file that shrank or lost a dataset meanwhile."""


class Frames:
    """The frames of a dataset.

    HDF5 decompresses a whole chunk for each read that touches it, and its own cache is smaller than
    a chunk of images. So all frames of a chunk are read at once and handed out one by one.

    Parameters
    ----------
    opened
        The file.
    name
        Path of the dataset.
    axes
        What each of its axes is, of `peaknet_predict.sources.hdf5.axes.AXES`.
    threshold
        Index along the axis of thresholds.

    Attributes
    ----------
    shape
        (P, H, W) or (H, W) of a frame.

    Raises
    ------
    UnreadableError
        If none of its frames can be read.
    """

    def __init__(
        self, opened: LinkedFile, name: str, axes: Sequence[str], threshold: int | None
    ) -> None:
        self._dataset = opened.dataset(name)
        self._where = name
        self._axes = tuple(axes)
        opened.check_raw_files(self._dataset, self._where)
        axis = self._axes.index("events") if "events" in self._axes else None
        fixed = {} if threshold is None else {self._axes.index("thresholds"): threshold}
        self._storage = Storage(opened, self._dataset, axis, fixed, self._where)
        self._num = 1 if axis is None else self._dataset.shape[axis]
        self._index = [fixed.get(k, slice(None)) for k in range(self._dataset.ndim)]
        self._order = _order(self._axes, ("events", "panels", "slow", "fast"))
        self._order_of_frame = _order(self._axes, ("panels", "slow", "fast"))
        kept = [k for k in range(self._dataset.ndim) if k != axis and k not in fixed]
        self.shape = tuple(self._dataset.shape[kept[k]] for k in self._order_of_frame)
        block = self._storage.events_per_chunk
        if self._dataset.is_virtual and block > 1:
            block *= _CHUNKS_OF_SOURCES
        frame_bytes = max(1, self._dataset.size // max(1, self._num) * self._dataset.dtype.itemsize)
        self._per_block = max(1, min(block, self._num, MAX_BLOCK_BYTES // frame_bytes))
        self._block: Image | None = None
        self._first = 0
        self._damaged: int | None = None  # first frame of a block that cannot be read as a whole

    def __len__(self) -> int:
        return self._num

    def read(self, record: int) -> tuple[Image, npt.NDArray[np.bool_] | None]:
        """Read a frame.

        Returns
        -------
        image, unmapped
            (P, H, W) or (H, W) in the dataset's dtype, and True for the pixels of it that a virtual
            dataset takes from nowhere; None if there are none.

        Raises
        ------
        UnreadableError
            If it cannot be read.
        """
        if record >= self._num:
            raise UnreadableError(f"{self._where} has only {self._num} frames now")
        self._storage.check(record)
        try:
            image = self._frame(record)
        except READ_ERRORS as error:
            raise UnreadableError(f"{self._where}: {error}") from error
        if self._dataset.is_virtual:
            # A source that was gone before HDF5 opened it is still gone now.
            self._storage.check(record)
        unmapped = self._storage.unmapped(record)
        if unmapped is not None:
            unmapped = unmapped.transpose(self._order_of_frame)
        return image, unmapped

    def _frame(self, record: int) -> Image:
        first = record // self._per_block * self._per_block
        if self._per_block == 1 or first == self._damaged:
            return np.ascontiguousarray(self._read(record, 1)[0])
        if self._block is None or first != self._first:
            self._block = None  # before the next one is read: not both in memory
            try:
                self._block, self._first = self._read(first, self._per_block), first
            except READ_ERRORS:
                # Perhaps only some of its frames are damaged.
                self._damaged = first
                return self._frame(record)
        # A copy, so that an event that is kept does not hold the whole block in memory.
        frame: Image = self._block[record - first].copy()
        return frame

    def _read(self, first: int, number: int) -> Image:
        """Read some frames, (number, P, H, W) or (number, H, W)."""
        index = list(self._index)
        if "events" not in self._axes:
            return np.asarray(self._dataset[tuple(index)]).transpose(self._order)[np.newaxis]
        index[self._axes.index("events")] = slice(first, first + number)
        return np.asarray(self._dataset[tuple(index)]).transpose(self._order)


def _order(axes: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the permutation that brings the wanted axes into order."""
    kept = [axis for axis in axes if axis in wanted]
    return [kept.index(axis) for axis in wanted if axis in kept]
