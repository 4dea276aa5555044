"""Clients of the two kinds of queue: our own actor, and a foreign one with three methods."""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peaknet_predict.queues.actor import PROTOCOL, QueueActor
from peaknet_predict.queues.cluster import NAMESPACE
from peaknet_predict.queues.state import END_MARKER, ForeignItem, Kind, Record
from peaknet_predict.types import Event, Refusal, Result
from peaknet_predict.wire import (
    event_to_item,
    item_to_event,
    item_to_results,
    results_to_item,
)

log = logging.getLogger(__name__)

Taken = Event | Result | Refusal

_PUT_BYTES = 64 * 2**20  # most bytes of one put: some 16 events of 4 MB
_HICCUP_S = 30.0  # how long a queue may be out of reach before a call fails
_POLL_S = 2.0  # longest single wait inside the actor; bounds how late a signal is noticed
_REPORT_S = 30.0  # how often a wait for room or for events is mentioned in the log


class QueueError(RuntimeError):
    """A queue cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class QueueAddress:
    """Where a queue is, and how to make it if it is not there.

    Attributes
    ----------
    name
        Name of the queue's actor in the cluster.
    namespace
        Ray namespace of the actor.
    create
        Make the queue if there is none of that name; otherwise a missing queue is an error.
    max_events, max_bytes
        Capacity of a queue made here; producers wait while it is full.
    idle_timeout_s
        A queue of another program cannot say that the stream has ended: reading it ends after this
        many seconds without an event. Our own queue says so and takes no notice of this.
    """

    name: str
    namespace: str = NAMESPACE
    create: bool = True
    max_events: int = 400
    max_bytes: int = 2 * 1024**3
    idle_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a queue needs a name")
        if self.max_events < 1 or self.max_bytes < 1 or self.idle_timeout_s <= 0:
            raise ValueError(
                f"queue {self.name!r}: max_events, max_bytes and idle_timeout_s must be positive; "
                f"got {self.max_events}, {self.max_bytes} and {self.idle_timeout_s}"
            )


class Queue(Protocol):
    """What the rest of the program does with a queue, whichever actor is behind it."""

    failures: dict[str, str]
    """At the end of the stream: producers that ended early, and why."""

    native: bool
    """Whether it is our own actor: knows event identity and the end of the stream."""

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of``."""

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream."""

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records, waiting for room until ``stop`` is set; return how many were accepted."""

    def get(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Take up to ``max_records`` within ``timeout_s``; True at the end of the stream."""

    def size(self) -> int:
        """Return how many items can be taken now."""


def connect_queue(
    address: QueueAddress, kind: Kind, outlives_us: bool = True
) -> NativeQueue | ForeignQueue:
    """Find a queue by name, or make it, in the cluster this process has joined.

    Parameters
    ----------
    address
        Where the queue is.
    kind
        What it holds.
    outlives_us
        Whether a queue made here stays when this process ends, for those who still read it.

    Raises
    ------
    QueueError
        If it is missing and may not be made, holds the other kind of record, or speaks another
        version of the protocol.
    """
    import ray

    try:
        handle = ray.get_actor(address.name, namespace=address.namespace)
    except ValueError as error:
        if not address.create:
            raise QueueError(_missing(address)) from error
        handle = (
            ray.remote(QueueActor)
            .options(
                name=address.name,
                namespace=address.namespace,
                lifetime="detached" if outlives_us else None,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=1000,
            )
            .remote(kind, address.max_events, address.max_bytes)
        )
    if not hasattr(handle, "describe"):
        _check_three_methods(handle, address)
        return ForeignQueue(handle, address, kind)
    description = ray.get(handle.describe.remote())
    if description.protocol != PROTOCOL:
        raise QueueError(
            f"queue {address.name!r} was made by another version of this program (protocol "
            f"{description.protocol}, ours is {PROTOCOL}); end that run, or use another name"
        )
    if description.kind != kind:
        raise QueueError(
            f"queue {address.name!r} holds {description.kind}, but {kind} are expected here; "
            "input and output need queues of different names"
        )
    if (description.max_events, description.max_bytes) != (address.max_events, address.max_bytes):
        log.warning(
            "queue %r is there already and holds up to %d events and %d bytes, whatever is "
            "configured here",
            address.name,
            description.max_events,
            description.max_bytes,
        )
    return NativeQueue(handle, address, kind)


def _missing(address: QueueAddress) -> str:
    import ray

    known = [
        f"{actor['namespace']}/{actor['name']}"
        for actor in ray.util.list_named_actors(all_namespaces=True)
    ]
    return (
        f"there is no queue {address.name!r} in namespace {address.namespace!r}; named actors in "
        f"this cluster: {', '.join(sorted(known)) or 'none'}. Start its producer first, correct "
        "the name, or set create to true"
    )


def _check_three_methods(handle: Any, address: QueueAddress) -> None:
    lacking = [name for name in ("put", "get", "size") if not hasattr(handle, name)]
    if lacking:
        raise QueueError(
            f"the actor {address.name!r} in namespace {address.namespace!r} is not a queue: it has "
            f"no method {' and no '.join(lacking)}. Check the name"
        )


class _Patience:
    """Mentions a long wait in the log now and then, so that a silent hang cannot happen."""

    def __init__(self, waiting_for: str) -> None:
        self._waiting_for = waiting_for
        self._since = self._mentioned = time.monotonic()

    def mention(self) -> None:
        now = time.monotonic()
        if now - self._mentioned >= _REPORT_S:
            self._mentioned = now
            log.warning("%s for %.0f s", self._waiting_for, now - self._since)

    def reset(self) -> None:
        self._since = self._mentioned = time.monotonic()


class NativeQueue:
    """Client of our own `QueueActor`."""

    native = True

    def __init__(self, handle: Any, address: QueueAddress, kind: Kind) -> None:
        self.failures: dict[str, str] = {}
        self._handle = handle
        self._kind = kind
        self._name = address.name
        self._waiting = _Patience(f"no event in queue {address.name!r}")

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of`` that together make the stream."""
        self._call("open", producer, of)

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; ``failure`` says why it is incomplete."""
        self._call("close", producer, failure, end_markers)

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
            How many were accepted: all, unless ``stop`` was set.

        Raises
        ------
        QueueError
            If the queue's actor is gone.
        """
        patience = _Patience(f"queue {self._name!r} is full; waiting")
        accepted = 0
        for left in _by_size(records):
            while left:
                if stop is not None and stop.is_set():
                    return accepted
                taken = self._call("put_many", producer, left, _POLL_S)
                left = left[taken:]
                accepted += taken
                if taken:
                    patience.reset()
                else:
                    patience.mention()
        return accepted

    def get(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Take up to ``max_records``, waiting up to ``timeout_s`` for the first; True at the end.

        Parameters
        ----------
        reader
            Names the reader; readers that share one job (the ranks of a run) share a name.
        """
        delivery = self._call("get_many", reader, max_records, timeout_s)
        if delivery.records:
            self._waiting.reset()
        elif not delivery.ended:
            self._waiting.mention()
        if delivery.ended:
            self.failures = delivery.failures
        taken = [taken for record in delivery.records for taken in self._decode(record)]
        return taken, bool(delivery.ended)

    def size(self) -> int:
        """Return how many events can be taken now."""
        return int(self._call("size"))

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until every producer has closed the stream; say whether they have."""
        return bool(self._call("wait_ended", timeout_s))

    def statistics(self) -> Any:
        """Return the queue's `QueueStatistics`."""
        return self._call("statistics")

    def mention_leftovers(self) -> None:
        """Say in the log if what is in the queue was put by a run that has already ended."""
        statistics = self.statistics()
        if statistics.ended and statistics.ready:
            log.warning(
                "queue %r still holds %d events of a stream that has ended; they come first",
                self._name,
                statistics.ready,
            )

    def _decode(self, record: Record) -> list[Taken]:
        if not isinstance(record, ForeignItem):
            return [record]
        return _decode_item(self._kind, record, f"{self._name}#{record.stream}")

    def _call(self, method: str, *args: Any) -> Any:
        import ray

        deadline = time.monotonic() + _HICCUP_S
        while True:
            try:
                return ray.get(getattr(self._handle, method).remote(*args))
            except ray.exceptions.ActorUnavailableError as error:
                # The call may have been carried out: only what may be done twice is tried again.
                if method in ("put_many", "get_many") or time.monotonic() > deadline:
                    raise QueueError(_unanswered(self._name, method)) from error
                time.sleep(1.0)
            except ray.exceptions.RayActorError as error:
                raise QueueError(_gone(self._name, error)) from error


class ForeignQueue:
    """Client of an actor that knows only ``put``, ``get`` and ``size``, such as psana-ray's.

    Such a queue hands every item out once and for good, cannot tell "empty" from "ended" (both are
    ``None``), and cannot tell producers apart. Items keep the identity their producer gave them.
    """

    native = False

    def __init__(self, handle: Any, address: QueueAddress, kind: Kind) -> None:
        self._handle = handle
        self._address = address
        self._kind = kind
        self.failures: dict[str, str] = {}
        self._items_taken = 0
        # Such a queue names no stream, and its producers count from 0 in every run.
        self._stream = f"{address.name}@{secrets.token_hex(4)}"
        self._idle_s = 0.0
        self._waiting = _Patience(f"no event in queue {address.name!r}")

    def open(self, producer: str, of: int = 1) -> None:
        """Check that nothing is asked that such a queue cannot do: it knows no producers.

        Raises
        ------
        QueueError
            For events from several producers: the end of the first would be the end of all.
        """
        if of > 1 and self._kind == "events":
            raise QueueError(
                f"queue {self._address.name!r} is another program's and cannot tell {of} producers "
                "apart; feed it with one, or let this program make the queue"
            )

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Put ``end_markers`` end items, each until it is accepted.

        Call it from one producer, after all others have put their last item.
        """
        marker = None if self._kind == "events" else END_MARKER
        for _ in range(end_markers):
            self._put_item(marker)

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records, retrying with back-off and jitter until ``stop`` is set; results together.

        Returns
        -------
        int
            How many were accepted: all, unless ``stop`` was set.
        """
        accepted = 0
        results = [record for record in records if isinstance(record, Result)]
        if results and self._put_item(results_to_item(results), stop):
            accepted += len(results)
        for record in records:
            if isinstance(record, Event) and self._put_item(event_to_item(record), stop):
                accepted += 1
        return accepted

    def get(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Take up to ``max_records`` items within ``timeout_s``; True after the idle time."""
        asked_at = time.monotonic()
        pause = 0.001
        while True:
            items = self._get_items(max_records)
            if items:
                self._idle_s = 0.0
                self._waiting.reset()
                return [taken for item in items for taken in self._decode(item)], False
            self._waiting.mention()
            # Only time spent asking is idle: while the caller compiles or waits for room at the
            # output, the queue may well be full.
            waited_s = time.monotonic() - asked_at
            if self._idle_s + waited_s >= self._address.idle_timeout_s:
                return [], True
            if waited_s >= timeout_s:
                self._idle_s += waited_s
                return [], False
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    def size(self) -> int:
        """Return how many items can be taken now."""
        return int(self._call([("size", ())])[0])

    def _get_items(self, max_items: int) -> list[Any]:
        """Take what is there, up to ``max_items``, with all calls under way at once."""
        wanted = min(max_items, max(1, self.size()))
        answers = self._call([("get", ())] * wanted)
        # An old-style END in a queue of results is an end for its readers, not an item for us.
        return [
            item
            for item in answers
            if item is not None and not (isinstance(item, str) and item == END_MARKER)
        ]

    def _decode(self, item: Any) -> list[Taken]:
        record = ForeignItem(item, self._items_taken, 0)
        self._items_taken += 1
        return _decode_item(self._kind, record, self._stream)

    def _put_item(self, item: Any, stop: threading.Event | None = None) -> bool:
        import ray

        patience = _Patience(f"queue {self._address.name!r} is full; waiting")
        pause = 0.01
        # One object for all tries; Ray hands the actor the value, not the reference.
        reference = ray.put(item)
        while not self._call([("put", (reference,))])[0]:
            if stop is not None and stop.is_set():
                return False
            patience.mention()
            # Jitter keeps several producers from knocking at the same moments.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 1.0)
        return True

    def _call(self, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        import ray

        try:
            references = [getattr(self._handle, method).remote(*args) for method, args in calls]
            answers: list[Any] = ray.get(references)
        except ray.exceptions.ActorUnavailableError as error:
            raise QueueError(_unanswered(self._address.name, calls[0][0])) from error
        except ray.exceptions.RayActorError as error:
            raise QueueError(_gone(self._address.name, error)) from error
        return answers


def _decode_item(kind: Kind, item: ForeignItem, stream: str) -> list[Taken]:
    if kind == "events":
        return [item_to_event(item.payload, stream, item.position)]
    return list(item_to_results(item.payload, stream, item.position))


def _by_size(records: Sequence[Event | Result]) -> Iterator[list[Event | Result]]:
    """Group records so that a call moves a bounded number of bytes.

    The arrays of a call share one object in Ray's memory, which stays as long as any of them.
    """
    group: list[Event | Result] = []
    size = 0
    for record in records:
        if group and size + record.nbytes > _PUT_BYTES:
            yield group
            group, size = [], 0
        group.append(record)
        size += record.nbytes
    if group:
        yield group


def _unanswered(name: str, method: str) -> str:
    return (
        f"queue {name!r} did not answer a {method}; whether it was carried out is not known. Look "
        "at the network and at the Ray logs of the actor's node, then restart this run"
    )


def _gone(name: str, error: Exception) -> str:
    return (
        f"the actor of queue {name!r} is gone, and what was still in it is lost; the Ray logs of "
        f"its node say why ({str(error).splitlines()[0]}). Restart the producer and this run"
    )
