"""What tests do with queues again and again."""

from __future__ import annotations

import os
import signal

import numpy as np

from peaknet_predict.queues import Queue, QueueAddress, Reader, Taken
from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.types import Event, EventId


def event(idx: int, side: int = 8) -> Event:
    return Event(EventId("s", 0, idx), np.full((1, side, side), idx, np.float32), 9000.0)


def statistics(queue: Queue) -> QueueStatistics:
    """Return the statistics of a queue of ours."""
    found = queue.admin.statistics()
    assert found is not None
    return found


def take(
    reader: Reader, group: str, max_records: int, timeout_s: float
) -> tuple[list[Taken], bool]:
    """Get, and acknowledge at once."""
    taken, ended = reader.get(group, max_records, timeout_s)
    reader.ack([one.id for one in taken if one.id is not None])
    return taken, ended


def take_all(reader: Reader, group: str = "r") -> list[Taken]:
    """Take everything up to the end of the stream."""
    taken: list[Taken] = []
    ended = False
    while not ended:
        more, ended = take(reader, group, 7, 1.0)
        taken += more
    return taken


def kill_actor(address: QueueAddress) -> None:
    import ray

    handle = ray.get_actor(address.name, namespace=address.namespace)
    os.kill(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
