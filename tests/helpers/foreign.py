"""A queue as psana-ray makes it, for tests: three methods, None for empty."""

from __future__ import annotations

import time
from collections import deque
from typing import Any


class ThreeMethodQueue:
    def __init__(self, max_size: int, pause_at: int | None = None, pause_s: float = 0.0) -> None:
        self._items: deque[Any] = deque()
        self._max_size = max_size
        self._gets = 0
        self._pause_at = pause_at
        self._pause_s = pause_s
        self._dry_until = 0.0

    def put(self, item: Any) -> bool:
        if len(self._items) >= self._max_size:
            return False
        self._items.append(item)
        return True

    def get(self) -> Any:
        if self._pause_at is not None and self._gets == self._pause_at:
            self._dry_until, self._pause_at = time.monotonic() + self._pause_s, None
        if time.monotonic() < self._dry_until or not self._items:
            return None
        self._gets += 1
        return self._items.popleft()

    def size(self) -> int:
        return len(self._items)


def make_three_method_queue(name: str, namespace: str, *args: Any) -> Any:
    import ray

    handle = (
        ray.remote(ThreeMethodQueue)
        .options(name=name, namespace=namespace, lifetime="detached", num_cpus=0)
        .remote(*args)
    )
    ray.get(handle.size.remote())
    return handle
