"""Measured frames with peak lists, from CXI files, as the data of a training run.

Shape legend: B events of a batch, P panels of an event, H rows, W columns, h rows and w columns of
a crop, M peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peaknet_predict.sources.base import resolve_paths
from peaknet_predict.training.augment import turned
from peaknet_predict.training.labels import IGNORED, MAX_RADIUS, draw_labels
from peaknet_predict.training.shots import LabelledShots

_LISTS = ("nPeaks", "peakXPosRaw", "peakYPosRaw")
_BEYOND_PX = 5.0
"""Peaks whose centres lie so far outside of a crop reach into it."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    data: str
    lists: str
    mask: str | None
    num_events: int
    panels: int
    height: int
    width: int


@dataclass(slots=True)
class _Crop:
    """One sample: pixels (h, w) float32 with NaN where there are none, peaks (M, 2) y, x."""

    pixels: npt.NDArray[np.float32]
    peaks: npt.NDArray[np.float32]


class CxiShots(L.LightningDataModule):
    """Crops of the events of CXI files, labelled with the files' own peak lists.

    For a facility that adapts a network to its detector. The lists are taken for the truth: a spot
    that is not listed is background, so they should be good ones, those of indexed frames with
    the predicted reflections, say. Files are those that `peaknet-predict write-cxi` writes, or
    others with the same datasets, such as Cheetah's.

    Parameters
    ----------
    path
        File, glob pattern, or a list of them.
    data
        Dataset of the frames, (N, rows, W) with the panels of an event stacked, or (N, P, H, W). A
        dataset ``mask`` beside it, where there is one, marks bad pixels with a number that is not
        0; it is one frame, or a frame for each event.
    peaks
        Group that holds ``nPeaks`` (N,) and ``peakXPosRaw``, ``peakYPosRaw`` (N, most peaks), in
        pixels of the stacked panels, pixel centres on integers.
    panel_height
        Rows of one panel of a stack. Our own files say it themselves; of others the whole stack
        is one panel by default.
    peak_radius_px
        Distance from the centre at which a typical peak has half its height, in pixels: the radius
        of the disc that the network learns to mark.
    batch_size
        Crops of a batch, for each process.
    height, width
        Of a crop, multiples of 32 for PeakNet. Smaller panels are filled up with pixels that do not
        count.
    val_fraction
        Share of the events that are kept for validation, at least one.
    num_workers
        Processes that read.
    seed
        Decides which events those are, and all crops.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file is not HDF5, lacks a dataset or has other shapes, or if there are no peaks at all.
    """

    def __init__(
        self,
        path: str | list[str],
        data: str = "/entry_1/data_1/data",
        peaks: str = "/entry_1/result_1",
        panel_height: int | None = None,
        peak_radius_px: float = 1.8,
        batch_size: int = 32,
        height: int = 256,
        width: int = 256,
        val_fraction: float = 0.1,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, height, width) < 1 or not 0 < val_fraction < 1:
            raise ValueError(
                f"batch_size is {batch_size}, height {height}, width {width} (at least 1 each) and "
                f"val_fraction {val_fraction} (between 0 and 1)"
            )
        if not 0 < peak_radius_px <= MAX_RADIUS:
            raise ValueError(
                f"peak_radius_px is {peak_radius_px}; give a number up to {MAX_RADIUS:g}"
            )
        self.peak_radius_px = peak_radius_px
        self.batch_size = batch_size
        self.num_workers = num_workers
        files = [_inspect(file, data, peaks, panel_height) for file in resolve_paths(path)]
        events = [(number, row) for number, f in enumerate(files) for row in range(f.num_events)]
        if len(events) < 2:
            raise ValueError(
                f"{path}: {len(events)} events; at least 2 are needed, one of them to validate on"
            )
        if not sum(_num_peaks(file) for file in files):
            raise ValueError(
                f"{path}: the lists of all {len(events)} events are empty, so there is nothing to "
                "learn; run peaknet-predict (or another finder) with write-cxi first"
            )
        order = np.random.default_rng(seed).permutation(len(events))
        num_val = max(1, round(val_fraction * len(events)))
        self._val = _Crops(files, [events[i] for i in order[:num_val]], height, width, seed)
        self._train = _Crops(files, [events[i] for i in order[num_val:]], height, width, seed + 1)

    def train_dataloader(self) -> DataLoader[_Crop]:
        """Return a loader with one crop of every training event, other ones in every epoch."""
        return self._loader(self._train, moves_on=True)

    def val_dataloader(self) -> DataLoader[_Crop]:
        """Return a loader with one crop of every validation event, always the same."""
        return self._loader(self._val, moves_on=False)

    def _loader(self, crops: _Crops, moves_on: bool) -> DataLoader[_Crop]:
        assert self.trainer is not None
        return DataLoader(
            crops,
            self.batch_size,
            sampler=_Numbers(len(crops.events), self.trainer, moves_on),
            num_workers=self.num_workers,
            collate_fn=_collate,
            persistent_workers=self.num_workers > 0,
            # A compiled network would be compiled again for the short batch at the end.
            drop_last=len(crops.events) >= self.batch_size * self.trainer.world_size,
        )

    def on_after_batch_transfer(self, batch: LabelledShots, dataloader_idx: int) -> LabelledShots:
        """Draw the labels, on the device; turn what is trained on."""
        assert self.trainer is not None
        images, peaks_M4 = batch.images_BPHW, batch.peaks_M4
        B, P, H, W = images.shape
        radius_M = torch.full_like(peaks_M4[:, 0], self.peak_radius_px)
        labels = draw_labels(peaks_M4, radius_M, (B, P, H, W))
        labels = torch.where(torch.isfinite(images), labels, IGNORED).to(torch.uint8)
        if self.trainer.training:
            seed = self.trainer.global_step * self.trainer.world_size + self.trainer.global_rank
            images, labels = turned([images, labels], seed)
            return LabelledShots(images, labels, peaks_M4[:0], batch.snr_M[:0])
        y_M, x_M = peaks_M4[:, 2], peaks_M4[:, 3]
        inside_M = (y_M >= 0) & (y_M <= H - 1) & (x_M >= 0) & (x_M <= W - 1)
        return LabelledShots(images, labels, peaks_M4[inside_M], batch.snr_M[inside_M])


class _Numbers(Sampler[int]):
    """Numbers of this process's crops: of each epoch, others, or always the same ones."""

    def __init__(self, num_events: int, trainer: L.Trainer, moves_on: bool) -> None:
        self._num_events, self._trainer, self._moves_on = num_events, trainer, moves_on
        # Every process must have as many batches as the others.
        self._share = max(num_events // trainer.world_size, 1)

    def __len__(self) -> int:
        return self._share

    def __iter__(self) -> Iterator[int]:
        first = self._trainer.current_epoch * self._num_events if self._moves_on else 0
        ranks = self._trainer.world_size
        yield from (first + k * ranks + self._trainer.global_rank for k in range(self._share))


class _Crops(Dataset[_Crop]):
    """Crop number n: of one of the events, all of which have their turn before the first again."""

    def __init__(
        self,
        files: list[_File],
        events: list[tuple[int, int]],
        height: int,
        width: int,
        seed: int,
    ) -> None:
        self.events = events
        self._files, self._size, self._seed = files, (height, width), seed
        self._open: dict[int, Any] = {}  # every process that reads has its own

    def __getitem__(self, number: int) -> _Crop:
        turn, place = divmod(number, len(self.events))
        order = np.random.default_rng((self._seed, turn)).permutation(len(self.events))
        which, row = self.events[order[place]]
        return self._crop(which, row, np.random.default_rng((self._seed, turn, place, 1)))

    def _crop(self, which: int, row: int, rng: np.random.Generator) -> _Crop:
        file = self._files[which]
        if which not in self._open:
            self._open[which] = h5py.File(file.path, "r")
        h5 = self._open[which]
        panel = int(rng.integers(file.panels))
        height, width = min(self._size[0], file.height), min(self._size[1], file.width)
        top = int(rng.integers(file.height - height + 1))
        left = int(rng.integers(file.width - width + 1))
        pixels = np.full(self._size, np.nan, dtype=np.float32)
        place = panel, slice(top, top + height), slice(left, left + width)
        good = np.ones((height, width), dtype=np.bool_)
        if file.mask is not None:
            mask = h5[file.mask]
            frames_of_events = mask.ndim == h5[file.data].ndim
            good = _part(mask, row if frames_of_events else None, file, *place) == 0
        values = _part(h5[file.data], row, file, *place)
        pixels[:height, :width] = np.where(good, values.astype(np.float32), np.nan)

        lists = h5[file.lists]
        count = int(lists["nPeaks"][row])
        x, stacked_y = (lists[name][row, :count].astype(np.float64) for name in _LISTS[1:])
        y = stacked_y - panel * file.height
        on_panel = (y > -0.5) & (y < file.height - 0.5)
        y, x = y - top, x - left
        near = on_panel & (y > -_BEYOND_PX) & (y < height + _BEYOND_PX)
        near &= (x > -_BEYOND_PX) & (x < width + _BEYOND_PX)
        return _Crop(pixels, np.column_stack([y[near], x[near]]).astype(np.float32))


def _part(
    dataset: Any, row: int | None, file: _File, panel: int, rows: slice, columns: slice
) -> npt.NDArray[Any]:
    """Read a part of one panel, of a stack or of an array with a dimension for panels."""
    event = () if row is None else (row,)
    if dataset.ndim - len(event) == 3:
        return np.asarray(dataset[(*event, panel, rows, columns)])
    first = panel * file.height
    return np.asarray(dataset[(*event, slice(first + rows.start, first + rows.stop), columns)])


def _collate(crops: list[_Crop]) -> LabelledShots:
    """Make a batch of one panel an event; labels are drawn later."""
    images_BPHW = torch.from_numpy(np.stack([crop.pixels for crop in crops])[:, np.newaxis])
    rows = [
        np.column_stack([np.full(len(crop.peaks), b), np.zeros(len(crop.peaks)), crop.peaks])
        for b, crop in enumerate(crops)
    ]
    peaks_M4 = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    # Lists do not say what `snr` says of simulated peaks; all of theirs are to be found.
    snr_M = torch.full((len(peaks_M4),), torch.inf)
    return LabelledShots(images_BPHW, torch.empty(0, dtype=torch.uint8), peaks_M4, snr_M)


def _inspect(path: Path, data: str, peaks: str, panel_height: int | None) -> _File:
    try:
        h5 = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be opened as HDF5: {error}") from error
    with h5:
        frames = h5.get(data)
        lists = {name: h5.get(f"{peaks}/{name}") for name in _LISTS}
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
        if any(lists[name].shape[:1] != (num_events,) for name in _LISTS):
            shapes = ", ".join(f"{name} {lists[name].shape}" for name in _LISTS)
            raise ValueError(f"{path}: {num_events} frames, but peak lists of shape {shapes}")
        if frames.ndim == 4:
            panels, height = int(frames.shape[1]), int(frames.shape[2])
        else:
            rows = int(frames.shape[1])
            panels = int(frames.parent.attrs.get("panels", 1))
            height = panel_height or rows // panels
            if rows % height:
                raise ValueError(
                    f"{path}: the {rows} rows of {data} are not a multiple of panel_height={height}"
                )
            panels = rows // height
        mask = f"{data.rpartition('/')[0]}/mask"
        has_mask = isinstance(h5.get(mask), h5py.Dataset)
        width = int(frames.shape[-1])
        return _File(
            path, data, peaks, mask if has_mask else None, num_events, panels, height, width
        )


def _num_peaks(file: _File) -> int:
    with h5py.File(file.path, "r") as h5:
        return int(np.sum(h5[file.lists]["nPeaks"][()]))
