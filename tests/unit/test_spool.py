from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peaknet_predict.queues.records import Entry, ForeignItem, Opaque, entry_of
from peaknet_predict.queues.spool import Spool, SpoolError
from peaknet_predict.types import Event, EventId, Result


def event(idx: int, side: int = 4) -> Event:
    return Event(EventId("s", 0, idx), np.full((1, side, side), idx, ">u2"), 9000.0, 1.5)


def put(spool: Spool, *records: Any) -> None:
    for record in records:
        spool.put(entry_of(record))
    spool.sync()


def found(directory: Path) -> list[Entry]:
    spool = Spool(directory)
    spool.close()
    return spool.replay.entries


def test_every_kind_of_record_comes_back_as_it_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    peaks = np.array([[0.0, 1.5, 2.5]])
    bits = np.array([5], np.uint8)
    result = Result(EventId("s", 1, 2), np.zeros((2, 3), np.float32), peaks, 9.0, 4, 2.5, bits, 7e4)
    payload = [1, 2, np.arange(6.0).reshape(2, 3)[:, ::-1], float("inf")]
    masked = np.ma.masked_greater(np.arange(6).reshape(2, 3), 3)
    strange = (b"raw", "text", 1j, None, Opaque("Strange thing"), np.zeros((0, 3)), masked)
    put(spool, event(7), result, ForeignItem(payload, "f#0", 3), ForeignItem(strange, "f#0", 4))
    spool.close()
    one, two, three, four = (entry.record for entry in found(tmp_path / "spool"))
    assert isinstance(one, Event)
    assert (one.id, one.photon_energy, one.put_at) == (EventId("s", 0, 7), 9000.0, 1.5)
    assert one.image.dtype == np.dtype(">u2")
    np.testing.assert_array_equal(one.image, event(7).image)
    assert isinstance(two, Result)
    assert (two.id, two.bad_pixels, two.saturation) == (EventId("s", 1, 2), 4, 7e4)
    np.testing.assert_array_equal(two.bad_bits, bits)
    np.testing.assert_array_equal(two.peaks, peaks)
    assert isinstance(three, ForeignItem)
    np.testing.assert_array_equal(three.payload[2], payload[2])
    assert three.id == EventId("f#0", 1, 2)
    assert isinstance(four, ForeignItem)
    assert four.payload[:5] == strange[:5]
    assert four.payload[5].shape == (0, 3)
    np.testing.assert_array_equal(four.payload[6].data, masked.data)
    np.testing.assert_array_equal(four.payload[6].mask, masked.mask)


def test_what_was_settled_does_not_come_back_but_its_key_is_known(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool, *(event(i) for i in range(5)))
    for i in (1, 3):
        spool.settled(EventId("s", 0, i), quarantined=i == 3)
    spool.books({"generation": 7})
    spool.close()
    again = Spool(tmp_path)
    again.close()
    assert [entry.id.idx for entry in again.replay.entries] == [0, 2, 4]
    assert list(again.replay.keys.intervals()) == [("s", 0, [0, 5])]
    assert (again.replay.accepted, again.replay.quarantined) == (5, 1)
    assert again.replay.books == {"generation": 7}


def test_a_record_that_was_being_written_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool, event(0), event(1))
    spool.close()
    (segment,) = tmp_path.glob("*.spool")
    os.truncate(segment, segment.stat().st_size - 3)
    assert [entry.id.idx for entry in found(tmp_path)] == [0]
    assert [entry.id.idx for entry in found(tmp_path)] == [0], "and it can be written again"


def test_damage_before_the_end_is_an_error_never_an_empty_queue(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool, event(0), event(1))
    spool.close()
    Spool(tmp_path).close()  # begins a segment of its own
    first = min(tmp_path.glob("*.spool"))
    content = bytearray(first.read_bytes())
    content[-10] ^= 1
    first.write_bytes(content)
    with pytest.raises(SpoolError, match=r"is damaged at byte \d+.*feed again"):
        Spool(tmp_path)


def test_segments_go_when_their_records_and_all_before_are_settled(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=3000)
    for i in range(40):
        put(spool, event(i, side=16))
        if i > 0:
            spool.settled(EventId("s", 0, i), quarantined=False)
    assert len(list(tmp_path.glob("*.spool"))) > 4, "the first still has an event"
    spool.settled(EventId("s", 0, 0), quarantined=False)
    assert len(list(tmp_path.glob("*.spool"))) == 1
    spool.close()
    again = Spool(tmp_path)
    assert again.replay.entries == []
    assert list(again.replay.keys.intervals()) == [("s", 0, [0, 40])]
    again.close()


def test_a_spool_has_one_queue_and_one_owner(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert (tmp_path / "spool").stat().st_mode & 0o077 == 0
    with pytest.raises(SpoolError, match="belongs to a queue that is alive"):
        Spool(tmp_path / "spool")
    spool.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match=r"cannot be used.*name another one"):
        Spool(tmp_path / "file")


def test_a_full_disk_takes_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put(spool, event(0))
    writable = spool._file
    spool._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):
        spool.put(entry_of(event(1)))
    os.close(spool._file)
    spool._file = writable
    put(spool, event(2))
    spool.close()
    assert [entry.id.idx for entry in found(tmp_path)] == [0, 2]


def test_the_readers_that_a_record_has_cost_are_known_after_a_restart(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entries = [entry_of(event(i)) for i in range(2)]
    for entry in entries:
        spool.put(entry)
    entries[0].losses, entries[0].lost_by = 2, ["a", "b"]
    spool.note(entries[0])
    entries[1].reason = "bad"
    spool.note(entries[1])
    spool.sync()
    spool.close()
    first, second = found(tmp_path)
    assert (first.losses, first.lost_by, first.reason) == (2, ["a", "b"], None)
    assert (second.losses, second.reason) == (0, "bad")
