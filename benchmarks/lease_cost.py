"""What leases, acknowledgements and known keys cost, against a queue that only hands on.

Both queues are Ray actors with long polling that move lots of events a call; the bare one pops what
it hands out and remembers nothing. Windows alternate between the two, so that a slow machine is
slow for both. Prints the medians and their ratio, of which at most 5 % may be missing::

    python -m benchmarks.lease_cost [--megabytes 4] [--rate_hz 1000] [--seconds 10] [--windows 5]

At 1,000 events of 4 MB a second it needs some 16 cores and 30 GB of shared memory.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import deque
from typing import Any
from uuid import uuid4

import numpy as np

from peaknet_predict.queues import ClusterTask, QueueAddress, connect_queue, run_in_cluster
from peaknet_predict.queues.cluster import connect
from peaknet_predict.types import Event, EventId

LOT = 8
CAPACITY = 128


class BareQueue:
    """As little as a queue can be: a deque, waited for inside the actor."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._open = 0
        self._changed = asyncio.Condition()

    async def open(self, producers: int) -> None:
        self._open = producers

    async def close(self) -> None:
        async with self._changed:
            self._open -= 1
            self._changed.notify_all()

    async def put_many(self, events: list[Event]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._events) < CAPACITY)
            self._events.extend(events)
            self._changed.notify_all()

    async def get_many(self, most: int) -> list[Event]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._events) or not self._open)
            taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
            self._changed.notify_all()
        return taken


def lots(rank: int, num_events: int, nbytes: int, rate_hz: float | None) -> Any:
    """Yield lots of events at their time."""
    image = np.zeros((1, 1024, max(1, nbytes // 4096)), np.float32)
    began = time.perf_counter()
    for first in range(0, num_events, LOT):
        if rate_hz is not None:
            time.sleep(max(0.0, began + first / rate_hz - time.perf_counter()))
        yield [Event(EventId("s", rank, first + i), image, 9500.0) for i in range(LOT)]


def produce(name: str, leased: bool, rank: int, settings: dict[str, Any], of: int) -> None:
    if leased:
        queue = connect_queue(QueueAddress(name, create=False), "events")
        queue.open(f"p{rank}", of)
        for lot in lots(rank, **settings):
            queue.put(f"p{rank}", lot)
        queue.close(f"p{rank}")
        return
    import ray

    handle = ray.get_actor(name, namespace="peaknet")
    for lot in lots(rank, **settings):
        ray.get(handle.put_many.remote(lot))
    ray.get(handle.close.remote())


def read(name: str, leased: bool) -> tuple[int, float, float]:
    """Read to the end; return how many events, and when the first and the last came."""
    taken, moments = 0, [0.0, 0.0]

    def note(events: list[Any]) -> None:
        nonlocal taken
        now = time.time()
        moments[0] = moments[0] or now
        moments[1] = now
        taken += len(events)

    if leased:
        queue = connect_queue(QueueAddress(name, create=False), "events")
        ended = False
        while not ended:
            events, ended = queue.get("reader", LOT, 2.0)
            if events:
                note(events)
                queue.ack([event.id for event in events if event.id is not None])
        return taken, moments[0], moments[1]
    import ray

    handle = ray.get_actor(name, namespace="peaknet")
    while bare := ray.get(handle.get_many.remote(LOT)):
        note(bare)
    return taken, moments[0], moments[1]


def window(leased: bool, pairs: int, settings: dict[str, Any]) -> float:
    """Return events a second, from as many producers to as many readers."""
    import ray

    name = f"cost-{uuid4().hex[:8]}"
    if leased:
        connect_queue(QueueAddress(name, max_events=CAPACITY), "events")
        handle = ray.get_actor(name, namespace="peaknet")
    else:
        options = {"name": name, "namespace": "peaknet", "num_cpus": 0, "max_concurrency": 1000}
        handle = ray.remote(BareQueue).options(**options).remote()
        ray.get(handle.open.remote(pairs))
    readers: list[ClusterTask] = [run_in_cluster(read, name, leased) for _ in range(pairs)]
    for rank in range(pairs):
        run_in_cluster(produce, name, leased, rank, settings, pairs)
    found = [reader.result() for reader in readers]
    ray.kill(handle)
    busy = [(count, first, last) for count, first, last in found if count]
    seconds = max(last for _, _, last in busy) - min(first for _, first, _ in busy)
    return float(sum(count for count, _, _ in busy) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--rate_hz", type=float, help="of all producers; as fast as possible")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of a window, at 1,000 a second"
    )
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4, help="producers, and readers")
    arguments = parser.parse_args()
    connect("local")
    pairs = arguments.pairs
    num_events = max(1, int((arguments.rate_hz or 1000) * arguments.seconds / pairs / LOT)) * LOT
    rate_hz = None if arguments.rate_hz is None else arguments.rate_hz / pairs
    nbytes = int(arguments.megabytes * 2**20)
    settings = {"num_events": num_events, "nbytes": nbytes, "rate_hz": rate_hz}
    rates: dict[bool, list[float]] = {False: [], True: []}
    window(True, pairs, {**settings, "num_events": 10 * LOT})  # the workers' own start-up
    for k in range(arguments.windows):
        for leased in (k % 2 == 0, k % 2 == 1):
            rates[leased].append(window(leased, pairs, settings))
    bare, leased_rate = (statistics.median(rates[kind]) for kind in (False, True))
    print(f"events of {arguments.megabytes:g} MB, {pairs} producers, {pairs} readers")
    for kind, name in ((False, "bare"), (True, "leased")):
        print(f"{name:8} {', '.join(f'{rate:.0f}' for rate in rates[kind])} events/s")
    print(f"medians  {bare:.0f} and {leased_rate:.0f}; leased of bare: {leased_rate / bare:.3f}")


if __name__ == "__main__":
    main()
