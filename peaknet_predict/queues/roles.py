"""The three roles in which a program uses a queue of either kind.

A `Producer` fills the queue, a `Reader` leases records and settles them, an `Admin` looks at the
queue without changing it. Our own actor and a three-method actor such as psana-ray's each have
their own classes for them (`native.py`, `foreign.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.types import Event, EventId, Refusal, Result

Taken = Event | Result | Refusal
"""What a reader gets: a record, or the reason why an item is not one."""


class Producer(Protocol):
    """Fills a queue, under the name of one or more producers of its stream."""

    @property
    def closes_for_all(self) -> bool:
        """Whether `close` ends the stream for all producers, so that only the last may call it."""

    def open(self, producer: str, of: int = 1, here: bool = True) -> None:
        """Announce a producer, one of ``of`` that together make the stream.

        With ``here``, this process keeps it alive; otherwise the producer has to do that itself.

        Raises
        ------
        QueueError
            If the queue cannot tell so many producers apart.
        """

    def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx of a stream that the queue has never accepted.

        Raises
        ------
        QueueError
            If the queue does not know which events it has had.
        """

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records in order, waiting for room until ``stop`` is set; by default for ever.

        Returns
        -------
        int
            How many were accepted, now or earlier: all, unless ``stop`` was set.

        Raises
        ------
        QueueError
            If the queue's actor is gone.
        """

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream.

        Parameters
        ----------
        producer
            Its name.
        failure
            Why the part is incomplete; None if it is whole.
        end_markers
            How many readers that know only ``get`` are handed an end item.
        """

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End the part of each producer whose name has a prefix; forget those producers' failures.

        Only a producer that knows that all work has been done may call it. ``failure`` says what is
        wrong with the stream as a whole.
        """


class Reader(Protocol):
    """Leases records from a queue and settles each of them."""

    failures: dict[str, str]
    """At the end of the stream: producers that ended their part early, and why."""

    flush_wanted: bool
    """Whether nothing more comes until what is held here has been settled."""

    @property
    def holder(self) -> str:
        """The name under which the queue knows this process as the holder of leases."""

    @property
    def unsettled(self) -> int:
        """How many leases are held here."""

    def join(self, group: str) -> str:
        """Join a stream as a consumer group; the first `get` would do so as well.

        Returns
        -------
        str
            The stream's name: the same for all its readers, and unique among all queues. Another
            program's queue holds a single stream, run after run.
        """

    def get(self, group: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Lease up to ``max_records``, waiting up to ``timeout_s`` for the first.

        Parameters
        ----------
        group
            The consumer group: readers that share one job, such as the ranks of a run, share it.
            Each record goes to one of them, and the end to all.
        max_records
            Most records.
        timeout_s
            Seconds.

        Returns
        -------
        list of Event, Result or Refusal
            What was leased or refused.
        bool
            Whether the stream has ended.
        """

    def ack(self, ids: Iterable[EventId]) -> None:
        """Acknowledge records that the next stage has: the queue need not keep them any longer."""

    def reject(self, refusals: Iterable[Refusal]) -> None:
        """Have records put into quarantine, each with its reason."""

    def release(self, failure: str | None = None) -> int:
        """Give back all that is held; return how many records.

        With a ``failure``, each of them counts as a record that may have caused it.
        """

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Return which of these are leased to this process now."""

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before and were lost with it."""

    def touch(self) -> None:
        """Note that the work goes on, although nothing is taken or acknowledged."""


class Admin(Protocol):
    """Looks at a queue."""

    @property
    def uid(self) -> str:
        """A name that no other queue, past or future, has."""

    @property
    def leases(self) -> bool:
        """Whether records are leased, so that a dead reader's records go to another one."""

    @property
    def promise(self) -> str:
        """What is promised of the records in this queue, in words."""

    def statistics(self) -> QueueStatistics | None:
        """Return what went through the queue and what is in it; None if it does not count."""

    def size(self) -> int:
        """Return how many items can be taken now."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A connected queue, in its three roles."""

    producer: Producer
    reader: Reader
    admin: Admin
