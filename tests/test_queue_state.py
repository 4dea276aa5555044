from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.queues.state import END_MARKER, ForeignItem, QueueState
from peaknet_predict.types import Event, EventId


def event(idx: int, size: int = 4) -> Event:
    return Event(EventId("s", 0, idx), np.zeros((1, 1, size), np.uint8), 9000.0)


def take_all(state: QueueState, reader: str = "r") -> list[int]:
    taken = []
    while records := state.get(reader, 3)[0]:
        taken += [record.id.idx for record in records if isinstance(record, Event)]
    return taken


def test_records_come_out_in_order_and_the_end_comes_after_the_last() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    assert state.put("p", [event(i) for i in range(5)]) == 5
    assert state.get("r", 100)[1] is False
    assert state.get("r", 1) == ([], False), "empty is not ended while a producer is open"
    state.close("p")
    assert state.get("r", 1) == ([], True)
    assert state.get("r", 1) == ([], True), "the end is a state: every reader of the run sees it"


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


def test_the_stream_ends_when_the_last_of_several_producers_closes() -> None:
    state = QueueState("events", 10, 1000)
    state.open("a", of=2)
    state.close("a")
    assert state.get("r", 1) == ([], False), "the second producer has yet to open"
    state.open("b", of=2)
    state.put("b", [event(1)])
    state.close("b")
    assert take_all(state) == [1]
    assert state.get("r", 1) == ([], True)


def test_a_reader_that_joins_after_the_end_waits_for_the_next_run() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.close("p")
    assert state.get("first run", 1) == ([], True)
    assert state.get("second run", 1) == ([], False)
    state.open("q")
    state.put("q", [event(7)])
    state.close("q")
    assert take_all(state, "second run") == [7]
    assert state.get("second run", 1) == ([], True)


def test_a_reader_that_joins_late_still_gets_a_run_that_nobody_read() -> None:
    state = QueueState("events", 10, 1000)
    state.open("p")
    state.close("p")
    assert state.get("r", 1) == ([], True), "an empty run ends, too"


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
    records, _ = state.get("r", 5)
    assert isinstance(records[0], ForeignItem)
    assert records[0].nbytes == 24
    assert state.get("r", 5) == ([], True)
    assert state.put_foreign([0, 0, np.zeros(3), 1.0])
    assert state.get("r", 5) == ([], True), "what a reader was told stays so"
    (again,), _ = state.get("next", 5)
    assert isinstance(again, ForeignItem)
    assert again.stream != records[0].stream, "rank and idx repeat from run to run"
    assert state.get("next", 5) == ([], False)


def test_a_producer_that_has_not_opened_is_told_so() -> None:
    with pytest.raises(ValueError, match="has not opened"):
        QueueState("events", 1, 1).put("nobody", [event(1)])


def test_a_failed_producer_is_named() -> None:
    state = QueueState("events", 1, 1)
    state.open("p")
    state.close("p", failure="disk on fire")
    assert state.statistics().failures == {"p": "disk on fire"}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5))),
    st.integers(1, 7),
    st.integers(1, 30),
)
def test_nothing_is_lost_or_doubled_in_any_order_of_puts_and_gets(
    moves: list[tuple[str, int]], max_events: int, max_bytes: int
) -> None:
    state = QueueState("events", max_events, max_bytes)
    producers = {name: f"p{name}" for name in "ab"}
    for name in producers.values():
        state.open(name, of=2)
    put = got = 0
    for who, count in moves:
        if who == "c":
            records, ended = state.get("r", count)
            assert not ended
            assert [r.id.idx for r in records if isinstance(r, Event)] == list(
                range(got, got + len(records))
            )
            got += len(records)
        else:
            put += state.put(producers[who], [event(put + i) for i in range(count)])
        assert len(state) <= max_events
        assert state.statistics().ready_bytes <= max(max_bytes, 4)
    for name in producers.values():
        state.close(name)
    assert take_all(state) == list(range(got, put))
    assert state.get("r", 1) == ([], True)
    assert state.statistics().ready_bytes == 0
