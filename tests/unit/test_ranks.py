"""Several ranks in one process, each in its thread, between queues in memory."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from peaknet_predict.callbacks.cxi_output import CxiOutput
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.data import QueueDataModule
from peaknet_predict.dataset import QueueDataset
from peaknet_predict.process.balance import BalanceError, SurvivedError
from peaknet_predict.queues import QueueAddress, QueueError
from peaknet_predict.types import Event, EventBatch, EventId, PeakBatch, Result
from tests.helpers.chain import written
from tests.helpers.examples import thorough
from tests.helpers.memory_cluster import MemoryCluster, install
from tests.helpers.prediction import shot

EVENTS = 20
LEASE_S = 2.0
PEAK = np.array([[0.0, 3.0, 4.0]])


class Strategy:
    """What ranks of one run have in common."""

    def __init__(self, ranks: int) -> None:
        self._all = threading.Barrier(ranks)
        self._value: Any = None

    def broadcast(self, value: Any, rank: int) -> Any:
        self._all.wait()
        if rank == 0:
            self._value = value
        self._all.wait()
        return self._value


class Finished:
    """A handle to the results of a batch that has been computed."""

    def __init__(self, batch: EventBatch) -> None:
        results = [Result(e.id, e.image, PEAK, e.photon_energy) for e in batch.events]
        self._result = PeakBatch(results, list(batch.refused))

    def done(self) -> bool:
        return True

    def result(self) -> PeakBatch:
        return self._result


class Rank:
    """The callbacks of one rank, called as Lightning does."""

    def __init__(
        self,
        cluster: MemoryCluster,
        strategy: Strategy,
        rank: int,
        ranks: int,
        directory: Path,
        room: int = 8,
    ) -> None:
        self.error: BaseException | None = None
        self.writer = QueueWriter(
            QueueAddress("out", lease_s=LEASE_S, producer_timeout_s=LEASE_S, max_events=room),
            balance=str(directory / "balance.json"),
        )
        self.files = CxiOutput(str(directory / "cxi"), events_per_file=4)
        data = QueueDataModule(QueueAddress("in"))
        queue = cluster.connect_queue(QueueAddress("in", lease_s=LEASE_S), "events")
        self.dataset = data.dataset = QueueDataset(queue, "predict", batch_size=2)
        self.trainer: Any = SimpleNamespace(
            global_rank=rank,
            world_size=ranks,
            is_global_zero=rank == 0,
            strategy=SimpleNamespace(broadcast=lambda value: strategy.broadcast(value, rank)),
            callbacks=[self.writer, self.files],
            datamodule=data,
        )
        self.module: Any = None

    def set_up(self) -> None:
        for callback in (self.writer, self.files):
            callback.setup(self.trainer, self.module, "predict")

    def run(self, fails_after: int | None = None, dies_after: int | None = None) -> None:
        """Predict to the end, or fail or vanish after so many batches."""
        try:
            for k, batch in enumerate(self.dataset):
                if k == dies_after:
                    return
                if k == fails_after:
                    raise RuntimeError("boom")
                handle: Any = Finished(batch)
                self.writer.write_on_batch_end(self.trainer, self.module, handle, None, batch, k, 0)
                self.files.on_predict_batch_end(self.trainer)
            self.writer.on_predict_end(self.trainer, self.module)
        except BaseException as error:
            self.error = error
            self.writer.on_exception(self.trainer, self.module, error)


class Ranks:
    def __init__(
        self, cluster: MemoryCluster, directory: Path, ranks: int = 2, room: int = 8
    ) -> None:
        strategy = Strategy(ranks)
        self.directory = directory
        self.ranks = [
            Rank(cluster, strategy, rank, ranks, directory, room) for rank in range(ranks)
        ]
        self._in_threads([rank.set_up for rank in self.ranks])

    def run(self, **of_one: dict[str, int]) -> list[BaseException | None]:
        """Run all; ``rank0`` and so on say what happens to one of them."""
        self._in_threads(
            [partial(rank.run, **of_one.get(f"rank{k}", {})) for k, rank in enumerate(self.ranks)]
        )
        return [rank.error for rank in self.ranks]

    def record(self, rank: int) -> Any:
        name = f"balance.rank{rank}.json" if rank else "balance.json"
        return json.loads((self.directory / name).read_text())

    def _in_threads(self, acts: list[Any]) -> None:
        threads = [threading.Thread(target=act, daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600.0)
            assert not thread.is_alive(), "it waits for ever"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> MemoryCluster:
    cluster = install(monkeypatch)
    producer = cluster.connect_queue(QueueAddress("in", lease_s=LEASE_S), "events").producer
    producer.open("feed")
    events = [shot(idx, [(0, 3, 4)], (1, 32, 32)) for idx in range(EVENTS)]
    producer.put("feed", [Event(EventId("s", 0, e.id.idx), e.image, 9e3) for e in events])
    producer.close("feed")
    return cluster


def test_two_ranks_share_the_work_and_both_know_that_all_is_well(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    ranks = Ranks(cluster, tmp_path)
    assert ranks.run() == [None, None]
    assert written(tmp_path / "cxi") == list(range(EVENTS))
    records = [ranks.record(0), ranks.record(1)]
    assert sum(one["stages"]["predict"]["predicted"] for one in records) == EVENTS
    assert all(one["problem"] is None and one["other_ranks"] is None for one in records)


def test_a_rank_that_fails_leaves_its_work_to_the_other(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    ranks = Ranks(cluster, tmp_path)
    other, failed = ranks.run(rank1={"fails_after": 1})
    assert isinstance(failed, RuntimeError)
    assert isinstance(other, SurvivedError)
    assert "rank 1: RuntimeError: boom" in str(other)
    assert written(tmp_path / "cxi") == list(range(EVENTS))
    assert ranks.record(0)["other_ranks"] == "rank 1: RuntimeError: boom"
    assert ranks.record(1)["problem"] == "RuntimeError: boom"


def test_when_rank_0_fails_its_files_are_complete_all_the_same(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    ranks = Ranks(cluster, tmp_path)
    failed, other = ranks.run(rank0={"fails_after": 1})
    assert isinstance(failed, RuntimeError)
    assert isinstance(other, SurvivedError)
    assert written(tmp_path / "cxi") == list(range(EVENTS))


@pytest.mark.parametrize("room", [8, *thorough(100)])
def test_when_rank_0_vanishes_with_its_file_writer_another_rank_writes_the_files(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture, room: int
) -> None:
    cluster.lost = 1  # rank 0's writer of files, before it has taken anything
    ranks = Ranks(cluster, tmp_path, room=room)
    _, other = ranks.run(rank0={"dies_after": 0})
    assert isinstance(other, SurvivedError)
    assert "rank 0: silent for 2 s: killed or cut off" in str(other)
    assert written(tmp_path / "cxi") == list(range(EVENTS))
    assert "this rank writes them" in said.text or room == 100, "it had no room for all results"


def test_without_the_roster_each_rank_ends_and_says_what_it_does_not_know(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    ranks = Ranks(cluster, tmp_path)
    for place in cluster.places:
        place.reachable = False
    errors = ranks.run()
    assert [type(error) for error in errors] == [SurvivedError, SurvivedError]
    assert "the roster, where the ranks meet, is gone" in str(errors[0])
    assert written(tmp_path / "cxi") == list(range(EVENTS))


def test_what_rank_0_cannot_make_no_rank_waits_for(
    cluster: MemoryCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise QueueError("queue 'out' cannot be made: the spool is damaged")

    monkeypatch.setattr("peaknet_predict.callbacks.queue_writer.connect_queue", refuse)
    strategy = Strategy(2)
    ranks = [Rank(cluster, strategy, rank, 2, tmp_path) for rank in range(2)]
    errors: list[str] = []

    def set_up(rank: Rank) -> None:
        with pytest.raises(QueueError) as error:
            rank.set_up()
        errors.append(str(error.value))

    threads = [threading.Thread(target=set_up, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600.0)
    assert errors == ["queue 'out' cannot be made: the spool is damaged"] * 2


def test_a_rank_whose_events_do_not_add_up_is_everybodys_failure(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    ranks = Ranks(cluster, tmp_path)
    ranks.ranks[1].dataset.received = 1  # as if one had vanished in this process
    errors = ranks.run()
    assert [type(error) for error in errors] == [BalanceError, BalanceError]
    assert "but predicted" in str(errors[0])
