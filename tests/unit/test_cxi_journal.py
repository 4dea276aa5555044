"""The journal of a CXI writer: records stay, and damage is told from a torn end."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.cxi.directory import CxiDirectory
from peaknet_predict.cxi.filtered import FilteredEvents
from peaknet_predict.cxi.journal import Journal, read_journal
from peaknet_predict.cxi.writer import CxiWriteError, CxiWriter
from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import write_again
from peaknet_predict.types import EventId, Result
from tests.helpers.examples import examples
from tests.helpers.failing_disk import FailingDisk


def keys(*idx: int) -> list[EventId]:
    return [EventId("röntgen", 3, i) for i in idx]


def journal_in(directory: Path, *batches: list[EventId], balance: int | None = None) -> Path:
    journal = Journal(directory, "peaks", "run 7", "node1-12-ab")
    events = FilteredEvents(journal)
    for batch in batches:
        for key in batch:
            events.add(key)
        assert events.record() == batch
    if balance is not None:
        journal.append({"balance": {"taken": balance}})
    journal.close()
    (path,) = directory.glob("*.jsonl")
    return path


def filtered(path: Path) -> list[int]:
    return [key.idx for key in keys(*range(50)) if key in read_journal(path.read_bytes()).filtered]


def test_what_is_on_record_is_read_again(tmp_path: Path) -> None:
    path = journal_in(tmp_path, keys(4, 5, 9), keys(1), balance=7)
    assert path.name == "peaks_journal_node1-12-ab.jsonl"
    contents = read_journal(path.read_bytes())
    assert (contents.run, contents.writer) == ("run 7", "node1-12-ab")
    assert filtered(path) == [1, 4, 5, 9]
    assert (contents.balance, contents.damaged) == ({"taken": 7}, 0)


def test_a_torn_end_costs_what_was_never_confirmed_and_no_more(tmp_path: Path) -> None:
    path = journal_in(tmp_path, keys(1), keys(2), keys(3))
    whole = path.read_bytes()
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        confirmed = sum(end < size for end in ends)
        # A line that lacks its line break only is there.
        found, complete = filtered(path), size in ends
        assert len(found) == max(0, confirmed - 1 + complete)
        assert read_journal(path.read_bytes()).damaged == 0
    path.write_bytes(whole + b"\0" * 100)
    assert filtered(path) == [1, 2, 3], "a file system may leave zeros behind a torn end"


@examples(60)
@given(data=st.data())
def test_a_flipped_bit_is_never_overlooked(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = journal_in(Path(directory), keys(1), keys(2), keys(3), balance=3)
        damaged = bytearray(path.read_bytes())
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        before = read_journal(path.read_bytes())
        path.write_bytes(damaged)
        after = read_journal(path.read_bytes())
        same = len(after.filtered) == len(before.filtered) and after.balance == before.balance
        assert after.damaged or (same and after.run == before.run)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_what_cannot_be_recorded_waits_for_another_file(tmp_path: Path, call: str) -> None:
    disk = FailingDisk()
    events = FilteredEvents(Journal(tmp_path, "peaks", "r", "w", fs=disk))
    events.add(keys(1)[0])
    events.record()
    disk.fails = {call}
    events.add(keys(2)[0])
    with pytest.raises(OSError, match="No space"):
        events.record()
    assert keys(2)[0] in events
    disk.fails = set()
    assert events.record() == keys(2)
    # A sync that has failed once says nothing if it succeeds later: the first file is left alone.
    first, second = sorted(tmp_path.glob("*.jsonl"))
    assert filtered(first)[:1] == [1]
    assert filtered(second) == [2]


def test_filtered_events_wait_for_a_second_or_for_company(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    events = FilteredEvents(Journal(tmp_path, "peaks", "r", "w"))
    assert not events.due
    events.add(keys(1)[0])
    assert not events.due
    now = 101.0
    assert events.due
    assert events.record() == keys(1)
    for key in keys(*range(255)):
        events.add(key)
    assert not events.due
    events.add(keys(255)[0])
    assert events.due


def test_a_writer_reads_the_journals_of_others(tmp_path: Path) -> None:
    image, none = np.ones((1, 8, 8), np.float32), np.empty((0, 3))

    def add(writer: CxiWriter, *idx: int) -> None:
        for key in keys(*idx):
            writer.add(Result(key, image, none, 9e3))

    first = CxiWriter(tmp_path, min_peaks=1, owner="first")
    add(first, 1, 2)
    assert set(first.record_filtered(at_once=True)) == set(keys(1, 2))
    second = CxiWriter(tmp_path, min_peaks=1, owner="second")
    assert second.statistics.filtered == second.statistics.filtered_elsewhere == 2
    add(first, 3)
    first.flush()
    second.take_over_from(["first"])
    add(second, 4)
    assert second.add(Result(keys(3)[0], image, none, 9e3)) == keys(3), "there already"
    assert second.close() == keys(4)
    statistics = second.statistics
    assert (statistics.taken, statistics.duplicates) == (2, 1)
    assert (statistics.filtered, statistics.filtered_elsewhere) == (4, 3)


def test_what_a_dead_writer_recorded_is_on_disk_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died between the write and the sync, or its sync may have failed."""
    path = journal_in(tmp_path, keys(1))
    done: list[tuple[str, int]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def noting_pwrite(file: int, data: bytes, offset: int) -> int:
        done.append((f"{bytes(data)!r} at {offset}", os.fstat(file).st_ino))
        return pwrite(file, data, offset)

    def noting_fsync(file: int) -> None:
        done.append(("synced", os.fstat(file).st_ino))
        fsync(file)

    monkeypatch.setattr(os, "pwrite", noting_pwrite)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    writer = CxiWriter(tmp_path, min_peaks=1)
    result = Result(keys(1)[0], np.zeros((1, 4, 4), np.uint16), np.zeros((0, 3)), 9000.0)
    assert writer.add(result) == keys(1)
    journal = path.stat().st_ino
    assert [what for what, file in done if file == journal] == [
        f"{path.read_bytes()!r} at 0",
        "synced",
    ]
    assert ("synced", tmp_path.stat().st_ino) in done, "its name, and those of finished files"


def test_damage_is_said_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = journal_in(tmp_path, keys(1), keys(2))
    path.write_bytes(path.read_bytes().replace(b"[1, 2]", b"[1, 9]"))
    CxiWriter(tmp_path)
    assert f"{path} is damaged in 1 lines" in caplog.text


def test_a_journal_that_cannot_be_read_stops_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal_in(tmp_path, keys(1))

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("peaknet_predict.cxi.directory.write_again", fail)
    with pytest.raises(CxiWriteError, match="Input/output error"):
        CxiWriter(tmp_path)


@given(
    st.lists(st.integers(0, 30)),
    st.lists(st.integers(0, 30)),
)
def test_a_set_of_keys_takes_over_another(ours: list[int], theirs: list[int]) -> None:
    united = KeySet(keys(*ours))
    united.update(KeySet(keys(*theirs)))
    assert united.to_json() == KeySet(keys(*ours, *theirs)).to_json()


def test_a_line_that_is_added_while_a_journal_is_made_safe_waits_for_the_next_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer has not synced it yet: a power cut could take it."""
    (tmp_path / "there").mkdir()
    path = journal_in(tmp_path / "there", keys(1))
    (tmp_path / "more").mkdir()
    more = journal_in(tmp_path / "more", keys(2)).read_bytes()

    def and_then(path: Path) -> bytes:
        content = write_again(path)
        with path.open("ab") as file:
            file.write(more)
        return content

    monkeypatch.setattr("peaknet_predict.cxi.directory.write_again", and_then)
    directory = CxiDirectory(tmp_path / "there", "peaks", None, create=False)
    assert [key.idx for key in keys(1, 2) if key in directory.filtered] == [1]
    monkeypatch.undo()
    directory.look_again()
    assert [key.idx for key in keys(1, 2) if key in directory.filtered] == [1, 2]
    assert filtered(path) == [1, 2]
