"""The end of a run: ranks in any order, failing, killed, paused and slow, on a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.callbacks.sign_off import Ending, SignOff
from peaknet_predict.process.balance import BalanceError, SurvivedError
from peaknet_predict.queues.roster import RosterState
from peaknet_predict.types import Event, EventId, Result
from tests.helpers.examples import examples
from tests.helpers.memory_cluster import MemoryRoster
from tests.helpers.memory_queue import MemoryQueue
from tests.helpers.virtual_time import Task, VirtualTime

LEASE_S = 10.0
NOTHING = np.empty((0, 3))
IMAGE = np.zeros((1, 2, 2), np.float32)

Fate = Literal["lives", "fails", "is killed", "is paused", "miscounts"]


@dataclass(frozen=True)
class Plan:
    """What becomes of a rank: for how long it works on an event, and what happens to it when."""

    work_s: float
    fate: Fate = "lives"
    at_s: float = 0.0


class RunsConsumer:
    """As `CxiOutput`: a process that takes results, belongs to a rank and dies with it."""

    def __init__(self, world: World, rank: int) -> None:
        self._world = world
        self._rank = rank
        self.task: Task | None = None

    def start(self, again: bool = False) -> None:
        name = f"cxi-{self._rank}"
        self.task = self._world.time.start(lambda: self._world.consume(name, again))

    def check(self) -> None:
        pass

    def finish(self, take_over: bool, failed: bool) -> None:
        while self._is_needed(take_over):
            if self.task is None or self.task.ended:
                self.start(again=True)
            self._world.sleep(1.0)

    def _is_needed(self, take_over: bool) -> bool:
        if self.task is not None:
            return not self.task.ended
        now = self._world.results.state.statistics()
        return take_over and not (now.ended and not now.ready and not now.leased)


@dataclass
class World:
    """A run of several ranks between two queues."""

    plans: list[Plan]
    events: int
    ours: tuple[bool, bool] = (True, True)  # the queues of events and of results
    own_consumer: bool = False
    roster_gone_at: float = float("inf")
    endings: dict[int, Ending] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    put_after_end: list[int] = field(default_factory=list)
    told_end: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.time = VirtualTime()
        shared: Any = {
            "clock": self.time.now,
            "sleep": self.sleep,
            "lease_s": LEASE_S,
            "producer_timeout_s": 20.0,
            "look_s": 0.5,
        }
        self.input = MemoryQueue("events", ours=self.ours[0], **shared)
        self.results = MemoryQueue("results", ours=self.ours[1], **shared)
        self.roster = RosterState(len(self.plans), LEASE_S, self.time.now)
        self.places = [MemoryRoster(self.roster, rank, tuple) for rank in range(len(self.plans))]
        self.queues = [(self.input.connect(), self.results.connect()) for _ in self.plans]
        self.consumers = [RunsConsumer(self, rank) for rank in range(len(self.plans))]
        self.tasks: list[Task] = []

    def run(self) -> bool:
        """Run all to the end; False if anybody waits for ever."""
        feeder = self.input.connect().producer
        feeder.open("feed")
        names = [EventId("s", 0, idx) for idx in range(self.events)]
        feeder.put("feed", [Event(name, IMAGE, 9e3) for name in names])
        feeder.close("feed")
        for rank in range(len(self.plans)):
            self.tasks.append(self.time.start(partial(self.rank, rank)))
        for rank, plan in enumerate(self.plans):
            if plan.fate in ("is killed", "is paused"):
                self.time.start(partial(self.strike, rank), at=plan.at_s)
        if self.roster_gone_at < float("inf"):
            self.time.start(self.lose_roster, at=self.roster_gone_at)
        if not self.own_consumer and self.ours[1]:
            self.time.start(lambda: self.consume("write-cxi"))
        return self.time.run(until=3_000.0)

    def rank(self, rank: int) -> None:
        plan, (events, results) = self.plans[rank], self.queues[rank]
        sign_off = SignOff(
            results,
            self.places[rank] if len(self.plans) > 1 else None,
            "run:",
            f"run:rank{rank}",
            rank,
            len(self.plans),
            num_consumers=2,
            clock=self.time.now,
            sleep=self.sleep,
        )
        sign_off.begin()
        if self.own_consumer:
            sign_off.consumer = self.consumers[rank]
            if rank == 0:
                self.consumers[0].start()
        problem, ended = None, False
        while not ended and problem is None:
            taken, ended = events.reader.get("predict", 2, 1.0)
            self.sleep(plan.work_s * len(taken))
            if plan.fate == "fails" and not ended and self.time.now() >= plan.at_s:
                problem = "RuntimeError: out of memory"
                events.reader.release(problem)
                break
            made = [Result(one.id, IMAGE, NOTHING, 9e3) for one in taken if isinstance(one, Event)]
            results.producer.put(f"run:rank{rank}", made)
            if not self.ours[1]:
                names = [result.id.idx for result in made]
                self.written += names
                self.put_after_end += names if self.results.end_items else []
            events.reader.ack([result.id for result in made])
        if plan.fate == "miscounts":
            problem = problem or "received 3 events, but predicted 2"
        input_ended = self.ours[0] and ended
        self.endings[rank] = sign_off.end(problem, input_ended)

    def sleep(self, seconds: float) -> None:
        """Sleep; a rank's threads say now and then that it is alive."""
        if self.time.current not in self.tasks:
            self.time.sleep(seconds)
            return
        rank = self.tasks.index(self.time.current)
        until = self.time.now() + seconds
        while (left := until - self.time.now()) > 0:
            self.time.sleep(min(left, LEASE_S / 4))
            self.queues[rank][0].reader.touch()
            self.results.step(lambda state: state.heartbeat("", [f"run:rank{rank}"]))
            if len(self.plans) > 1 and rank not in self.endings and self.places[rank].reachable:
                self.places[rank].report()

    def left(self) -> list[int]:
        """Return what is still in the queue of results."""
        if not self.ours[1]:
            return []
        left = set(range(self.events)) - set(self.written)
        keys = self.results.state.keys
        return sorted(idx for idx in left if EventId("s", 0, idx) in keys)

    def strike(self, rank: int) -> None:
        own = [self.tasks[rank], self.consumers[rank].task]
        if self.plans[rank].fate == "is paused":
            # Its consumer is another process, which goes on.
            self.tasks[rank].paused_until = self.time.now() + 5 * LEASE_S
            return
        for task in own:
            if task is not None:
                task.killed = True

    def lose_roster(self) -> None:
        for place in self.places:
            place.reachable = False

    def consume(self, name: str, resumes: bool = False) -> None:
        """Take results until the end; each is written once, as a fence sees to in the files."""
        reader = self.results.connect(resumes).reader
        ended = False
        while not ended:
            taken, ended = reader.get(name, 3, 1.0)
            self.sleep(0.1)
            ids = [one.id for one in taken if one.id is not None]
            if reader.still_held(ids) != set(ids):
                continue
            self.written += [key.idx for key in ids]
            reader.ack(ids)
        self.told_end[name] = reader.failures


plans = st.builds(
    Plan,
    work_s=st.sampled_from([0.01, 0.3, 2.0, 30.0]),
    fate=st.sampled_from(["lives", "lives", "fails", "is killed", "is paused", "miscounts"]),
    at_s=st.floats(0.0, 60.0),
)


def check_exits(world: World) -> None:
    """Check that each rank exits with what it can know of all of them."""
    fates = {plan.fate for plan in world.plans}
    failed = any(ending.problem is not None for ending in world.endings.values())
    for ending in world.endings.values():
        error = ending.error
        if ending.problem is not None:
            assert isinstance(error, BalanceError)
        elif world.roster_gone_at < float("inf"):
            assert world.ours[0] or not isinstance(error, SurvivedError)
        elif failed and ("miscounts" in fates or not world.ours[0]):
            # Nobody can make good what is missing.
            assert isinstance(error, BalanceError)
        elif fates == {"lives"}:
            assert error is None
        elif failed:
            assert isinstance(error, SurvivedError)
        else:
            # A rank that was killed when all was done, or paused for a while, need not be missed.
            expected = SurvivedError if world.ours[0] else BalanceError
            assert error is None or isinstance(error, expected)


@examples(250)
@given(
    st.lists(plans, min_size=1, max_size=5),
    st.integers(0, 12),
    st.booleans(),
    st.one_of(st.just(float("inf")), st.floats(0.0, 60.0)),
)
def test_with_queues_of_ours_nothing_is_lost_and_the_stream_ends_once(
    plans: list[Plan], events: int, own_consumer: bool, roster_gone_at: float
) -> None:
    world = World(plans, events, own_consumer=own_consumer, roster_gone_at=roster_gone_at)
    assert world.run(), "somebody waits for ever"
    for rank, plan in enumerate(plans):
        assert plan.fate == "is killed" or rank in world.endings
    check_exits(world)
    fates = {plan.fate for plan in plans}
    if any(ending.problem is None for ending in world.endings.values()):
        assert world.input.state.streams.drained
        assert sorted([*world.written, *world.left()]) == list(range(events))
    if "lives" in fates:
        # Otherwise all were silent for a while, so that the stream was taken for ended.
        assert not world.left()
        assert "miscounts" in fates or not any(world.told_end.values())


@pytest.mark.parametrize("lower", ["is killed", "fails", "lives"])
def test_a_rank_that_fails_leaves_the_end_to_a_lower_one_only_if_that_is_alive(lower: Any) -> None:
    world = World([Plan(2.0, lower, 3.0), Plan(2.0, "fails", 3.5)], 12, ours=(True, False))
    assert world.run(), "somebody waits for ever"
    assert world.results.end_items == ["END"] * 2
    assert isinstance(world.endings[1].error, BalanceError)


def test_a_run_that_takes_the_place_of_one_whose_ranks_were_all_killed_puts_the_end() -> None:
    world = World([Plan(2.0, "is killed", 3.0)] * 2, 12, ours=(True, False))
    assert world.run()
    assert (world.results.end_items, world.endings) == ([], {})
    world.plans = [Plan(2.0)]
    world.queues = [(world.input.connect(resumes=True), world.results.connect())]
    world.tasks = [world.time.start(lambda: world.rank(0))]
    assert world.time.run(until=6_000.0), "somebody waits for ever"
    assert world.results.end_items == ["END"] * 2
    assert sorted(set(world.written)) == list(range(12))


@examples(250)
@given(st.lists(plans, min_size=1, max_size=5), st.integers(0, 12), st.booleans())
def test_a_results_queue_with_one_end_for_all_gets_it_once_and_last(
    plans: list[Plan], events: int, leases: bool
) -> None:
    world = World(plans, events, ours=(leases, False))
    assert world.run(), "somebody waits for ever"
    check_exits(world)
    whole = [rank for rank, ending in world.endings.items() if ending.problem is None]
    if whole or 0 in world.endings:
        assert world.results.end_items == ["END"] * 2
        # A rank that comes back after it was taken for lost may be late.
        assert world.put_after_end == [] or any(plan.fate == "is paused" for plan in plans)
    else:
        assert world.results.end_items in ([], ["END"] * 2)
    if whole and leases:
        assert sorted(set(world.written)) == list(range(events))
