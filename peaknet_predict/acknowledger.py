"""Acknowledges events in a prediction whose results go to no next stage."""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

import lightning as L

from peaknet_predict.dataset import QueueDataset
from peaknet_predict.first_refusals import BlamelessError
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.queues import QueueError
from peaknet_predict.types import EventBatch, PeakBatch

log = logging.getLogger(__name__)


class Handle(Protocol):
    """What `predict_step` returns: results that may not be there yet."""

    def done(self) -> bool:
        """Whether `result` returns without waiting."""

    def result(self) -> PeakBatch:
        """Return what became of a batch's events."""


class Acknowledger(L.Callback):
    """Acknowledges events once their results have been fetched, where no `QueueWriter` does.

    `Trainer.predict`, called from Python, can so read a queue to its end. If it returns the
    predictions, their results have peaks, but neither pixels nor masks: a stream has no end, and
    memory has one.

    Parameters
    ----------
    dataset
        Where the events come from.
    """

    def __init__(self, dataset: QueueDataset) -> None:
        self._dataset = dataset
        self._under_way: deque[Handle] = deque()
        self._predicted = 0
        self._refused = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say who acknowledges."""
        if self._acts:
            log.info(
                "no QueueWriter takes the results on: each event is acknowledged when its peaks "
                "have been found, and its result is with this process alone"
            )

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Handle,
        batch: EventBatch,
        *args: object,
    ) -> None:
        """Fetch what is finished; all of it when the queue waits for what is held."""
        if not self._acts:
            return
        self._under_way.append(outputs)
        reminded = not batch.events and not batch.refused
        while self._under_way and (reminded or self._under_way[0].done()):
            self._fetch(trainer)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fetch the rest, and give back what is left.

        Raises
        ------
        BalanceError
            If the stream has not been read whole; not where the Trainer limits the batches.
        """
        if not self._acts:
            return
        while self._under_way:
            self._fetch(trainer)
        dataset = self._dataset
        problem = dataset.problem()
        left = dataset.received - self._predicted - self._refused
        dataset.release()
        log.info(
            "received %d = predicted %d + refused %d%s",
            dataset.received,
            self._predicted,
            self._refused,
            f" + given back {left}" if left else "",
        )
        if problem is None:
            return
        if not dataset.ended and not dataset.interrupted:
            log.warning("%s", problem)
            return
        raise BalanceError(problem)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give back what is held; with an error, as events that may have caused it."""
        if not self._acts:
            return
        innocent = isinstance(exception, KeyboardInterrupt | BalanceError | BlamelessError)
        try:
            self._dataset.release(None if innocent else f"{type(exception).__name__}: {exception}")
        except QueueError as error:
            log.error("what is left goes back when its leases end: %s", error)

    @property
    def _acts(self) -> bool:
        return not self._dataset.results_go_on

    def _fetch(self, trainer: L.Trainer) -> None:
        found = self._under_way.popleft().result()
        self._predicted += len(found.results)
        self._refused += len(found.refused)
        for refusal in found.refused:
            log.warning("refused %s", refusal)
        self._dataset.reject(found.refused)
        self._dataset.ack([result.id for result in found.results])
        if trainer.predict_loop.return_predictions:
            for result in found.results:
                result.drop_pixels()
