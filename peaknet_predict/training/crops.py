"""Crops of the frames of CXI files, with the peaks that the files list.

Shape legend: N events of a file, P panels of an event, H rows, W columns, M peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from peaknet_predict.cxi.frames import (
    PEAK_LISTS,
    index_of_event,
    mask_beside,
    open_cxi,
    panels_in,
    read_peak_list,
)

_BEYOND_PX = 5.0
"""Greatest distance outside a crop at which a peak may reach into it, pixels."""


@dataclass(frozen=True, slots=True)
class CxiFile:
    """One file: names of its datasets, and the shape of its events.

    `lists` is the group of the peak lists.
    """

    path: Path
    data: str
    lists: str
    num_events: int
    panels: int
    height: int
    width: int


@dataclass(slots=True)
class FrameCrop:
    """A part of one panel, as a sample to train on.

    Attributes
    ----------
    pixels
        (H, W) float32, NaN where there is no good pixel.
    peaks
        (M, 2) float32, y and x in the crop; some lie a little outside of it.
    """

    pixels: npt.NDArray[np.float32]
    peaks: npt.NDArray[np.float32]


class FrameCrops(Dataset[FrameCrop]):
    """Crops by number. Every event is used once before any is used again.

    Parameters
    ----------
    files
        Where the events are.
    events
        Number of the file and row in it, of each event.
    height, width
        Pixels of a crop.
    seed
        Decides the order of the events, and where the crops lie.
    """

    def __init__(
        self,
        files: list[CxiFile],
        events: list[tuple[int, int]],
        height: int,
        width: int,
        seed: int,
    ) -> None:
        self.events = events
        self._files, self._size, self._seed = files, (height, width), seed
        self._open: dict[int, Any] = {}  # each reading process has its own

    def __getitem__(self, number: int) -> FrameCrop:
        turn, place = divmod(number, len(self.events))
        order = np.random.default_rng((self._seed, turn)).permutation(len(self.events))
        which, row = self.events[order[place]]
        return self._crop(which, row, np.random.default_rng((self._seed, turn, place, 1)))

    def _crop(self, which: int, row: int, rng: np.random.Generator) -> FrameCrop:
        file = self._files[which]
        if which not in self._open:
            self._open[which] = open_cxi(file.path)
        h5 = self._open[which]
        panel = int(rng.integers(file.panels))
        height, width = min(self._size[0], file.height), min(self._size[1], file.width)
        top = int(rng.integers(file.height - height + 1))
        left = int(rng.integers(file.width - width + 1))
        pixels = np.full(self._size, np.nan, dtype=np.float32)
        place = panel, slice(top, top + height), slice(left, left + width)
        good = np.ones((height, width), dtype=np.bool_)
        frames = h5[file.data]
        mask = mask_beside(frames)
        if mask is not None:
            good = _part(mask, index_of_event(mask, frames, row), file, *place) == 0
        values = _part(frames, (row,), file, *place)
        pixels[:height, :width] = np.where(good, values.astype(np.float32), np.nan)

        x, slab_y = read_peak_list(h5[file.lists], row)
        y = slab_y - panel * file.height
        on_panel = (y > -0.5) & (y < file.height - 0.5)
        y, x = y - top, x - left
        near = on_panel & (y > -_BEYOND_PX) & (y < height + _BEYOND_PX)
        near &= (x > -_BEYOND_PX) & (x < width + _BEYOND_PX)
        return FrameCrop(pixels, np.column_stack([y[near], x[near]]).astype(np.float32))


def _part(
    dataset: Any,
    event: tuple[int, ...],
    file: CxiFile,
    panel: int,
    rows: slice,
    columns: slice,
) -> npt.NDArray[Any]:
    """Read a part of one panel, of a stack or of an array with a dimension for panels."""
    if dataset.ndim - len(event) == 3:
        return np.asarray(dataset[(*event, panel, rows, columns)])
    first = panel * file.height
    return np.asarray(dataset[(*event, slice(first + rows.start, first + rows.stop), columns)])


def inspect_file(path: Path, data: str, peaks: str, panel_height: int | None) -> CxiFile:
    """Return what a file holds; parameters and errors as for `CxiShots`."""
    try:
        h5 = open_cxi(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened as HDF5: {error}") from error
    with h5:
        frames = h5.get(data)
        lists = {name: h5.get(f"{peaks}/{name}") for name in PEAK_LISTS}
        missing = [f"{peaks}/{name}" for name, found in lists.items() if found is None]
        if not isinstance(frames, h5py.Dataset) or missing:
            lacking = ", ".join([] if frames is not None else [data]) or ", ".join(missing)
            raise ValueError(
                f"{path} has no dataset {lacking}: name the frames with `data` and the group of "
                "the peak lists with `peaks`"
            )
        num_events = int(frames.shape[0]) if frames.ndim else 0
        if frames.ndim not in (3, 4) or frames.dtype.kind not in "iuf":
            raise ValueError(
                f"{path}: {data} has shape {frames.shape} and dtype {frames.dtype}; expected real "
                "numbers (N, rows, columns) or (N, P, H, W)"
            )
        if any(lists[name].shape[:1] != (num_events,) for name in PEAK_LISTS):
            shapes = ", ".join(f"{name} {lists[name].shape}" for name in PEAK_LISTS)
            raise ValueError(f"{path}: {num_events} frames, but peak lists of shape {shapes}")
        if frames.ndim == 4:
            panels, height = int(frames.shape[1]), int(frames.shape[2])
        else:
            rows = int(frames.shape[1])
            height = panel_height or rows // panels_in(frames)
            if rows % height:
                raise ValueError(
                    f"{path}: the {rows} rows of {data} are not a multiple of panel_height={height}"
                )
            panels = rows // height
        return CxiFile(path, data, peaks, num_events, panels, height, int(frames.shape[-1]))


def num_peaks(file: CxiFile) -> int:
    """Return how many peaks a file lists."""
    with open_cxi(file.path) as h5:
        return int(np.sum(h5[file.lists]["nPeaks"][()]))
