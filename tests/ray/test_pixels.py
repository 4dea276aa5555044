"""The pixels of an event are written once, and outlive the process that wrote them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.queues.native import NativeReader
from peaknet_predict.types import Event, EventId, Result
from tests.helpers.commands import environment
from tests.helpers.queues import statistics

SIDE = 128  # large enough for a lot


def events(first: int, number: int) -> list[Event]:
    return [
        Event(
            EventId("s", 0, idx),
            np.full((2, SIDE, SIDE), idx, np.float32),
            9e3,
            bad_bits=np.full(2**14, idx, np.uint8),
        )
        for idx in range(first, first + number)
    ]


def place(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def produce(address: QueueAddress, number: int, then_die: bool) -> None:
    queue = connect_queue(address, "events").producer
    queue.open("p")
    queue.put("p", events(0, number))
    if then_die:
        os.kill(os.getpid(), signal.SIGKILL)
    queue.close("p")


def produced(address: QueueAddress, number: int, then_die: bool = False) -> Any:
    """Produce in another process; Ray's reference to that."""
    return ray.remote(num_cpus=0, max_retries=0)(produce).remote(address, number, then_die)


@pytest.mark.parametrize("dies", [False, True])
def test_both_queues_and_all_readers_have_the_same_memory(
    address: QueueAddress, dies: bool
) -> None:
    events_in = connect_queue(address, "events")
    results_out = connect_queue(replace(address, name=f"{address.name}-out"), "results")
    try:
        ray.get(produced(address, 6, dies))
    except ray.exceptions.WorkerCrashedError:
        assert dies
    taken, _ = events_in.reader.get("a", 4, 5.0)
    first = [one for one in taken if isinstance(one, Event)]
    results_out.producer.open("w")
    results_out.producer.put(
        "w", [Result(one.id, one.image, np.ones((1, 3)), 9e3) for one in first]
    )
    events_in.reader.ack([one.id for one in first])
    taken, _ = results_out.reader.get("b", 4, 5.0)
    results = [one for one in taken if isinstance(one, Result)]
    assert [one.id for one in results] == [one.id for one in first]
    for event, result in zip(first, results, strict=True):
        assert np.all(event.image == event.id.idx)
        assert np.all(event.bad_bits == event.id.idx)
        assert place(event.image) == place(result.image)
        assert not event.image.flags.writeable
    # What the queue keeps is whole, too, and comes to another process as it was.
    assert len(events_in.reader.get("a", 4, 5.0)[0]) == 2
    assert events_in.reader.release() == 2
    again, _ = events_in.reader.get("a", 4, 5.0)
    assert [int(one.image.min()) for one in again if isinstance(one, Event)] == [4, 5]


def test_what_cannot_be_mapped_is_asked_of_the_queue(
    address: QueueAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine, when the process that the lots belong to is dead."""
    queue = connect_queue(address, "events")
    ray.get(produced(address, 6))
    get = ray.get

    def out_of_reach(what: Any, **limits: Any) -> Any:
        if isinstance(what, list):
            raise ray.exceptions.OwnerDiedError("", "", "")
        return get(what, **limits)

    monkeypatch.setattr(ray, "get", out_of_reach)
    taken, _ = queue.reader.get("a", 4, 5.0)
    assert [(one.id.idx, int(one.image.max())) for one in taken if isinstance(one, Event)] == [
        (idx, idx) for idx in range(4)
    ]
    assert isinstance(queue.reader, NativeReader)
    calls = queue.reader._calls

    def late(method: str, *args: Any, **limits: Any) -> Any:
        if method == "pixels":  # the lease is over before the question comes
            type(calls).call(calls, "release", args[0][:1], None)
        return type(calls).call(calls, method, *args, **limits)

    monkeypatch.setattr(calls, "call", late)
    taken, _ = queue.reader.get("a", 4, 5.0)
    assert [one.id.idx for one in taken if isinstance(one, Event)] == [5]
    monkeypatch.undo()
    taken, _ = queue.reader.get("a", 4, 5.0)
    assert [one.id.idx for one in taken if isinstance(one, Event)] == [4]


_TWO_NODES = """
import os, signal, sys, time
import numpy as np, ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.types import Event, EventId, Result

size = {"num_cpus": 1, "object_store_memory": 2**27}
cluster = Cluster(initialize_head=True, head_node_args=size)
other = cluster.add_node(**size)
ray.init(address=cluster.address, namespace="peaknet", log_to_driver=False)
address = QueueAddress("pixels", quarantine=sys.argv[1])
queue = connect_queue(address, "events")

def events(number):
    return [Event(EventId("s", 0, k), np.full((2, 256, 256), k, np.float32), 9e3)
            for k in range(number)]

@ray.remote(num_cpus=0, max_retries=0)
def produce():
    queue = connect_queue(address, "events").producer
    queue.open("p")
    queue.put("p", events(40))
    os.kill(os.getpid(), signal.SIGKILL)

@ray.remote(num_cpus=0)
def read():
    reader = connect_queue(address, "events").reader
    taken = []
    while len(taken) < 40:
        more, _ = reader.get("r", 7, 5.0)
        taken += [(one.id.idx, int(one.image.min()), int(one.image.max())) for one in more]
        reader.ack([one.id for one in more])
    return taken

@ray.remote(num_cpus=0)
def take_results():
    reader = connect_queue(results, "results").reader
    taken, _ = reader.get("w", 4, 5.0)
    return [(one.id.idx, int(one.image.min()), int(one.image.max())) for one in taken]

try:
    ray.get(produce.remote())
except ray.exceptions.WorkerCrashedError:
    pass
there = On(other.node_id, soft=False)
results = QueueAddress("results", quarantine=sys.argv[1])
ray.get(take_results.options(scheduling_strategy=there).remote())  # makes that queue there
some, _ = queue.reader.get("r", 4, 5.0)
writer = connect_queue(results, "results").producer
writer.open("w")
writer.put("w", [Result(one.id, one.image, np.ones((1, 3)), 9e3) for one in some])
print("into a queue on another node")
found = ray.get(take_results.options(scheduling_strategy=there).remote())
assert found == [(k, k, k) for k in range(4)], found
queue.reader.release()
began = time.monotonic()
taken = ray.get(read.options(scheduling_strategy=there).remote(), timeout=100)
assert sorted(taken) == [(k, k, k) for k in range(40)], taken
print("read on another node, the owner dead, in", time.monotonic() - began, "s")
ray.shutdown()
cluster.shutdown()
print("done")
"""


@pytest.mark.slow
def test_on_another_node_a_dead_producers_pixels_come_from_the_queue(tmp_path: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # sockets have short names
        found = subprocess.run(
            [sys.executable, "-c", _TWO_NODES, str(tmp_path / "quarantine")],
            env=environment() | {"RAY_TMPDIR": short},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert found.returncode == 0, found.stderr
    assert "done" in found.stdout
    print(found.stdout)


def test_a_queue_that_is_full_takes_the_pixels_once_there_is_room(address: QueueAddress) -> None:
    queue = connect_queue(replace(address, max_events=3), "events")
    producer = produced(address, 8)
    taken: list[int] = []
    ended = False
    while not ended:
        some, ended = queue.reader.get("r", 2, 5.0)
        taken += [int(one.image.max()) for one in some if isinstance(one, Event)]
        queue.reader.ack([one.id for one in some if one.id is not None])
    ray.get(producer)
    assert taken == list(range(8))
    assert statistics(queue).acknowledged == 8
