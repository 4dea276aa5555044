"""Calls that wait in the queue's process: the actor's own class, in one event loop, without Ray.

Nobody looks at the clock here (the actor's tick is off) and calls wait for minutes, so a call that
is not answered when the queue changes is never answered in time.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peaknet_predict.queues import actor as actor_module
from peaknet_predict.queues.actor import QueueActor
from peaknet_predict.queues.address import QueueAddress
from peaknet_predict.queues.claim_check import OUT_OF_REACH
from peaknet_predict.queues.clock import Ticker
from peaknet_predict.queues.dispatch import Delivery
from peaknet_predict.queues.wire import Opaque
from peaknet_predict.types import Event, EventId
from tests.helpers.examples import thorough

MINUTES = 600.0


def event(idx: int, producer: int = 0) -> Event:
    return Event(EventId("s", producer, idx), np.zeros((1, 1, 4), np.uint8), 9000.0)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., QueueActor]:
    def make(cls: type[QueueActor] = QueueActor, **settings: Any) -> QueueActor:
        actor = cls("events", QueueAddress("q", quarantine=str(tmp_path / "bad"), **settings))
        actor._ticker = Ticker(MINUTES)  # it never looks at the clock by itself
        actor._state._clock = time.monotonic  # nor does it take that for a pause of its own
        return actor

    return make


def run(test: Coroutine[Any, Any, None], within_s: float = 30.0) -> None:
    asyncio.run(asyncio.wait_for(test, within_s))


class Client:
    """Asks as a process does: every request has a number of its own, unless it is repeated."""

    def __init__(self, actor: QueueActor, holder: str, reader: str = "r") -> None:
        self.actor, self.holder, self.reader = actor, holder, reader
        self.request = 0

    async def get(
        self, most: int = 1, timeout_s: float = MINUTES, repeat: bool = False
    ) -> Delivery:
        self.request += not repeat
        call = (self.reader, self.holder, self.request, False, most, timeout_s)
        fields, _, _ = await self.actor.get_many(call)
        return Delivery(*fields)


async def put(actor: QueueActor, *numbers: int, timeout_s: float = MINUTES) -> int:
    return (await actor.put_many(("p", [event(idx) for idx in numbers], timeout_s)))[0]


async def waiting(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start a call and see that it waits."""
    task = asyncio.create_task(call)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def numbers(delivery: Delivery) -> list[int]:
    return [record.id.idx for record in delivery.records]


def test_readers_are_answered_in_their_order_with_one_look_each(
    make: Callable[..., QueueActor],
) -> None:
    async def test() -> None:
        actor = make()
        await actor.open("p", 1)
        looks = 0
        take = actor._state.take

        def counted(*args: Any) -> Delivery:
            nonlocal looks
            looks += 1
            return take(*args)

        actor._state.take = counted  # type: ignore[method-assign, assignment]
        calls = [await waiting(Client(actor, f"h{k}").get()) for k in range(50)]
        for idx in range(50):
            await put(actor, idx)
            assert numbers(await calls[idx]) == [idx]
        assert looks == 50

    run(test())


def test_records_whose_pixels_are_out_of_reach_are_not_taken(
    make: Callable[..., QueueActor],
) -> None:
    """Their producer, which is told so, writes the pixels anew."""

    async def test() -> None:
        actor = make()
        await actor.open("p", 1)
        call = ("p", [event(0)], MINUTES)
        elsewhere: Any = ([{"image": (0, 0)}], ["a lot"])
        lost = Opaque("its owner has died")  # what comes in place of a lot that Ray cannot map
        assert await actor.put_many(call, elsewhere, lost) == (0, OUT_OF_REACH)
        assert await actor.put_many(call, elsewhere, [event(0).image]) == (1, None)

    run(test())


def test_whatever_a_call_waits_for_answers_it(make: Callable[..., QueueActor]) -> None:
    async def test() -> None:
        actor = make(max_events=2)
        await actor.open("p", 1)
        a, b = Client(actor, "a"), Client(actor, "b")
        producer = await waiting(put(actor, 0, 1, 2, 3, 4))
        assert numbers(await a.get(2)) == [0, 1]
        last = await a.get(2)
        assert await producer == 5
        assert numbers(last) == [2, 3]
        assert numbers(await b.get(9)) == [4]
        call = await waiting(b.get(9))
        await actor.release(last.tokens, None)
        back = await call
        assert numbers(back) == [2, 3]
        call = await waiting(a.get())
        await actor.close("p", None, 1)
        assert (await call).flush, "a holds two, and others may be lost"
        await actor.ack(last.tokens)
        await actor.reject(dict.fromkeys(back.tokens[:1], "bad"))
        calls = [await waiting(Client(actor, who).get()) for who in "cd"]
        for client in ("a", "b"):
            held = list(actor._state.leases._holders[client].tokens)
            await actor.ack(held)
        assert all([(await call).ended for call in calls])

    run(test())


def test_programs_of_three_methods_and_silence_answer_too(make: Callable[..., QueueActor]) -> None:
    async def test() -> None:
        actor = make(max_events=1, lease_s=0.1, producer_timeout_s=0.3)
        await actor.open("p", 1)
        await put(actor, 0)
        producer = await waiting(put(actor, 1))
        assert (await actor.get())[1] == 0
        assert await producer == 1
        lost = await Client(actor, "a").get()
        call = await waiting(Client(actor, "b").get(9))
        await asyncio.sleep(0.2)
        assert await actor.held(lost.tokens) == []
        assert numbers(await call) == [1]
        call = await waiting(Client(actor, "c").get())
        assert await actor.put([0, 7, np.zeros((1, 2, 2)), 9000.0])
        assert (await call).records[0].id.idx == 7
        await asyncio.sleep(0.2)
        await asyncio.sleep(0.2)
        assert (await actor.statistics()).failures.keys() == {"p"}

    run(test())


def test_poison_goes_to_a_reader_that_holds_nothing_and_the_others_are_told(
    make: Callable[..., QueueActor],
) -> None:
    async def test() -> None:
        actor = make()
        await actor.open("p", 1)
        await put(actor, 0, 1)
        for who in "xy":
            await actor.release((await Client(actor, who).get()).tokens, "it raised")
        holding, free = Client(actor, "a"), Client(actor, "b")
        poison = await free.get()
        assert numbers(poison) == [0]
        assert numbers(await holding.get()) == [1]
        calls = [await waiting(client.get()) for client in (holding, Client(actor, "c"))]
        await actor.release(poison.tokens, None)
        assert (await calls[0]).flush
        assert not (await calls[0]).tokens
        assert numbers(await calls[1]) == [0]

    run(test())


def test_a_cancelled_call_takes_nothing_along(make: Callable[..., QueueActor]) -> None:
    async def test() -> None:
        actor = make()
        await actor.open("p", 1)
        calls = [await waiting(Client(actor, f"h{k}").get(1)) for k in range(4)]
        calls[0].cancel()  # it still stands in the line
        await put(actor, 0)
        assert numbers(await calls[1]) == [0]
        await put(actor, 1)  # which answers the next call, but that is cancelled before it hears
        calls[2].cancel()
        assert numbers(await calls[3]) == [1]
        assert calls[0].cancelled()
        assert calls[2].cancelled()
        assert (await actor.statistics()).leased == 2

    run(test())


def test_a_repeated_request_takes_its_own_place(make: Callable[..., QueueActor]) -> None:
    async def test() -> None:
        actor = make()
        await actor.open("p", 1)
        client = Client(actor, "a")
        unheard = await waiting(client.get())
        again = await waiting(client.get(repeat=True))
        assert not (await unheard).tokens
        await put(actor, 0)
        first = await again
        assert numbers(first) == [0]
        assert (await client.get(repeat=True)).tokens == first.tokens

    run(test())


def test_a_call_that_cannot_be_answered_hears_why_and_the_others_go_on(
    make: Callable[..., QueueActor],
) -> None:
    async def test() -> None:
        actor = make(max_events=1)
        await actor.open("p", 2)
        await actor.open("q", 2)
        await put(actor, 0)
        closed = await waiting(put(actor, 1))
        other = await waiting(actor.put_many(("q", [event(2)], MINUTES)))
        await actor.close("p", None, 1)
        client = Client(actor, "a")
        assert numbers(await client.get()) == [0]
        with pytest.raises(ValueError, match="its part is closed"):
            await closed
        assert (await other)[0] == 1
        with pytest.raises(ValueError, match="its part is closed"):
            await put(actor, 3)  # full, but there is nothing to wait for

    run(test())


def test_time_runs_out(make: Callable[..., QueueActor]) -> None:
    async def test() -> None:
        actor = make(max_events=1)
        await actor.open("p", 1)
        started = time.monotonic()
        client = Client(actor, "a")
        assert not (await client.get(timeout_s=0.1)).tokens
        await put(actor, 0)
        assert await put(actor, 1, timeout_s=0.1) == 0
        assert 0.2 <= time.monotonic() - started < 3
        # Nothing of them is left: what comes now is for others.
        assert numbers(await Client(actor, "b").get()) == [0]

    run(test())


def test_what_comes_in_quick_succession_goes_out_together(
    make: Callable[..., QueueActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr(actor_module, "LINGER_S", 0.2)
        actor = make(max_events=5)
        await actor.open("p", 1)
        client = Client(actor, "a")
        call = await waiting(client.get(4))
        await put(actor, 0)
        assert numbers(await call) == [0], "the first at once"
        call = await waiting(client.get(4))
        started = time.monotonic()
        await put(actor, 1)
        await put(actor, 2)
        assert numbers(await call) == [1, 2]
        assert 0.1 < time.monotonic() - started < 2
        await put(actor, *range(3, 7))
        assert numbers(await client.get(4)) == [3, 4, 5, 6], "as many as were asked for: at once"
        await put(actor, 7)
        assert numbers(await client.get(4, timeout_s=0.01)) == [7], "in the reader's time"
        await put(actor, *range(8, 13))
        assert numbers(await client.get(9)) == [8, 9, 10, 11, 12], "full: at once"
        await put(actor, 13)
        call = await waiting(client.get(4))
        await actor.close("p", None, 1)
        assert numbers(await call) == [13], "nothing more comes: at once"

    run(test())


class Crowd:
    """Many producers and readers that do everything a client may do, at random.

    The patient ones neither give up nor call for nothing, and the queue never rests, so that who is
    forgotten stays so. Among the others there is always somebody whose calls set things going
    again: they are looked over after every step.
    """

    def __init__(self, actor: QueueActor, seed: int, patient: bool) -> None:
        self.actor = actor
        self.patient = patient
        self.random = random.Random(seed)
        self.acked: Counter[EventId] = Counter()
        self.producers, self.readers, self.events = 5, 7, 60
        self.names = {f"h{k}": self.random.choice(["r", f"r{k}"]) for k in range(self.readers)}

    async def work(self) -> None:
        for k in range(self.producers):
            await self.actor.open(f"p{k}", self.producers)
        async with asyncio.TaskGroup() as group:
            for k in range(self.producers):
                group.create_task(self.produce(k))
            for k in range(self.readers):
                group.create_task(self.read(k))

    def look_over(self) -> None:
        """Nobody waits for what is there."""
        if self.patient:
            return
        actor, state = self.actor, self.actor._state
        producers, readers = (
            [key for key, call in line._calls.items() if not call.future.done()]
            for line in (actor._producers, actor._readers)
        )
        assert not producers or state.ready.full
        assert not readers or not len(state) or actor._linger._alarm is not None
        if state.streams.ended:
            for key in readers:
                assert isinstance(key, tuple)
                holder, request = key
                reader = self.names[holder]
                answer = copy.deepcopy(state).take(reader, holder, request, 1)
                assert (answer.tokens, answer.ended, answer.flush) == ([], False, False)

    async def pause(self) -> None:
        self.look_over()
        for _ in range(self.random.choice([0, 0, 1, 2, 5])):
            await asyncio.sleep(0)
        # The patient ones wait for nothing but each other: so each seed is one order of events.
        if not self.patient and self.random.random() < 0.05:
            await asyncio.sleep(self.random.random() * 0.01)

    async def often_cancelled(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Return the answer, or None for a call that was cancelled or had too little time."""
        task = asyncio.create_task(call)
        if not self.patient and self.random.random() < 0.2:
            await self.pause()
            task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    def time(self) -> float:
        return MINUTES if self.patient else self.random.choice([MINUTES, MINUTES, 0.0, 0.001])

    async def produce(self, k: int) -> None:
        left = [event(idx, k) for idx in range(self.events)]
        while left:
            lot = left[: self.random.randint(1, 6)]
            answer = await self.often_cancelled(self.actor.put_many((f"p{k}", lot, self.time())))
            if answer is not None:
                left = left[answer[0] :]
            await self.pause()
        await self.actor.close(f"p{k}", None, 1)
        self.look_over()

    async def read(self, k: int) -> None:
        client = Client(self.actor, f"h{k}", self.names[f"h{k}"])
        held: dict[int, EventId] = {}
        repeat = False
        while True:
            delivery = await self.often_cancelled(
                client.get(self.random.randint(1, 6), self.time(), repeat)
            )
            # A client whose call had no answer makes it again.
            repeat = delivery is None
            if delivery is None:
                continue
            for token, record in zip(delivery.tokens, delivery.records, strict=True):
                assert record.id is not None
                held[token] = record.id
            if delivery.ended:
                assert not held
                return
            await self.pause()
            if delivery.flush or len(held) > 4:
                await self.finish(held)

    async def finish(self, held: dict[int, EventId]) -> None:
        tokens, what = list(held), self.random.random()
        if what < 0.1:
            await self.actor.release(tokens, None)
        elif what < 0.2:
            await self.actor.release(tokens, "it raised")
        else:
            stale = await self.actor.ack(tokens)
            self.acked.update(held[token] for token in tokens if token not in stale)
        held.clear()
        self.look_over()


def stress(
    make: Callable[..., QueueActor], seed: int, patient: bool, cls: type[QueueActor] = QueueActor
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if patient:
            patch.setattr(actor_module, "LINGER_S", 0.0)
        actor = make(cls, max_events=(1, 3, 40)[seed % 3], max_losses=1000)
    crowd = Crowd(actor, seed, patient)
    run(crowd.work(), within_s=20 if cls is QueueActor else 1)
    assert set(crowd.acked.values()) == {1}
    assert len(crowd.acked) == crowd.producers * crowd.events


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2, *thorough(*range(3, 12))])
def test_nobody_is_forgotten_in_a_crowd(
    make: Callable[..., QueueActor], seed: int, patient: bool
) -> None:
    stress(make, seed, patient)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "patient"),
    [
        *((change, False) for change in ("put", "take", "release", "ack", "close")),
        ("close", True),  # of all others, the next change makes up for it
    ],
)
def test_the_crowd_notices_who_is_forgotten(
    make: Callable[..., QueueActor], change: str, patient: bool
) -> None:
    class Forgetful(QueueActor):
        """Answers nobody who waited for one kind of change."""

        forgets = False

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            act = getattr(self._state, change)

            def noted(*args: Any) -> Any:
                self.forgets = True
                return act(*args)

            setattr(self._state, change, noted)

        def _serve(self) -> None:
            if not self.forgets:
                super()._serve()
            self.forgets = False

    def crowds() -> None:
        for seed in range(12):
            stress(make, seed, patient, Forgetful)

    with pytest.raises((TimeoutError, ExceptionGroup)):  # stuck, or seen by one of the crowd
        crowds()
