"""What leases, acknowledgements and known keys cost, against a queue that only hands on.

Both queues are Ray actors, in which calls wait in the same way; the bare one pops what it hands
out and remembers nothing. Producers put as `feed` does, at a given rate (one event a call, those
that are late together) and as fast as possible (eight a call); readers fill batches of 32 as
`predict` does, and acknowledge each. What arrives is counted while all producers are at work.
Windows of the four cases alternate, so that a slow moment of the machine is slow for all. Prints a
table and the ratios. At the given rate at most 5 % may be missing; as fast as possible shows what
the leases cost a queue that has nothing else to wait for::

    python -m benchmarks.reliability.lease_cost [--megabytes 4] [--rate_hz 1000] [--seconds 2.5]
        [--rounds 4]

It takes a minute. 1,000 events of 4 MB a second need some 16 cores, and 4 GB of shared memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np

from peaknet_predict.feed import EVENTS_PER_PUT, is_due
from peaknet_predict.queues import QueueAddress, connect_queue, run_in_cluster
from peaknet_predict.queues.actor import LINGER_S
from peaknet_predict.queues.cluster import connect
from peaknet_predict.queues.waiting import Linger, WaitingCalls
from peaknet_predict.types import Event, EventId

BATCH = 32
CAPACITY = 128
_FOR_EVER_S = 1e6


@dataclass(frozen=True)
class Load:
    """What the producers of a window do: together ``rate_hz``, or as fast as they can."""

    pairs: int
    nbytes: int
    seconds: float
    rate_hz: float | None


@dataclass(frozen=True)
class Measured:
    """Events a second at the readers, cores' worth of the queue's process, and events a put."""

    rate_hz: float
    actor_cpu: float
    events_per_put: float


class BareQueue:
    """As little as a queue can be: a deque; calls wait in it as in ours, and linger as ours do."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._open = 0
        self._producers = WaitingCalls[bool](self._serve)
        self._readers = WaitingCalls[list[Event]](self._serve)
        self._linger = Linger(LINGER_S, self._serve)

    async def open(self, producers: int) -> None:
        self._open = producers

    async def close(self) -> None:
        self._open -= 1
        self._serve()

    async def put_many(self, events: list[Event]) -> None:
        def put() -> bool | None:
            if self._full:
                return None
            self._events.extend(events)
            return True

        await self._producers.answer(object(), put, _FOR_EVER_S)

    async def get_many(self, most: int) -> list[Event]:
        def take() -> list[Event] | None:
            if self._events:
                self._linger.begin()
            taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
            return taken if taken or not self._open else None

        return await self._readers.answer(object(), take, _FOR_EVER_S, most) or []

    @property
    def _full(self) -> bool:
        return len(self._events) >= CAPACITY

    def _serve(self) -> None:
        while True:
            self._producers.serve(lambda wanted: not self._full)
            if not self._readers.serve(self._is_worth_trying):
                return

    def _is_worth_trying(self, wanted: int) -> bool:
        if not self._open:
            return True
        ready = len(self._events)
        return ready > 0 and (ready >= wanted or self._full or self._linger.is_over())


def _address(name: str) -> QueueAddress:
    return QueueAddress(name, max_events=CAPACITY)


def produce(name: str, leased: bool, rank: int, load: Load) -> tuple[float, float, int, int]:
    """Put events while the window lasts; return its begin and end, events and puts."""
    import ray

    queue = connect_queue(_address(name), "events") if leased else None
    handle = ray.get_actor(name, namespace="peaknet")
    if queue is not None:
        queue.producer.open(f"p{rank}", load.pairs)
    image = np.zeros((4, 512, max(1, load.nbytes // (4 * 512 * 4))), np.float32)
    rate_hz = None if load.rate_hz is None else load.rate_hz / load.pairs
    began, started, idx, puts = time.time(), time.monotonic(), 0, 0
    while time.monotonic() - started < load.seconds:
        lot = 1
        while lot < EVENTS_PER_PUT and is_due(started, idx + lot, rate_hz):
            lot += 1
        if rate_hz is not None:
            time.sleep(max(0.0, started + idx / rate_hz - time.monotonic()))
        events = [Event(EventId("s", rank, idx + i), image, 9500.0) for i in range(lot)]
        if queue is not None:
            queue.producer.put(f"p{rank}", events)
        else:
            ray.get(handle.put_many.remote(events))
        idx += lot
        puts += 1
    ended = time.time()
    if queue is not None:
        queue.producer.close(f"p{rank}")
    else:
        ray.get(handle.close.remote())
    return began, ended, idx, puts


def read(name: str, leased: bool) -> list[tuple[float, int]]:
    """Read to the end in batches; return when how many events came."""
    import ray

    queue = connect_queue(_address(name), "events") if leased else None
    handle = ray.get_actor(name, namespace="peaknet")
    arrivals: list[tuple[float, int]] = []
    batch: list[EventId | None] = []
    ended = False
    while not ended:
        wanted = BATCH - len(batch)
        events: Any
        if queue is not None:
            events, ended = queue.reader.get("reader", wanted, 2.0)
            ended = ended and not events
        else:
            events = ray.get(handle.get_many.remote(wanted))
            ended = not events
        if events:
            arrivals.append((time.time(), len(events)))
            batch += [event.id for event in events]
        full = len(batch) == BATCH or (queue is not None and queue.reader.flush_wanted)
        if full or ended:
            if queue is not None:
                queue.reader.ack([key for key in batch if key is not None])
            batch = []
    return arrivals


def cpu_seconds(handle: Any) -> float:
    import ray

    return float(ray.get(handle.__ray_call__.remote(lambda actor: time.process_time())))


def window(leased: bool, load: Load) -> Measured:
    """Run one window, from as many producers to as many readers."""
    import ray

    name = f"cost-{uuid4().hex[:8]}"
    if leased:
        connect_queue(_address(name), "events")
        handle = ray.get_actor(name, namespace="peaknet")
    else:
        options = {"name": name, "namespace": "peaknet", "num_cpus": 0, "max_concurrency": 1000}
        handle = ray.remote(BareQueue).options(**options).remote()
        ray.get(handle.open.remote(load.pairs))
    used_s = cpu_seconds(handle)
    readers = [run_in_cluster(read, name, leased) for _ in range(load.pairs)]
    producers = [run_in_cluster(produce, name, leased, k, load) for k in range(load.pairs)]
    reports = [producer.result() for producer in producers]
    arrivals = [one for reader in readers for one in reader.result()]
    used_s = cpu_seconds(handle) - used_s
    ray.kill(handle)
    begins, ends, events, puts = zip(*reports, strict=True)
    first, last = max(begins), min(ends)
    counted = sum(count for at, count in arrivals if first <= at < last)
    at_work_s = max(ends) - min(begins)
    return Measured(counted / (last - first), used_s / at_work_s, sum(events) / sum(puts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of an event, in 2**20 bytes")
    parser.add_argument("--rate_hz", type=float, default=1000.0, help="of all producers together")
    parser.add_argument("--seconds", type=float, default=2.5, help="of a window")
    parser.add_argument("--rounds", type=int, default=4, help="windows of each of the four cases")
    parser.add_argument("--pairs", type=int, default=4, help="producers, and readers")
    arguments = parser.parse_args()
    began = time.monotonic()
    connect("local")
    nbytes = int(arguments.megabytes * 2**20)
    loads = {
        f"{arguments.rate_hz:g} events/s": arguments.rate_hz,
        "as fast as possible": None,
    }
    cases = [(what, leased) for what in loads for leased in (False, True)]
    measured: dict[tuple[str, bool], list[Measured]] = {case: [] for case in cases}
    for leased in (False, True):  # the workers' own start-up
        window(leased, Load(arguments.pairs, nbytes, 0.5, None))
    for k in range(arguments.rounds):
        for what, leased in cases if k % 2 == 0 else reversed(cases):
            load = Load(arguments.pairs, nbytes, arguments.seconds, loads[what])
            measured[what, leased].append(window(leased, load))
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}; events of "
        f"{arguments.megabytes:g} MB, {arguments.pairs} producers, {arguments.pairs} readers; "
        f"{arguments.rounds} windows of {arguments.seconds:g} s each; "
        f"{time.monotonic() - began:.0f} s in all"
    )
    print(
        f"{'':20} {'queue':8} {'median':>8}  {'queue CPU':>9}  {'events/put':>10}  "
        "windows, events/s"
    )
    medians: dict[tuple[str, bool], float] = {}
    for what, leased in cases:
        windows = measured[what, leased]
        medians[what, leased] = statistics.median(one.rate_hz for one in windows)
        print(
            f"{what:20} {'leased' if leased else 'bare':8} {medians[what, leased]:8.0f}  "
            f"{statistics.median(one.actor_cpu for one in windows):8.0%}   "
            f"{statistics.median(one.events_per_put for one in windows):10.2f}  "
            f"{', '.join(f'{one.rate_hz:.0f}' for one in windows)}"
        )
    for what in loads:
        print(f"{what}: leased of bare {medians[what, True] / medians[what, False]:.3f}")


if __name__ == "__main__":
    main()
