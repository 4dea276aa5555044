"""Where the ranks of a run meet at its end: who is at work, who is done, and who closes the run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from peaknet_predict.queues.address import QueueAddress
from peaknet_predict.queues.transport import ActorCalls, Heartbeat

_LINGER_S = 60.0  # how long a roster stays when no rank is left


class Standing(Enum):
    """Where a rank stands; the one answer to whether it is alive."""

    WORKING = "at work"
    """It takes events, or pushes results."""

    DONE = "done"
    """It has pushed its last result, and stays until the run is closed."""

    GONE = "gone"
    """It has left."""

    LOST = "lost"
    """Nothing is heard of it: killed, stopped or cut off."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says about itself. Each report is complete, so losing one does no harm.

    Attributes
    ----------
    rank
        Its number.
    standing
        Any standing except `Standing.LOST`.
    failure
        What went wrong with it.
    final
        Whether the other ranks cannot repair what went wrong.
    closed
        Whether it has closed the run.
    given_up
        A rank that should close the run and does not; it counts as lost until it reports something
        new.
    counts
        What it has counted, in an order of the caller's.
    """

    rank: int
    standing: Standing = Standing.WORKING
    failure: str | None = None
    final: bool = False
    closed: bool = False
    given_up: int | None = None
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Roll:
    """Where all ranks stand.

    Attributes
    ----------
    standings
        Of each rank.
    failures
        Ranks that had a failure, and the failure.
    final
        Whether one of the failures cannot be repaired by other ranks.
    closer
        The rank whose turn it is to close the run; None while ranks are at work, and afterwards.
    closed
        Whether the run has been closed, so that no rank has to stay.
    silent_s
        For how many seconds nothing has been heard of each rank.
    counts
        Of each rank, as it last reported them.
    """

    standings: tuple[Standing, ...]
    failures: dict[int, str] = field(default_factory=dict)
    final: bool = False
    closer: int | None = None
    closed: bool = False
    silent_s: tuple[float, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()


class RosterState:
    """The reports of all ranks, and what follows from them: no Ray, and the clock is given.

    The run is closed when no rank is at work any more, by the lowest rank that is done. If that
    rank is lost, the next one closes it. A lost rank that reports again is no longer lost.

    Parameters
    ----------
    num_ranks
        All of them count from the beginning: one that dies before its first report is lost, too.
    silence_s
        A rank that is silent for longer is lost.
    clock
        Seconds that only go forward.
    """

    def __init__(
        self, num_ranks: int, silence_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._reports = [Report(rank) for rank in range(num_ranks)]
        self._silence_s = silence_s
        self._clock = clock
        self._heard = [clock()] * num_ranks
        self._given_up: set[int] = set()
        self._closer: int | None = None
        self._closed = False

    def report(self, report: Report) -> Roll:
        """Hear a rank, and tell it where all stand."""
        if report != self._reports[report.rank]:
            self._given_up.discard(report.rank)
            if report.given_up is not None:
                self._given_up.add(report.given_up)
        self._reports[report.rank] = report
        self._heard[report.rank] = self._clock()
        self._closed |= report.closed
        return self.roll()

    def roll(self) -> Roll:
        """Say where all ranks stand."""
        standings = tuple(self._standing(report) for report in self._reports)
        failures = {
            report.rank: report.failure
            for report in self._reports
            if report.failure is not None and standings[report.rank] is not Standing.LOST
        }
        for rank, standing in enumerate(standings):
            if standing is Standing.LOST:
                failures[rank] = self._why_lost(rank)
        if self._closer is None or standings[self._closer] is not Standing.DONE:
            done = [rank for rank, one in enumerate(standings) if one is Standing.DONE]
            self._closer = done[0] if done and Standing.WORKING not in standings else None
        final = any(report.final and report.failure is not None for report in self._reports)
        closer = None if self._closed else self._closer
        now = self._clock()
        silent_s = tuple(now - heard for heard in self._heard)
        counts = tuple(report.counts for report in self._reports)
        return Roll(standings, failures, final, closer, self._closed, silent_s, counts)

    def deserted(self) -> bool:
        """Whether no rank is left."""
        return not {Standing.WORKING, Standing.DONE} & set(self.roll().standings)

    def _standing(self, report: Report) -> Standing:
        if report.standing is Standing.GONE:
            return Standing.GONE
        lost = report.rank in self._given_up or self._silent(report.rank)
        return Standing.LOST if lost else report.standing

    def _silent(self, rank: int) -> bool:
        return self._clock() - self._heard[rank] > self._silence_s

    def _why_lost(self, rank: int) -> str:
        if self._silent(rank):
            return f"silent for {self._silence_s:g} s: killed or cut off"
        return "alive, but it did not close the run"


class RosterActor:
    """`RosterState` as an actor, which ends when no rank is left.

    It outlives rank 0, because the others must learn of rank 0's death. If Ray restarts it, it
    knows everything again once each rank has reported.
    """

    def __init__(self, num_ranks: int, silence_s: float, linger_s: float = _LINGER_S) -> None:
        self._linger_s = linger_s
        self._state = RosterState(num_ranks, silence_s)
        self._watch: asyncio.Task[None] | None = None

    async def report(self, report: Report) -> Roll:
        """Hear a rank, and tell it where all stand."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_deserted())
        return self._state.report(report)

    async def _end_when_deserted(self) -> None:
        import ray

        since = time.monotonic()
        while time.monotonic() - since < self._linger_s:
            await asyncio.sleep(1.0)
            if not self._state.deserted():
                since = time.monotonic()
        ray.kill(ray.get_runtime_context().current_actor)


class Roster:
    """One rank's place in the roster.

    A thread repeats its report, so that it counts as alive for as long as it works.

    Parameters
    ----------
    calls
        The roster's actor.
    rank
        This rank's number.
    silence_s
        The silence after which it would be lost.
    stalled
        Says whether the rank is stuck and must not count as alive.
    counts
        Says what the rank has counted so far; goes along with every report.

    Attributes
    ----------
    latest
        What the roster answered last.
    """

    def __init__(
        self,
        calls: ActorCalls,
        rank: int,
        silence_s: float,
        stalled: Callable[[], bool],
        counts: Callable[[], tuple[int, ...]] = tuple,
    ) -> None:
        self.latest: Roll | None = None
        self._calls = calls
        self._stalled = stalled
        self._counts = counts
        self._report = Report(rank)
        self._in_order = threading.Lock()  # an older report must not arrive behind a newer one
        self._heartbeat = Heartbeat(self._beat, silence_s / 4)

    def report(self, **changes: Any) -> Roll:
        """Say what has changed with this rank, in the fields of `Report`; return where all stand.

        Raises
        ------
        QueueError
            If the roster cannot be reached.
        """
        with self._in_order:
            self._report = replace(self._report, **changes)
            self._heartbeat.start()
            return self._send()

    def _beat(self) -> None:
        with self._in_order:
            if self._report.standing is not Standing.GONE and not self._stalled():
                self._send()

    def _send(self) -> Roll:
        self._report = replace(self._report, counts=self._counts())
        roll: Roll = self._calls.call("report", self._report)
        self.latest = roll
        return roll


def connect_roster(
    name: str,
    namespace: str,
    num_ranks: int,
    rank: int,
    silence_s: float,
    stalled: Callable[[], bool],
    counts: Callable[[], tuple[int, ...]] = tuple,
) -> Roster:
    """Find the roster of a run, or make it, in the cluster this process has joined.

    Parameters
    ----------
    name, namespace
        Of the roster's actor; every run has its own name.
    num_ranks, rank
        How many ranks the run has, and which of them this is.
    silence_s
        A rank that is silent for longer is lost.
    stalled, counts
        As for `Roster`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    handle = (
        ray.remote(RosterActor)
        .options(
            name=name,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            # A soft constraint: if this node dies, the roster is made on another one.
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote(num_ranks, silence_s)
    )
    calls = ActorCalls(handle, QueueAddress(name, namespace))
    return Roster(calls, rank, silence_s, stalled, counts)
