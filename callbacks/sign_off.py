"""The end of a run: what every rank does when it has no more to do, and who closes the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from peaknet_predict.callbacks.ledger import Counts
from peaknet_predict.process.balance import BalanceError, SurvivedError
from peaknet_predict.queues import Queue, QueueError
from peaknet_predict.queues.roster import Roll, Standing

log = logging.getLogger(__name__)

_GIVE_UP_S = 600.0  # how long to wait for a rank that is alive but does not close the run
_NOTICE_S = 30.0
_LOOK_S = 0.5


class Meeting(Protocol):
    """Where the ranks of a run meet: a `peaknet_predict.queues.roster.Roster`."""

    latest: Roll | None

    def report(self, **changes: object) -> Roll:
        """Say what has changed with this rank; return where all stand."""


class Consumer(Protocol):
    """Takes the results of this run out of the output queue, as part of the run."""

    def check(self) -> None:
        """Raise if it has failed."""

    def finish(self, take_over: bool, failed: bool) -> None:
        """Wait until it has settled all results that it was sent; raise if it cannot.

        With ``take_over``, this rank is responsible for all results, even another rank's. After a
        run that has ``failed``, the wait is limited.
        """


@dataclass(frozen=True)
class Ending:
    """How a run ended for this rank.

    Attributes
    ----------
    problem
        What is wrong with this rank, or with what it closed.
    other_ranks
        What is wrong with other ranks, as far as this rank knows.
    error
        What to raise; None if every event is accounted for and nobody was lost.
    """

    problem: str | None
    other_ranks: str | None
    error: Exception | None


class SignOff:
    """Ends a run for one of its ranks, whether it has done its work or failed.

    A rank closes its part of the stream of results. If it has seen the end of a leased input, no
    rank has anything under way, so it closes all parts. Then it reports to the roster and stays
    until the run is closed. The lowest rank that is left closes it: it marks the end in a queue
    that has a single end for all producers, and waits for the run's own consumer. A rank that has
    failed leaves at once, unless no lower one is alive: rank 0 may host the cluster.

    Parameters
    ----------
    results
        The output queue.
    roster
        Where the ranks meet; None if there is only one.
    group
        Prefix of the names of this run's producers, and of those of a run that it replaces.
    producer
        This rank's own name.
    rank, world_size
        This rank's number, and the number of ranks.
    num_consumers
        Readers of the output queue that know only ``get``.
    clock, sleep
        A monotonic clock in seconds, and a function that pauses.

    Attributes
    ----------
    consumer
        The run's own consumer of its results, where it has one.
    """

    def __init__(
        self,
        results: Queue,
        roster: Meeting | None,
        group: str,
        producer: str,
        rank: int = 0,
        world_size: int = 1,
        num_consumers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.consumer: Consumer | None = None
        self._results = results
        self._roster = roster
        self._group = group
        self._producer = producer
        self._rank = rank
        self._world_size = world_size
        self._num_consumers = num_consumers
        self._clock = clock
        self._sleep = sleep
        self._standing = Standing.WORKING

    def begin(self) -> None:
        """Sign on: from now on this rank counts as alive, and the stream waits for its end."""
        if self._roster is not None:
            self._roster.report()
        self._results.producer.open(self._producer, of=self._world_size)

    def check_consumer(self) -> None:
        """Raise if the run's own consumer has failed: there would never be room for results."""
        if self.consumer is not None:
            self.consumer.check()

    def counts_of_all(self, own: Counts) -> Counts | None:
        """Return the counts of all ranks, as far as they are known here.

        None where a lower rank is alive, which shows them: one rank does so for all.
        """
        latest = None if self._roster is None else self._roster.latest
        if latest is None:
            return own if self._rank == 0 else None
        if {Standing.WORKING, Standing.DONE} & set(latest.standings[: self._rank]):
            return None
        others = [Counts(*one) for k, one in enumerate(latest.counts) if one and k != self._rank]
        return Counts(*map(sum, zip(own, *others, strict=True)))

    def rank_zero(self) -> Standing:
        """Return whether rank 0 is alive, lost or gone; without the roster it counts as lost."""
        if self._roster is None or self._rank == 0:
            return self._standing
        try:
            return self._roster.report().standings[0]
        except QueueError:
            return Standing.LOST

    def end(self, problem: str | None, input_ended: bool, at_once: bool = False) -> Ending:
        """Leave the run in an orderly way, whatever has happened to this rank.

        It may be called again, ``at_once``, where an earlier call was interrupted.

        Parameters
        ----------
        problem
            What went wrong with this rank.
        input_ended
            Whether it has seen the end of an input that leases its events: then no rank has
            anything under way.
        at_once
            Whether to leave without waiting for anybody or anything.
        """
        errors: list[Exception] = []
        if not self._results.producer.closes_for_all:
            errors += _attempt(lambda: self._close_part(problem, input_ended))
        roll = self._wait_for_turn(problem or _said(errors), input_ended, at_once)
        others = self._other_ranks(roll)
        closes = self._rank == 0 if at_once or roll is None else roll.closer == self._rank
        if closes and self._results.producer.closes_for_all:
            errors += _attempt(lambda: self._close_for_all(problem or others))
        if self.consumer is not None and not at_once:
            finish = self.consumer.finish
            # Without news of the others, each rank is responsible for all; no result is written
            # twice.
            take_over = closes or roll is None
            errors += _attempt(lambda: finish(take_over, failed=problem is not None))
        trouble = problem or _said(errors)
        self._leave(trouble, closes)
        beyond_help = not input_ended or (roll is not None and roll.final)
        error: Exception | None = None
        if errors and problem is None:
            error = errors.pop(0)
        elif problem is not None or (others is not None and beyond_help):
            error = BalanceError(problem or others)
        elif others is not None:
            # What the others left undone came back and has been done.
            error = SurvivedError(f"every event is accounted for, but {others}")
        for unraised in errors:
            log.error("at the end of the run: %s: %s", type(unraised).__name__, unraised)
        return Ending(trouble, others, error)

    def _close_part(self, problem: str | None, input_ended: bool) -> None:
        producer = self._results.producer
        if input_ended:
            # Everything has been pushed, by one rank or another.
            producer.close_group(self._group, problem, self._num_consumers)
        else:
            producer.close(self._producer, problem, self._num_consumers)

    def _close_for_all(self, failure: str | None) -> None:
        self._results.producer.close(self._producer, failure, self._num_consumers)

    def _wait_for_turn(self, failure: str | None, final: bool, at_once: bool) -> Roll | None:
        """Report, and stay until the run is closed or it is this rank's turn to close it."""
        self._standing = Standing.DONE
        if self._roster is None:
            return None
        if at_once:
            self._standing = Standing.GONE
        try:
            roll = self._roster.report(standing=self._standing, failure=failure, final=final)
            if failure is not None and self._is_left_to_others(self._roster, roll, at_once):
                self._standing = Standing.GONE
                return self._roster.report(standing=Standing.GONE)
            return roll if at_once else self._wait(self._roster, roll)
        except QueueError as error:
            log.error("the roster of the ranks cannot be reached: %s", error)
            return None

    def _is_left_to_others(self, roster: Meeting, roll: Roll, at_once: bool) -> bool:
        """Whether a lower rank is alive, which closes the run."""
        reported_at = self._clock()
        while True:
            stays = (Standing.WORKING, Standing.DONE)
            lower = [rank for rank in range(self._rank) if roll.standings[rank] in stays]
            if not lower or at_once or not self._results.producer.closes_for_all:
                return bool(lower)
            # If nobody else can end the queue's stream, an old report is not enough: a lower rank
            # may have been killed a moment ago.
            reported_s = self._clock() - reported_at
            if any(roll.silent_s[rank] < reported_s for rank in lower):
                return True
            self._sleep(_LOOK_S)
            roll = roster.report()

    def _wait(self, roster: Meeting, roll: Roll) -> Roll:
        closer, chosen_at = roll.closer, self._clock()
        notice_at = self._clock()
        while not roll.closed and roll.closer != self._rank:
            now = self._clock()
            if roll.closer != closer:
                closer, chosen_at = roll.closer, now
            if now >= notice_at:
                notice_at = now + _NOTICE_S
                log.info("waiting for rank %s", _waited_for(roll))
            given_up = None
            if closer is not None and now - chosen_at > _GIVE_UP_S:
                chosen_at = now
                # Its consumer may be waiting for disk space, which can take long.
                if not self._results_wait():
                    log.error("gave up waiting for rank %s to close the run", closer)
                    given_up = closer
            self._sleep(_LOOK_S)
            roll = roster.report(given_up=given_up)
        return roll

    def _results_wait(self) -> bool:
        """Whether results are still on their way to a consumer."""
        try:
            now = self._results.admin.statistics()
            return self._results.admin.size() > 0 if now is None else now.ready + now.leased > 0
        except QueueError:
            return False

    def _other_ranks(self, roll: Roll | None) -> str | None:
        """Return what is wrong with the other ranks."""
        if roll is None:
            return None if self._roster is None else "the roster, where the ranks meet, is gone"
        failures = sorted((k, what) for k, what in roll.failures.items() if k != self._rank)
        return "; ".join(f"rank {k}: {what}" for k, what in failures) or None

    def _leave(self, failure: str | None, closed: bool) -> None:
        if self._standing is Standing.GONE or self._roster is None:
            return
        self._standing = Standing.GONE
        try:
            self._roster.report(standing=Standing.GONE, failure=failure, closed=closed)
        except QueueError as error:
            log.error("the other ranks cannot be told the end: %s", error)


def _said(errors: list[Exception]) -> str | None:
    return "; ".join(f"{type(error).__name__}: {error}" for error in errors) or None


def _attempt(act: Callable[[], None]) -> list[Exception]:
    """Return what went wrong instead of raising it: the rest must still happen."""
    try:
        act()
    except Exception as error:
        return [error]
    return []


def _waited_for(roll: Roll) -> str:
    working = [rank for rank, one in enumerate(roll.standings) if one is Standing.WORKING]
    return ", ".join(map(str, working)) or f"{roll.closer} to close the run"
