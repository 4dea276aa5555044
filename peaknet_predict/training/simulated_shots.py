"""Simulated shots as the data of a training run, made on the device that trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from peaknet_predict.simulation.shots import LabelledShots, ShotSimulator
from peaknet_predict.training.augment import turned


class SimulatedShots(L.LightningDataModule):
    """Endless simulated shots with labels, and a fixed set of others to validate on.

    Nothing is read or copied: the data loader passes on numbers, and the batch for a number is
    drawn on the device. The same seed gives the same batches, even when a run continues from a
    checkpoint; each process of a run has different batches.

    Parameters
    ----------
    batch_size
        Events of a batch, for each process.
    panels, height, width
        Shape of an event.
    hit_fraction
        Share of the events that have peaks.
    steps_per_epoch
        Batches between validations.
    val_batches
        Batches to validate on, all processes together. They are of the simulator's ``held_out``
        domain: kinds of shots that training never sees.
    seed
        Decides all of it.
    """

    def __init__(
        self,
        batch_size: int = 16,
        panels: int = 2,
        height: int = 256,
        width: int = 256,
        hit_fraction: float = 0.85,
        steps_per_epoch: int = 500,
        val_batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, steps_per_epoch, val_batches) < 1:
            raise ValueError(
                f"batch_size is {batch_size}, steps_per_epoch {steps_per_epoch} and val_batches "
                f"{val_batches}; each must be at least 1"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.val_batches = val_batches
        self._simulators = {
            domain: ShotSimulator(panels, height, width, hit_fraction, seed, domain)
            for domain in ("training", "held_out")
        }
        self._seed = seed
        self._batches_made = 0
        self._ahead: _Ahead | None = None

    def train_dataloader(self) -> DataLoader[int]:
        """Return one number for each step of an epoch."""
        return _numbers(range(self.steps_per_epoch))

    def val_dataloader(self) -> DataLoader[int]:
        """Return the numbers of this process's share of the validation batches."""
        assert self.trainer is not None
        return _numbers(range(self.trainer.global_rank, self.val_batches, self.trainer.world_size))

    def on_after_batch_transfer(self, batch: int, dataloader_idx: int) -> LabelledShots:
        """Make the batch of a number, on the device."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        if not self.trainer.training:
            return self._simulators["held_out"].shots(batch, self.batch_size, device)
        # A separate count: the loader's starts again with every epoch.
        world_size = self.trainer.world_size
        index = self._batches_made * world_size + self.trainer.global_rank
        self._batches_made += 1
        if device.type != "cuda":
            return self._training_batch(index, device)
        if self._ahead is None:
            self._ahead = _Ahead(self._training_batch, device)
        return self._ahead.batch(index, index + world_size)

    def _training_batch(self, index: int, device: torch.device) -> LabelledShots:
        shots = self._simulators["training"].shots(index, self.batch_size, device)
        images, labels = turned([shots.images_BPHW, shots.labels_BPHW], hash((self._seed, index)))
        return LabelledShots(images, labels, *_no_peaks(shots))

    def state_dict(self) -> dict[str, Any]:
        """Return how far the stream of batches has come, for a checkpoint."""
        return {"batches_made": self._batches_made}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._batches_made = state_dict["batches_made"]


class _Ahead:
    """Makes the next batch while the device trains on the present one.

    The simulator starts some two thousand small kernels a batch: starting them takes the host as
    long as the device needs for a training step. A thread with its own stream does that meanwhile.
    """

    def __init__(
        self, make: Callable[[int, torch.device], LabelledShots], device: torch.device
    ) -> None:
        self._make, self._device = make, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shots")
        self._next: tuple[int, Future[tuple[LabelledShots, torch.cuda.Event]]] | None = None

    def batch(self, index: int, next_index: int) -> LabelledShots:
        """Return a batch, ready for the current stream, and begin with the one after."""
        if self._next is None or self._next[0] != index:
            self._next = index, self._thread.submit(self._on_own_stream, index)
        shots, made = self._next[1].result()
        self._next = next_index, self._thread.submit(self._on_own_stream, next_index)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(made)
        for tensor in (shots.images_BPHW, shots.labels_BPHW, shots.peaks_M4, shots.snr_M):
            # Its memory belongs to the other stream, which must not reuse it too early.
            tensor.record_stream(stream)
        return shots

    def _on_own_stream(self, index: int) -> tuple[LabelledShots, torch.cuda.Event]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return self._make(index, self._device), self._stream.record_event()


def _no_peaks(shots: LabelledShots) -> tuple[Tensor, Tensor]:
    """Return empty lists of peaks: training asks for labels only, and the shots are turned."""
    return shots.peaks_M4[:0], shots.snr_M[:0]


def _numbers(values: range) -> DataLoader[int]:
    loader: Any = DataLoader(values, batch_size=None)  # type: ignore[arg-type]
    numbers: DataLoader[int] = loader
    return numbers
