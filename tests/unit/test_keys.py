from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.keys import KeySet
from peaknet_predict.types import EventId

KEYS = st.builds(EventId, st.sampled_from("st"), st.integers(0, 1), st.integers(-3, 12))


@given(st.lists(KEYS))
def test_it_is_the_set_it_stands_for(keys: list[EventId]) -> None:
    compact, plain = KeySet(), set()
    for key in keys:
        assert compact.add(key) == (key not in plain)
        plain.add(key)
    assert len(compact) == len(plain)
    for stream in "st":
        for rank in (0, 1):
            for idx in range(-4, 14):
                key = EventId(stream, rank, idx)
                assert (key in compact) == (key in plain)
            missing = next(i for i in range(14) if EventId(stream, rank, i) not in plain)
            assert compact.first_missing(stream, rank) == missing
    again = KeySet.from_json(json.loads(json.dumps(compact.to_json())))
    assert sorted(again.intervals()) == sorted(compact.intervals())


def test_many_events_in_order_are_one_interval() -> None:
    keys = KeySet(EventId("s", 0, idx) for idx in range(100_000))
    assert list(keys.intervals()) == [("s", 0, [0, 100_000])]
