"""Client of an actor that knows only ``put``, ``get`` and ``size``, such as psana-ray's."""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.native import Taken
from peaknet_predict.queues.patience import Patience
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.records import END_MARKER, Kind, Opaque
from peaknet_predict.queues.streams import StreamBook
from peaknet_predict.queues.wire import (
    event_to_item,
    item_to_event,
    item_to_results,
    named,
    results_to_item,
)
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)


class ForeignQueue:
    """Client of an actor that knows only ``put``, ``get`` and ``size``, such as psana-ray's.

    Such a queue hands every item out once and for good, cannot tell "empty" from "ended" (both are
    ``None``), and cannot tell producers apart. Items keep the identity their producer gave them.
    Leases, acknowledgements and repeated puts are more than it can do: the methods for them do
    nothing, and `promise` says what that means.
    """

    native = False
    flush_wanted = False

    def __init__(self, handle: Any, address: QueueAddress, kind: Kind) -> None:
        self._handle = handle
        self._address = address
        self._kind = kind
        self.failures: dict[str, str] = {}
        self.resumes = False
        self._items_taken = 0
        # Such a queue names no stream, and its producers count from 0 in every run.
        self.uid = f"{address.name}@{secrets.token_hex(4)}"
        self.holder = self.uid
        self._names = StreamBook(self.uid)
        self._idle_s = 0.0
        self._waiting = Patience(f"no event in queue {address.name!r}")
        self._quarantine = Quarantine(address.quarantine, address.quarantine_bytes)
        self._under_way: dict[EventId, Any] = {}  # and the item it came in

    @property
    def promise(self) -> str:
        """What is promised of records in this queue."""
        return (
            "weaker: another program's queue hands an event out once, so that what a killed "
            "process had taken is lost; and an answer that is lost is a put that may be lost"
        )

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

    def vouch(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Do nothing: such a queue knows no producers."""

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
                taken: list[Taken] = []
                for item in items:
                    parts = self._decode(item)
                    self._under_way |= {part.id: item for part in parts if part.id is not None}
                    taken += parts
                return taken, False
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

    def ack(self, ids: Iterable[EventId]) -> None:
        """Note that these are done."""
        for key in ids:
            self._under_way.pop(key, None)

    def take(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """As `get`, and nothing is noted as under way."""
        taken, ended = self.get(reader, max_records, timeout_s)
        self._under_way.clear()
        return taken, ended

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        """Put these into the quarantine of this process: the queue has none."""
        for refusal in refusals:
            if refusal.id is not None:
                item = self._under_way.pop(refusal.id, None)
                self._quarantine.keep(refusal.id, refusal.reason, item)

    def release(self, failure: str | None = None) -> int:
        """Say that what is under way is lost: such a queue takes nothing back."""
        if self._under_way:
            log.error(
                "%d events of queue %r are lost: another program's queue takes none back",
                len(self._under_way),
                self._address.name,
            )
        return 0

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Return all: such a queue hands nothing out twice."""
        return set(ids)

    @property
    def unsettled(self) -> int:
        """How many items are under way here."""
        return len(self._under_way)

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return none: such a queue hands nothing out twice."""
        return ()

    def touch(self) -> None:
        """Do nothing: such a queue does not ask who is alive."""

    def first_missing(self, stream: str, rank: int) -> int:
        """Return 0: such a queue remembers nothing."""
        return 0

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
        position, self._items_taken = self._items_taken, self._items_taken + 1
        if self._kind == "results":
            return list(item_to_results(item, self.uid, position))
        return [item_to_event(item, self._names.foreign_stream(named(item)), position)]

    def _put_item(self, item: Any, stop: threading.Event | None = None) -> bool:
        import ray

        patience = Patience(f"queue {self._address.name!r} is full; waiting")
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

        def answer(reference: Any) -> Any:
            try:
                return ray.get(reference)
            except ray.exceptions.ActorUnavailableError as error:
                raise QueueError(_unanswered(self._address.name, calls[0][0])) from error
            except ray.exceptions.RayActorError as error:
                raise QueueError(_gone(self._address.name, error)) from error
            except Exception as error:
                if calls[0][0] != "get":
                    raise
                # An object of a class that is not here: one bad item, not the end of the stream.
                return Opaque(f"(cannot be unpickled: {type(error).__name__}: {error})"[:500])

        references = [getattr(self._handle, method).remote(*args) for method, args in calls]
        return [answer(reference) for reference in references]


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
