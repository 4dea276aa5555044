"""Programs that know only ``put``, ``get`` and ``size``, as psana-ray's producers and readers do.

::

    python -m benchmarks.reliability.chaos.peer ADDRESS QUEUE produce RANK EVENTS RATE_HZ
    python -m benchmarks.reliability.chaos.peer ADDRESS QUEUE consume FILE
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.chaos.events import truth
from peaknet_predict.queues.cluster import NAMESPACE, connect

_LONGEST_PAUSE_S = 0.5


def produce(queue: Any, rank: int, num_events: int, rate_hz: float) -> None:
    """Put ``[rank, idx, image, photon energy]``, again while the queue is full, and ``None``."""
    import ray

    began = time.monotonic()
    for idx in [*range(num_events), None]:
        item: Any = None
        if idx is not None:
            one = truth(rank, idx)
            item = [rank, idx, one.image, one.photon_energy]
            time.sleep(max(0.0, began + idx / rate_hz - time.monotonic()))
        pause = 0.01
        while not ray.get(queue.put.remote(item)):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def consume(queue: Any, path: Path) -> None:
    """Get lists of ``(image, peaks, photon energy)`` and keep them, until ``'END'``."""
    import ray

    with path.open("ab") as file:
        pause = 0.01
        while True:
            item = ray.get(queue.get.remote())
            if isinstance(item, str):
                return
            if item is None:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            pause = 0.01
            pickle.dump(item, file)
            file.flush()


def kept(path: Path) -> Iterator[tuple[Any, Any, float]]:
    """Read what `consume` kept; only ever a file of our own."""
    with path.open("rb") as file:
        while file.peek(1):
            yield from pickle.load(file)


def main() -> None:
    address, name, does, *words = sys.argv[1:]
    connect(address)
    import ray  # which reads its security settings when it is imported

    queue = ray.get_actor(name, namespace=NAMESPACE)
    if does == "produce":
        produce(queue, int(words[0]), int(words[1]), float(words[2]))
    else:
        consume(queue, Path(words[0]))


if __name__ == "__main__":
    main()
