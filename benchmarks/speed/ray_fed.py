"""Ray-fed against memory-fed, transport alone, and latency at a beamline's rate.

Prints one table. Needs a CUDA GPU with some 20 GB and about 30 GB of shared memory::

    python -m benchmarks.speed.ray_fed [--seconds 20] [--producers 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch

from benchmarks.speed.pipeline import (
    EVENTS,
    PANELS,
    SIDE,
    end_to_end,
    make_module,
    make_trainer,
    windows_of,
)
from benchmarks.speed.planted import planted_logits
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.data import QueueDataModule
from peaknet_predict.feed import push
from peaknet_predict.module import PeakNetModule
from peaknet_predict.queues import (
    QueueAddress,
    Reader,
    Taken,
    connect_queue,
    run_in_cluster,
)
from peaknet_predict.queues.cluster import connect
from peaknet_predict.sources import EventSource
from peaknet_predict.types import EventId, Image, Result


class Repeated(EventSource):
    """A few random images over and over: a producer that costs nothing but its puts."""

    def __init__(self, num_events: int, kept: int = 8) -> None:
        self.num_events = num_events
        self.kept = kept

    def __len__(self) -> int:
        return self.num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        random = np.random.default_rng(0)
        images = random.random((self.kept, PANELS, SIDE, SIDE), dtype=np.float32)
        for idx in range(first, self.num_events):
            yield idx, images[idx % self.kept], 9500.0


def produce(
    queue: QueueAddress, num_events: int, rate_hz: float | None, of: int, rank: int
) -> None:
    push(Repeated(num_events), connect_queue(queue, "events"), rate_hz, rank=rank, producers=of)


def take(reader: Reader, group: str) -> tuple[list[Taken], bool]:
    """Get, and acknowledge at once."""
    taken, ended = reader.get(group, 32, 1.0)
    reader.ack([one.id for one in taken if one.id is not None])
    return taken, ended


def discard(queue: QueueAddress) -> int:
    """Take results until the end, as a writer with an infinitely fast disk would."""
    reader = connect_queue(queue, "results").reader
    taken, ended = 0, False
    while not ended:
        results, ended = take(reader, "discard")
        taken += len(results)
    return taken


def relay(name: str, producers: int, num_events: int) -> float:
    """Events per second from producers to one reader that does nothing with them."""
    queue = QueueAddress(name, max_events=256)
    reader = connect_queue(queue, "events").reader
    for rank in range(producers):
        run_in_cluster(produce, queue, num_events // producers, None, producers, rank)
    taken, ended, began = 0, False, 0.0
    while not ended:
        events, ended = take(reader, "relay")
        if events and not began:
            began = time.perf_counter()  # the producers' start-up is not the rate
            continue
        taken += len(events)
    return taken / (time.perf_counter() - began)


def send(name: str, num_events: int) -> float:
    """Results per second from one writer to one reader that does nothing with them."""
    queue = QueueAddress(name, max_events=256)
    producer = connect_queue(queue, "results").producer
    producer.open("sender")
    reader = run_in_cluster(discard, queue)
    source = Repeated(num_events)
    lot: list[Result] = []
    began = 0.0
    for idx, image, energy in source.events():
        lot.append(Result(EventId("s", 0, idx), image, np.zeros((50, 3)), energy))
        if len(lot) == EVENTS:
            producer.put("sender", lot)
            began = began or time.perf_counter()
            lot = []
    producer.close("sender")
    reader.result()
    return (num_events - EVENTS) / (time.perf_counter() - began)


class Clock(L.Callback):
    """Starts the producers when all is compiled, and notes when each batch goes to the writer."""

    def __init__(self, start: Callable[[], None]) -> None:
        self.moments: list[float] = []
        self.start = start

    def on_predict_epoch_start(self, *args: Any) -> None:
        self.start()

    def on_predict_batch_end(self, *args: Any) -> None:
        self.moments.append(time.perf_counter())


def ray_fed(
    module: PeakNetModule, name: str, producers: int, num_events: int, rate_hz: float | None
) -> tuple[list[float], QueueWriter]:
    events, results = QueueAddress(f"{name}-in", max_events=256), QueueAddress(f"{name}-out")
    slow = rate_hz is not None
    data = QueueDataModule(
        events,
        EVENTS,
        partial_sizes=(8,) if slow else (),
        max_latency_ms=20.0 if slow else None,
        address="auto",
    )
    connect_queue(events, "events")
    connect_queue(results, "results")
    run_in_cluster(discard, results)

    def start() -> None:
        for rank in range(producers):
            run_in_cluster(produce, events, num_events // producers, rate_hz, producers, rank)

    writer, clock = QueueWriter(results, balance=None), Clock(start)
    trainer = make_trainer(writer, clock)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return clock.moments, writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--producers", type=int, default=4)
    arguments = parser.parse_args()
    connect("local")
    rows: list[tuple[str, str]] = []
    for producers in (1, arguments.producers):
        rate = relay(f"relay-{producers}", producers, 4096)
        rows.append((f"transport in: {producers} producers to 1 reader", f"{rate:.0f} events/s"))
    rows.append(("transport out: 1 writer to 1 reader", f"{send('send', 4096):.0f} events/s"))

    module = make_module(planted_logits(EVENTS * PANELS, SIDE, SIDE, 50, seed=0))
    module.warmup_shapes += [(8, PANELS, SIDE, SIDE)]
    memory_s, _ = end_to_end(module, 7, 20)
    rows.append(("memory-fed, 50 peaks a panel", f"{EVENTS / memory_s:.0f} events/s"))
    wanted = int(arguments.seconds / memory_s) * EVENTS
    moments, writer = ray_fed(module, "fast", arguments.producers, wanted, None)
    assert writer.ledger.predicted == wanted // arguments.producers * arguments.producers
    ray_s = statistics.median(windows_of(moments, 20))
    rows.append(("Ray-fed, results into Ray", f"{EVENTS / ray_s:.0f} events/s"))
    rows.append(("  of memory-fed", f"{memory_s / ray_s:.3f}"))
    _, writer = ray_fed(module, "slow", 1, 1500, 120.0)
    p50, p99 = writer.ledger.latency_ms(50, 99)
    rows.append(
        ("latency from put to result at 120 events/s", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; events of 4x512x512 float32")
    for name, figure in rows:
        print(f"{name:50} {figure}")


if __name__ == "__main__":
    main()
