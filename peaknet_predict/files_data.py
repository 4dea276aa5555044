"""Events from files, without a queue and without Ray: Lightning's data module for a source."""

from __future__ import annotations

import logging
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, IterableDataset

from peaknet_predict.batching import MAX_EVENT_BYTES, Batcher
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.sources import EventSource
from peaknet_predict.types import Event, EventBatch, EventId

log = logging.getLogger(__name__)

HARMLESS_WARNINGS = (
    # That is the point: predict_step moves the pixels without waiting.
    "You have overridden `transfer_batch_to_device`",
    # A thread makes the batches; worker processes would only copy them.
    r"The '\w+_dataloader' does not have many workers",
    # Between Lightning and torch; nothing a user could change.
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Patterns of Lightning's warnings that every prediction with this program causes."""

_BATCHES_AHEAD = 2


class EventBatches(IterableDataset[EventBatch]):
    """Batches of events, made by a thread while the caller works on earlier ones.

    Parameters
    ----------
    events
        Called once for each pass; returns its events.
    make_batcher
        Called once for each pass; returns the batcher that gathers them.

    Attributes
    ----------
    ended
        Whether the latest pass has come to the last event.
    """

    def __init__(
        self, events: Callable[[], Iterable[Event]], make_batcher: Callable[[], Batcher]
    ) -> None:
        self._events = events
        self._make_batcher = make_batcher
        self.ended = False

    def __iter__(self) -> Iterator[EventBatch]:
        """Yield batches until there are no more events; raise what reading raises."""
        self.ended = False
        batches = self._batches()
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:

            def read() -> Future[EventBatch | None]:
                return reader.submit(next, batches, None)

            ahead = deque(read() for _ in range(_BATCHES_AHEAD))
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(read())
                yield batch
        self.ended = True

    def _batches(self) -> Iterator[EventBatch]:
        batcher = self._make_batcher()
        for event in self._events():
            yield from batcher.add([event])
            if batcher.is_full:
                yield batcher.take()
        if not batcher.is_empty:
            yield batcher.take()


class FilesDataModule(L.LightningDataModule):
    """Events of a source for `Trainer.predict`, without a queue and without Ray.

    ::

        trainer.predict(load_model("peaknet_small"), FilesDataModule(Hdf5Source("run42/*.h5")))

    The predictions are handles (`peaknet_predict.in_flight.PendingPeaks`): ``handle.result()`` has
    the ``results`` of a batch and its ``refused`` events. If the Trainer returns the predictions,
    their results have peaks, but neither pixels nor masks, which would fill the memory. A callback
    that needs the pixels takes them in its own ``on_predict_batch_end``.

    Each of several ranks reads its share of the events, a contiguous one.

    Parameters
    ----------
    source
        Where the events come from: `peaknet_predict.sources.Hdf5Source`, say.
    batch_size, partial_sizes
        As for `peaknet_predict.data.QueueDataModule`.
    max_event_bytes
        Larger images are refused.

    Raises
    ------
    ValueError
        If a number makes no sense; at the start of a run, if the source's events cannot be read.
    """

    def __init__(
        self,
        source: EventSource,
        batch_size: int = 8,
        partial_sizes: tuple[int, ...] = (),
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.partial_sizes = partial_sizes
        self.max_event_bytes = max_event_bytes
        self._batcher(pin_memory=False)  # so that a wrong number is an error here
        self._batches: EventBatches | None = None

    def setup(self, stage: str) -> None:
        """Check the source, and divide its events among the ranks."""
        if self.trainer is None:
            raise RuntimeError("a FilesDataModule is set up by the Trainer that runs it")
        for harmless in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=harmless)
        self.source.check()
        trainer = self.trainer
        total, rank, ranks = len(self.source), trainer.global_rank, trainer.world_size
        first, last = rank * total // ranks, (rank + 1) * total // ranks
        # A new name for each run: a queue or a directory that has had these files before would take
        # their events, brought by a QueueWriter, for known ones.
        stream = trainer.strategy.broadcast(f"files-{secrets.token_hex(6)}")
        pin_memory = trainer.strategy.root_device.type == "cuda"

        def events() -> Iterator[Event]:
            for idx, image, photon_energy in islice(self.source.events(first), last - first):
                yield Event(EventId(stream, 0, idx), image, photon_energy)

        self._batches = EventBatches(events, lambda: self._batcher(pin_memory))
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Its hooks come last: a callback of the user's finds the results as they are.
        callbacks[:] = [one for one in callbacks if not isinstance(one, _Balance)]
        callbacks.append(_Balance(self._batches, last - first, self.source))

    def _batcher(self, pin_memory: bool) -> Batcher:
        return Batcher(self.batch_size, self.partial_sizes, pin_memory, self.max_event_bytes)

    def predict_dataloader(self) -> DataLoader[EventBatch]:
        """Return a loader that passes on the finished batches."""
        assert self._batches is not None
        return DataLoader(self._batches, batch_size=None)


class _Balance(L.Callback):
    """Fetches every result, names refused events, and checks that no event is missing.

    Parameters
    ----------
    batches
        The events in batches.
    expected
        How many events this rank is to read.
    source
        Where they come from.
    """

    def __init__(self, batches: EventBatches, expected: int, source: EventSource) -> None:
        self._batches, self._expected, self._source = batches, expected, source
        self._under_way: deque[PendingPeaks] = deque()
        self._read = self._predicted = self._refused = 0
        self._last_refusal = ""

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: PendingPeaks,
        batch: EventBatch,
        *args: object,
    ) -> None:
        """Fetch what is finished."""
        self._read += len(batch.events) + len(batch.refused)
        self._under_way.append(outputs)
        while self._under_way and self._under_way[0].done():
            self._fetch(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fetch the rest, and check that the counts add up.

        Raises
        ------
        BalanceError
            If an event is missing, or if all were refused.
        """
        while self._under_way:
            self._fetch(trainer)
        skipped: Sequence[object] = self._source.skipped
        log.info(
            "read %d = predicted %d + refused %d%s",
            self._read,
            self._predicted,
            self._refused,
            f"; {len(skipped)} files were left out" if skipped else "",
        )
        if self._read != self._predicted + self._refused:
            raise BalanceError(
                f"read {self._read} events, but predicted {self._predicted} and refused "
                f"{self._refused}"
            )
        if self._refused and not self._predicted:
            raise BalanceError(
                f"all {self._refused} events were refused; the last one was {self._last_refusal}"
            )
        if self._read == self._expected:
            return
        if self._batches.ended:
            raise BalanceError(
                f"the source has {self._expected} events, but gave {self._read}: were its files "
                "changed meanwhile?"
            )
        log.warning("the Trainer stopped after %d of %d events", self._read, self._expected)

    def _fetch(self, trainer: L.Trainer) -> None:
        found = self._under_way.popleft().result()
        self._predicted += len(found.results)
        self._refused += len(found.refused)
        for refusal in found.refused:
            self._last_refusal = str(refusal)
            log.warning("refused %s", refusal)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        written = any(isinstance(one, BasePredictionWriter) for one in callbacks)
        if trainer.predict_loop.return_predictions and not written:
            for result in found.results:
                result.drop_pixels()
