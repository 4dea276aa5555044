"""What became of the events of one rank: counted, shown in the log, and written down."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peaknet_predict.dataset import QueueDataset
from peaknet_predict.process.balance import path_of_rank, queue_balance, write_balance
from peaknet_predict.queues import Admin, QueueError
from peaknet_predict.sources import SkippedFile
from peaknet_predict.types import Refusal, Result

log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """What one rank has counted, or all of them together."""

    predicted: int
    hits: int
    peaks: int
    refused: int


_REFUSALS_SHOWN = 20  # log lines; more are only counted, or a broken producer would flood the log
_MANY = 32  # events, among which a peak is to be expected
_LATENCIES_KEPT = 10_000


class Ledger:
    """Counts what became of every event that one rank has received in one run.

    Parameters
    ----------
    dataset
        Where the events come from; None where they do not come from a queue.
    output
        The queue of the results.
    rank
        This rank's number.
    min_hit_peaks
        An event with at least this many peaks is a hit.
    path
        File of rank 0's record; the others write theirs beside it. None writes none.
    network
        What the peaks depend on, for the record, see `Provenance.record`; None if unknown.
    skipped
        Files that the run's own source leaves out, for the record.

    Attributes
    ----------
    predicted, refused, hits, peaks
        Counts.
    path
        File of this rank's record; None if there is none.
    """

    def __init__(
        self,
        dataset: QueueDataset | None,
        output: Admin,
        rank: int = 0,
        min_hit_peaks: int = 10,
        path: str | Path | None = None,
        network: dict[str, Any] | None = None,
        skipped: Sequence[SkippedFile] = (),
    ) -> None:
        self.predicted = 0
        self.refused = 0
        self.hits = 0
        self.peaks = 0
        self._dataset = dataset
        self._output = output
        self._rank = rank
        self._min_hit_peaks = min_hit_peaks
        self._network = network
        self._skipped = [asdict(file) for file in skipped]
        self.path = None if path is None else path_of_rank(path, rank)
        self._last_refusal: Refusal | None = None
        # One thread appends to it while another takes percentiles of a copy. Seconds that an
        # event waited in the input queue, and from there to the acceptance of its result.
        self._waited_worked_s: deque[tuple[float, float]] = deque(maxlen=_LATENCIES_KEPT)

    @property
    def received(self) -> int:
        """Items taken from the input."""
        counted = self.predicted + self.refused
        return counted if self._dataset is None else self._dataset.received

    @property
    def counts(self) -> Counts:
        """What has been counted so far."""
        return Counts(self.predicted, self.hits, self.peaks, self.refused)

    @property
    def left(self) -> int:
        """Items that were neither predicted nor refused, and so go back."""
        return self.received - self.predicted - self.refused

    def count(self, results: Sequence[Result], refusals: Sequence[Refusal]) -> None:
        """Count what became of a batch."""
        self.predicted += len(results)
        self.peaks += sum(len(result.peaks) for result in results)
        self.hits += sum(len(result.peaks) >= self._min_hit_peaks for result in results)
        for refusal in refusals:
            self.refused += 1
            self._last_refusal = refusal
            if self.refused <= _REFUSALS_SHOWN:
                log.warning("refused %s", refusal)
            if self.refused == _REFUSALS_SHOWN:
                log.warning("further refusals are counted, but not shown")

    def count_delivered(self, results: Sequence[Result]) -> None:
        """Note when results were accepted by the output queue."""
        now = time.time()
        self._waited_worked_s.extend(
            (max(result.taken_at - result.put_at, 0.0), now - result.taken_at)
            for result in results
            if result.put_at > 0 and result.taken_at > 0
        )

    def latency_ms(self, *percentiles: float) -> list[float]:
        """Return percentiles of the time from an event's put to its result's acceptance.

        They cover the latest events whose time of entry is known; NaN if there are none.
        """
        latencies_s = [sum(both) for both in list(self._waited_worked_s)]
        if not latencies_s:
            return [float("nan")] * len(percentiles)
        return [1000 * float(p) for p in np.percentile(latencies_s, percentiles)]

    def waited_worked_s(self) -> tuple[float, float] | None:
        """Return the medians of what `latency_ms` consists of.

        Seconds that the latest events waited in the input queue, and seconds from there to the
        acceptance of their results; None where there are none.
        """
        both = list(self._waited_worked_s)
        if not both:
            return None
        waited_s, worked_s = np.median(both, axis=0)
        return float(waited_s), float(worked_s)

    def problem(self, world_size: int) -> str | None:
        """Return, at the end of the loop, what does not add up; None if everything does.

        With several ranks, one may get only bad events by chance.
        """
        if self._dataset is None:
            return None
        problem = self._dataset.problem()
        if problem is not None:
            return problem
        if self.left:
            return (
                f"received {self.received} events, but predicted {self.predicted} and refused "
                f"{self.refused}"
            )
        if self.refused and not self.predicted and world_size == 1:
            return f"all {self.refused} events were refused; the last one was {self._last_refusal}"
        return None

    def show(self) -> None:
        """Show in the log what became of the events, and what the queues promise."""
        back = "given back" if self._dataset is not None and self._leases_input else "lost"
        log.info(
            "rank %d: received %d = predicted %d + refused %d%s; %d peaks",
            self._rank,
            self.received,
            self.predicted,
            self.refused,
            f" + {back} {self.left}" if self.left else "",
            self.peaks,
        )
        if self.predicted >= _MANY and not self.peaks:
            log.warning(
                "no peak in any of %d events: do weights, threshold and preprocessing fit them?",
                self.predicted,
            )
        if self._rank > 0:
            return
        for name, queue in self._queues().items():
            level = logging.INFO if queue.leases else logging.WARNING
            log.log(level, "%s queue: %s", name, queue.promise)

    def draft(self) -> dict[str, Any]:
        """Return the record as far as this process knows it without asking a queue."""
        return self._record(
            {name: {"promise": one.promise} for name, one in self._queues().items()}
        )

    def write(self, problem: str | None, other_ranks: str | None) -> None:
        """Write the record as JSON; a queue's lost counts are left out, with the reason.

        Parameters
        ----------
        problem
            What is wrong with this rank's run.
        other_ranks
            What is wrong with other ranks.
        """
        queues = {name: _said_by(one) for name, one in self._queues().items()}
        left_over = _left_over(queues)
        if self._rank == 0:
            log.info("%s", left_over)
        if self.path is None:
            return
        record = self._record(queues)
        record |= {"problem": problem, "other_ranks": other_ranks, "left_over": left_over}
        try:
            write_balance(self.path, record)
        except OSError as error:
            log.error("the balance could not be written to %s: %s", self.path, error)

    def _record(self, queues: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return a record, its stages in the order in which the data flow."""
        counts = {
            "rank": self._rank,
            "received": self.received,
            "predicted": self.predicted,
            "quarantined": self.refused,
            "given_back": self.left,
        }
        stages = queues | {"predict": counts}
        if self._skipped:
            stages["feed"] = {"skipped_files": self._skipped}
        order = ("feed", "input", "predict", "output")
        return {
            "problem": None,
            "other_ranks": None,
            "network": self._network,
            "stages": {one: stages[one] for one in order if one in stages},
        }

    @property
    def _leases_input(self) -> bool:
        return self._dataset is not None and self._dataset.queue.admin.leases

    def _queues(self) -> dict[str, Admin]:
        input = {} if self._dataset is None else {"input": self._dataset.queue.admin}
        return input | {"output": self._output}


def _left_over(queues: dict[str, dict[str, Any]]) -> str:
    """Say what the queues still hold at the end."""
    parts = []
    for name, what in (("input", "events"), ("output", "results")):
        said = queues.get(name, {})
        if waiting := said.get("ready", 0):
            parts.append(f"{waiting} {what} wait in the {name} queue")
        if leased := said.get("leased", 0):
            parts.append(f"readers of the {name} queue are at work on {leased} {what}")
    return "; ".join(parts) or "nothing left over"


def _said_by(queue: Admin) -> dict[str, Any]:
    try:
        return queue_balance(queue)
    except QueueError as error:
        return {"promise": queue.promise, "problem": str(error)}
