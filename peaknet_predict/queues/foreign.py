"""An actor that knows only ``put``, ``get`` and ``size``, such as psana-ray's, in three roles.

Such a queue hands every item out once and for good, cannot tell "empty" from "ended" (both are
``None``), cannot tell producers apart and counts nothing. Items keep the identity that their
producer gave them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from peaknet_predict.process.stopping import uninterrupted
from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.foreign_streams import ForeignStreams
from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.records import END_MARKER, Kind
from peaknet_predict.queues.roles import Taken
from peaknet_predict.queues.waiting_notice import WaitingNotice
from peaknet_predict.queues.wire import (
    cannot_unpickle,
    event_to_item,
    item_to_event,
    item_to_results,
    named,
    results_to_item,
)
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0  # between two tries of a put
_LONGEST_POLL_S = 0.1  # between two looks for an item


class ForeignProducer:
    """Fills another program's queue, as the only producer of its stream."""

    closes_for_all = True

    def __init__(self, handle: Any, address: QueueAddress, kind: Kind) -> None:
        self._handle = handle
        self._name = address.name
        self._kind = kind

    def open(self, producer: str, of: int = 1, here: bool = True) -> None:
        """Check that the queue can do what is asked.

        Raises
        ------
        QueueError
            If several producers are to fill it: the end of the first would end the stream for all.
        """
        if of > 1 and self._kind == "events":
            raise QueueError(
                f"queue {self._name!r} is another program's and cannot tell {of} producers "
                "apart; feed it with one, or let this program make the queue"
            )

    def first_missing(self, stream: str, rank: int) -> int:
        """Raise `QueueError`: this queue does not know which events it has had."""
        raise QueueError(
            f"stream {stream!r}: queue {self._name!r} is another program's and does not know which "
            "events it has had, so that no producer can go on in it; leave the stream's name out"
        )

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records, with back-off and jitter until ``stop`` is set; results in one item."""
        accepted = 0
        results = [record for record in records if isinstance(record, Result)]
        if results and self._put_item(results_to_item(results), stop):
            accepted += len(results)
        for record in records:
            if isinstance(record, Event) and self._put_item(event_to_item(record), stop):
                accepted += 1
        return accepted

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Put ``end_markers`` end items, each until it is accepted.

        Only one producer may call it, after all others have put their last item.
        """
        marker = None if self._kind == "events" else END_MARKER
        for _ in range(end_markers):
            self._put_item(marker)

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Put ``end_markers`` end items: they end the stream of every producer."""
        self.close(prefix, failure, end_markers)

    def _put_item(self, item: Any, stop: threading.Event | None = None) -> bool:
        import ray

        notice = WaitingNotice(f"queue {self._name!r} is full; waiting")
        pause = 0.01
        # One object for all tries; Ray hands the actor the value, not the reference.
        reference = ray.put(item)
        while not _call(self._handle, self._name, "put", reference):
            if stop is not None and stop.is_set():
                return False
            notice.report()
            # Jitter keeps several producers from trying at the same moments.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, _LONGEST_PAUSE_S)
        return True


class ForeignReader:
    """Takes items out of another program's queue.

    Parameters
    ----------
    handle
        Ray's handle of the actor.
    address, kind
        Where the queue is, and what it holds.
    uid
        Name for the queue's streams: the queue itself names none, and its producers count from 0 in
        every run.
    """

    def __init__(self, handle: Any, address: QueueAddress, kind: Kind, uid: str) -> None:
        self.failures: dict[str, str] = {}
        self.flush_wanted = False
        self.holder = uid
        self._handle = handle
        self._address = address
        self._kind = kind
        self._uid = uid
        self._streams = ForeignStreams(uid)
        self._items_taken = 0
        self._idle_s = 0.0
        self._notice = WaitingNotice(f"no event in queue {address.name!r}")
        self._quarantine = Quarantine(address.quarantine, address.quarantine_bytes, self._uid)
        self._under_way: dict[EventId, Any] = {}  # and the item that it came in

    @property
    def unsettled(self) -> int:
        """How many items are under way here."""
        return len(self._under_way)

    def join(self, group: str) -> str:
        """Return the actor's name: this queue cannot tell its streams apart."""
        return f"{self._address.name}@{self._handle._actor_id.hex()[:16]}"

    def get(self, group: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Take up to ``max_records`` items within ``timeout_s``; True after the idle time."""
        asked_at = time.monotonic()
        pause = 0.001
        while True:
            items = self._get_items(max_records)
            if items:
                self._idle_s = 0.0
                self._notice.reset()
                taken: list[Taken] = []
                for item in items:
                    parts = self._decode(item)
                    self._under_way |= {part.id: item for part in parts if part.id is not None}
                    taken += parts
                return taken, False
            self._notice.report()
            self._keep_refused()
            # Only time spent asking is idle: while the caller compiles or waits for room at the
            # output, the queue may well be full.
            waited_s = time.monotonic() - asked_at
            if self._idle_s + waited_s >= self._address.idle_timeout_s:
                return [], True
            if waited_s >= timeout_s:
                self._idle_s += waited_s
                return [], False
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_POLL_S)

    def ack(self, ids: Iterable[EventId]) -> None:
        """Note that these are done."""
        for key in ids:
            self._under_way.pop(key, None)

    def reject(self, refusals: Iterable[Refusal]) -> None:
        """Put these into this process's quarantine: the queue has none."""
        for refusal in refusals:
            if refusal.id is not None:
                item = self._under_way.pop(refusal.id, None)
                self._quarantine.keep(refusal.id, refusal.reason, item)
        self._keep_refused()

    def release(self, failure: str | None = None) -> int:
        """Log that what is under way is lost: this queue takes nothing back."""
        if self._under_way:
            log.error(
                "%d events of queue %r are lost: another program's queue takes none back",
                len(self._under_way),
                self._address.name,
            )
        self._keep_refused()
        if self._quarantine.problem is not None:
            log.error("refused events of queue %r are lost: %s", self._address.name, self._lack())
        return 0

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Return all: this queue hands nothing out twice."""
        return set(ids)

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return none: this queue hands nothing out twice."""
        return ()

    def touch(self) -> None:
        """Restart the idle time: while work goes on elsewhere, silence does not mean the end."""
        self._idle_s = 0.0

    def _keep_refused(self) -> None:
        """Write what the quarantine had no room for; without it, the stream is incomplete."""
        self._quarantine.retry()
        if self._quarantine.problem is None:
            self.failures.pop("quarantine", None)
        else:
            self.failures["quarantine"] = self._lack()

    def _lack(self) -> str:
        return f"refused events are in no file: {self._quarantine.problem}"

    def _get_items(self, max_items: int) -> list[Any]:
        """Take up to ``max_items`` items, with all calls under way at once."""
        name = self._address.name
        wanted = min(max_items, max(1, int(_call(self._handle, name, "size"))))
        references = [self._handle.get.remote() for _ in range(wanted)]
        answers = [_taken(name, reference) for reference in references]
        # An old-style END in a queue of results is an end for its readers, not an item for us.
        return [item for item in answers if item is not None and not _is_end_marker(item)]

    def _decode(self, item: Any) -> list[Taken]:
        position, self._items_taken = self._items_taken, self._items_taken + 1
        if self._kind == "results":
            return list(item_to_results(item, self._uid, position))
        identity = named(item)
        stream = self._streams.name_for(identity)
        self._streams.accept(identity)
        return [item_to_event(item, stream, position)]


class ForeignAdmin:
    """Looks at another program's queue, which counts nothing."""

    leases = False
    promise = (
        "may lose events: another program's queue hands each out once, so that a process that is "
        "killed takes with it what it held, and a put whose answer is lost may be lost"
    )

    def __init__(self, handle: Any, address: QueueAddress, uid: str) -> None:
        self.uid = uid
        self._handle = handle
        self._name = address.name

    def statistics(self) -> None:
        """Return None: such a queue does not count."""
        return

    def size(self) -> int:
        """Return how many items can be taken now."""
        return int(_call(self._handle, self._name, "size"))


def _call(handle: Any, name: str, method: str, *args: Any) -> Any:
    return _answer(name, method, getattr(handle, method).remote(*args))


def _answer(name: str, method: str, reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.ActorUnavailableError as error:
        raise QueueError(
            f"queue {name!r} did not answer a {method}; whether it was carried out is not known. "
            "Look at the network and at the Ray logs of the actor's node, then restart this run"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise QueueError(
            f"the actor of queue {name!r} is gone, and what was still in it is lost; the Ray logs "
            f"of its node say why ({str(error).splitlines()[0]}). Restart the producer and this run"
        ) from error


def _is_end_marker(item: Any) -> bool:
    return isinstance(item, str) and item == END_MARKER


def _taken(name: str, reference: Any) -> Any:
    """Return an item; one of a class that is unknown here is a bad item, not the stream's end."""
    import ray

    ray.wait([reference])
    # While an object is made again it may raise anything, also what a signal raises.
    with uninterrupted():
        try:
            return sanitized(_answer(name, "get", reference))
        except QueueError:
            raise
        except ray.exceptions.RaySystemError as error:
            return cannot_unpickle(getattr(error, "client_exc", error))
        except BaseException as error:
            return cannot_unpickle(error)
