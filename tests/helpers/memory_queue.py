"""A queue in this process: the state of the real one behind the real roles, without Ray."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from peaknet_predict.queues import Queue, QueueError, Taken
from peaknet_predict.queues.held_leases import HeldLeases
from peaknet_predict.queues.records import END_MARKER, ForeignItem, Kind, Record
from peaknet_predict.queues.state import QueueState, QueueStatistics
from peaknet_predict.queues.wire import item_to_event, item_to_results
from peaknet_predict.types import Event, EventId, Refusal, Result

T = TypeVar("T")


class MemoryQueue:
    """The state of a queue, and a lock that makes every call one step.

    Parameters
    ----------
    kind
        What it holds.
    name
        For its errors.
    ours
        Whether it behaves like our own queue. Otherwise it is another program's: it leases nothing
        and has one end for all producers.
    clock, sleep, look_s
        Of those who use it: the time, a pause, and how often one that waits looks again.
    settings
        Of `QueueState`.

    Attributes
    ----------
    quarantine
        What was rejected, with the reason.
    end_items
        End items put into a queue that is not ours.
    """

    def __init__(
        self,
        kind: Kind = "events",
        name: str = "memory",
        ours: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        look_s: float = 0.001,
        max_events: int = 1000,
        **settings: Any,
    ) -> None:
        self.kind = kind
        self.name = name
        self.ours = ours
        self.clock = clock
        self._sleep, self._look_s = sleep, look_s
        self.quarantine: dict[EventId, str] = {}
        self.end_items: list[str | None] = []
        self.state = QueueState(
            kind,
            max_events,
            2**40,
            uid=f"{name}-uid",
            clock=clock,
            quarantine=lambda entry, reason: self.quarantine.update({entry.id: reason}),
            **settings,
        )
        self._lock = threading.RLock()
        self._holders = itertools.count()
        self._dead = False

    def die(self) -> None:
        """From now on every call fails, as when the actor of a queue is gone."""
        self._dead = True

    def step(self, act: Callable[[QueueState], T]) -> T:
        """Do something with the state, alone."""
        with self._lock:
            if self._dead:
                raise QueueError(f"the actor of queue {self.name!r} is gone. Restart this run")
            return act(self.state)

    def wait(self) -> None:
        """Pause before the next look."""
        self._sleep(self._look_s)

    def connect(self, resumes: bool = False) -> Queue:
        """Connect once more, as another process does."""
        return Queue(
            MemoryProducer(self),
            MemoryReader(self, f"holder-{next(self._holders)}", resumes),
            MemoryAdmin(self),
        )


class MemoryProducer:
    def __init__(self, queue: MemoryQueue) -> None:
        self.closes_for_all = not queue.ours
        self._queue = queue

    def open(self, producer: str, of: int = 1, here: bool = True) -> None:
        self._queue.step(lambda state: state.open(producer, of))

    def first_missing(self, stream: str, rank: int) -> int:
        return self._queue.step(lambda state: state.keys.first_missing(stream, rank))

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        accepted = 0
        if not self._queue.ours:
            self.open(producer)  # such a queue knows no producers
        while accepted < len(records) and not (stop is not None and stop.is_set()):
            left: Sequence[Record] = records[accepted:]
            taken = self._queue.step(lambda state, left=left: state.put(producer, left))  # type: ignore[misc]
            accepted += taken
            if not taken:
                self._queue.wait()
        return accepted

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        if self._queue.ours:
            self._queue.step(lambda state: state.close(producer, failure, end_markers))
        else:
            marker = None if self._queue.kind == "events" else END_MARKER
            self._queue.end_items += [marker] * end_markers

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        self._queue.step(lambda state: state.close_group(prefix, failure, end_markers))


class MemoryReader:
    def __init__(self, queue: MemoryQueue, holder: str, resumes: bool) -> None:
        self.failures: dict[str, str] = {}
        self.flush_wanted = False
        self.holder = holder
        self._queue = queue
        self._resumes = resumes
        self._sequence = itertools.count()
        self._held = HeldLeases()

    @property
    def unsettled(self) -> int:
        return len(self._held)

    def join(self, group: str) -> str:
        return self._queue.step(lambda state: state.streams.join(group, self._resumes))

    def get(self, group: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        sequence = next(self._sequence)
        deadline = self._queue.clock() + timeout_s
        queue = self._queue
        answer = queue.step(lambda s: s.ask(group, self.holder, sequence, self._resumes))
        while answer is None:
            found = queue.step(lambda s: s.take(group, self.holder, sequence, max_records))
            if found.tokens or found.ended or found.flush or queue.clock() >= deadline:
                answer = found
            else:
                queue.wait()
        self.flush_wanted = answer.flush
        if answer.ended:
            self.failures = answer.failures
        taken: list[Taken] = []
        for token, record in zip(answer.tokens, answer.records, strict=True):
            parts = self._decode(record)
            keys = [part.id for part in parts if part.id is not None]
            self._held.add(token, keys, answer.lost_by.get(token, ()))
            taken += parts
        return taken, answer.ended

    def ack(self, ids: Iterable[EventId]) -> None:
        self._end(list(ids), None)

    def reject(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            if refusal.id is not None:
                self._end([refusal.id], refusal.reason)

    def release(self, failure: str | None = None) -> int:
        tokens = self._held.clear()
        if tokens:
            self._queue.step(lambda state: state.release(tokens, failure))
        return len(tokens)

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        tokens = self._held.tokens_of(ids)
        current = set(self._queue.step(lambda state: state.held(list(tokens.values()))))
        self._held.forget({key: token for key, token in tokens.items() if token not in current})
        return {key for key, token in tokens.items() if token in current}

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        return self._held.lost_by(key)

    def touch(self) -> None:
        self._queue.step(lambda state: state.heartbeat(self.holder, []))

    def _end(self, ids: list[EventId], reason: str | None) -> None:
        finished = self._held.finish(ids, reason)
        self._queue.step(lambda state: state.ack(finished.acknowledged))
        self._queue.step(lambda state: state.reject(finished.rejected))

    def _decode(self, record: Record) -> list[Taken]:
        if not isinstance(record, ForeignItem):
            return [record]
        if self._queue.kind == "events":
            return [item_to_event(record.payload, record.stream, record.position)]
        return list(item_to_results(record.payload, record.stream, record.position))


class MemoryAdmin:
    def __init__(self, queue: MemoryQueue) -> None:
        self.uid = queue.state.streams.uid
        self.leases = queue.ours
        self.promise = "no event lost while this process lives" if queue.ours else "weaker"
        self._queue = queue

    def statistics(self) -> QueueStatistics | None:
        found = self._queue.step(lambda state: state.statistics())
        return found if self._queue.ours else None

    def size(self) -> int:
        return self._queue.step(len)
