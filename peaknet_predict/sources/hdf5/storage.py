"""Which frames of a dataset really exist.

For a chunk that was never written, and for a virtual dataset whose source is gone, HDF5 returns a
fill value without an error. A fill value must not pass for a measurement.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError, check_filters

_MAX_NESTING = 4  # virtual datasets of virtual datasets


class Storage:
    """Where the frames of a dataset are stored: in its chunks, or in those of other files.

    Parameters
    ----------
    opened
        The file that the dataset was found in.
    dataset
        The dataset.
    axis
        Its axis that counts events; None if it is a single frame.
    fixed
        Index along other axes of which one element is read: the threshold.
    where
        File and dataset, for messages.

    Raises
    ------
    UnreadableError
        If none of its frames can be read.
    """

    def __init__(
        self,
        opened: LinkedFile,
        dataset: h5py.Dataset,
        axis: int | None,
        fixed: Mapping[int, int],
        where: str,
        nesting: int = 0,
    ) -> None:
        self._dataset = dataset
        self._axis = axis
        self._fixed = dict(fixed)
        self._where = where
        self.events_per_chunk = 1
        self._sources: list[_Source] = []
        self._bare: dict[tuple[Any, ...], npt.NDArray[np.bool_] | None] = {}
        self._is_sparse = False
        check_filters(dataset, where)
        if dataset.is_virtual:
            if nesting > _MAX_NESTING:
                raise UnreadableError(f"{where}: its virtual sources lead in a circle")
            self._sources = [
                _Source(opened, mapping, slab, dataset, axis, where, nesting)
                for mapping in dataset.virtual_sources()
                for slab in _slabs(mapping.vspace, dataset.shape)
            ]
            problems = [source.problem for source in self._sources]
            if problems and None not in problems:
                raise UnreadableError(f"none of its sources can be read: {problems[0]}")
            chunks = [source.events_per_chunk for source in self._sources]
            self.events_per_chunk = max(chunks, default=1)
        elif dataset.chunks is not None:
            if axis is not None:
                self.events_per_chunk = dataset.chunks[axis]
            grid = [-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True)]
            written = dataset.id.get_num_chunks()
            if written == 0 and dataset.size:
                raise UnreadableError(f"{where}: nothing was ever written to it")
            self._is_sparse = written < int(np.prod(grid))
        elif (
            dataset.size
            and dataset.external is None
            and dataset.id.get_space_status() == h5py.h5d.SPACE_STATUS_NOT_ALLOCATED
        ):
            raise UnreadableError(f"{where}: nothing was ever written to it")

    def check(self, record: int) -> None:
        """Raise an `UnreadableError` unless a frame exists."""
        reason = self.why_missing(record)
        if reason is not None:
            raise UnreadableError(reason)

    def why_missing(self, record: int) -> str | None:
        """Return why a frame does not exist; None if it does."""
        if self._dataset.is_virtual:
            touching = self._touching(record)
            if not touching:
                return f"{self._where}: no source is mapped to this frame"
            reasons = (source.why_missing(record) for source in touching)
            return next((reason for reason in reasons if reason is not None), None)
        if not self._is_sparse:
            return None
        offsets: list[Sequence[int]] = []
        for axis, (n, chunk) in enumerate(
            zip(self._dataset.shape, self._dataset.chunks, strict=True)
        ):
            index = record if axis == self._axis else self._fixed.get(axis)
            offsets.append(range(0, n, chunk) if index is None else [index // chunk * chunk])
        for offset in itertools.product(*offsets):
            if self._dataset.id.get_chunk_info_by_coord(offset).byte_offset is None:
                return f"{self._where}: it was never written (no chunk at {offset})"
        return None

    def unmapped(self, record: int) -> npt.NDArray[np.bool_] | None:
        """Return the pixels of a frame that no source fills, True there; None if there are none.

        Its shape is that of the dataset without the axes of events and of `fixed`.
        """
        touching = self._touching(record)
        if not touching:
            return None
        key = tuple(source.area for source in touching)
        if key not in self._bare:
            kept = [
                axis
                for axis in range(self._dataset.ndim)
                if axis != self._axis and axis not in self._fixed
            ]
            bare = np.ones([self._dataset.shape[axis] for axis in kept], np.bool_)
            for source in touching:
                bare[np.ix_(*(source.indices(axis) for axis in kept))] = False
            self._bare[key] = bare if bare.any() else None
        return self._bare[key]

    def _touching(self, record: int) -> list[_Source]:
        """Return the sources that fill some pixel of a frame."""
        read = dict(self._fixed)
        if self._axis is not None:
            read[self._axis] = record
        return [source for source in self._sources if source.touches(read)]


class _Source:
    """A part of a virtual dataset that comes from one place."""

    def __init__(
        self,
        opened: LinkedFile,
        mapping: Any,
        slab: _Slab,
        dataset: h5py.Dataset,
        axis: int | None,
        where: str,
        nesting: int,
    ) -> None:
        self._slab = slab
        self._shape = dataset.shape
        self._axis = axis
        self._name = f"{where}: its source {mapping.dset_name} in {mapping.file_name}"
        self.problem: str | None = None
        self._path: Path | None = None
        self._storage: Storage | None = None
        self._source_slab: _Slab | None = None
        self.events_per_chunk = 1
        if "%b" in mapping.file_name or "%b" in mapping.dset_name:
            return  # HDF5 itself ends such a dataset before the first source that is not there
        try:
            self._open(opened, mapping, dataset, nesting)
        except UnreadableError as error:
            self.problem = f"{self._name} cannot be read: {error}"

    def _open(self, opened: LinkedFile, mapping: Any, dataset: h5py.Dataset, nesting: int) -> None:
        file = dataset.file
        if mapping.file_name != ".":
            file = opened.open_beside(mapping.file_name, dataset.file)
            self._path = Path(file.filename)
        source = opened.find(mapping.dset_name, file)
        if not isinstance(source, h5py.Dataset):
            raise UnreadableError(f"{file.filename} has no such dataset")
        if source.file.swmr_mode and not dataset.file.swmr_mode:
            # HDF5 opens it in the mode of this file, fails, and silently fills in.
            raise UnreadableError(f"{source.file.filename} is still being written; wait")
        slabs = _slabs(mapping.src_space, source.shape)
        if any(
            slab.index(axis, slab.size(axis) - 1) >= n
            for slab in slabs
            for axis, n in enumerate(source.shape)
            if slab.size(axis)
        ):
            raise UnreadableError(f"its shape {source.shape} is less than is mapped")
        # Frame for frame, where the elements of both are in the order of the frames.
        axis, slab = self._axis, self._slab
        if (
            axis is not None
            and len(slabs) == 1
            and source.ndim
            and slabs[0].size(0) == slab.size(axis)
            and all(slab.size(before) == 1 for before in range(axis))
        ):
            self._source_slab = slabs[0]
        source_axis = None if self._source_slab is None else 0
        self._storage = Storage(opened, source, source_axis, {}, self._name, nesting + 1)
        self.events_per_chunk = self._storage.events_per_chunk

    @property
    def area(self) -> tuple[Any, ...]:
        """The part of a frame that it fills, for comparison."""
        return tuple(
            selected for axis, selected in enumerate(self._slab.axes) if axis != self._axis
        )

    def touches(self, read: Mapping[int, int]) -> bool:
        """Return whether it fills anything at these indices, given by axis."""
        return all(self._slab.position(axis, index) is not None for axis, index in read.items())

    def indices(self, axis: int) -> npt.NDArray[np.intp]:
        """Return the indices that it fills along an axis."""
        return np.array([self._slab.index(axis, k) for k in range(self._slab.size(axis))], np.intp)

    def why_missing(self, record: int) -> str | None:
        """Return why its part of a frame does not exist; None if it does."""
        if self.problem is not None:
            return self.problem
        if self._path is not None and not os.path.exists(self._path):
            return f"{self._name} cannot be read: {self._path} is not there any more"
        if self._storage is None:
            return None
        if self._axis is None or self._source_slab is None:
            return self._storage.why_missing(0)
        position = self._slab.position(self._axis, record)
        assert position is not None
        return self._storage.why_missing(self._source_slab.index(0, position))


class _Slab:
    """A selection of elements: start, stride, count and block along each axis."""

    def __init__(self, axes: list[tuple[int, int, int, int]]) -> None:
        self.axes = axes

    def size(self, axis: int) -> int:
        """Return how many indices are selected along an axis."""
        _, _, count, block = self.axes[axis]
        return count * block

    def index(self, axis: int, position: int) -> int:
        """Return the index of the selected element at a position."""
        start, stride, _, block = self.axes[axis]
        return start + position // block * stride + position % block

    def position(self, axis: int, index: int) -> int | None:
        """Return the position of an index among the selected ones; None if it is not selected."""
        start, stride, count, block = self.axes[axis]
        number, rest = divmod(index - start, stride)
        return number * block + rest if 0 <= number < count and rest < block else None


def _slabs(space: Any, shape: tuple[int, ...]) -> list[_Slab]:
    """Return what a dataspace selects, of a dataset of this shape, as slabs."""
    kind = space.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        return [_Slab([(0, max(n, 1), 1, n) for n in shape])]
    if kind != h5py.h5s.SEL_HYPERSLABS:
        raise UnreadableError("its virtual mapping selects single points, which is not supported")
    if not space.is_regular_hyperslab():
        return [
            _Slab(
                [
                    (int(a), int(b - a + 1), 1, int(b - a + 1))
                    for a, b in zip(low, high, strict=True)
                ]
            )
            for low, high in space.get_select_hyper_blocklist()
        ]
    axes = []
    start_stride_count_block = zip(*space.get_regular_hyperslab(), strict=True)
    for (start, stride, count, block), n in zip(start_stride_count_block, shape, strict=True):
        # Unlimited selections reach as far as the dataset does.
        if count > n:
            count = max(0, -(-(n - start) // stride))
        block = min(block, n - start)
        # The stride of a single block means nothing, and may be shorter than the block.
        axes.append((start, max(stride, block), count, block))
    return [_Slab(axes)]
