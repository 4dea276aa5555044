"""Records part from their pixels and get them back, whatever goes on between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.queues.claim_check import (
    INLINE_BYTES,
    Claims,
    check_in,
    check_out,
)
from peaknet_predict.queues.records import ForeignItem, Record
from peaknet_predict.types import Event, EventId, Result

Lots = list[list[np.ndarray[Any, Any]]]


def image(side: int, value: int = 0) -> np.ndarray[Any, Any]:
    return np.full((1, side, side), value, np.uint16)


def arrived(lots: list[int], store: Lots) -> list[list[np.ndarray[Any, Any]]]:
    """Return what another process maps: objects of its own, of the same values."""
    return [[mapped(array) for array in store[lot]] for lot in lots]


def mapped(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def put_into(store: Lots) -> Any:
    def put(arrays: list[np.ndarray[Any, Any]]) -> int:
        store.append(arrays)
        return len(store) - 1

    return put


@st.composite
def records(draw: st.DrawFn) -> Record:
    number, side = draw(st.integers(0, 999)), draw(st.sampled_from([1, 8, 70, 100]))
    key = EventId("s", 0, number)
    bits = draw(st.sampled_from([None, np.ones(5, np.uint8), np.ones(INLINE_BYTES, np.uint8)]))
    kind = draw(st.sampled_from(["event", "result", "foreign"]))
    if kind == "foreign":
        return ForeignItem([0, number, image(side), 1.0], "s", number)
    if kind == "event":
        return Event(key, image(side, number), 9e3, bad_bits=bits)
    return Result(key, image(side, number), np.ones((2, 3)), 9e3, bad_bits=bits)


def same(one: Record, other: Record) -> bool:
    if isinstance(one, ForeignItem) or isinstance(other, ForeignItem):
        return one is other
    pairs = ((one.image, other.image), (one.bad_bits, other.bad_bits))
    return one.id == other.id and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )


@given(st.lists(records(), max_size=6), st.data())
def test_through_two_queues_every_record_has_its_pixels(
    sent: list[Record], data: st.DataObject
) -> None:
    store: Lots = []
    checked = check_in(sent, Claims(), put_into(store))
    taken = data.draw(st.integers(0, len(sent)))
    queue, reader = Claims(), Claims()
    left = checked.after(taken)
    inside = check_out(left, arrived(left.lots, store), queue)
    assert all(map(same, inside, sent[taken:]))
    outside = check_in(inside, queue)
    assert all(map(same, inside, sent[taken:]))  # the queue keeps its own
    for record in outside.records:
        if not isinstance(record, ForeignItem):
            for part in (record.image, record.bad_bits):
                assert part is None or part.nbytes < INLINE_BYTES
    received = check_out(outside, arrived(outside.lots, store), reader)
    assert all(map(same, received, sent[taken:]))
    known = len(store)
    again = check_in(received, reader, put_into(store))
    assert len(store) == known  # nothing is written a second time
    assert again.lots == outside.lots


def test_a_claim_lasts_as_long_as_its_array() -> None:
    claims = Claims()
    store: Lots = []
    checked = check_in([Event(EventId("s", 0, 0), image(100), 1.0)], Claims(), put_into(store))
    record = check_out(checked, arrived(checked.lots, store), claims)[0]
    assert isinstance(record, Event)
    assert claims.of(record.image) is not None
    assert claims.of(record.image.copy()) is None
    assert len(claims) == 1
    record.image = image(1)
    assert len(claims) == 0


def test_what_a_producer_may_still_change_is_written_each_time() -> None:
    store: Lots = []
    event, claims = Event(EventId("s", 0, 0), image(100), 1.0), Claims()
    for _ in range(2):
        check_in([event], claims, put_into(store))
    assert len(store) == 2


@pytest.mark.parametrize("dtype", [object, "V4", [("a", "f4"), ("b", "f4")]])
def test_arrays_that_are_more_than_their_bytes_stay_in_the_record(dtype: Any) -> None:
    odd = np.zeros((100, 100), dtype)
    checked = check_in([Event(EventId("s", 0, 0), odd, 1.0)], Claims(), put_into([]))
    assert checked.lots == []
    assert isinstance(checked.records[0], Event)
    assert checked.records[0].image is odd


def test_what_can_be_changed_is_written_anew_and_what_is_stored_is_in_one_piece() -> None:
    store: Lots = []
    event = Event(EventId("s", 0, 0), image(200)[:, ::2, ::2], 1.0)
    checked = check_in([event], Claims(), put_into(store))
    assert store[0][0].flags.forc
    claims = Claims()
    record = check_out(checked, [[store[0][0].copy()]], claims)[0]  # a copy: Ray could not map it
    assert isinstance(record, Event)
    record.image[:] = 7
    again = check_in([record], claims, put_into(store))
    assert again.lots == [1]
    assert np.all(store[1][0] == 7)
