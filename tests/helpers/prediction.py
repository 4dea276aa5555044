"""Events, batches, and a Trainer that predicts them without any queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims, Transform
from peaknet_predict.types import Event, EventBatch, EventId, PeakBatch, Refusal


def shot(
    idx: int, spots: list[tuple[int, int, int]], shape: tuple[int, ...] = (2, 32, 40)
) -> Event:
    """Return an event that is 0 but for bright pixels at (panel, y, x)."""
    image = np.zeros(shape, np.float32)
    for panel, y, x in spots:
        image.reshape(-1, *shape[-2:])[panel, y, x] = 100.0
    return Event(EventId("s", 0, idx), image, 9000.0 + idx)


def batch(events: list[Event], size: int, refused: list[Refusal] | None = None) -> EventBatch:
    """Put events of one shape into a batch with room for ``size``."""
    images = torch.zeros((size, *events[0].image.shape)) if events else torch.empty((0, 0, 0, 0))
    for row, event in enumerate(events):
        images[row] = torch.from_numpy(event.image)
    return EventBatch(images, events, refused or [])


def noisy_batches(
    sizes: list[int], batch_size: int, shape: tuple[int, int, int], dtype: str = "float32"
) -> list[EventBatch]:
    """Return batches of so many events each: Poisson noise, 3x3 spots, some NaN."""
    # A fixed seed: the devices' sums differ in the last bits, and in some data a pixel lies so
    # close to the threshold that its class depends on them. The finder's own tests take fresh data.
    random = np.random.default_rng(7)
    batches, idx = [], 0
    for size in sizes:
        events = []
        images = torch.zeros(
            (batch_size, *shape),
            dtype=getattr(torch, dtype),
            pin_memory=torch.cuda.is_available(),
        )
        for row in range(size):
            image = random.poisson(3.0, shape).astype(dtype)
            for _ in range(20):
                panel, y, x = (int(random.integers(0, n)) for n in (shape[0], 1000, 1000))
                y, x = 1 + y % (shape[1] - 2), 1 + x % (shape[2] - 2)
                image[panel, y - 1 : y + 2, x - 1 : x + 2] += 60
            if image.dtype.kind == "f":
                image[0, 0, : row % 4] = np.nan
            images[row] = torch.from_numpy(image)
            events.append(Event(EventId("s", 0, idx), image, 9000.0 + idx))
            idx += 1
        batches.append(EventBatch(images, events, []))
    return batches


def chain(*first: Transform) -> list[Transform]:
    """Return a preprocessing that begins with some transforms."""
    return [*first, InstanceNorm(), MergeBatchChannelDims()]


class Batches(IterableDataset[EventBatch]):
    """A stream of batches, without a length as the real one."""

    def __init__(self, batches: list[EventBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[EventBatch]:
        return iter(self._batches)


class Collect(L.Callback):
    """Keeps the handles that `predict_step` returns."""

    def __init__(self) -> None:
        self.pending: list[PendingPeaks] = []

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.pending.append(outputs)


def run(
    module: PeakNetModule,
    batches: list[EventBatch],
    callbacks: list[L.Callback],
    accelerator: str = "cpu",
    **settings: Any,
) -> None:
    """Run `Trainer.predict` as the command line does."""
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        limit_predict_batches=10**9,
        **settings,
    )
    loader = DataLoader(Batches(batches), batch_size=None)
    trainer.predict(module, loader, return_predictions=False)


def predict(
    module: PeakNetModule,
    batches: list[EventBatch],
    callbacks: list[L.Callback] | None = None,
    **settings: Any,
) -> list[PeakBatch]:
    """Do `run`, and return all results, fetched at the end."""
    collect = Collect()
    run(module, batches, [*(callbacks or []), collect], **settings)
    return [pending.result() for pending in collect.pending]
