"""Every kind of item that the fuzzer knows, through queue, spool, reader and quarantine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from benchmarks.reliability.fuzz_kinds import AT_PUT, GOOD, WRITTEN, Kind, kinds
from peaknet_predict.batching import Batcher
from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.quarantine import Quarantine, read_index
from peaknet_predict.queues.records import ForeignItem, purged
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.queues.wire import item_to_event
from peaknet_predict.types import Event, EventId

IMAGE = np.random.default_rng(0).normal(100, 5, (1, 32, 32)).astype(np.float32)
JUDGED_LATER = "no pixel of the image is finite"  # by the device


class NoSync:
    """The disk, but nobody waits for it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, file: int) -> None:
        pass

    fdatasync = fsync


class Chain:
    """A queue and its reader."""

    def __init__(self, directory: Path) -> None:
        fs: Any = NoSync()
        self.directory = directory
        self.quarantine = Quarantine(directory / "q", 2**40, "u", fs)
        self.spool = Spool(directory / "s", fs=fs)
        self.state = QueueState(
            "events",
            10**6,
            2**40,
            uid="u",
            quarantine=lambda entry, reason: self.quarantine.keep(entry.id, reason, entry.record),
            journal=self.spool,
        )
        self.state.open("p")

    def read(self) -> dict[EventId, Event | str]:
        """Take what is there: the events that make batches, and why the others do not."""
        found: dict[EventId, Event | str] = {}
        batcher = Batcher(1000, max_event_bytes=2 * 10**6)
        self.state.ask("g", "h", 0)
        given = self.state.take("g", "h", self.state.accepted, 10**6)
        parts = [item_to_event(*_of(r)) if isinstance(r, ForeignItem) else r for r in given.records]
        batches = [*batcher.add(parts), batcher.take()]
        for batch in batches:
            found |= {event.id: event for event in batch.events}
            found |= {refusal.id: refusal.reason for refusal in batch.refused if refusal.id}
        tokens = dict(zip([part.id for part in parts], given.tokens, strict=True))
        reasons = {tokens[key]: why for key, why in found.items() if isinstance(why, str)}
        assert self.state.reject(reasons) == []
        assert self.state.ack([token for token in given.tokens if token not in reasons]) == []
        return found

    def lines(self) -> list[dict[str, Any]]:
        """The quarantine's index, once all is settled and the spool can be read again."""
        assert self.state.accepted == self.state.acknowledged + self.state.quarantined
        self.spool.sync()
        self.spool.close()
        assert Spool(self.directory / "s").replay.entries == []
        return read_index(self.directory / "q")


def _of(item: ForeignItem) -> tuple[Any, str, int]:
    return item.payload, item.stream, item.position


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def check_pixels(event: Event, sent: Any) -> None:
    np.testing.assert_array_equal(event.image, np.ma.getdata(np.asarray(sent)))
    assert 9000 < event.photon_energy < 10000


def test_items_of_other_programs_are_written_or_kept_with_a_reason(chain: Chain) -> None:
    sent = [(kind, kind.make(idx, IMAGE)) for idx, kind in enumerate(all_kinds())]
    for number, (kind, item) in enumerate(sent, 1):
        assert chain.state.put_foreign(item), kind.name
        assert chain.state.accepted == number, kind.name
    written = {key: event for key, event in chain.read().items() if isinstance(event, Event)}
    lines = chain.lines()
    assert len(written) + len(lines) == len(sent)
    for key, event in written.items():
        kind, item = sent[key.idx]
        assert kind.fate in (WRITTEN, JUDGED_LATER), kind.name
        if kind.fate == WRITTEN:
            check_pixels(event, list.__getitem__(item, 2) if isinstance(item, list) else item[2])
    for line in lines:
        kind, _ = sent[line["idx"]]  # the item's own number, or its position
        known = "not an ndarray" if "cannot be unpickled" in kind.fate else kind.fate
        assert known in line["reason"] or kind.fate == AT_PUT, (kind.name, line["reason"])
        assert line["reason"].isprintable()
        with h5py.File(chain.directory / "q" / line["file"]) as file:
            assert file.attrs["reason"] == line["reason"]


def all_kinds() -> list[Kind]:
    found = [GOOD, *kinds(), GOOD]
    assert len({kind.name for kind in found}) > 290
    return found


def test_events_of_our_own_producers_are_written_or_kept_with_a_reason(chain: Chain) -> None:
    for idx, kind in enumerate(all_kinds()):
        item = kind.make(idx, IMAGE)
        parts = sanitized(item)
        if not isinstance(parts, list | tuple) or len(parts) != 4:
            with pytest.raises(TypeError, match="only an Event or a Result can be put"):
                purged(item)
            continue
        rank, number, image, energy = list.__iter__(item) if isinstance(item, list) else item
        event = purged(Event(EventId(kind.name, rank, number), image, energy))
        counts = chain.state.accepted, chain.state.quarantined
        assert chain.state.put("p", [event]) == 1
        assert chain.state.put("p", [event]) == 1
        assert chain.state.accepted == counts[0] + 1, kind.name
        for found in chain.read().values():
            if isinstance(found, Event) and kind.fate != JUDGED_LATER:
                assert kind.is_written_of_ours, kind.name
                check_pixels(found, image)
                assert [type(part) for part in found.id] == [str, int, int]
        if kind.fate != JUDGED_LATER:
            assert (chain.state.quarantined == counts[1]) == kind.is_written_of_ours, kind.name
    assert all(line["reason"].isprintable() for line in chain.lines())


def test_two_events_whose_names_only_look_alike_are_two(chain: Chain) -> None:
    for idx in ([*range(5000), 1], [*range(5000), 2]):
        image = IMAGE + len(idx) + idx[-1]
        event = Event(EventId("s", 0, idx), image, 9500.0)  # type: ignore[arg-type]
        assert chain.state.put("p", [purged(event)] * 2) == 2
    assert (chain.state.accepted, chain.state.quarantined) == (2, 2)
