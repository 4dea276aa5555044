from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from peaknet_predict.keys import KeySet
from peaknet_predict.queues.dispatch import Delivery
from peaknet_predict.queues.quarantine import Quarantine, read_index
from peaknet_predict.queues.records import END_MARKER, Entry, ForeignItem
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.queues.wire import item_to_event
from peaknet_predict.types import Event, EventId, Refusal, Result, identity_problem
from tests.helpers.examples import examples


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def event(idx: int, size: int = 4) -> Event:
    return Event(EventId("s", 0, idx), np.zeros((1, 1, size), np.uint8), 9000.0)


def get(
    state: QueueState, reader: str, holder: str, request: int, most: int, resumes: bool = False
) -> Delivery:
    """Make a request that does not wait."""
    answer = state.ask(reader, holder, request, resumes)
    return answer or state.take(reader, holder, request, most)


def ask(state: QueueState, reader: str = "r", most: int = 3, holder: str | None = None) -> Delivery:
    """Ask as a process does: every request has a number of its own."""
    ask.requests += 1  # type: ignore[attr-defined]
    return get(state, reader, holder or reader, ask.requests, most)  # type: ignore[attr-defined]


ask.requests = 0  # type: ignore[attr-defined]


def ids(delivery: Delivery) -> list[int]:
    return [record.id.idx for record in delivery.records]


def tokens(delivery: Delivery) -> list[int]:
    return delivery.tokens


def take_all(state: QueueState, reader: str = "r") -> list[int]:
    taken = []
    while (delivery := ask(state, reader)).tokens:
        taken += ids(delivery)
        state.ack(tokens(delivery))
    return taken


def test_records_come_out_in_order_and_the_end_comes_after_the_last() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    assert state.put("p", [event(i) for i in range(5)]) == 5
    assert take_all(state) == [0, 1, 2, 3, 4]
    assert not ask(state).ended, "empty is not ended while a producer is open"
    state.close("p")
    assert ask(state).ended
    assert ask(state).ended, "the end is a state: every reader of the run sees it"


def test_capacity_in_events_and_in_bytes() -> None:
    by_events = QueueState("events", 2, 1000)
    by_events.open("p")
    assert by_events.put("p", [event(i) for i in range(5)]) == 2
    assert by_events.put("p", [event(2)]) == 0
    by_bytes = QueueState("events", 100, 10)
    by_bytes.open("p")
    assert by_bytes.put("p", [event(i, size=4) for i in range(5)]) == 2
    take_all(by_bytes)
    assert by_bytes.put("p", [event(9, size=50)]) == 1, "or it could never be put"


def test_a_retried_put_is_no_duplicate() -> None:
    state = QueueState("events", 2, 1000)
    state.open("p")
    assert state.put("p", [event(0), event(1), event(2)]) == 2
    assert state.put("p", [event(0), event(1)]) == 2, "the answer was lost: done already"
    assert take_all(state) == [0, 1]
    assert state.put("p", [event(0), event(1), event(2)]) == 3
    assert take_all(state) == [2]
    assert (state.accepted, state.duplicates) == (3, 4)
    state.close("p")
    assert state.put("p", [event(1)]) == 1, "known, whoever says it"


def test_the_stream_ends_when_the_last_of_several_producers_closes() -> None:
    state = QueueState("events", 10, 1000)
    state.open("a", of=2)
    state.close("a")
    assert not ask(state).ended, "the second producer has yet to open"
    state.open("b", of=2)
    state.put("b", [event(1)])
    state.close("b")
    assert take_all(state) == [1]
    assert ask(state).ended


def test_the_end_waits_for_what_others_hold_and_asks_for_what_one_holds() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.put("p", [event(0), event(1)])
    state.close("p")
    mine, theirs = ask(state, holder="a", most=1), ask(state, holder="b", most=1)
    assert (mine.flush, theirs.flush) == (False, True), "b has the last one"
    nothing = ask(state, holder="a")
    assert (nothing.ended, nothing.flush) == (False, True)
    state.ack(tokens(mine))
    nothing = ask(state, holder="a")
    assert (nothing.ended, nothing.flush) == (False, False), "b may yet die"
    state.release(tokens(theirs))
    again = ask(state, holder="a")
    assert ids(again) == [1]
    state.ack(tokens(again))
    assert ask(state, holder="a").ended


def test_silence_beyond_the_lease_puts_records_back_in_order_under_new_tokens() -> None:
    clock = Clock()
    state = QueueState("events", 10, 1000, lease_s=10, clock=clock)
    state.open("p")
    state.put("p", [event(i) for i in range(4)])
    lost = ask(state, holder="a", most=2)
    clock.now = 6.0
    state.heartbeat("a", ["p"])
    clock.now = 12.0
    assert ids(ask(state, holder="b", most=9)) == [2, 3], "it was heard of at 6 s"
    clock.now = 17.0
    again = ask(state, holder="b", most=9)
    assert ids(again) == [0, 1]
    assert again.lost_by == {token: ["a"] for token in tokens(again)}
    assert state.ack(tokens(lost)) == tokens(lost), "a late acknowledgement means nothing"
    assert state.held(tokens(lost) + tokens(again)) == tokens(again)
    assert state.ack(tokens(again)) == []
    assert state.statistics().redeliveries == 2


def test_a_repeated_request_gets_the_same_answer() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.put("p", [event(i) for i in range(4)])
    first = get(state, "r", "h", 7, 2)
    assert get(state, "r", "h", 7, 2) == first
    assert ids(get(state, "r", "h", 8, 2)) == [2, 3]


def test_a_record_that_kills_its_readers_is_isolated_and_then_quarantined() -> None:
    clock, kept = Clock(), []
    state = QueueState(
        *("events", 10, 1000),
        lease_s=10,
        max_losses=4,
        clock=clock,
        quarantine=lambda entry, reason: kept.append((entry.id.idx, reason)),
    )
    state.open("p")
    state.put("p", [event(i) for i in range(4)])
    done: list[int] = []
    for life in range(8):
        holder = f"life {life}"
        while True:
            delivery = ask(state, holder=holder)
            if 1 in ids(delivery):  # event 1 kills
                clock.now += 11
                state.heartbeat("nobody", ["p"])
                break
            if not delivery.tokens:
                break
            state.ack(tokens(delivery))
            done += ids(delivery)
    assert sorted(done) == [0, 2, 3], "nobody else is blamed"
    ((idx, reason),) = kept
    assert idx == 1
    assert "cost 4 readers" in reason
    assert "silent for 10 s" in reason
    statistics = state.statistics()
    assert (statistics.quarantined, statistics.acknowledged) == (1, 3)
    assert "s:0:1: cost 4 readers" in statistics.quarantine[0]


def test_what_may_be_poison_waits_until_its_reader_holds_nothing_else() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.put("p", [event(i) for i in range(3)])
    for _ in range(2):
        state.release(tokens(ask(state, most=1)), failure="it raised")
    alone = ask(state)
    assert ids(alone) == [0]
    assert alone.flush
    waiting = ask(state)
    assert (waiting.tokens, waiting.flush) == ([], True), "nothing beside it"
    state.release(tokens(alone))
    other = ask(state, holder="other", most=1)
    assert ids(other) == [0], "given back freely is no loss, but it stays isolated"
    state.ack(tokens(other))
    assert ids(ask(state)) == [1, 2]


def test_a_silent_producer_is_closed_and_may_come_back() -> None:
    clock = Clock()
    state = QueueState("events", 10, 1000, producer_timeout_s=60, clock=clock)
    state.open("p")
    clock.now = 61.0
    delivery = ask(state)
    assert delivery.ended
    assert "silent for 60 s" in delivery.failures["p"]
    state.open("p")
    state.put("p", [event(0)])
    state.close("p")
    assert state.statistics().failures == {}
    assert take_all(state, "next") == [0]


def test_a_producer_that_was_interrupted_and_goes_on_makes_its_stream_whole() -> None:
    state = QueueState("events", 10, 1000)
    for name in ("a", "b"):
        state.open(name, of=2)
    state.put("a", [event(0)])
    state.close("a")
    state.close("b", failure="interrupted")
    assert not ask(state, most=0).ended, "an event is left"
    state.open("b", of=2)  # nobody waits for the other one, which has done its part
    state.put("b", [event(1)])
    state.close("b")
    assert take_all(state) == [0, 1]
    delivery = ask(state)
    assert delivery.ended
    assert delivery.failures == {}


def test_a_producer_that_only_slept_goes_on() -> None:
    clock = Clock()
    state = QueueState("events", 10, 1000, producer_timeout_s=60, clock=clock)
    state.open("p")
    clock.now = 61.0
    assert ask(state, "first").ended
    assert state.put("p", [event(0)]) == 1
    assert take_all(state, "next") == [0]
    assert state.statistics().failures == {}


def test_one_producer_of_a_group_closes_the_parts_of_the_silent_ones() -> None:
    clock = Clock()
    state = QueueState("results", 10, 1000, producer_timeout_s=60, clock=clock)
    for rank in range(3):
        state.open(f"predict:x:{rank}", of=3)
    clock.now = 61.0
    state.heartbeat("h", ["predict:x:1"])
    state.tick()
    clock.now = 62.0
    state.heartbeat("h", ["predict:x:1"])
    state.close_group("predict:x:")
    assert ask(state).ended
    assert state.statistics().failures == {}


def test_a_reader_that_joins_after_the_end_waits_for_the_next_run() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.close("p")
    assert ask(state, "first run").ended
    assert not ask(state, "second run").ended
    state.open("q")
    state.put("q", [event(7)])
    state.close("q")
    assert take_all(state, "second run") == [7]
    assert ask(state, "second run").ended


def test_a_reader_that_takes_the_place_of_a_dead_one_waits_for_no_other_run() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.close("p")
    assert ask(state, "first").ended
    assert get(state, "again", "again", 1, 1, resumes=True).ended
    assert not get(state, "next", "next", 1, 1).ended


def test_a_reader_that_joins_late_still_gets_a_run_that_nobody_read() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.close("p")
    assert ask(state).ended, "an empty run ends, too"


def test_end_markers_of_one_run_do_not_end_the_next() -> None:
    state = QueueState("results", 10, 1000)
    state.open("p")
    state.close("p", end_markers=2)
    assert state.get_foreign() == END_MARKER
    state.open("q")
    assert state.get_foreign() is None
    state.close("q", end_markers=1)
    assert state.get_foreign() == END_MARKER
    assert state.get_foreign() is None


def test_foreign_puts_end_with_none_and_begin_again_with_the_next_item() -> None:
    state = QueueState("events", 1, 1000)
    assert state.put_foreign([0, 0, np.zeros(3), 1.0])
    assert not state.put_foreign([0, 1, np.zeros(3), 1.0]), "full"
    assert state.put_foreign(None)
    first = ask(state)
    assert isinstance(first.records[0], ForeignItem)
    assert first.records[0].nbytes == 24 + 4 * 8
    state.ack(tokens(first))
    assert ask(state).ended
    assert state.put_foreign([0, 0, np.zeros(3), 1.0])
    assert ask(state).ended, "what a reader was told stays so"
    again = ask(state, "next")
    assert again.records[0].id != first.records[0].id, "idx repeats from run to run"
    assert not ask(state, "next").ended


def test_a_foreign_producer_that_begins_anew_loses_nothing() -> None:
    state = QueueState("events", 9, 1000)
    for idx in (0, 1, 0, 1):
        assert state.put_foreign([3, idx, np.zeros(3), 1.0])
    records = [record.id for record in ask(state, most=9).records]
    assert len(set(records)) == 4
    assert [key.idx for key in records] == [0, 1, 0, 1]


def fill_by_retrying(state: QueueState, count: int) -> list[EventId]:
    """Put items as psana-ray does, again and again while the queue is full; return what came."""
    seen: list[EventId] = []
    for idx in range(count):
        item = [0, idx, np.zeros((1, 64, 64), np.float32), 9500.0]
        while not state.put_foreign(item):
            delivery = ask(state, most=1)
            seen += [record.id for record in delivery.records]
            state.ack(tokens(delivery))
    while (delivery := ask(state, most=10)).tokens:
        seen += [record.id for record in delivery.records]
        state.ack(tokens(delivery))
    return seen


@pytest.mark.parametrize("capacity", [(400, 100_000), (5, 10**9)])
def test_a_put_that_is_tried_again_while_the_queue_is_full_keeps_its_streams_name(
    capacity: tuple[int, int],
) -> None:
    state = QueueState("events", *capacity)
    seen = fill_by_retrying(state, 100)
    assert [key.idx for key in seen] == list(range(100))
    assert len({key.stream for key in seen}) == 1
    assert len(list(state.keys.intervals())) == 1


def test_two_producers_with_one_rank_cost_no_memory_that_grows() -> None:
    state = QueueState("events", 5, 10**9)
    seen = set()
    for idx in range(200):
        for _ in range(2):
            assert state.put_foreign([0, idx, np.zeros((1, 2, 2)), 9500.0])
            assert state.put_foreign("no event")
        delivery = ask(state, most=5)
        seen |= {record.id for record in delivery.records}
        state.ack(tokens(delivery))
    assert len(seen) == 800, "each is an event of its own"
    assert len(list(state.keys.intervals())) <= 4


def test_what_no_other_process_may_know_is_replaced_by_its_description() -> None:
    class Strange:
        def __repr__(self) -> str:
            raise RuntimeError("not even a text")

    state = QueueState("events", 9, 1000)
    state.put_foreign([0, 0, Strange(), 1.0])
    state.put_foreign({"set", "of"})
    first, second = ask(state).records
    assert isinstance(first, ForeignItem)
    assert isinstance(second, ForeignItem)
    assert "Strange (its repr fails: RuntimeError)" in repr(first.payload)
    assert "set {" in repr(second.payload)


def test_a_producer_that_has_not_opened_is_told_so() -> None:
    with pytest.raises(ValueError, match="has not opened"):
        QueueState("events", 1, 1).put("nobody", [event(1)])


NUMBERS: list[Any] = [2**63, 2**70, -(2**63) - 1, 10**5000, "7", None, 1.5]
RANKS: list[Any] = [10**30, -(10**30), "rank", True]
NAMES: list[Any] = ["a\0b", "half\ud800", "two\nlines", "x" * 300, 5]
IMPOSSIBLE = [
    *(EventId("s", 0, idx) for idx in NUMBERS),
    *(EventId("s", rank, 7) for rank in RANKS),
    *(EventId(stream, 0, 7) for stream in NAMES),
]


def test_an_event_whose_identity_no_file_can_hold_is_quarantined_at_the_border(
    tmp_path: Path,
) -> None:
    quarantine, spool = Quarantine(tmp_path / "q", 10**6, "u"), Spool(tmp_path / "spool")

    def keep(entry: Entry, reason: str) -> bool:
        return quarantine.keep(entry.id, reason, entry.record, entry.losses)

    state = QueueState("events", 3, 1000, uid="u", quarantine=keep, journal=spool)
    state.open("p")
    image = np.zeros((1, 2, 2), np.uint8)
    bad = [Event(key, image, 9000.0) for key in IMPOSSIBLE]
    for _ in range(2):  # the answer to the first put was lost
        assert state.put("p", [event(0), *bad, event(1)]) == len(bad) + 2
    assert ids(ask(state)) == [0, 1]
    now = state.statistics()
    assert (now.accepted, now.quarantined, now.duplicates) == (len(bad) + 2, len(bad), len(bad) + 2)
    lines = read_index(tmp_path / "q")
    assert len(lines) == len(bad)
    assert all("cannot be kept" in line["reason"] for line in lines)
    assert sum("does not fit in 64 bits" in line["reason"] for line in lines) == 6
    assert not any("\n" in line or "\0" in line for line in now.quarantine)
    spool.sync()
    spool.close()
    again = Spool(tmp_path / "spool").replay
    assert [entry.id.idx for entry in again.entries] == [0, 1]
    assert (again.accepted, again.quarantined) == (len(bad) + 2, len(bad))


@pytest.mark.parametrize("name", [(-1, 0), (0, -1), (2**63, 0), (0, 2**63), (10**30, 1)])
def test_a_foreign_item_with_such_an_identity_takes_that_of_no_other(name: Any) -> None:
    state = QueueState("events", 9, 10**6)
    state.put_foreign("no event")
    state.put_foreign([*name, np.zeros((1, 2, 2)), 9000.0])
    state.put_foreign([0, 0, np.zeros((1, 2, 2)), 9000.0])
    refused, bad, good = ask(state).records
    assert isinstance(bad, ForeignItem)
    found = item_to_event(bad.payload, bad.stream, bad.position)
    assert isinstance(found, Refusal)
    assert found.id == bad.id
    assert "integers from 0 to 2^63 - 1" in found.reason
    assert len({refused.id, bad.id, good.id}) == 3


@given(
    stream=st.text(st.characters(codec=None), max_size=5),
    rank=st.integers() | st.none() | st.text(max_size=2),
    idx=st.integers(-(2**65), 2**65),
)
def test_whatever_its_identity_a_record_is_ready_or_quarantined(
    stream: Any, rank: Any, idx: Any
) -> None:
    rejected: list[Entry] = []
    state = QueueState("events", 9, 1000, quarantine=lambda entry, _: rejected.append(entry))
    state.open("p")
    one = Event(EventId(stream, rank, idx), np.zeros((1, 2, 2), np.uint8), 9000.0)
    assert state.put("p", [one, one]) == 2
    now = state.statistics()
    assert (now.accepted, now.duplicates) == (1, 1)
    assert now.ready + now.quarantined == 1
    assert now.quarantined == len(rejected)
    assert all(identity_problem(entry.id) is None for entry in rejected)


def test_a_result_that_is_no_result_is_quarantined_under_its_own_identity() -> None:
    state = QueueState("results", 9, 1000)
    state.open("p")
    nothing: Any = None
    result = Result(EventId("s", 0, 3), np.zeros((1, 2, 2)), nothing, 9000.0)
    assert state.put("p", [result]) == 1
    (line,) = state.statistics().quarantine
    assert line.startswith("s:0:3: result s:0:3: image, peaks and mask must be arrays")


def test_events_that_are_none_stay_apart_whatever_their_ranks() -> None:
    state = QueueState("events", 99, 10**6)
    state.open("p")
    picture: Any = "no array"
    names = [EventId("s", rank, idx) for rank in (-2, -1, 0) for idx in (-1, 0, 1)]
    assert state.put("p", [Event(key, picture, 9000.0) for key in names]) == 9
    assert len({record.id for record in ask(state, most=9).records}) == 9


def test_names_and_reasons_forge_no_lines() -> None:
    state = QueueState("events", 9, 1000)
    with pytest.raises(ValueError, match=r"must be printable text, not 'p\\n12:00 ERROR'"):
        state.open("p\n12:00 ERROR")
    state.open("p")
    state.put("p", [event(0)])
    state.reject(dict.fromkeys(tokens(ask(state)), "bad\n12:00 ERROR all is lost\x1b[2J"))
    state.close("p", failure="RuntimeError: one\ntwo\0")
    now = state.statistics()
    assert now.failures == {"p": r"RuntimeError: one\ntwo\x00"}
    assert now.quarantine == [r"s:0:0: bad\n12:00 ERROR all is lost\x1b[2J"]


def test_a_failed_producer_is_named() -> None:
    state = QueueState("events", 1, 1)
    state.open("p")
    state.close("p", failure="disk on fire")
    assert state.statistics().failures == {"p": "disk on fire"}


class Disk:
    """A quarantine whose disk may be full, and a journal that notes the order of things."""

    def __init__(self) -> None:
        self.full = False
        self.has: set[EventId] = set()
        self.written: list[Any] = []

    def quarantine(self, entry: Entry, reason: str) -> bool:
        if not self.full and entry.id not in self.has:
            self.written.append(("line", entry.id.idx, reason))
        return not self.full

    def put(self, entry: Entry) -> None:
        self.written.append(("put", entry.id.idx))

    def note(self, entry: Entry) -> None:
        self.written.append(("note", entry.id.idx, entry.losses, entry.reason))

    def settled(self, key: EventId, quarantined: bool) -> None:
        self.written.append(("settled", key.idx, quarantined))

    def books(self, books: dict[str, Any]) -> None:
        pass


def test_a_rejected_record_is_settled_once_the_quarantine_has_it_on_disk() -> None:
    disk = Disk()
    state = QueueState("events", 2, 1000, quarantine=disk.quarantine, journal=disk)
    state.open("p")
    state.put("p", [event(0), event(1)])
    disk.full = True
    delivery = ask(state, most=2)
    state.reject(dict.fromkeys(tokens(delivery), "bad"))
    assert state.put("p", [event(2)]) == 0, "what waits for the disk takes up room"
    state.close("p")
    assert not ask(state).ended
    now = state.statistics()
    assert (now.accepted, now.quarantining, now.quarantined, now.leased) == (2, 2, 0, 0)
    assert not [line for line in disk.written if line[0] == "settled"]
    state.settlements.confirm([event(0).id])
    state.settlements.confirm([event(0).id, event(1).id, event(7).id])
    assert [line for line in disk.written if line[0] == "settled"] == [
        ("settled", 0, True),
        ("settled", 1, True),
    ]
    assert ask(state).ended
    now = state.statistics()
    assert (now.quarantining, now.quarantined) == (0, 2)


def test_a_quarantine_that_raises_loses_nothing() -> None:
    def broken(entry: Entry, reason: str) -> bool:
        raise RuntimeError("HDF5 says no")

    state = QueueState("events", 9, 1000, quarantine=broken)
    state.open("p")
    state.put("p", [event(0)])
    delivery = ask(state)
    with pytest.raises(RuntimeError, match="HDF5 says no"):
        state.reject(dict.fromkeys(tokens(delivery), "bad"))
    assert state.statistics().quarantining == 1


def test_what_happened_to_a_record_survives_the_queue() -> None:
    """Losses, so that a poison message does not begin anew, and reasons."""
    disk = Disk()
    entries = [Entry(event(i), event(i).id, 4) for i in range(4)]
    entries[1].losses, entries[1].lost_by = 4, ["a", "b", "c", "d"]
    entries[2].reason = "bad"
    keys = KeySet(entry.id for entry in entries)
    state = QueueState("events", 9, 1000, quarantine=disk.quarantine, journal=disk)
    disk.has = {event(3).id}
    state.restore(entries, keys, None, 4, 0, kept={event(3).id: "worse"})
    now = state.statistics()
    assert (now.accepted, now.ready, now.quarantined, now.acknowledged) == (4, 2, 2, 0)
    assert disk.written == [
        ("note", 2, 0, "bad"),
        ("line", 2, "bad"),
        ("settled", 2, True),
        ("note", 3, 0, "worse"),
        ("settled", 3, True),
    ], "the last had its line before, and gets no second one"
    poison = ask(state)
    assert ids(poison) == [1]
    assert poison.flush
    state.release(tokens(poison), "it raised")
    assert ("line", 1, "cost 5 readers, the last time: it raised") in disk.written
    assert ids(ask(state, holder="another")) == [0]


def restarted(state: QueueState, clock: Clock, **settings: Any) -> QueueState:
    """Return the next life of a queue whose records have all been acknowledged."""
    again = QueueState("events", 10, 10**6, clock=clock, **settings)
    books, keys = state.streams.to_json(), KeySet.from_json(state.keys.to_json())
    again.restore([], keys, books, state.accepted, state.quarantined)
    return again


def foreign(idx: int) -> list[Any]:
    return [3, idx, np.zeros((1, 2, 2)), 9500.0]


def test_a_restart_ends_the_stream_of_a_producer_that_ended_with_the_queue() -> None:
    clock = Clock()
    state = QueueState("events", 10, 10**6, clock=clock)
    for idx in range(3):
        state.put_foreign(foreign(idx))
    assert len(take_all(state)) == 3
    state = restarted(state, clock, producer_timeout_s=60)
    clock.now = 59.0
    assert not ask(state).ended
    clock.now = 61.0
    delivery = ask(state)
    assert delivery.ended
    ((who, why),) = delivery.failures.items()
    assert who == "a program that knows only put"
    assert "rank 3 idx 2" in why
    assert "Start it again" in why


@pytest.mark.parametrize("survivors", [[3], [3, 4], []])
def test_ranks_that_ended_with_the_queue_are_named_though_another_ends_the_stream(
    survivors: list[int],
) -> None:
    clock = Clock()
    state = QueueState("events", 10, 10**6, clock=clock)
    for rank in (3, 4):
        state.put_foreign([rank, 0, *foreign(0)[2:]])
    assert len(take_all(state)) == 2
    state = restarted(state, clock)
    for rank in survivors:
        state.put_foreign([rank, 1, *foreign(0)[2:]])
    assert state.put_foreign(None)
    assert state.put_foreign(None), "once for each of several readers"
    take_all(state)
    dead = ", ".join(f"rank {rank} idx 0" for rank in (3, 4) if rank not in survivors)
    failures = state.statistics().failures
    assert len(failures) == (1 if dead else 0)
    assert all(f"The last events of those ranks: {dead}. If" in why for why in failures.values())


def test_a_producer_of_three_methods_that_survives_a_restart_goes_on_in_its_stream() -> None:
    clock = Clock()
    first = QueueState("events", 10, 10**6, clock=clock)
    first.put_foreign(foreign(0))
    (record,) = ask(first).records
    for pause_s, ends in ((30.0, False), (100.0, True)):
        state = restarted(first, clock, producer_timeout_s=60)
        clock.now += pause_s
        assert ask(state, "early").ended == ends
        state.put_foreign(foreign(1))
        clock.now += 1000
        (next_one,) = ask(state, "later").records
        assert next_one.id == EventId(record.id.stream, 3, 1)
        assert state.statistics().failures == {}, "none is missing"
        state.put_foreign(None)
        state = restarted(state, clock)
        state.put_foreign(foreign(0))
        (another,) = ask(state, "next").records
        assert another.id.stream != record.id.stream


def test_items_after_a_restart_never_take_the_identity_of_earlier_ones() -> None:
    clock = Clock()
    state = QueueState("events", 10, 10**6, clock=clock)
    seen = []
    for _ in range(4):
        for item in ("no event", foreign(0), foreign(1)):
            state.put_foreign(item)
        seen += [record.id for record in ask(state, most=9).records]
        # What was written down before the last items came is what the next life knows, and keys.
        state = restarted(state, clock)
    assert len(set(seen)) == len(seen) == 12


def test_an_item_lost_with_the_power_never_shares_its_identity_with_a_later_one() -> None:
    """A reader may have had it, and the next stage would take the later one for a duplicate."""
    clock = Clock()
    state = QueueState("events", 10, 10**6, clock=clock)
    seen = []
    for life in range(4):
        before = state
        state = restarted(before, clock)
        for item in ("no event", foreign(0), foreign(1), foreign(0)):
            state.put_foreign(item)
        seen += [record.id for record in ask(state, most=9).records]
        if life % 2 == 0:
            # None of it was on disk, but that this life had begun.
            state = restarted(restarted(before, clock), clock)
    assert len(set(seen)) == len(seen) == 16


def test_a_producer_that_comes_back_does_not_make_the_others_close_again() -> None:
    state = QueueState("events", 10, 10**6)
    for producer in ("a", "b"):
        state.open(producer, 2)
    state.put("b", [event(0)])
    for producer in ("a", "b"):
        state.close(producer)
    state.open("b", 2)  # its first close was not answered: it was killed, and started again
    assert not state.statistics().ended
    state.close("b")
    assert take_all(state) == [0]
    assert ask(state).ended
    state.open("b", 2)
    state.close("b")
    assert not state.statistics().ended, "this stream is another one"


class Died(Exception):
    """The queue's process has been killed."""


class Memory:
    """What a spool and a quarantine's disk know after the death of the queue's process."""

    def __init__(self) -> None:
        self.full = self.dies = False
        self.unsettled: dict[EventId, Entry] = {}
        self.accepted = self.quarantined = 0
        self.state_of_streams: dict[str, Any] | None = None
        self.kept: list[EventId] = []
        self.waiting: list[EventId] = []  # in the process's own memory

    def put(self, entry: Entry) -> None:
        self.unsettled[entry.id] = copy.deepcopy(entry)
        self.accepted += 1

    def note(self, entry: Entry) -> None:
        self.unsettled[entry.id] = copy.deepcopy(entry)

    def settled(self, key: EventId, quarantined: bool) -> None:
        del self.unsettled[key]
        self.quarantined += quarantined

    def books(self, books: dict[str, Any]) -> None:
        self.state_of_streams = copy.deepcopy(books)

    def quarantine(self, entry: Entry, reason: str) -> bool:
        if entry.id in self.kept:
            return True  # in an earlier life
        (self.waiting if self.full else self.kept).append(entry.id)
        if self.dies:
            raise Died
        return not self.full

    def retry(self) -> list[EventId]:
        done, self.waiting = ([], self.waiting) if self.full else (self.waiting, [])
        self.kept += done
        return done


class Conservation(RuleBasedStateMachine):
    """Any order of calls, silences, full disks and restarts, against a model.

    The model knows where each accepted key is.
    """

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.memory = Memory()
        self.lives = 0
        self.state = self.begin()
        self.state.open("a", of=2)
        self.state.open("b", of=2)
        self.accepted: set[EventId] = set()
        self.acked: set[EventId] = set()
        self.current: dict[int, tuple[EventId, str]] = {}  # as the model knows it
        self.heard: dict[str, float] = {}
        self.requests = 0
        self.waiting: list[tuple[str, int, int]] = []
        self.closed = False

    def begin(self) -> QueueState:
        """Begin a life of the queue."""
        self.lives += 1
        return QueueState(
            *("events", 5, 22),
            lease_s=10,
            producer_timeout_s=1e9,
            max_losses=3,
            first_token=1000 * self.lives,
            clock=self.clock,
            quarantine=self.memory.quarantine,
            journal=self.memory,
        )

    @property
    def quarantined(self) -> list[EventId]:
        return self.memory.kept + self.memory.waiting

    @rule(full=st.booleans())
    def fill_or_clear_the_disk(self, full: bool) -> None:
        self.memory.full = full

    @rule()
    def retry(self) -> None:
        self.state.settlements.confirm(self.memory.retry())

    @rule()
    def restart(self) -> None:
        """The process dies; the next one has what was written down."""
        memory, keys = self.memory, self.state.keys
        memory.waiting, memory.dies = [], False
        self.current = {}
        self.heard = {}
        self.waiting = []
        self.state = self.begin()
        self.state.restore(
            copy.deepcopy(list(memory.unsettled.values())),
            KeySet.from_json(keys.to_json()),
            memory.state_of_streams,
            memory.accepted,
            memory.quarantined,
            kept=dict.fromkeys(memory.kept, "bad"),
        )

    @rule(given=leases)
    def die_behind_the_quarantines_line(self, given: list[int]) -> None:
        """The line of the first is on disk, but not that it has been settled."""
        self.memory.dies = True
        with contextlib.suppress(Died):
            self.state.reject(dict.fromkeys(given, "bad"))
        self.restart()

    def expire(self) -> None:
        """What the model expects of time: silent holders hold nothing."""
        silent = {who for who, at in self.heard.items() if self.clock.now > at + 10}
        self.current = {t: (k, who) for t, (k, who) in self.current.items() if who not in silent}

    @precondition(lambda self: not self.closed)
    @rule(producer=st.sampled_from("ab"), first=st.integers(0, 30), count=st.integers(1, 6))
    def put(self, producer: str, first: int, count: int) -> None:
        records = [event(first + i, size=1 + (first + i) % 6) for i in range(count)]
        taken = self.state.put(producer, list(records))
        self.accepted |= {record.id for record in records[:taken]}
        waiting = len(self.memory.waiting)
        assert taken == count or len(self.state) + waiting > 0, "refused although there is room"

    @rule(target=leases, holder=st.sampled_from("xyz"), most=st.integers(1, 4))
    def get(self, holder: str, most: int) -> list[int]:
        self.expire()
        self.requests += 1
        self.heard[holder] = self.clock.now
        delivery = get(self.state, "r", holder, self.requests, most)
        repeated = get(self.state, "r", holder, self.requests, most)
        assert repeated.tokens == delivery.tokens
        return self.check(holder, delivery)

    def check(self, holder: str, delivery: Delivery) -> list[int]:
        """What is leased was there and is leased to nobody else; return its tokens."""
        for token, record in zip(delivery.tokens, delivery.records, strict=True):
            key = record.id
            assert key in self.accepted
            assert key not in self.acked
            assert key not in self.quarantined
            assert token not in self.current
            assert key not in {held for held, _ in self.current.values()}, "leased twice"
            self.current[token] = key, holder
        done = len(self.acked) + len(self.memory.kept)
        assert delivery.ended == (self.closed and done == len(self.accepted))
        return tokens(delivery)

    @rule(holder=st.sampled_from("xyz"), most=st.integers(1, 4))
    def wait(self, holder: str, most: int) -> None:
        """Ask where nothing is taken yet: see `answer`."""
        self.expire()
        self.requests += 1
        self.heard[holder] = self.clock.now
        if self.state.ask("r", holder, self.requests) is None:
            self.waiting.append((holder, self.requests, most))

    @precondition(lambda self: self.waiting)
    @rule(target=leases)
    def answer(self) -> list[int]:
        """Answer the call that has waited longest."""
        holder, request, most = self.waiting.pop(0)
        self.state.tick()
        self.expire()
        self.heard[holder] = self.clock.now
        return self.check(holder, self.state.take("r", holder, request, most))

    @rule(given=leases)
    def ack(self, given: list[int]) -> None:
        stale = self.state.ack(given)
        self.expire_to(stale, given)
        for token in set(given) - set(stale):
            key, _ = self.current.pop(token)
            assert key not in self.acked
            self.acked.add(key)

    @rule(given=leases)
    def reject(self, given: list[int]) -> None:
        stale = self.state.reject(dict.fromkeys(given, "bad"))
        self.expire_to(stale, given)
        for token in set(given) - set(stale):
            self.current.pop(token)

    @rule(given=leases, failure=st.sampled_from([None, "it raised"]))
    def release(self, given: list[int], failure: str | None) -> None:
        self.state.release(given, failure)
        for token in given:
            self.current.pop(token, None)

    def expire_to(self, stale: list[int], given: list[int]) -> None:
        """Tokens may be stale only for silence or because they were ended before."""
        for token in set(given) - set(stale):
            assert token in self.current
        for token in stale:
            held = self.current.pop(token, None)
            assert held is None or self.clock.now > self.heard[held[1]] + 10

    @rule(holder=st.sampled_from("xyz"))
    def heartbeat(self, holder: str) -> None:
        self.state.tick()
        self.expire()
        self.state.heartbeat(holder, ["a", "b"])
        self.heard[holder] = self.clock.now

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def close(self) -> None:
        self.state.close("a")
        self.state.close("b")
        self.closed = True

    @invariant()
    def conserved(self) -> None:
        statistics = self.state.statistics()
        self.expire()
        assert statistics.accepted == len(self.accepted)
        assert statistics.acknowledged == len(self.acked)
        assert statistics.quarantined == len(self.memory.kept)
        assert statistics.quarantining == len(self.memory.waiting)
        assert len(self.quarantined) == len(set(self.quarantined)), "quarantined twice"
        assert statistics.leased == len(self.current)
        assert (
            statistics.accepted
            == statistics.acknowledged
            + statistics.quarantined
            + statistics.quarantining
            + statistics.ready
            + statistics.leased
        )
        assert (statistics.ready_bytes == 0) == (statistics.ready == 0)
        assert (statistics.leased_bytes == 0) == (statistics.leased == 0)

    def teardown(self) -> None:
        """Whatever happened, one good reader brings all of it to an end."""
        self.close()
        self.memory.full = False
        self.retry()
        self.clock.now += 11
        seen: list[Any] = []
        for _ in range(200):
            delivery = ask(self.state, "r", 4, holder="last")
            self.state.ack(tokens(delivery))
            seen += [record.id for record in delivery.records]
            if delivery.ended:
                break
        assert ask(self.state, "r", 4, holder="last").ended
        done = self.acked | set(self.quarantined) | set(seen)
        assert done == self.accepted
        assert len(self.acked) + len(self.quarantined) + len(seen) == len(self.accepted)


TestConservation = Conservation.TestCase
TestConservation.settings = settings(examples(150), stateful_step_count=40)
