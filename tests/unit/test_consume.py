"""The consumer in this process: a queue's state, a reader on it, and real files."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peaknet_predict import consume
from peaknet_predict.consume import drain, write_cxi
from peaknet_predict.cxi import filtered, publisher
from peaknet_predict.cxi.account import ConsumeReport
from peaknet_predict.cxi.file import read_ids, write_cxi_file
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.process import stopping
from peaknet_predict.queues import QueueAddress, QueueError
from peaknet_predict.queues.state import QueueState
from peaknet_predict.types import Event, EventId, Result
from tests.helpers.memory_cluster import install
from tests.helpers.memory_queue import MemoryQueue
from tests.helpers.reader import StateReader

IMAGE = np.ones((1, 24, 24), np.float32)
NONE, FIVE = np.zeros((0, 3)), np.array([[0, 9.0, 9.0]] * 5)


class Killed(BaseException):
    """What becomes of a process: nothing behind it is carried out."""


def results(first: int, last: int, every: int = 2, stream: str = "s") -> list[Result]:
    """Return results of which all but every so-many-th have no peaks."""
    return [
        Result(EventId(stream, 0, i), IMAGE, NONE if i % every else FIVE, 9e3)
        for i in range(first, last)
    ]


def queue_of(records: list[Any], closed: bool = True) -> QueueState:
    state = QueueState("results", 10**5, 10**10, uid="results-q")
    state.open("p")
    assert state.put("p", records) == len(records)
    if closed:
        state.close("p")
    return state


def writer_on(directory: Path, reader: StateReader, **more: Any) -> CxiWriter:
    arguments: dict[str, Any] = {"events_per_file": 20, "min_peaks": 3, "run": "r"} | more
    return CxiWriter(directory, owner=reader.holder, still_ours=reader.still_held, **arguments)


def run(directory: Path, state: QueueState, holder: str, **more: Any) -> ConsumeReport:
    reader = StateReader(state, holder)
    writer = writer_on(directory, reader, **more)
    report = drain(reader, writer)
    writer.account.write_balance(report, {})
    return report


def run_until_killed(directory: Path, state: QueueState, holder: str, gets: int) -> None:
    reader = StateReader(state, holder)

    def kill(count: int) -> None:
        if count == gets:
            raise Killed

    reader.before_get = kill
    with pytest.raises(Killed):
        drain(reader, writer_on(directory, reader))
    reader.die()


def balance(directory: Path, name: str = "peaks_balance.json") -> Any:
    return json.loads((directory / name).read_text())["stages"]["files"]


def in_files(directory: Path) -> list[int]:
    return sorted(key.idx for path in directory.glob("*.cxi") for key in read_ids(path))


def test_everything_is_written_filtered_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[Any] = results(0, 50)
    records[10].peaks = np.array([[0, 99.0, 9.0]] * 5)  # outside of the image
    records[20].image = np.ones((1, 24, 24), np.complex64)
    records[30] = Event(EventId("s", 0, 30), IMAGE, 9e3)
    state = queue_of(records)
    with caplog.at_level(logging.WARNING):
        report = run(tmp_path, state, "w")
    assert str(report) == "taken 50 = written 22 + filtered 25 + refused 3, in 2 files"
    assert report.balanced
    assert not report.interrupted
    assert in_files(tmp_path) == [i for i in range(0, 50, 2) if i not in (10, 20, 30)]
    assert (state.statistics().acknowledged, state.statistics().quarantined) == (47, 3)
    assert "an event stands in a queue of results" in caplog.text
    found = balance(tmp_path)
    assert (found["taken"], found["refused"], found["given_back"]) == (50, 3, 0)
    assert (found["cxi"]["written"], found["cxi"]["filtered"]) == (22, 25)


@pytest.fixture(params=[0.0, 1e9], ids=["recorded at once", "recorded with files"])
def record_after_s(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How long filtered events wait for their record, whatever the machine's speed."""
    seconds: float = request.param
    monkeypatch.setattr(filtered, "_RECORD_AFTER_S", seconds)
    return seconds


def test_filtered_events_of_a_killed_writer_are_counted(
    tmp_path: Path, record_after_s: float
) -> None:
    state = queue_of(results(0, 200))
    run_until_killed(tmp_path, state, "w0", gets=7)
    before = state.statistics().acknowledged
    assert before == (96 if record_after_s == 0 else 40)
    report = run(tmp_path, state, "w1", create=False)
    now, files = state.statistics(), in_files(tmp_path)
    assert files == list(range(0, 200, 2))
    assert (now.accepted, now.acknowledged, now.quarantined) == (200, 200, 0)
    assert report.balanced
    assert report.cxi.filtered == 100, "by all writers of the run"
    found = balance(tmp_path)
    assert (found["taken"], found["cxi"]["written"], found["cxi"]["filtered"]) == (200, 100, 100)
    assert ConsumeReport(**{k: v for k, v in found.items() if k != "cxi"}).taken == 200
    assert len(found["cxi"]["files"]) == len(list(tmp_path.glob("*.cxi")))
    assert report.run_files == sorted(tmp_path.glob("*.cxi")), "those of the dead writer, too"


def test_what_was_recorded_but_not_acknowledged_is_counted_once(
    tmp_path: Path, record_after_s: float
) -> None:
    state = queue_of(results(0, 60))
    reader = StateReader(state, "w0")

    def die_unheard(ids: Any) -> None:
        raise Killed

    reader.ack = die_unheard  # type: ignore[method-assign]
    with pytest.raises(Killed):
        drain(reader, writer_on(tmp_path, reader))
    reader.die()
    report = run(tmp_path, state, "w1")
    assert report.balanced
    assert in_files(tmp_path) == list(range(0, 60, 2))
    found = balance(tmp_path)
    assert (found["cxi"]["written"], found["cxi"]["filtered"]) == (30, 30)
    assert state.statistics().acknowledged == 60


def test_writers_side_by_side_have_one_balance_and_one_list(tmp_path: Path) -> None:
    state = queue_of(results(0, 300, every=3))

    def work(holder: str) -> ConsumeReport:
        reader = StateReader(state, holder)
        writer = writer_on(tmp_path, reader, events_per_file=7)
        report = drain(reader, writer, group="job")
        writer.account.write_balance(report, {"output": {"promise": "none"}})
        return report

    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(work, ["w0", "w1", "w2"]))
    assert all(report.balanced for report in reports)
    whole = json.loads((tmp_path / "peaks_balance.json").read_text())
    found = whole["stages"]["files"]
    assert (found["taken"], found["cxi"]["written"], found["cxi"]["filtered"]) == (300, 100, 200)
    assert set(whole["writers"]) <= {"w0", "w1", "w2"}
    assert sum(writer["taken"] for writer in whole["writers"].values()) == 300
    assert in_files(tmp_path) == list(range(0, 300, 3))
    listed = (tmp_path / "files.lst").read_text().split()
    assert listed == sorted(str(path) for path in tmp_path.glob("*.cxi"))


def test_a_stream_without_hits_costs_few_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtered, "_RECORD_AFTER_S", 1e9)
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    report = run(tmp_path, queue_of(results(1, 2000, every=10**9)), "w")
    assert report.cxi.filtered == 1999
    assert len(syncs) < 20, "one for some hundred events, and a few at the end"


def full_disk_for(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, iter(range(calls))

    def fsync(fd: int) -> None:
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_while_the_disk_is_full_nothing_is_acknowledged_and_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consume, "_RETRY_S", 0.001)
    state = queue_of(results(0, 90))
    reader = StateReader(state, "w")
    writer = writer_on(tmp_path, reader)
    full_disk_for(9, monkeypatch)
    report = drain(reader, writer)
    writer.account.write_balance(report, {})
    assert caplog.text.count("trying again") >= 9
    assert report.balanced
    assert (report.cxi.written, report.cxi.filtered, report.cxi.duplicates) == (45, 45, 0)
    assert in_files(tmp_path) == list(range(0, 90, 2))
    assert balance(tmp_path)["cxi"]["filtered"] == 45


def test_a_writer_that_cannot_write_its_lists_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All events are in files, but nobody is told which these are."""
    monkeypatch.setattr(consume, "_RETRY_S", 0.001)
    state = queue_of(results(0, 10))
    reader = StateReader(state, "w")
    tries = 0

    def full(*args: Any, **settings: Any) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            signal.raise_signal(signal.SIGTERM)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("peaknet_predict.cxi.lists.write_whole", full)
    report = drain(reader, writer_on(tmp_path, reader), grace_s=0.05)
    assert state.statistics().acknowledged == 10
    assert report.interrupted


def test_a_stop_request_writes_what_was_taken(tmp_path: Path) -> None:
    state = queue_of(results(0, 100), closed=False)
    reader = StateReader(state, "w")

    def stop(count: int) -> None:
        if count == 3:
            signal.raise_signal(signal.SIGTERM)

    reader.before_get = stop
    report = drain(reader, writer_on(tmp_path, reader))
    assert report.interrupted
    assert report.balanced
    assert report.taken == state.statistics().acknowledged
    assert report.taken >= 64
    assert len(in_files(tmp_path)) == report.cxi.written == report.taken / 2


@pytest.mark.parametrize("comes_again", [False, True])
def test_a_storage_that_does_not_come_back_gives_back_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_again: bool
) -> None:
    monkeypatch.setattr(consume, "_RETRY_S", 0.001)
    state = queue_of(results(0, 60))
    reader = StateReader(state, "w")
    writer = writer_on(tmp_path / "out", reader)

    def gone(count: int) -> None:
        if count == 2:
            shutil.rmtree(tmp_path / "out")
            signal.raise_signal(signal.SIGTERM)
            if comes_again:  # its leases had ended without its knowledge
                state.release(list(reader._tokens.values()), "silent")

    reader.before_get = gone
    report = drain(reader, writer, grace_s=0.2)
    assert report.interrupted
    assert not report.balanced
    assert report.unaccounted == 0
    assert report.given_back + report.cxi.duplicates == report.taken == 48
    assert state.statistics().ready == 60


def test_a_queue_that_is_gone_ends_it_and_costs_no_file(tmp_path: Path) -> None:
    state = queue_of(results(0, 100, every=1))
    reader = StateReader(state, "w")
    writer = writer_on(tmp_path, reader)

    def gone(ids: Any) -> set[EventId]:
        raise QueueError("the queue is gone")

    reader.still_held = gone  # type: ignore[method-assign]
    writer = writer_on(tmp_path, reader)
    report = ConsumeReport(cxi=writer.statistics)
    with pytest.raises(QueueError):
        drain(reader, writer, report=report)
    assert report.interrupted
    assert list(tmp_path.iterdir()) == []
    assert state.statistics().acknowledged == 0


def test_a_damaged_journal_is_no_balance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtered, "_RECORD_AFTER_S", 0.0)
    state = queue_of(results(0, 60))
    run_until_killed(tmp_path, state, "w0", gets=3)
    (journal,) = tmp_path.glob("*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b"filtered", b"filTered", 1))
    report = run(tmp_path, state, "w1")
    assert "1 lines of journals are damaged" in str(report)
    assert not report.balanced


@pytest.mark.parametrize("within", ["get", "write"])
def test_stopped_at_once_everything_is_in_a_file_or_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    monkeypatch.setattr(stopping, "_ONE_REQUEST_S", 0.0)
    state = queue_of(results(0, 100, every=1))
    reader = StateReader(state, "w")
    writer = writer_on(tmp_path, reader)

    def stop_twice() -> None:
        # To this very thread: one sent to the process may be taken by another thread, which on a
        # busy machine runs its handler when the next writer is at work.
        stop = stopping._current
        assert stop is not None
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(30)
        while not stop.at_once:
            signal.raise_signal(signal.SIGTERM)

    if within == "write":

        def strike(*args: Any) -> None:
            monkeypatch.setattr(publisher, "write_cxi_file", write_cxi_file)
            write_cxi_file(*args)
            stop_twice()

        monkeypatch.setattr(publisher, "write_cxi_file", strike)
    else:

        def strike_and_wait(count: int) -> None:
            if count == 3:
                stop_twice()
                time.sleep(30)  # the interrupt comes from another thread: here, and not later

        reader.before_get = strike_and_wait
    report = drain(reader, writer)
    assert report.interrupted
    assert report.unaccounted == 0
    now = state.statistics()
    assert now.leased == 0
    assert now.ready == 100 - now.acknowledged
    assert in_files(tmp_path) == list(range(now.acknowledged))
    assert report.cxi.written == now.acknowledged == (20 if within == "write" else 40)
    report = run(tmp_path, state, "next", create=False)
    assert in_files(tmp_path) == list(range(100))
    assert balance(tmp_path)["taken"] == 100


@pytest.mark.parametrize(("spool", "given_back"), [("spool", 3), (None, 0)])
def test_what_a_writer_holds_when_its_queue_goes_counts_as_given_back_if_the_queue_can_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spool: str | None, given_back: int
) -> None:
    queue = install(monkeypatch).queues["out"] = MemoryQueue("results", "out")
    producer = queue.connect().producer
    producer.open("p")
    producer.put("p", results(0, 3))

    def add(writer: CxiWriter, result: Result) -> list[EventId]:
        queue.die()
        return []

    monkeypatch.setattr(CxiWriter, "add", add)
    with pytest.raises(QueueError):
        write_cxi(QueueAddress("out", spool=spool), str(tmp_path))
    balance = json.loads((tmp_path / "peaks_balance.json").read_text())
    files = balance["stages"]["files"]
    assert (files["taken"], files["given_back"]) == (3, given_back)
    assert "QueueError" in files["problem"]
