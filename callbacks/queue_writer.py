"""The writer: results of every batch, in order, into the output queue."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

from peaknet_predict.callbacks.outbox import Outbox
from peaknet_predict.callbacks.roster import Roster
from peaknet_predict.data import QueueDataModule, QueueDataset
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.process.balance import (
    BalanceError,
    SurvivedError,
    path_of_rank,
    queue_balance,
    write_balance,
)
from peaknet_predict.process.stopping import GRACE_S, StopRequest, stop_requests
from peaknet_predict.queues import (
    Queue,
    QueueAddress,
    QueueError,
    connect_queue,
)
from peaknet_predict.types import EventBatch, EventId, Refusal, Result

log = logging.getLogger(__name__)

_REFUSALS_SHOWN = 20  # one line each; more are only counted, or a broken producer floods the log


class QueueWriter(BasePredictionWriter):
    """Push ``(image, peaks, photon energy)`` of every event into the output queue.

    An event is acknowledged in the input queue once the output queue has its result; what cannot be
    processed goes into the input queue's quarantine.

    Waiting for room in the output queue is the back-pressure of the whole program: while it is
    full, nothing more is taken from the input queue.

    Parameters
    ----------
    queue
        The output queue.
    accumulation_steps
        Batches that are put together.
    num_consumers
        How many readers that know only ``get`` the output queue has: each is handed one end item,
        after the last rank has pushed its last result.
    min_hit_peaks
        An event with at least this many peaks counts as a hit in the log. Nothing is filtered here.
    balance
        File for the record of the run: what became of the events, stage by stage. Ranks above 0
        add their number to the name. None writes none.

    Attributes
    ----------
    predicted, refused, hits, peaks
        Counts of this rank.
    check_consumer
        Called while the output queue is full; to be set by who knows the consumer, raises if there
        is none any more.
    """

    def __init__(
        self,
        queue: QueueAddress,
        accumulation_steps: int = 1,
        num_consumers: int = 1,
        min_hit_peaks: int = 10,
        balance: str | None = "predict_balance.json",
    ) -> None:
        # The epoch interval would make Lightning keep every prediction of an endless stream.
        super().__init__("batch")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps is {accumulation_steps}; give 1 or more")
        if num_consumers < 0:
            raise ValueError(f"num_consumers is {num_consumers}; give 0 or more")
        self.queue_address = queue
        self.accumulation_steps = accumulation_steps
        self.num_consumers = num_consumers
        self.min_hit_peaks = min_hit_peaks
        self.balance = balance
        self.predicted = 0
        self.refused = 0
        self.peaks = 0
        self.hits = 0
        self.check_consumer: Callable[[], None] = lambda: None
        self._pending: deque[PendingPeaks] = deque()
        self._results: list[Result] = []
        self._batches_accumulated = 0
        self._queue: Queue | None = None
        self._outbox: Outbox | None = None
        self._roster: Roster | None = None
        self._producer = self._run = ""
        self._signed_off = False
        self._last_refusal: Refusal | None = None
        self._dataset: QueueDataset | None = None
        self._stop = StopRequest()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the output queue; all ranks are producers of one stream."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        self._dataset = datamodule.dataset if isinstance(datamodule, QueueDataModule) else None
        # A run that takes the place of one that was killed can tell that it is: same input queue.
        source = uuid4().hex[:8] if self._dataset is None else self._dataset.queue.admin.uid
        self._run = f"predict:{trainer.strategy.broadcast(source)}:"
        run = trainer.strategy.broadcast(uuid4().hex[:8])
        producers = [f"{self._run}{run}:rank{rank}" for rank in range(trainer.world_size)]
        self._producer = producers[trainer.global_rank]
        # A rank that is silent for a lease's time has lost what it held.
        roster = (f"{self.queue_address.name}.roster.{run}", producers, trainer.global_rank)
        silence_s = self.queue_address.lease_s
        if trainer.is_global_zero:
            if trainer.world_size > 1:
                self._roster = Roster(*roster, silence_s)
            self._queue = connect_queue(self.queue_address, "results")
        trainer.strategy.barrier("the output queue and the roster exist")
        if not trainer.is_global_zero:
            self._roster = Roster(*roster, silence_s)
            self._queue = connect_queue(self.queue_address, "results")
        assert self._queue is not None
        if self._roster is not None:
            self._roster.sign_on()
        self._queue.producer.open(self._producer, of=trainer.world_size)
        self._outbox = Outbox(self._queue.producer, self._producer, self._acknowledge)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: PendingPeaks,
        batch_indices: Sequence[int] | None,
        batch: EventBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take over the batch's handle and push what is finished, in order."""
        self._pending.append(prediction)
        try:
            while self._pending and self._pending[0].done():
                self._collect()
            if not batch.events and not batch.refused:
                self._push()  # a reminder: somebody waits for what is here
        except StopIteration as error:
            # Lightning takes a StopIteration for the end of the data and reports success.
            raise RuntimeError("a result could not be fetched") from error

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Push the rest, mark the end and strike the balance.

        Raises
        ------
        BalanceError
            If an event was received and neither predicted nor refused, if all were refused, or if
            the stream has not been read whole.
        SurvivedError
            If another rank died or failed, and others have done its work.
        """
        grace_s = GRACE_S if self._dataset is None else self._dataset.grace_s
        with stop_requests(grace_s) as self._stop:
            self._drain()
        problem = self._imbalance(trainer)
        if self._dataset is not None:
            self._dataset.release()
        self._log_balance(trainer)
        elsewhere = self._sign_off(trainer, problem)
        self._signed_off = True
        self._write_balance(trainer, problem, elsewhere)
        if problem is not None:
            raise BalanceError(problem)
        if elsewhere is not None:
            if self._leased_to_its_end:
                # What the others left undone has come back and has been done.
                raise SurvivedError(f"every event is accounted for, but {elsewhere}")
            raise BalanceError(elsewhere)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Deliver what is finished; readers learn that the stream is incomplete and why.

        After a second signal nothing more is delivered: what is not acknowledged goes back.
        """
        if self._outbox is None or self._signed_off:
            return
        reason = f"{type(exception).__name__}: {exception}"
        at_once = isinstance(exception, KeyboardInterrupt)
        if at_once:
            reason = "stopped at once by a second signal"
        else:
            self._deliver_finished()
        if self._dataset is not None:
            # What is left may be what caused it; the queue counts, and isolates it in the end.
            innocent = isinstance(exception, KeyboardInterrupt | BalanceError)
            self._dataset.release(None if innocent else reason)
        self._log_balance(trainer)
        elsewhere = None
        try:
            elsewhere = self._sign_off(trainer, reason, wait_for_ranks=not at_once)
        except Exception:
            log.exception("the end of the stream could not be marked")
        self._write_balance(trainer, reason, elsewhere)

    def _deliver_finished(self) -> None:
        while self._pending:
            try:
                self._collect()
            except Exception as error:
                log.error("a batch could not be processed: %s", error)
        try:
            self._drain()
        except Exception:
            log.exception("results of the last batches could not be delivered")

    def _log_balance(self, trainer: L.Trainer) -> None:
        dataset = self._dataset
        received = self.predicted + self.refused if dataset is None else dataset.received
        rest = received - self.predicted - self.refused
        back = "given back" if dataset is not None and dataset.queue.admin.leases else "lost"
        log.info(
            "rank %d: received %d = predicted %d + refused %d%s; %d peaks",
            trainer.global_rank,
            received,
            self.predicted,
            self.refused,
            f" + {back} {rest}" if rest else "",
            self.peaks,
        )
        if trainer.is_global_zero:
            for name, queue in (
                ("input", None if dataset is None else dataset.queue),
                ("output", self._queue),
            ):
                if queue is not None:
                    log.log(
                        logging.INFO if queue.admin.leases else logging.WARNING,
                        "promise of the %s queue: %s",
                        name,
                        queue.admin.promise,
                    )

    def latency_ms(self, *percentiles: float) -> list[float]:
        """Return percentiles of the latency from put to result, of the latest events."""
        latencies_s = list(self._outbox.latencies_s) if self._outbox is not None else []
        if not latencies_s:
            return [float("nan")] * len(percentiles)
        return [1000 * float(p) for p in np.percentile(latencies_s, percentiles)]

    def _collect(self) -> None:
        """Fetch the oldest batch's result; push when enough batches are together."""
        peak_batch = self._pending.popleft().result()
        results, refused = peak_batch.results, list(peak_batch.refused)
        blind = [result for result in results if result.bad_pixels >= result.image.size]
        if blind:
            results = [result for result in results if result.bad_pixels < result.image.size]
            refused += [Refusal(result.id, "no pixel of the image is finite") for result in blind]
        self._results += results
        self.predicted += len(results)
        self.peaks += sum(len(result.peaks) for result in results)
        self.hits += sum(len(result.peaks) >= self.min_hit_peaks for result in results)
        for refusal in refused:
            self._count_refusal(refusal)
        if refused and self._dataset is not None:
            self._dataset.reject(refused)
        self._batches_accumulated += 1
        if self._batches_accumulated >= self.accumulation_steps:
            self._push()

    def _push(self) -> None:
        assert self._outbox is not None
        if self._results:
            self._outbox.put(self._results, self._check_waiting)
        self._results = []
        self._batches_accumulated = 0

    def _drain(self) -> None:
        assert self._outbox is not None
        while self._pending:
            self._collect()
        self._push()
        self._outbox.close(self._check_waiting)

    def _acknowledge(self, ids: list[EventId]) -> None:
        if self._dataset is not None:
            self._dataset.ack(ids)

    def _check_waiting(self) -> None:
        """Raise if waiting for room in the output queue has become pointless."""
        self.check_consumer()
        dataset = self._dataset
        if dataset is not None:
            dataset.touch()
        if self._stop.out_of_time() or (dataset is not None and dataset.stop.out_of_time()):
            assert self._outbox is not None
            raise BalanceError(
                f"interrupted while the output queue is full: {self._outbox.delivered} results "
                f"were delivered, the others of {self.predicted} predicted were not"
            )

    def _count_refusal(self, refusal: Refusal) -> None:
        self.refused += 1
        self._last_refusal = refusal
        if self.refused <= _REFUSALS_SHOWN:
            log.warning("refused %s", refusal)
        if self.refused == _REFUSALS_SHOWN:
            log.warning("further refusals are counted, but not shown")

    def _imbalance(self, trainer: L.Trainer) -> str | None:
        dataset = self._dataset
        if dataset is None:
            return None
        problem = dataset.problem()
        if problem is not None:
            return problem
        if dataset.received != self.predicted + self.refused:
            return (
                f"received {dataset.received} events, but predicted {self.predicted} and refused "
                f"{self.refused}"
            )
        if self.refused and not self.predicted and trainer.world_size == 1:
            return f"all {self.refused} events were refused; the last one was {self._last_refusal}"
        return None

    @property
    def _leased_to_its_end(self) -> bool:
        """Whether the input has ended with nothing under lease any more, on any rank."""
        dataset = self._dataset
        return dataset is not None and dataset.queue.admin.leases and dataset.ended

    def _sign_off(
        self, trainer: L.Trainer, failure: str | None, wait_for_ranks: bool = True
    ) -> str | None:
        """Close this rank's part; rank 0 leaves last, and marks the end for old-style readers.

        Returns what is wrong with other ranks, as far as this one knows.
        """
        queue = self._queue
        assert queue is not None
        closes_for_all = queue.producer.closes_for_all
        if not closes_for_all:
            if self._leased_to_its_end:
                # All there is to push has been pushed, by whichever rank.
                queue.producer.close_group(self._run, failure, self.num_consumers)
            else:
                queue.producer.close(self._producer, failure, self.num_consumers)
        elsewhere = None
        if self._roster is not None:
            elsewhere = self._roster.sign_off(
                failure, wait_for_ranks, lambda: queue.admin.size() > 0
            )
            if not trainer.is_global_zero and self._leased_to_its_end:
                elsewhere = elsewhere or self._roster.look_at_rank_zero()
        if closes_for_all and trainer.is_global_zero:
            queue.producer.close(self._producer, failure or elsewhere, self.num_consumers)
        return elsewhere

    @property
    def rank_zero_is_gone(self) -> bool:
        """Whether rank 0 died or fell silent before this rank's end."""
        return self._roster is not None and self._roster.rank_zero_is_gone

    def rank_zero_is_lost(self) -> bool:
        """Whether rank 0 has died or fallen silent while this rank, another, is at work."""
        return self._roster is not None and self._roster.rank_zero_is_lost()

    def _write_balance(
        self, trainer: L.Trainer, problem: str | None, elsewhere: str | None
    ) -> None:
        """Write the record of this rank's run, as JSON."""
        if self.balance is None:
            return
        path = path_of_rank(self.balance, trainer.global_rank)
        dataset = self._dataset
        received = self.predicted + self.refused if dataset is None else dataset.received
        stages: dict[str, Any] = {
            "predict": {
                "rank": trainer.global_rank,
                "received": received,
                "predicted": self.predicted,
                "quarantined": self.refused,
                "given_back": received - self.predicted - self.refused,
            }
        }
        try:
            if dataset is not None:
                stages = {"input": queue_balance(dataset.queue.admin), **stages}
            if self._queue is not None:
                stages["output"] = queue_balance(self._queue.admin)
            write_balance(path, {"problem": problem, "other_ranks": elsewhere, "stages": stages})
        except (OSError, QueueError) as error:
            log.error("the balance could not be written to %s: %s", path, error)
