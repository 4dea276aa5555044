"""Measured frames with peak lists, from CXI files, as the data of a training run.

Shape legend: B events of a batch, P panels of an event, H rows, W columns, M peaks.
"""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from peaknet_predict.simulation.labels import IGNORED, MAX_RADIUS, draw_labels
from peaknet_predict.simulation.shots import LabelledShots
from peaknet_predict.sources.base import resolve_paths
from peaknet_predict.training.augment import turned
from peaknet_predict.training.crops import FrameCrop, FrameCrops, inspect_file, num_peaks


class CxiShots(L.LightningDataModule):
    """Crops of the events of CXI files, labelled with the files' own peak lists.

    For facilities that adapt a network to their detector. The lists count as the truth: a spot that
    is not listed is background. So the lists should be good, such as predicted reflections of
    indexed frames. Files are those that `peaknet-predict write-cxi` writes, or others with the same
    datasets, such as Cheetah's.

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
        Rows of one panel of a stack. Our own files contain it; in others the whole stack is one
        panel by default.
    peak_radius_px
        Distance from the centre at which a typical peak has half its height, in pixels: the radius
        of the disc that the network learns to mark.
    batch_size
        Crops in a batch, for each process.
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
        files = [inspect_file(file, data, peaks, panel_height) for file in resolve_paths(path)]
        events = [(number, row) for number, f in enumerate(files) for row in range(f.num_events)]
        if len(events) < 2:
            raise ValueError(
                f"{path}: {len(events)} events; at least 2 are needed, one of them to validate on"
            )
        if not sum(num_peaks(file) for file in files):
            raise ValueError(
                f"{path}: the lists of all {len(events)} events are empty, so there is nothing to "
                "learn; run peaknet-predict (or another finder) with write-cxi first"
            )
        order = np.random.default_rng(seed).permutation(len(events))
        num_val = max(1, round(val_fraction * len(events)))
        self._val = FrameCrops(files, [events[i] for i in order[:num_val]], height, width, seed)
        self._train = FrameCrops(
            files, [events[i] for i in order[num_val:]], height, width, seed + 1
        )

    def train_dataloader(self) -> DataLoader[FrameCrop]:
        """Return a loader with one crop of every training event, different ones in every epoch."""
        return self._loader(self._train, moves_on=True)

    def val_dataloader(self) -> DataLoader[FrameCrop]:
        """Return a loader with one crop of every validation event, always the same."""
        return self._loader(self._val, moves_on=False)

    def _loader(self, crops: FrameCrops, moves_on: bool) -> DataLoader[FrameCrop]:
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
        """Draw the labels on the device; turn the training images."""
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
    """Numbers of this process's crops: different ones in each epoch, or always the same."""

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


def _collate(crops: list[FrameCrop]) -> LabelledShots:
    """Make a batch with one panel per event; labels are drawn later."""
    images_BPHW = torch.from_numpy(np.stack([crop.pixels for crop in crops])[:, np.newaxis])
    rows = [
        np.column_stack([np.full(len(crop.peaks), b), np.zeros(len(crop.peaks)), crop.peaks])
        for b, crop in enumerate(crops)
    ]
    peaks_M4 = torch.from_numpy(np.concatenate(rows).astype(np.float32))
    # Lists have no `snr`, unlike simulated peaks; all listed peaks should be found.
    snr_M = torch.full((len(peaks_M4),), torch.inf)
    return LabelledShots(images_BPHW, torch.empty(0, dtype=torch.uint8), peaks_M4, snr_M)
