"""Objects that raise where they are unpickled: of our own queue's process, and of a reader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.reliability.fuzz_kinds import Unpickled
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.types import Event, EventId, Refusal
from tests.helpers.commands import HANGS_S
from tests.helpers.foreign import make_three_method_queue
from tests.helpers.queues import statistics

IMAGE = np.ones((1, 8, 8), np.float32)
ERRORS = (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError)


class Fuse:
    """Can be unpickled so many times; then it raises."""

    def __init__(self, times: int, error: type[BaseException]) -> None:
        self.left = times, error

    def __reduce__(self) -> Any:
        return _burn, self.left


def _burn(times: int, error: type[BaseException]) -> Fuse:
    if not times:
        raise error("burnt\nout")
    return Fuse(times - 1, error)


def test_our_queue_keeps_what_it_cannot_unpickle_and_goes_on(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    handle: Any = ray.get_actor(address.name, namespace=address.namespace)
    items = [[0, idx, Unpickled(error), 9000.0] for idx, error in enumerate(ERRORS)]
    items += [ray.exceptions.ActorDiedError(), [0, 9, IMAGE, 9000.0]]
    for item in items:
        assert ray.get(handle.put.remote(item), timeout=HANGS_S)
    assert ray.get(handle.put.remote(ray.put(items[1])), timeout=HANGS_S)
    assert ray.get(handle.put.remote(None))
    taken, _ = queue.reader.get("r", 99, 1.0)
    good = [one for one in taken if isinstance(one, Event)]
    refused = [one for one in taken if isinstance(one, Refusal)]
    assert [one.id.idx for one in good] == [9]
    assert len(refused) == len(ERRORS) + 2
    for error, one in zip(ERRORS, refused, strict=False):
        assert f"cannot be unpickled: {error.__name__}" in one.reason
    queue.reader.reject(refused)
    queue.reader.ack([one.id for one in good])
    assert queue.reader.get("r", 1, 10.0) == ([], True)
    assert statistics(queue).quarantined == len(refused)


def test_a_producer_of_ours_sends_what_is_left_of_foreign_objects(address: QueueAddress) -> None:
    queue = connect_queue(address, "events")
    queue.producer.open("p")
    strange: list[Any] = [(k for k in "ab"), Unpickled(SystemExit), lambda: 0]
    events = [Event(EventId("s", 0, idx), image, 9e3) for idx, image in enumerate(strange)]
    numbers: list[Any] = [np.int64(0), np.int64(7)]
    assert queue.producer.put("p", [*events, Event(EventId("s", *numbers), IMAGE, 9e3)]) == 4
    with pytest.raises(TypeError, match="only an Event or a Result can be put, not str"):
        queue.producer.put("p", ["text"])  # type: ignore[list-item]
    queue.producer.close("p")
    taken, _ = queue.reader.get("r", 99, 1.0)
    assert [type(one) for one in taken] == [Refusal, Refusal, Refusal, Event]
    assert [one.id for one in taken] == [EventId("s", 0, idx) for idx in (0, 1, 2, 7)]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
def test_a_reader_of_another_program_s_queue_refuses_what_it_cannot_unpickle(
    address: QueueAddress, error: type[BaseException]
) -> None:
    handle = make_three_method_queue(address.name, address.namespace, 10)
    died = ray.exceptions.ActorDiedError()
    for item in ([0, 0, Fuse(1, error), 9e3], [0, 1, IMAGE, 9e3], died, [0, 2, IMAGE, 9e3]):
        assert ray.get(handle.put.remote([item] if item is died else item))
    reader = connect_queue(address, "events").reader
    taken, _ = reader.get("r", 99, 1.0)
    assert [type(one) for one in taken] == [Refusal, Event, Refusal, Event]
    assert f"cannot be unpickled: {error.__name__}: burnt" in str(taken[0])
    assert str(taken[0]).isprintable()
    reader.reject([one for one in taken if isinstance(one, Refusal)])
