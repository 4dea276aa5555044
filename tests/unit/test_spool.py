from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from peaknet_predict.process.files import FileSystem
from peaknet_predict.queues.records import Entry, ForeignItem, entry_of
from peaknet_predict.queues.spool import Spool, SpoolError
from peaknet_predict.queues.wire import Opaque
from peaknet_predict.types import Event, EventId, Result
from tests.helpers.failing_disk import FailingDisk


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
    image = np.zeros((2, 3), np.float32)
    result = Result(EventId("s", 1, 2), image, peaks, 9.0, 4, 2.5, bits, 7e4, '{"threshold": 1.5}')
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
    assert two.provenance == result.provenance
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
    put(spool, event(0))
    _, synced = spool.position
    spool.put(entry_of(event(1)))
    spool.close()
    (segment,) = tmp_path.glob("*.spool")
    written = segment.read_bytes()
    for cut in range(synced, len(written), 7):
        copy = tmp_path / f"cut at {cut}"
        copy.mkdir()
        shutil.copy(tmp_path / "synced", copy)
        (copy / segment.name).write_bytes(written[:cut])
        assert [entry.id.idx for entry in found(copy)] == [0]
        assert [entry.id.idx for entry in found(copy)] == [0], "and it can be written again"


def written_spool(directory: Path) -> None:
    """Make a spool of several segments, of which all has been confirmed."""
    spool = Spool(directory, segment_bytes=2000)
    for i in range(20):
        put(spool, event(i))
    for i in range(0, 20, 3):
        spool.settled(event(i).id, quarantined=False)
    spool.sync()
    spool.close()


def is_whole(directory: Path) -> bool:
    """Whether all is found that `written_spool` confirmed; False if the spool is refused."""
    try:
        spool = Spool(directory)
    except SpoolError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert re.search("damaged|missing|another version", said)
        assert re.search("move .* away|delete it", said), "what can be done"
        return False
    spool.close()
    entries = spool.replay.entries
    assert [entry.id.idx for entry in entries] == [i for i in range(20) if i % 3]
    for entry in entries:
        assert isinstance(entry.record, Event)
        np.testing.assert_array_equal(entry.record.image, event(entry.id.idx).image)
    assert list(spool.replay.keys.intervals()) == [("s", 0, [0, 20])]
    return True


@pytest.mark.thorough
def test_a_flipped_bit_anywhere_is_an_error_or_costs_nothing(tmp_path: Path) -> None:
    """In every file, the last segment and the mark too: 100 confirmed events never become 9."""
    written_spool(tmp_path / "spool")
    assert len(list((tmp_path / "spool").glob("*.spool"))) > 2
    refused = 0
    for path in sorted((tmp_path / "spool").iterdir()):
        content = path.read_bytes()
        for position in {
            *range(0, len(content), 61),
            *range(max(len(content) - 40, 0), len(content)),
        }:
            copy = tmp_path / f"{path.name} at {position}"
            shutil.copytree(tmp_path / "spool", copy)
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            (copy / path.name).write_bytes(flipped)
            refused += not is_whole(copy)
            shutil.rmtree(copy)
    assert refused > 50


def test_whatever_is_missing_is_an_error_or_costs_nothing(tmp_path: Path) -> None:
    written_spool(tmp_path / "spool")
    paths = sorted((tmp_path / "spool").iterdir())
    for path in paths:
        copy = tmp_path / f"without {path.name}"
        shutil.copytree(tmp_path / "spool", copy)
        (copy / path.name).unlink()
        assert is_whole(copy) == (path.suffix != ".spool")
    for path in paths:
        for cut in {1, 100, path.stat().st_size // 2, path.stat().st_size}:
            copy = tmp_path / f"{path.name} cut by {cut}"
            shutil.copytree(tmp_path / "spool", copy)
            with open(copy / path.name, "rb+") as file:
                file.truncate(max(path.stat().st_size - cut, 0))
            assert is_whole(copy) or path.name != "lock"


def test_a_spool_of_another_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    earlier = b"PQ\x03\x00" + bytes(100)
    (tmp_path / "00000001.spool").write_bytes(earlier)
    with pytest.raises(
        SpoolError, match=r"another version of this program \(format 1, ours is 4\)"
    ):
        Spool(tmp_path)
    assert (tmp_path / "00000001.spool").read_bytes() == earlier
    with pytest.raises(SpoolError, match="another version"):
        Spool(tmp_path)  # and the directory is not held by the first try


def test_a_power_cut_while_a_segment_begins_costs_nothing(tmp_path: Path) -> None:
    """At each sync of a rotation in turn; of what is not synced, half a kilobyte made it."""

    class PowerCut(BaseException):
        pass

    class Disk(FailingDisk):
        syncs_left = 10**9

        def fsync(self, file: int) -> None:
            self.syncs_left -= 1
            if self.syncs_left < 0:
                raise PowerCut
            path = os.readlink(f"/proc/self/fd/{file}")
            if os.path.isfile(path):
                synced[Path(path).name] = os.fstat(file).st_size

        fdatasync = fsync

    for syncs in range(6):
        synced: dict[str, int] = {}
        disk = Disk()
        before, after = tmp_path / f"before {syncs}", tmp_path / f"after {syncs}"
        spool = Spool(before, segment_bytes=8000, fs=disk)
        put(spool, *(event(i) for i in range(20)))
        disk.syncs_left = syncs
        with contextlib.suppress(PowerCut):
            for i in range(20, 60):
                spool.put(entry_of(event(i)))
        disk.syncs_left = 10**9
        spool.close()
        after.mkdir()
        for path in before.glob("*.spool"):
            durable = synced.get(path.name, 0) + 500
            (after / path.name).write_bytes(path.read_bytes()[:durable])
        assert [entry.id.idx for entry in found(after)][:20] == list(range(20))


def test_one_event_that_is_not_settled_does_not_keep_all_that_follows(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=20_000)
    for i in range(1000):
        spool.put(entry_of(event(i, side=16)))
        if i % 100:
            spool.settled(event(i).id, quarantined=False)
    used = sum(path.stat().st_size for path in tmp_path.glob("*.spool"))
    assert used < 100_000, "ten of a thousand events of half a kilobyte are alive"
    for i in range(0, 1000, 100):
        spool.settled(event(i).id, quarantined=False)
    spool.sync()
    assert len(list(tmp_path.glob("*.spool"))) == 1
    spool.close()
    again = Spool(tmp_path)
    assert again.replay.entries == []
    assert list(again.replay.keys.intervals()) == [("s", 0, [0, 1000])]
    again.close()


def test_moved_events_keep_their_order_and_what_is_known_of_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=5000)
    entries = [entry_of(event(i, side=16)) for i in range(200)]
    for i, entry in enumerate(entries):
        spool.put(entry)
        if i == 7:
            entry.losses, entry.reason = 3, "bad"
            spool.note(entry)
        if i % 50 != 7:
            spool.settled(entry.id, quarantined=False)
    spool.sync()
    spool.close()
    assert not (tmp_path / "00000001.spool").exists()
    back = found(tmp_path)
    assert [entry.id.idx for entry in back] == [7, 57, 107, 157]
    assert [(entry.losses, entry.reason) for entry in back] == [(3, "bad")] + [(0, None)] * 3


class NoRoom:
    """A file system on which no segment can be begun."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if path.endswith(".spool") and flags & os.O_EXCL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.open(path, flags, mode)


def test_an_event_that_was_moved_stays_where_it_was_until_that_is_on_disk(tmp_path: Path) -> None:
    """Moved, killed, started again on a full disk, and then the power fails."""
    first, killed, cut = (tmp_path / name for name in ("first", "killed", "cut"))
    spool = Spool(first, segment_bytes=5000)
    spool.books({"uid": "q"})
    spool.put(entry_of(event(0, side=16)))
    spool.sync()
    idx = 0
    while not spool._live._moved_to:
        idx += 1
        spool.put(entry_of(event(idx, side=16)))
        spool.settled(event(idx).id, quarantined=False)
        if not spool._live._moved_to:
            spool.sync()
    shutil.copytree(first, killed)
    spool.close()
    again = Spool(killed, fs=cast(FileSystem, NoRoom()))
    assert [entry.id.idx for entry in again.replay.entries] == [0]
    assert again.replay.accepted == idx + 1
    shutil.copytree(killed, cut)
    mark = again._mark.mark
    assert mark is not None
    os.truncate(cut / f"{mark.number:08d}.spool", mark.size)
    again.close()
    last = Spool(cut)
    assert event(0).id in {entry.id for entry in last.replay.entries}
    last.sync()
    last.close()


def test_a_spool_has_one_queue_and_one_owner(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert (tmp_path / "spool").stat().st_mode & 0o077 == 0
    with pytest.raises(SpoolError, match="belongs to a queue that is alive"):
        Spool(tmp_path / "spool")
    spool.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match=r"cannot be used.*name another one"):
        Spool(tmp_path / "file")


@pytest.mark.parametrize("fails", ["write", "open", "fsync", "fdatasync", "pwrite"])
def test_a_full_disk_confirms_nothing_and_spoils_nothing(tmp_path: Path, fails: str) -> None:
    """At a write, when a segment begins, and at a sync: it goes on when there is room again."""
    disk = FailingDisk()
    spool = Spool(tmp_path, segment_bytes=1000, fs=disk)
    confirmed, tried = [], 0
    for round_ in range(8):
        disk.fails = {fails} if round_ % 2 else set()
        for _ in range(5):
            with contextlib.suppress(OSError):
                spool.put(entry_of(event(tried)))
                spool.sync()
                confirmed.append(tried)
            tried += 1
        if confirmed[-1] % 4 == 0:
            spool.settled(event(confirmed[-1]).id, quarantined=False)
            confirmed.pop()
    assert len(confirmed) >= 16
    spool.close()
    assert set(confirmed) <= {entry.id.idx for entry in found(tmp_path)}


def test_what_is_known_of_producers_is_on_disk_before_anything_else_is_confirmed(
    tmp_path: Path,
) -> None:
    disk = FailingDisk()
    spool = Spool(tmp_path, fs=disk)
    put(spool, event(0))
    before = spool.position
    disk.fails = {"write"}
    spool.books({"open": ["p"]})
    assert spool.position > before, "so that whoever waits for it does not take it for written"
    with pytest.raises(OSError, match="No space left"):
        spool.sync()
    disk.fails = set()
    spool.sync()
    spool.close()
    again = Spool(tmp_path)
    assert again.replay.books == {"open": ["p"]}
    again.close()


def test_after_a_sync_that_failed_nothing_in_that_file_is_confirmed(tmp_path: Path) -> None:
    disk = FailingDisk()
    spool = Spool(tmp_path / "spool", fs=disk)
    put(spool, event(0))
    first, _ = spool.position
    synced = (tmp_path / "spool" / "00000001.spool").read_bytes()
    spool.put(entry_of(event(1)))
    disk.fails = {"fdatasync"}
    sync, later = spool.syncing(), spool.syncing()
    with pytest.raises(OSError, match="No space left"):
        sync()
    disk.fails = set()
    with pytest.raises(OSError, match="earlier sync of the same file failed"):
        later()
    spool.sync()
    assert spool.position > (first + 1, 0), "a new file has it"
    spool.close()
    (tmp_path / "spool" / "00000001.spool").write_bytes(synced)  # the rest never arrived
    assert [entry.id.idx for entry in found(tmp_path / "spool")] == [0, 1]


def test_a_full_spool_makes_room_by_itself_once_its_records_are_settled(tmp_path: Path) -> None:
    """Not even a settlement can be written then, and old segments go all the same."""

    class Small(FailingDisk):
        def write(self, file: int, data: bytes | memoryview) -> int:
            used = sum(path.stat().st_size for path in tmp_path.glob("*.spool"))
            if used + len(data) > 20_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.write(file, data)

    spool = Spool(tmp_path, segment_bytes=2000, fs=Small())
    accepted = 0
    with contextlib.suppress(OSError):
        for i in range(1000):
            spool.put(entry_of(event(i)))
            accepted += 1
    assert accepted < 1000
    for i in range(accepted):
        spool.settled(event(i).id, quarantined=False)
    put(spool, event(accepted))
    spool.close()
    assert [entry.id.idx for entry in found(tmp_path)] == [accepted]


def test_a_queue_that_comes_back_on_a_full_disk_waits_for_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.books({"uid": "q"})
    put(spool, event(0), event(1))
    spool.close()
    disk: Any = FailingDisk("write")
    again = Spool(tmp_path, fs=disk)
    assert [entry.id.idx for entry in again.replay.entries] == [0, 1]
    with pytest.raises(OSError, match="No space left"):
        again.put(entry_of(event(2)))
    with pytest.raises(OSError, match="No space left"):
        again.syncing()
    again.settled(event(0).id, False)
    again.tidy()
    disk.fails.clear()
    again.tidy()
    put(again, event(2))
    again.close()
    assert [entry.id.idx for entry in found(tmp_path)] == [1, 2]
    disk.fails.add("write")
    with pytest.raises(SpoolError, match=r"cannot be used.*No space left"):
        Spool(tmp_path / "new", fs=disk)


def test_what_was_quarantined_is_counted_after_its_segment_is_gone(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=1000)
    spool.books({"uid": "q"})
    put(spool, event(0))
    put(spool, *(event(i, side=20) for i in range(1, 4)))  # each begins another segment
    for idx in range(3):
        spool.settled(event(idx).id, quarantined=idx != 1)
    spool.sync()
    first, *_ = sorted(tmp_path.glob("*.spool"))
    assert first.name != "00000001.spool", "the first segment is deleted"
    spool.close()
    again = Spool(tmp_path)
    again.close()
    assert (again.replay.accepted, again.replay.quarantined) == (4, 2)


def test_what_a_killed_queue_left_behind_the_mark_is_written_again(tmp_path: Path) -> None:
    """It may be in the system's memory only, and the sync that failed have been the one before."""
    spool = Spool(tmp_path)
    put(spool, event(0))
    synced = spool.position[1]
    spool.put(entry_of(event(1)))
    spool.close()
    Spool(tmp_path).close()
    os.truncate(tmp_path / "00000001.spool", synced)
    assert [entry.id.idx for entry in found(tmp_path)] == [0, 1]


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
