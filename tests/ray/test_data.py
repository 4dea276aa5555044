from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peaknet_predict.dataset import QueueDataset
from peaknet_predict.feed import push
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.sources import EventSource, Simulator
from peaknet_predict.types import Event, EventBatch, EventId


def event(idx: int, image: Any) -> Event:
    return Event(EventId("s", 0, idx), image, 9000.0)


def batches(address: QueueAddress, events: Iterable[Event], **settings: Any) -> list[EventBatch]:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", list(events))
    queue.producer.close("p")
    return read(QueueDataset(queue, "r", **settings))


def read(dataset: QueueDataset) -> list[EventBatch]:
    """Read to the end, with every event brought to its own."""
    got = []
    for batch in dataset:
        dataset.ack([one.id for one in batch.events])
        dataset.reject(batch.refused)
        if batch.events or batch.refused:
            got.append(batch)
    return got


def test_full_batches_and_a_short_one_in_order_with_every_pixel(address: QueueAddress) -> None:
    images = np.random.default_rng(0).normal(size=(10, 3, 5, 7)).astype(np.float32)
    got = batches(address, (event(i, image) for i, image in enumerate(images)), batch_size=4)
    assert [len(batch.events) for batch in got] == [4, 4, 2]
    assert {tuple(batch.images_BPHW.shape) for batch in got} == {(4, 3, 5, 7)}
    pixels = torch.cat([batch.images_BPHW[: len(batch.events)] for batch in got])
    np.testing.assert_array_equal(pixels.numpy(), images)
    assert not got[-1].images_BPHW[2:].any(), "rows without an event are zero, not old data"
    for batch in got:
        for one in batch.events:
            np.testing.assert_array_equal(one.image, images[one.id.idx])


def test_a_short_batch_takes_the_smallest_size_that_holds_it(address: QueueAddress) -> None:
    image = np.zeros((1, 2, 2), np.float32)
    got = batches(address, (event(i, image) for i in range(11)), batch_size=8, partial_sizes=[2, 4])
    assert [len(batch.images_BPHW) for batch in got] == [8, 4]
    assert [len(batch.events) for batch in got] == [8, 3]


def test_shape_and_dtype_may_change_in_the_stream(address: QueueAddress) -> None:
    kinds: list[tuple[tuple[int, ...], str]] = [
        ((2, 4, 4), "float32"),
        ((3, 4, 4), "float32"),
        ((4, 4), "float32"),
        ((4, 4), "uint16"),
        ((4, 4), ">i4"),
        ((4, 4), "int32"),
        ((4, 4), "float64"),
    ]
    events = [
        event(10 * k + i, np.full(shape, k, dtype))
        for k, (shape, dtype) in enumerate(kinds)
        for i in range(2)
    ]
    got = batches(address, events, batch_size=8)
    assert [e.id.idx for batch in got for e in batch.events] == [e.id.idx for e in events]
    shapes = [tuple(batch.images_BPHW.shape[1:]) for batch in got]
    assert shapes == [(2, 4, 4), (3, 4, 4), (1, 4, 4), (1, 4, 4), (1, 4, 4), (1, 4, 4)]
    assert [len(batch.events) for batch in got] == [2, 2, 2, 2, 4, 2], "byte order is no new dtype"
    assert got[4].images_BPHW.dtype == torch.int32
    assert bool((got[4].images_BPHW[:2] == 4).all())


@pytest.mark.parametrize(
    ("image", "energy", "reason"),
    [
        (np.zeros((2, 2, 2, 2)), 9000.0, "shape"),
        (np.zeros((2, 0, 2)), 9000.0, "empty"),
        (np.zeros((2, 2), complex), 9000.0, "complex128"),
        (np.zeros((2, 2), bool), 9000.0, "bool"),
        (np.zeros((2, 2), object), 9000.0, "object"),
        (np.zeros((2, 2)), float("nan"), "photon energy"),
        (np.zeros((2, 2)), 0.0, "photon energy"),
        (np.zeros((2, 2)), float("inf"), "photon energy"),
        ([1, 2], 9000.0, "not an ndarray"),
    ],
)
def test_bad_events_are_refused_with_a_reason_between_good_ones(
    address: QueueAddress, image: Any, energy: float, reason: str
) -> None:
    import ray

    queue = connect_queue(address, "events")
    handle = ray.get_actor(address.name, namespace=address.namespace)
    good = np.zeros((2, 2), np.float32)
    for idx, (pixels, eV) in enumerate([(good, 9e3), (image, energy), (good, 9e3)]):
        assert ray.get(handle.put.remote([0, idx, pixels, eV]))
    ray.get(handle.put.remote(None))
    dataset = QueueDataset(queue, "r", batch_size=4)
    got = read(dataset)
    assert [e.id.idx for b in got for e in b.events] == [0, 2]
    (refusal,) = [refusal for b in got for refusal in b.refused]
    assert refusal.id is not None
    assert refusal.id.idx == 1
    assert reason in refusal.reason
    assert dataset.received == 3


def test_refusals_alone_come_out_too(address: QueueAddress) -> None:
    (batch,) = batches(address, [event(0, np.zeros((2, 2), bool))], batch_size=4)
    assert batch.events == []
    assert len(batch.refused) == 1


def test_at_a_low_rate_a_batch_does_not_wait_to_be_full(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    dataset = QueueDataset(queue, "r", batch_size=30, partial_sizes=[8], max_latency_ms=50)
    batches = (batch for batch in dataset if batch.events)
    for begin in range(0, 9, 3):
        ids = range(begin, begin + 3)
        queue.producer.put("p", [event(idx, np.zeros((1, 4, 4), np.uint8)) for idx in ids])
        got: list[int] = []
        while len(got) < 3:  # the stream is open: full batches would be waited for without end
            batch = next(batches)
            assert len(batch.images_BPHW) == 8
            got += [one.id.idx for one in batch.events]
            dataset.ack([one.id for one in batch.events])
        assert got == list(ids)
    queue.producer.close("p")
    assert list(batches) == []


def test_while_the_caller_is_busy_a_late_batch_goes_on_filling(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    simulator = Simulator(num_events=60, panels=1, height=16, width=16)
    feeder = threading.Thread(target=push, args=(simulator, queue, 100.0))
    feeder.start()
    sizes = []
    dataset = QueueDataset(queue, "r", batch_size=64, max_latency_ms=5)
    for batch in dataset:
        dataset.ack([one.id for one in batch.events])
        sizes.append(len(batch.events))
        feeder.join()  # busy for as long as events come
    assert sum(sizes) == 60
    assert len(sizes) <= 4


class SlowSource(EventSource):
    """Two events a second, whatever is wanted."""

    def __len__(self) -> int:
        return 5

    def events(self, first: int = 0) -> Iterator[tuple[int, Any, float]]:
        for idx in range(first, 5):
            time.sleep(0.5)
            yield idx, np.zeros((1, 2, 2), np.float32), 9000.0


def lots(queue: Any, monkeypatch: pytest.MonkeyPatch, put_takes_s: float) -> list[int]:
    """Make every put take longer, and return the list in which their sizes appear."""
    put, sizes = queue.producer.put, []

    def slow_put(producer: str, records: Any, stop: Any = None) -> int:
        time.sleep(put_takes_s)
        sizes.append(len(records))
        return int(put(producer, records, stop))

    monkeypatch.setattr(queue.producer, "put", slow_put)
    return sizes


def test_a_producer_whose_puts_are_slow_keeps_its_rate(
    address: QueueAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = connect_queue(address, "events")
    sizes = lots(queue, monkeypatch, 0.02)
    simulator = Simulator(num_events=120, panels=1, height=4, width=4)
    report = push(simulator, queue, rate_hz=150.0)
    assert report.events == sum(sizes) == 120
    assert max(sizes) <= 8
    # Three events are due when a put has taken 20 ms. One by one they would fall behind.
    assert len(sizes) <= 60


@pytest.mark.parametrize("rate_hz", [None, 50.0])
def test_a_slow_source_keeps_no_event_waiting_for_the_next(
    rate_hz: float | None, address: QueueAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = connect_queue(address, "events")
    sizes = lots(queue, monkeypatch, 0.0)
    push(SlowSource(), queue, rate_hz=rate_hz)
    assert sizes == [1] * 5


def test_what_goes_wrong_while_reading_reaches_the_caller(address: QueueAddress) -> None:
    import ray

    queue = connect_queue(address, "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(0, np.zeros((2, 2), np.float32))])
    reader = iter(QueueDataset(queue, "r", batch_size=1))
    assert next(reader).events[0].id.idx == 0
    ray.kill(ray.get_actor(address.name, namespace=address.namespace))
    with pytest.raises(RuntimeError, match="is gone"):
        next(reader)


def test_a_producer_that_fails_is_noticed_while_the_queue_is_empty(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")

    def failed() -> None:
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(QueueDataset(queue, "r", batch_size=1, check_producer=failed))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "at least one event"),
        ({"batch_size": 4, "partial_sizes": [4]}, "from 1 to 3"),
        ({"batch_size": 4, "max_latency_ms": 0}, "positive"),
    ],
)
def test_impossible_settings(address: QueueAddress, settings: Any, reason: str) -> None:
    queue = connect_queue(replace(address), "events")
    with pytest.raises(ValueError, match=reason):
        QueueDataset(queue, "r", **settings)
