"""Results of every batch, in order, on their way into the output queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from peaknet_predict.callbacks.ledger import Ledger
from peaknet_predict.callbacks.outbox import Outbox
from peaknet_predict.dataset import QueueDataset
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.types import Result


class Delivery:
    """Fetches results from handles, counts them, and hands them to the outbox.

    Parameters
    ----------
    outbox
        Puts results into the output queue.
    ledger
        Counts them.
    dataset
        Where the events come from, and where refused ones go back; None without a queue.
    accumulation_steps
        Batches that are put into the queue together.
    check
        Called while there is no room for results; raises if there never will be.
    """

    def __init__(
        self,
        outbox: Outbox,
        ledger: Ledger,
        dataset: QueueDataset | None,
        accumulation_steps: int,
        check: Callable[[], None],
    ) -> None:
        self._outbox = outbox
        self._ledger = ledger
        self._dataset = dataset
        self._accumulation_steps = accumulation_steps
        self._check = check
        self._pending: deque[PendingPeaks] = deque()
        self._results: list[Result] = []
        self._batches_accumulated = 0

    @property
    def delivered(self) -> int:
        """How many results the output queue has accepted."""
        return self._outbox.delivered

    def add(self, pending: PendingPeaks) -> None:
        """Take over a batch's handle, and push what is finished."""
        self._pending.append(pending)
        while self._pending and self._pending[0].done():
            self._collect()

    def push(self) -> None:
        """Push what has been collected without waiting for more batches."""
        if self._results:
            self._outbox.put(self._results, self._check)
        self._results = []
        self._batches_accumulated = 0

    def drain(self) -> None:
        """Wait for every batch, and until its results have been accepted."""
        while self._pending:
            self._collect()
        self.push()
        self._outbox.close(self._check)

    def salvage(self) -> list[Exception]:
        """Deliver what still can be; return what went wrong with the rest."""
        errors: list[Exception] = []
        while self._pending:
            try:
                self._collect()
            except Exception as error:
                errors.append(error)
        try:
            self.drain()
        except Exception as error:
            errors.append(error)
        return errors

    def _collect(self) -> None:
        """Fetch the oldest batch's result; push when enough batches are together."""
        peak_batch = self._pending.popleft().result()
        results, refused = peak_batch.results, peak_batch.refused
        self._results += results
        self._ledger.count(results, refused)
        if refused and self._dataset is not None:
            self._dataset.reject(refused)
        self._batches_accumulated += 1
        if self._batches_accumulated >= self._accumulation_steps:
            self.push()
