from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from peaknet_predict.queues.actor import QueueActor
from peaknet_predict.queues.address import QueueAddress
from peaknet_predict.queues.dispatch import Delivery
from peaknet_predict.queues.group_commit import GroupCommit
from peaknet_predict.queues.native import NativeProducer
from peaknet_predict.queues.records import entry_of
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.transport import ActorCalls
from peaknet_predict.types import Event, EventId
from tests.helpers.failing_disk import FailingDisk


def event(idx: int) -> Event:
    return Event(EventId("s", 0, idx), np.zeros((1, 2, 2), np.uint8), 9000.0)


def test_a_sync_that_fails_confirms_nothing_until_a_new_file_has_it(tmp_path: Path) -> None:
    disk = FailingDisk()
    spool = Spool(tmp_path, fs=disk)
    commit = GroupCommit(spool)

    async def run() -> None:
        spool.put(entry_of(event(0)))
        disk.fails = {"fdatasync"}
        for _ in range(2):
            problem = await commit.wait()
            assert problem is not None
            assert "cannot be synced: [Errno 28] No space left on device" in problem
            assert commit.problem == problem
        disk.fails = set()
        await commit.tidy()
        assert await commit.wait() is commit.problem is None

    first = spool.position[0]
    asyncio.run(run())
    assert spool.position[0] > first
    spool.close()


def test_the_queue_takes_nothing_for_confirmed_that_is_not_on_disk(tmp_path: Path) -> None:
    address = QueueAddress("q", spool=str(tmp_path / "spool"), quarantine=str(tmp_path / "q"))
    disk = FailingDisk()

    async def run() -> None:
        actor = QueueActor("events", address)
        assert actor._spool is not None
        actor._spool._fs = actor._spool._segment._fs = disk
        await actor.open("p", 1)
        disk.fails = {"fdatasync"}
        taken, problem = await actor.put_many(("p", [event(0)], 0.1))
        assert taken == 0
        assert problem is not None
        foreign = asyncio.create_task(actor.put([0, 0, np.zeros((2, 2)), 9000.0]))
        await asyncio.sleep(0.05)
        assert not foreign.done(), "neither taken, nor full, after which it would come again"
        statistics = await actor.statistics()
        assert statistics.problem is not None
        assert "cannot be synced" in statistics.problem
        disk.fails = set()
        assert await actor.put_many(("p", [event(0)], 0.1)) == (1, None)
        assert await foreign
        statistics = await actor.statistics()
        assert (statistics.accepted, statistics.problem) == (2, None)

    asyncio.run(run())


def test_begin_and_end_of_a_stream_are_on_disk_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes a stream, or reads its end, leaves: nobody would do it again."""
    monkeypatch.setattr("peaknet_predict.queues.group_commit._PAUSE_S", 0.01)
    address = QueueAddress("q", spool=str(tmp_path / "spool"), quarantine=str(tmp_path / "q"))
    disk = FailingDisk()

    async def get(actor: QueueActor, request: int) -> Delivery:
        return Delivery(*(await actor.get_many(("r", "holder", request, False, 1, 0.1)))[0])

    async def run() -> None:
        actor = QueueActor("events", address)
        assert actor._spool is not None
        actor._spool._fs = actor._spool._segment._fs = disk
        for call in (actor.open("p", 1), actor.close("p", None, 1)):
            disk.fails = {"fdatasync", "fsync"}
            waits = asyncio.create_task(call)
            await asyncio.sleep(0.05)
            assert not waits.done()
            disk.fails = set()
            await waits
        disk.fails = {"fdatasync", "fsync"}
        assert not (await get(actor, 0)).ended
        disk.fails = set()
        assert (await get(actor, 1)).ended

    asyncio.run(run())
    spool = Spool(shutil.copytree(tmp_path / "spool", tmp_path / "copy"))
    assert spool.replay.books is not None
    assert spool.replay.books["closed"] == ["p"]
    assert spool.replay.books["groups"]["end_seen"]
    spool.close()


def test_a_producer_has_begun_when_that_is_on_disk_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten by a queue that dies, a producer would be told the end of its own stream."""
    monkeypatch.setattr("peaknet_predict.queues.group_commit._PAUSE_S", 0.01)
    monkeypatch.setattr("peaknet_predict.queues.actor._BORDER_S", 0.02)
    address = QueueAddress("q", spool=str(tmp_path / "spool"), quarantine=str(tmp_path / "q"))
    disk = FailingDisk()
    answers: list[str | None] = []

    async def make() -> QueueActor:
        actor = QueueActor("events", address)
        assert actor._spool is not None
        actor._spool._fs = actor._spool._segment._fs = disk
        return actor

    with asyncio.Runner() as runner:
        actor = runner.run(make())
        disk.fails = {"fdatasync", "fsync"}

        def call(method: str, *args: Any) -> str | None:
            assert method == "open"
            if len(answers) == 2:
                disk.fails = set()
            answers.append(runner.run(actor.open(*args)))
            return answers[-1]

        calls = SimpleNamespace(settings=address, call=call)
        NativeProducer(cast(ActorCalls, calls)).open("p", of=1, here=False)
    assert answers[-1] is None
    assert len(answers) == 3
    assert all(answer is not None and "cannot be synced" in answer for answer in answers[:-1])
