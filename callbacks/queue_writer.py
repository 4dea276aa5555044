"""The writer: results of every batch, in order, into the output queue."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from peaknet_predict.callbacks.delivery import Delivery
from peaknet_predict.callbacks.ledger import Ledger
from peaknet_predict.callbacks.outbox import Outbox
from peaknet_predict.callbacks.sign_off import Ending, SignOff
from peaknet_predict.data import QueueDataModule
from peaknet_predict.dataset import QueueDataset
from peaknet_predict.first_refusals import BlamelessError, UnfitStreamError
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.module import PeakNetModule
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.process.files import expanded
from peaknet_predict.process.last_words import LastWords
from peaknet_predict.process.stopping import GRACE_S, StopRequest, stop_requests
from peaknet_predict.queues import ClusterError, Queue, QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.cluster import vital_signs
from peaknet_predict.queues.roster import Roster, connect_roster
from peaknet_predict.types import EventBatch, Result

log = logging.getLogger(__name__)

_NEXT_STEP = "Look at the cluster (`ray status`), and start again with --data.init_args.resume true"


@dataclass
class _Run:
    """The state of one run."""

    dataset: QueueDataset | None
    ledger: Ledger
    delivery: Delivery
    sign_off: SignOff
    last_words: LastWords
    stop: StopRequest = field(default_factory=StopRequest)
    ended: bool = False

    @property
    def input_ended(self) -> bool:
        """Whether the input has ended with nothing under lease any more, on any rank."""
        dataset = self.dataset
        return dataset is not None and dataset.queue.admin.leases and dataset.ended

    @property
    def stalled(self) -> bool:
        """Whether this rank makes no progress with what it holds."""
        return self.dataset is not None and self.dataset.stalled

    @property
    def out_of_time(self) -> bool:
        """Whether a stop was requested and the grace period is over."""
        return self.stop.out_of_time() or (
            self.dataset is not None and self.dataset.stop.out_of_time()
        )


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
        self.balance = None if balance is None else str(expanded(balance))
        self._run: _Run | None = None

    @property
    def ledger(self) -> Ledger:
        """The counts of the latest run."""
        return self._this_run().ledger

    @property
    def sign_off(self) -> SignOff:
        """The end of the latest run."""
        return self._this_run().sign_off

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the output queue; all ranks are producers of one stream."""
        self._run = None
        datamodule: Any = getattr(trainer, "datamodule", None)
        own = datamodule if isinstance(datamodule, QueueDataModule) else None
        dataset = None if own is None else own.dataset
        skipped = () if own is None or own.source is None else own.source.skipped
        rank, world_size = trainer.global_rank, trainer.world_size
        # A run that takes the place of one that was killed can tell that it is: same input queue.
        source = uuid4().hex[:8] if dataset is None else dataset.queue.admin.uid
        group, name = trainer.strategy.broadcast((f"predict:{source}:", uuid4().hex[:8]))
        queue, roster = self._connect_one_by_one(trainer, name)
        producer = f"{group}{name}:rank{rank}"
        network = pl_module.provenance.record() if isinstance(pl_module, PeakNetModule) else None
        ledger = Ledger(
            dataset, queue.admin, rank, self.min_hit_peaks, self.balance, network, skipped
        )
        outbox = Outbox(queue.producer, producer, self._accepted)
        self._run = _Run(
            dataset,
            ledger,
            Delivery(outbox, ledger, dataset, self.accumulation_steps, self._check_waiting),
            SignOff(queue, roster, group, producer, rank, world_size, self.num_consumers),
            LastWords(f"predict (rank {rank})", ledger.path, _NEXT_STEP, vital_signs()),
        )
        self._run.last_words.note(ledger.draft())
        if dataset is not None:
            dataset.results_go_on = True
        self._run.sign_off.begin()

    def _connect_one_by_one(self, trainer: L.Trainer, run: str) -> tuple[Queue, Roster | None]:
        """Connect rank 0 first, which makes missing queues; its failure fails all ranks."""
        connected, problem = None, None
        if trainer.is_global_zero:
            try:
                connected = self._connect(trainer, run)
            except (ClusterError, QueueError) as error:
                problem = error
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem
        return connected or self._connect(trainer, run)

    def _connect(self, trainer: L.Trainer, run: str) -> tuple[Queue, Roster | None]:
        address = self.queue_address
        queue = connect_queue(address, "results")
        if trainer.world_size == 1:
            return queue, None
        roster = connect_roster(
            f"{address.name}.roster.{run}",
            address.namespace,
            trainer.world_size,
            trainer.global_rank,
            address.lease_s,  # a rank that is silent for this long has lost what it held
            stalled=lambda: self._run is not None and self._run.stalled,
            counts=lambda: () if self._run is None else self._run.ledger.counts,
        )
        return queue, roster

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
        run = self._this_run()
        delivery = run.delivery
        try:
            delivery.add(prediction)
            if not batch.events and not batch.refused:
                delivery.push()  # a reminder: a reader waits for these results
            run.last_words.note(run.ledger.draft())
        except StopIteration as error:
            # Lightning takes a StopIteration for the end of the data and reports success.
            raise RuntimeError("a result could not be fetched") from error

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Push the rest, mark the end, and draw up the balance.

        Raises
        ------
        BalanceError
            If an event was received and neither predicted nor refused, if all were refused, or if
            the stream has not been read whole.
        SurvivedError
            If another rank died or failed, and others have done its work.
        """
        run = self._this_run()
        grace_s = GRACE_S if run.dataset is None else run.dataset.grace_s
        with stop_requests(grace_s) as run.stop:
            run.delivery.drain()
        problem = run.ledger.problem(trainer.world_size)
        if run.dataset is not None:
            run.dataset.release()
        ending = self._end(run, problem)
        if ending.error is not None:
            raise ending.error

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Deliver what is finished; tell readers that the stream is incomplete, and why.

        After a second signal nothing more is delivered: what is not acknowledged goes back.
        """
        run = self._run
        if run is None or run.ended:
            return
        at_once = isinstance(exception, KeyboardInterrupt)
        reason = f"{type(exception).__name__}: {exception}"
        if at_once:
            reason = "stopped at once by a second signal"
        else:
            for error in run.delivery.salvage():
                if str(error) != str(exception):
                    log.error("could not be delivered: %s", error)
        if run.dataset is not None:
            # What is left may be what caused it; the queue counts, and isolates it in the end.
            innocent = isinstance(exception, KeyboardInterrupt | BalanceError | BlamelessError)
            try:
                if isinstance(exception, UnfitStreamError) and not run.dataset.queue.admin.leases:
                    # Another program's queue takes nothing back: better there than nowhere.
                    run.dataset.reject(exception.refusals)
                run.dataset.release(None if innocent else reason)
            except QueueError as error:
                log.error("what is left goes back when its leases end: %s", error)
        self._end(run, reason, at_once)

    def _end(self, run: _Run, problem: str | None, at_once: bool = False) -> Ending:
        run.ledger.show()
        ending = Ending(problem, None, None)
        try:
            ending = run.sign_off.end(problem, run.input_ended, at_once)
            run.ended = True
        finally:
            # Even if a second signal interrupts it: then it is called again, at once.
            run.ledger.write(ending.problem, ending.other_ranks)
            run.last_words.done()
        return ending

    def _accepted(self, results: list[Result]) -> None:
        run = self._this_run()
        run.ledger.count_delivered(results)
        if run.dataset is not None:
            run.dataset.ack([result.id for result in results])

    def _check_waiting(self) -> None:
        """Raise if waiting for room in the output queue has become pointless."""
        run = self._this_run()
        run.sign_off.check_consumer()
        if run.dataset is not None:
            run.dataset.touch()
        if run.out_of_time:
            raise BalanceError(
                f"interrupted while the output queue is full: {run.delivery.delivered} results "
                f"were delivered, the others of {run.ledger.predicted} predicted were not"
            )

    def _this_run(self) -> _Run:
        assert self._run is not None, "made in setup"
        return self._run
