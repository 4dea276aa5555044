from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.batching import Batcher, check_event
from peaknet_predict.types import Event, EventBatch, EventId, Refusal, Result

GOOD = np.zeros((2, 2), np.float32)


def event(idx: int, image: Any = GOOD, energy: Any = 9000.0) -> Event:
    return Event(EventId("s", 0, idx), image, energy)


kinds = st.sampled_from(
    [
        lambda idx: event(idx, np.full((2, 3, 4), idx, np.uint16)),
        lambda idx: event(idx, np.full((2, 3, 4), idx, ">u2")),
        lambda idx: event(idx, np.full((3, 4), idx, np.float32)),
        lambda idx: event(idx, np.full((1, 3, 4), idx, np.float32)),
        lambda idx: event(idx, np.full((1, 3, 4), idx, np.float64)[..., ::-1]),
        lambda idx: event(idx, np.zeros((0, 3, 4))),
        lambda idx: event(idx, energy=-1.0),
        lambda idx: Refusal(EventId("s", 0, idx), "another program's nonsense"),
        lambda idx: Result(EventId("s", 0, idx), GOOD, np.zeros((0, 3)), 9000.0),
    ]
)


@given(kinds=st.lists(kinds), batch_size=st.integers(1, 5), cuts=st.lists(st.integers(1, 4)))
def test_every_item_comes_out_once_in_order_with_its_pixels(
    kinds: list[Any], batch_size: int, cuts: list[int]
) -> None:
    partial = sorted({cut for cut in cuts if cut < batch_size})
    batcher = Batcher(batch_size, partial)
    items = [kind(idx) for idx, kind in enumerate(kinds)]
    batches: list[EventBatch] = []
    rest = items
    while rest:
        room = batcher.room
        assert room > 0
        now, rest = rest[:room], rest[room:]
        batches += batcher.add(now)
        if batcher.is_full:
            batches.append(batcher.take())
            assert batcher.is_empty
    if not batcher.is_empty:
        batches.append(batcher.take())

    events = [one for batch in batches for one in batch.events]
    refused = [one for batch in batches for one in batch.refused]
    is_good = [isinstance(item, Event) and check_event(item) is None for item in items]
    assert events == [item for item, good in zip(items, is_good, strict=True) if good]
    assert [r.id for r in refused] == [
        item.id for item, good in zip(items, is_good, strict=True) if not good
    ]
    for batch in batches:
        assert batch.events or batch.refused
        if not batch.events:
            continue
        assert len(batch.images_BPHW) == min(
            size for size in [*partial, batch_size] if size >= len(batch.events)
        )
        for row, one in zip(batch.images_BPHW, batch.events, strict=False):
            np.testing.assert_array_equal(row.numpy().reshape(one.image.shape), one.image)
            assert row.numpy().dtype == one.image.dtype.newbyteorder("=")
        assert not batch.images_BPHW[len(batch.events) :].any()


@pytest.mark.parametrize(
    ("image", "energy", "reason"),
    [
        (np.zeros((2, 2, 2, 2)), 9000.0, "shape (2, 2, 2, 2)"),
        (np.zeros(3), 9000.0, "shape (3,)"),
        (np.zeros((2, 0, 2)), 9000.0, "empty"),
        (np.zeros((2, 2), complex), 9000.0, "complex128"),
        (np.zeros((2, 2), bool), 9000.0, "bool"),
        (np.zeros((2, 2), object), 9000.0, "object"),
        (np.zeros((2, 2), "M8[s]"), 9000.0, "datetime64"),
        (np.zeros((2, 2), [("a", "f4")]), 9000.0, "('a', '<f4')"),
        (np.zeros((2, 2), np.longdouble), 9000.0, "which torch cannot hold"),
        (np.zeros((16, 16)), 9000.0, "of 2048 bytes is larger than max_event_bytes, 1024"),
        ([1, 2], 9000.0, "list [1, 2], not an ndarray"),
        (GOOD, float("nan"), "photon energy"),
        (GOOD, 0.0, "photon energy"),
        (GOOD, float("inf"), "photon energy"),
        (GOOD, 10**400, "photon energy"),
        pytest.param(GOOD, 10**5000, "photon energy is int eV", id="5001 digits"),
        (GOOD, "9 keV", "photon energy is str 9 keV eV"),
        (GOOD, None, "photon energy"),
        (GOOD, np.zeros(2), "photon energy"),
    ],
)
def test_what_cannot_be_processed_is_named(image: Any, energy: Any, reason: str) -> None:
    assert reason in (check_event(event(0, image, energy), max_bytes=1024) or "")


def test_a_batch_knows_how_long_its_first_event_has_waited() -> None:
    batcher = Batcher(3)
    assert batcher.oldest_at is None
    list(batcher.add([event(0, energy=-1.0)]))
    assert batcher.oldest_at is None, "nobody waits for a refused event's peaks"
    list(batcher.add([event(1)]))
    first = batcher.oldest_at
    assert first is not None
    list(batcher.add([event(2)]))
    assert batcher.oldest_at == first
    (changed,) = batcher.add([event(3, np.zeros((4, 4), np.float32))])
    assert [one.id.idx for one in changed.events] == [1, 2]
    assert batcher.oldest_at is not None
    assert batcher.oldest_at >= first
    batcher.take()
    assert batcher.oldest_at is None


def test_an_empty_batch_has_no_rows() -> None:
    batch = Batcher(3).take()
    assert (batch.events, batch.refused) == ([], [])
    assert batch.images_BPHW.shape == torch.Size((0, 0, 0, 0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "at least one event"),
        ({"batch_size": 4, "partial_sizes": [4]}, "from 1 to 3"),
        ({"batch_size": 4, "max_event_bytes": 0}, "max_event_bytes is 0"),
    ],
)
def test_impossible_settings(settings: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Batcher(**settings)
