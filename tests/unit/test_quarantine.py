from __future__ import annotations

import errno
import json
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict.batching import check_event
from peaknet_predict.queues.quarantine import INDEX_NAME, Quarantine, kept_earlier, read_index
from peaknet_predict.queues.records import ForeignItem, entry_of
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.queues.wire import item_to_event, item_to_results
from peaknet_predict.types import Event, EventId, Refusal
from tests.helpers.failing_disk import FailingDisk

IMAGE = np.ones((1, 4, 4), np.float32)


def event(idx: int, side: int = 8) -> Event:
    return Event(EventId("a/b s", 0, idx), np.full((1, side, side), idx, np.uint16), 9500.0)


def test_data_and_reason_are_kept_and_can_be_read(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "deep" / "down", 10**6)
    assert not (tmp_path / "deep").exists(), "made when it is needed"
    assert quarantine.keep(event(3).id, "it is bad", event(3), losses=2)
    (line,) = read_index(tmp_path / "deep" / "down")
    assert (line["stream"], line["rank"], line["idx"]) == ("a/b s", 0, 3)
    assert (line["reason"], line["losses"]) == ("it is bad", 2)
    with h5py.File(tmp_path / "deep" / "down" / line["file"]) as file:
        np.testing.assert_array_equal(file["image"][:], event(3).image)
        assert file.attrs["photon_energy"] == "9500.0"
        assert file.attrs["reason"] == "it is bad"


def test_directory_and_files_are_their_owners_alone(tmp_path: Path) -> None:
    Quarantine(tmp_path / "q", 10**6).keep(event(0).id, "bad", event(0))
    for path in (tmp_path / "q", *(tmp_path / "q").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


class Evil:
    """Raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class EvilText(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __len__ = __eq__ = __hash__ = __str__  # type: ignore[assignment]


class EvilList(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("no length")

    __iter__ = __getitem__ = __repr__ = __len__  # type: ignore[assignment]


STRANGE: dict[str, Any] = {
    "nothing": None,
    "text with NUL": "bad\0text",
    "text with half a surrogate pair": "bad\udcfftext",
    "text of a megabyte": "\U000e0001" * 2**20,
    "NUL in a list": [0, 1, "x\0y", 9000.0],
    "integer of 5000 digits": 10**5000,
    "idx of 5000 digits": [0, 10**5000, IMAGE, 1.0],
    "idx of 2**63": [0, 2**63, IMAGE, 1.0],
    "idx of 2**64": [0, 2**64, "no image", 1.0],
    "rank of -2**70": [-(2**70), 1, IMAGE, 1.0],
    "bytes with NUL": b"a\0b",
    "energy of 10**400": [0, 1, IMAGE, 10**400],
    "energy of minus 10**400": [0, 1, IMAGE, -(10**400)],
    "energy of class longdouble": [0, 1, IMAGE, np.longdouble(-9000)],
    "energy of class datetime64": [0, 1, IMAGE, np.datetime64("2026-01-01")],
    "energy of class Fraction": [0, 1, IMAGE, Fraction(-1, 3)],
    "energy that raises": [0, 1, IMAGE, Evil()],
    "big-endian image": [0, 1, IMAGE.astype(">f4"), -1.0],
    "float16 image": [0, 1, IMAGE.astype(np.float16), float("nan")],
    "longdouble image": [0, 1, IMAGE.astype(np.longdouble), -1.0],
    "complex256 image": [0, 1, IMAGE.astype(np.clongdouble), 1.0],
    "datetime image": [0, 1, np.zeros((1, 4, 4), "M8[s]"), 1.0],
    "timedelta image": [0, 1, np.zeros((1, 4, 4), "m8[ns]"), 1.0],
    "text image": [0, 1, np.full((1, 4, 4), "a\0b"), 1.0],
    "bytes image": [0, 1, np.full((1, 4, 4), b"ab"), 1.0],
    "empty text image": [0, 1, np.zeros((1, 4, 4), "U0"), 1.0],
    "void image": [0, 1, np.zeros((1, 4, 4), "V3"), 1.0],
    "structured image": [0, 1, np.zeros((1, 4), [("a", "f4")]), 1.0],
    "record image": [0, 1, np.zeros((1, 4), [("a", "f4")]).view(np.recarray), 1.0],
    "masked image": [0, 1, np.ma.masked_array(IMAGE, mask=True), 1.0],
    "object image": [0, 1, np.array([{1}, None], object), 1.0],
    "image without dimensions": [0, 1, np.array(-1.0), 1.0],
    "image without pixels": [0, 1, np.zeros((0, 3)), 1.0],
    "image that raises": [0, 1, Evil(), 1.0],
    "every second pixel": [0, 1, np.arange(32.0)[::-2].reshape(1, 4, 4), -1.0],
    "lists in lists": [[[[[[[1]]]]]]],
    "200 items": list(range(200)),
    "mapping": {"a": {1: [2, {"b": 3}]}},
    "what raises": Evil(),
    "text that raises": EvilText("text"),
    "a class": int,
    "a module": os,
    "an exception": ValueError("x\0"),
    "a set": {1, 2},
    "memory": memoryview(b"ab").tobytes(),
    "bytearray": bytearray(b"ab"),
    "a list that raises": EvilList([0, 1, IMAGE, -1.0]),
    "text that compares": EvilText("END"),
}
"""What another program may put; more in the fuzz of whole processes."""


@pytest.mark.parametrize("with_spool", [False, True])
@pytest.mark.parametrize("name", STRANGE)
def test_whatever_comes_goes_into_quarantine_and_holds_up_nothing(
    tmp_path: Path, name: str, with_spool: bool
) -> None:
    """The way of an item of another program: put, spool, reader, refusal, quarantine, replay."""
    directory = tmp_path / "q"
    quarantine = Quarantine(directory, 10**8)

    def state(spool: Spool | None) -> QueueState:
        return QueueState(
            *("events", 10, 10**9),
            quarantine=lambda entry, reason: quarantine.keep(
                entry.id, reason, entry.record, entry.losses
            ),
            journal=spool,
        )

    spool = Spool(tmp_path / "spool") if with_spool else None
    queue = state(spool)
    assert queue.put_foreign(["an item before it"])
    assert queue.put_foreign(STRANGE[name]) or name == "nothing"
    assert queue.put_foreign([9, 5, "an item after it", 1.0])
    accepted = queue.accepted
    if spool is not None:
        spool.sync()
        spool.close()
        spool = Spool(tmp_path / "spool")
        queue = state(spool)
        found = spool.replay
        queue.restore(found.entries, found.keys, found.books, found.accepted, found.quarantined)
    for request in range(accepted):
        assert queue.ask("r", "h", request) is None
        delivery = queue.take("r", "h", request, 1)
        (record,) = delivery.records
        assert isinstance(record, ForeignItem)
        item = item_to_event(record.payload, record.stream, record.position)
        reason = item.reason if isinstance(item, Refusal) else check_event(item)
        assert reason is not None, f"{name} passed as an event"
        assert reason.isprintable()
        assert item.id == record.id
        item_to_results(record.payload, "s", 0)
        item_to_results([(IMAGE, record.payload, record.payload)], "s", 0)
        assert not queue.reject({delivery.tokens[0]: reason})
    assert queue.statistics().quarantined == len(read_index(directory)) == queue.accepted
    assert quarantine.problem is None
    if spool is not None:
        spool.close()


@pytest.mark.parametrize("name", STRANGE)
def test_an_event_of_ours_with_anything_in_it_is_refused_by_its_reader(name: str) -> None:
    """A source of the user's own may yield anything as image or energy."""
    strange = STRANGE[name]
    part = strange[2] if type(strange) is list and len(strange) == 4 else strange
    for image, energy in ((part, -1.0), (IMAGE, part)):
        key = EventId("s", 1, 2)
        record = entry_of(Event(key, image, energy)).record
        assert record.id == key
        if isinstance(record, ForeignItem):
            item = item_to_event(record.payload, record.stream, record.position)
            assert item.id == key
            assert isinstance(item, Refusal) or check_event(item) is not None
        else:
            assert check_event(record) is not None  # type: ignore[arg-type]


def test_an_identity_that_no_file_holds_is_refused_at_the_put() -> None:
    queue = QueueState("events", 10, 10**9)
    queue.open("p")
    for key in (
        EventId("s", 0, 2**63),
        EventId("s", -(2**64), 1),
        EventId("a\0b", 0, 1),
        EventId("a\nERROR forged", 0, 1),
        EventId("\udcff", 0, 1),
        EventId("s" * 256, 0, 1),
        EventId("s", 0, 10**5000),
        EventId("s", 0, 1.5),  # type: ignore[arg-type]
        EventId(None, 0, 1),  # type: ignore[arg-type]
    ):
        assert queue.put("p", [Event(key, IMAGE, 1.0)]) == 1
        reason = queue.statistics().quarantine[-1]
        assert re.search("cannot be kept: .* (must|does not fit)", reason)
        assert reason.isprintable()
    assert queue.quarantined == 9
    edge = EventId("é" * 255, -(2**63), 2**63 - 1)
    assert queue.put("p", [Event(edge, IMAGE, 1.0)]) == 1
    numpy = EventId("s", 0, np.int64(2**63 - 1))  # type: ignore[arg-type]
    assert queue.put("p", [Event(numpy, IMAGE, 1.0)]) == 1
    assert len(queue) == 2
    json.dumps(queue.keys.to_json())


def test_given_an_identity_that_cannot_be_kept_it_keeps_the_rest(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 10**6)
    assert quarantine.keep(EventId("a\0\udcff", 2**70, 10**5000), "bad", event(1))
    (line,) = read_index(tmp_path)
    assert "bad; its identity" in line["reason"]
    with h5py.File(tmp_path / line["file"]) as file:
        np.testing.assert_array_equal(file["image"][:], event(1).image)


def test_beyond_its_size_identity_and_reason_are_kept(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 300)
    for idx in range(5):
        quarantine.keep(event(idx).id, "bad", event(idx))  # 128 bytes each
    files = [line["file"] for line in read_index(tmp_path)]
    assert [file is not None for file in files] == [True, True, False, False, False]


def test_what_cannot_be_written_is_written_later_and_once(tmp_path: Path) -> None:
    disk = FailingDisk()
    quarantine = Quarantine(tmp_path, 10**6, fs=disk)
    for fails in ({"write"}, {"fsync"}, {"replace"}, {"open"}):
        disk.fails = fails
        key = event(len(read_index(tmp_path))).id
        assert not quarantine.keep(key, "bad", event(0))
        assert quarantine.problem is not None
        assert "No space left" in quarantine.problem
        assert quarantine.retry() == []
        disk.fails = set()
        assert quarantine.retry() == [key]
        assert quarantine.problem is None
    assert [line["idx"] for line in read_index(tmp_path)] == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 4 + 1, "one file each, and the index"


def test_an_index_that_cannot_be_written_costs_no_second_file(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    quarantine = Quarantine(tmp_path, 10**6)
    assert not quarantine.keep(event(0).id, "bad", event(0))
    for _ in range(3):
        assert quarantine.retry() == []
    assert len(list(tmp_path.glob("*.h5"))) == 1
    (tmp_path / INDEX_NAME).rmdir()
    assert quarantine.retry() == [event(0).id]
    assert len(list(tmp_path.glob("*.h5"))) == 1


def test_a_line_whose_sync_failed_is_written_again_in_its_place(tmp_path: Path) -> None:
    """After a sync that failed, another sync that succeeds says nothing about the same bytes."""
    disk = FailingDisk()
    quarantine = Quarantine(tmp_path, 0, fs=disk)
    quarantine.keep(event(0).id, "bad", None)
    disk.fails = {"fsync"}
    assert not quarantine.keep(event(1).id, "bad", None)
    disk.fails = {"write"}  # so it is not appended
    assert quarantine.retry() == [event(1).id]
    assert [line["idx"] for line in read_index(tmp_path)] == [0, 1]


def test_an_event_with_a_line_from_an_earlier_life_gets_no_second_one(tmp_path: Path) -> None:
    """That life may have died before the line was on disk, or before it was settled."""
    for queue in ("mine", "another"):
        Quarantine(tmp_path, 10**6, queue).keep(event(1).id, "bad", event(1))
    index = (tmp_path / INDEX_NAME).read_bytes()
    disk = FailingDisk()
    quarantine = Quarantine(tmp_path, 10**6, "mine", fs=disk)
    assert quarantine.look_up({event(0).id, event(1).id}) == {event(1).id: "bad"}
    disk.done.clear()
    assert quarantine.keep(event(1).id, "worse", event(1))
    assert (tmp_path / INDEX_NAME).read_bytes() == index
    written = disk.done.index("pwrite")
    assert "fsync" in disk.done[written:], "only that brings it on disk"
    assert quarantine.keep(event(0).id, "worse", event(0))
    assert len(read_index(tmp_path)) == 3


def test_a_queue_that_comes_back_waits_for_an_index_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = EventId("s", 0, 1)
    Quarantine(tmp_path / "q", 10**6, "queue").keep(key, "it smells", None)
    (tmp_path / "q").rename(tmp_path / "away")
    (tmp_path / "q").touch()

    def bring_back(seconds: float) -> None:
        (tmp_path / "q").unlink()
        (tmp_path / "away").rename(tmp_path / "q")

    again = Quarantine(tmp_path / "q", 10**6, "queue")
    with pytest.raises(NotADirectoryError):
        kept_earlier(again, {key}, patience_s=-1.0)
    monkeypatch.setattr("time.sleep", bring_back)
    assert kept_earlier(again, {key}) == {key: "it smells"}


def test_what_is_too_large_for_the_disk_holds_up_nothing_smaller(tmp_path: Path) -> None:
    class Small(FailingDisk):
        def write(self, file: int, data: bytes | memoryview) -> int:
            if len(data) > 10_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.write(file, data)

    quarantine = Quarantine(tmp_path, 10**8, fs=Small())
    assert not quarantine.keep(event(0).id, "bad", event(0, side=200))
    assert quarantine.keep(event(1).id, "bad", event(1))
    assert quarantine.problem is not None, "one still waits"


def test_a_line_that_a_power_cut_tore_spoils_no_other(tmp_path: Path) -> None:
    Quarantine(tmp_path, 10**6).keep(event(0).id, "bad", None)
    index = tmp_path / INDEX_NAME
    whole = index.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        index.write_bytes(whole + whole[:cut])
        assert len(read_index(tmp_path)) in (1, 2)  # all but the line's end is a line
        Quarantine(tmp_path, 10**6).keep(event(1).id, "bad", None)
        lines = [line["idx"] for line in read_index(tmp_path)]
        assert (lines[0], lines[-1]) == (0, 1)


def test_what_waits_for_the_disk_is_not_settled_and_takes_up_room(tmp_path: Path) -> None:
    disk = FailingDisk()
    quarantine = Quarantine(tmp_path, 10**6, fs=disk)
    queue = QueueState(
        *("events", 3, 10**9),
        quarantine=lambda entry, reason: quarantine.keep(entry.id, reason, entry.record),
    )
    queue.open("p")
    queue.put("p", [event(i) for i in range(3)])
    queue.ask("r", "h", 1)
    disk.fails = {"write"}
    queue.reject(dict.fromkeys(queue.take("r", "h", 1, 3).tokens, "bad"))
    now = queue.statistics()
    assert (now.quarantined, now.quarantining, now.ready, now.leased) == (0, 3, 0, 0)
    assert queue.put("p", [event(3)]) == 0, "or the memory would have no bound"
    queue.close("p")
    assert not queue.take("r", "h", 2, 1).ended, "it would end without them"
    disk.fails = set()
    queue.settlements.confirm(quarantine.retry())
    assert queue.statistics().quarantined == 3
    assert queue.take("r", "h", 3, 1).ended
