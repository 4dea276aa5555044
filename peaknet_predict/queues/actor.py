"""The queue as a Ray actor: long polling around `QueueState`, and psana-ray's three methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from peaknet_predict.queues.state import (
    END_MARKER,
    ForeignItem,
    Kind,
    QueueState,
    QueueStatistics,
    Record,
)
from peaknet_predict.types import Event, Result
from peaknet_predict.wire import event_to_item, results_to_item

PROTOCOL = 1
"""Version of the methods below; a client refuses to talk to another one."""


class Description(NamedTuple):
    """What kind of queue this is."""

    protocol: int
    kind: Kind
    max_events: int
    max_bytes: int


class Delivery(NamedTuple):
    """The answer to `QueueActor.get_many`: records, or nothing yet, or the end.

    With the end come the producers that ended their part of the stream early, and why.
    """

    records: list[Record]
    ended: bool
    failures: dict[str, str]


class QueueActor:
    """A named queue in the cluster, for any number of producers and readers.

    ``put``, ``get`` and ``size`` are psana-ray's; programs that know nothing else can use them. The
    other methods are for our own clients: they move many events a call, wait in the actor instead
    of polling, and tell "empty" from "ended".

    Every method runs in the actor's one event loop, so the state is never changed by two at once.
    """

    def __init__(self, kind: Kind, max_events: int, max_bytes: int) -> None:
        self._state = QueueState(kind, max_events, max_bytes)
        self._changed = asyncio.Condition()

    async def put(self, item: Any) -> bool:
        """Take one item (psana-ray's method): False when full, ``None`` ends the stream."""
        async with self._changed:
            taken = self._state.put_foreign(item)
            self._changed.notify_all()
        return taken

    async def get(self) -> Any:
        """Return one item, or ``None`` when there is none (psana-ray's method)."""
        async with self._changed:
            record = self._state.get_foreign()
            self._changed.notify_all()
        if isinstance(record, Event):
            return event_to_item(record)
        if isinstance(record, Result):
            return results_to_item([record])
        if isinstance(record, ForeignItem):
            return record.payload
        return END_MARKER if record is not None else None

    async def size(self) -> int:
        """Return the number of items that can be taken now (psana-ray's method)."""
        return len(self._state)

    async def describe(self) -> Description:
        """Return protocol version, kind and capacity."""
        return Description(
            PROTOCOL, self._state.kind, self._state.max_events, self._state.max_bytes
        )

    async def open(self, producer: str, of: int) -> None:
        """Announce a producer, one of ``of``."""
        async with self._changed:
            self._state.open(producer, of)
            self._changed.notify_all()

    async def close(self, producer: str, failure: str | None, end_markers: int) -> None:
        """End a producer's part of the stream."""
        async with self._changed:
            self._state.close(producer, failure, end_markers)
            self._changed.notify_all()

    async def put_many(self, producer: str, records: list[Record], timeout_s: float) -> int:
        """Take the records as room appears, up to ``timeout_s``; the answer is how many."""
        taken = 0

        def all_taken() -> bool:
            nonlocal taken
            more = self._state.put(producer, records[taken:])
            taken += more
            if more:
                self._changed.notify_all()
            return taken == len(records)

        await self._wait_for(all_taken, timeout_s)
        return taken

    async def get_many(self, reader: str, max_records: int, timeout_s: float) -> Delivery:
        """Return records as soon as there are any, the end, or nothing after ``timeout_s``."""
        delivery = Delivery([], False, {})

        def something() -> bool:
            nonlocal delivery
            records, ended = self._state.get(reader, max_records)
            delivery = Delivery(records, ended, self._state.failures if ended else {})
            return bool(records) or ended

        await self._wait_for(something, timeout_s)
        return delivery

    async def wait_ended(self, timeout_s: float) -> bool:
        """Wait until every producer has closed the stream; say whether they have."""
        return await self._wait_for(lambda: self._state.ended, timeout_s)

    async def statistics(self) -> QueueStatistics:
        """Return what went through and what is here."""
        return self._state.statistics()

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        # The condition may take records out of the queue, so it is only ever evaluated here,
        # outside anything that a timeout can cancel.
        clock = asyncio.get_running_loop()
        deadline = clock.time() + timeout_s
        async with self._changed:
            while not condition():
                remaining = deadline - clock.time()
                if remaining <= 0:
                    return False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), remaining)
            self._changed.notify_all()
        return True
