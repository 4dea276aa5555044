"""Items of other programs: whatever comes is an event, a result or a refusal with a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.records import ForeignItem
from peaknet_predict.queues.wire import (
    event_to_item,
    item_to_event,
    item_to_results,
    results_to_item,
)
from peaknet_predict.types import Event, EventId, Refusal, Result, identity_problem

NUMBERS = st.integers() | st.floats() | st.complex_numbers() | st.booleans()
TEXTS = st.text(st.characters(codec=None), max_size=4) | st.binary(max_size=4)
ARRAYS = arrays.arrays(
    arrays.scalar_dtypes() | arrays.unicode_string_dtypes() | arrays.array_dtypes(),
    arrays.array_shapes(min_dims=0, min_side=0, max_side=3),
)
PLAIN = st.none() | NUMBERS | TEXTS | ARRAYS
ANYTHING = st.recursive(
    PLAIN | st.builds(object) | st.sampled_from([np.float16("nan"), np.int64(3), type, math]),
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(st.integers(), parts, max_size=2)
    ),
    max_leaves=8,
)
IMAGES = arrays.arrays(np.dtype("float32"), arrays.array_shapes(min_dims=2, max_dims=3, max_side=3))
NAMES = st.integers(0, 2**63 - 1)


@given(ANYTHING | st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING).map(list))
def test_anything_is_an_event_or_refused_under_the_identity_that_the_queue_knows(item: Any) -> None:
    payload = sanitized(item)
    record = ForeignItem(payload, "s", 7)
    found = item_to_event(payload, "s", 7)
    assert found.id == record.id
    assert identity_problem(record.id) is None
    assert record.nbytes >= 0
    if isinstance(found, Refusal):
        assert found.reason.isprintable()
    else:
        assert isinstance(found.image, np.ndarray)
        assert isinstance(found.photon_energy, float)


@given(ANYTHING | st.lists(st.tuples(ANYTHING, ANYTHING, ANYTHING), max_size=3))
def test_any_list_has_a_result_or_a_refusal_for_each_of_its_parts(item: Any) -> None:
    payload = sanitized(item)
    found = item_to_results(payload, "s", 7)
    assert len(found) == (len(payload) if isinstance(payload, list | tuple) else 1)
    keys = [one.id for one in found]
    assert len(set(keys)) == len(keys)
    for one in found:
        assert one.id is not None
        assert identity_problem(one.id) is None
        if isinstance(one, Result):
            assert one.peaks.shape[1:] == (3,)
        else:
            assert one.reason.isprintable()


@given(rank=NAMES, idx=NAMES, image=IMAGES, energy=st.floats())
def test_an_event_comes_back_as_it_went_out(rank: int, idx: int, image: Any, energy: float) -> None:
    event = Event(EventId("s", rank, idx), image, energy)
    back = item_to_event(sanitized(event_to_item(event)), "s", 0)
    assert isinstance(back, Event)
    assert back.id == event.id
    np.testing.assert_array_equal(back.image, image)
    np.testing.assert_equal(back.photon_energy, energy)


@given(
    st.lists(
        st.tuples(IMAGES, arrays.arrays(np.float64, st.tuples(st.integers(0, 4), st.just(3)))),
        max_size=3,
    )
)
def test_results_come_back_as_they_went_out(parts: list[tuple[Any, Any]]) -> None:
    results = [
        Result(EventId("s", 0, n), image, peaks, 9000.0) for n, (image, peaks) in enumerate(parts)
    ]
    back = item_to_results(sanitized(results_to_item(results)), "t", 5)
    assert [one.id for one in back] == [EventId("t", 5, n) for n in range(len(parts))]
    for one, (image, peaks) in zip(back, parts, strict=True):
        assert isinstance(one, Result)
        np.testing.assert_array_equal(one.image, image)
        np.testing.assert_array_equal(one.peaks, peaks)
