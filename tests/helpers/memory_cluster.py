"""A cluster in this process: queues by name, tasks as threads, and no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from peaknet_predict.queues import ProcessLostError, Queue, QueueAddress, QueueError
from peaknet_predict.queues.records import Kind
from peaknet_predict.queues.roster import Report, Roll, RosterState
from tests.helpers.memory_queue import MemoryQueue

_USERS = (
    "peaknet_predict.data",
    "peaknet_predict.feed",
    "peaknet_predict.consume",
    "peaknet_predict.callbacks.queue_writer",
    "peaknet_predict.callbacks.cxi_output",
)


class MemoryTask:
    """A function that runs in a thread, as `ClusterTask` runs one in a process."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._act: Callable[[], Any] = partial(function, *args, **kwargs)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_s: float | None = None) -> Any:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"still running after {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._act()
        except BaseException as error:
            self._error = error


class MemoryRoster:
    """A rank's place in a roster of this process; nobody repeats its report."""

    def __init__(
        self, state: RosterState, rank: int, counts: Callable[[], tuple[int, ...]]
    ) -> None:
        self.state = state
        self._report = Report(rank)
        self._counts = counts
        self.latest: Roll | None = None
        self.reachable = True

    def report(self, **changes: Any) -> Roll:
        if not self.reachable:
            raise QueueError("the roster is gone")
        self._report = replace(self._report, counts=self._counts(), **changes)
        self.latest = self.state.report(self._report)
        return self.latest


class MemoryCluster:
    """Queues and rosters by name.

    Attributes
    ----------
    queues, rosters
        What has been made; a queue may be put here before a run makes it.
    places
        Of ranks in their rosters.
    tasks
        The functions that were started, in order.
    lost
        How many of the tasks to come die at once.
    """

    def __init__(self) -> None:
        self.queues: dict[str, MemoryQueue] = {}
        self.rosters: dict[str, RosterState] = {}
        self.places: list[MemoryRoster] = []
        self.tasks: list[MemoryTask] = []
        self.lost = 0
        self._lock = threading.Lock()

    def connect(self, address: str) -> str:
        return "memory"

    def connect_queue(self, address: QueueAddress, kind: Kind, resumes: bool = False) -> Queue:
        with self._lock:
            if address.name not in self.queues:
                self.queues[address.name] = MemoryQueue(
                    kind,
                    address.name,
                    max_events=address.max_events,
                    lease_s=address.lease_s,
                    producer_timeout_s=address.producer_timeout_s,
                )
            return self.queues[address.name].connect(resumes)

    def connect_roster(
        self,
        name: str,
        namespace: str,
        num_ranks: int,
        rank: int,
        silence_s: float,
        stalled: Callable[[], bool],
        counts: Callable[[], tuple[int, ...]],
    ) -> MemoryRoster:
        with self._lock:
            state = self.rosters.setdefault(name, RosterState(num_ranks, silence_s))
        self.places.append(MemoryRoster(state, rank, counts))
        return self.places[-1]

    def run_in_cluster(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> MemoryTask:
        def die(*args: Any, **kwargs: Any) -> None:
            raise ProcessLostError("the worker died")

        dies, self.lost = self.lost > 0, max(0, self.lost - 1)
        self.tasks.append(MemoryTask(die if dies else function, args, kwargs))
        return self.tasks[-1]


def install(monkeypatch: pytest.MonkeyPatch) -> MemoryCluster:
    """Have a test's runs find their queues in this process."""
    cluster = MemoryCluster()
    replacements = {
        "connect": cluster.connect,
        "connect_queue": cluster.connect_queue,
        "connect_roster": cluster.connect_roster,
        "run_in_cluster": cluster.run_in_cluster,
        "current_address": lambda: "memory",
        "vital_signs": lambda: {},
    }
    for module in _USERS:
        for name, replacement in replacements.items():
            monkeypatch.setattr(f"{module}.{name}", replacement, raising=False)
    return cluster
