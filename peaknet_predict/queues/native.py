"""Our own queue actor in its three roles: repeatable puts, leases, statistics."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from peaknet_predict.queues.claim_check import Checked
from peaknet_predict.queues.cluster import known_actors
from peaknet_predict.queues.dispatch import Delivery
from peaknet_predict.queues.held_leases import Finished, HeldLeases
from peaknet_predict.queues.lots import Parcel, unpack
from peaknet_predict.queues.records import ForeignItem, Kind, Record, purged
from peaknet_predict.queues.roles import Taken
from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.queues.transport import Acknowledgements, ActorCalls, Heartbeat
from peaknet_predict.queues.waiting_notice import WaitingNotice
from peaknet_predict.queues.wire import item_to_event, item_to_results
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)

_PUT_BYTES = 64 * 2**20  # most bytes of one put: some 16 events of 4 MB
_POLL_S = 2.0  # longest wait of one put in the actor: a request to stop is noticed after it
_STALL_S = 600.0  # without a sign of work for this long, leases are no longer kept alive


class NativeProducer:
    """Fills our own queue. A thread reports that this process and its producers are alive."""

    closes_for_all = False

    def __init__(self, calls: ActorCalls) -> None:
        self._calls = calls
        self._open: set[str] = set()
        self._heartbeat = Heartbeat(self._say_alive, calls.settings.producer_timeout_s / 4)

    def open(self, producer: str, of: int = 1, here: bool = True) -> None:
        """Announce a producer, one of ``of`` in all; with ``here``, keep it alive from now on."""
        notice = WaitingNotice(
            f"queue {self._calls.settings.name!r} cannot begin a stream; waiting"
        )
        # Forgotten by a queue that dies, it would be told that the stream has ended without it.
        while (problem := self._calls.call("open", producer, of)) is not None:
            notice.report(lambda why=problem: why)  # type: ignore[misc]
        if here:
            self._open.add(producer)
            self._heartbeat.start()

    def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx of a stream that the queue has never accepted."""
        return int(self._calls.call("first_missing", stream, rank))

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records in order, waiting for room until ``stop`` is set; return how many went in.

        Raises
        ------
        TypeError
            If one of them is no record: then none is put.
        """
        notice = WaitingNotice(f"queue {self._calls.settings.name!r} is full; waiting")
        accepted = 0
        for group in _by_size([purged(record) for record in records]):
            parcel = Parcel(group)
            while parcel:
                if stop is not None and stop.is_set():
                    return accepted
                taken = parcel.offer(self._calls, producer, _POLL_S)
                accepted += taken
                if taken:
                    notice.reset()
                else:
                    notice.report(lambda why=parcel.problem: why or self._why_full())  # type: ignore[misc]
        return accepted

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; ``failure`` says why it is incomplete."""
        self._calls.call("close", producer, failure, end_markers)
        self._open.discard(producer)

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End the part of each producer whose name has a prefix; forget their own failures."""
        self._calls.call("close_group", prefix, failure, end_markers)
        self._open = {name for name in self._open if not name.startswith(prefix)}

    def _say_alive(self) -> None:
        if self._open:
            self._calls.heartbeat("", list(self._open))

    def _why_full(self) -> str | None:
        """Say where to look when a producer waits for room."""
        now: QueueStatistics = self._calls.call("statistics")
        if now.acknowledged or now.quarantined or now.leased:
            return None
        return "nobody has read from it: start its reader, with this queue's name"


class NativeReader:
    """Leases records from our own queue.

    What `get` returns stays leased until `ack`, `reject` or `release`: a thread reports that this
    process is alive. A call whose answer is lost is repeated; that changes nothing.

    Parameters
    ----------
    calls
        The queue's actor.
    kind
        What the queue holds.
    resumes
        Whether this reader replaces one that died: it must not wait for another stream if this one
        has been read to its end meanwhile.
    """

    def __init__(self, calls: ActorCalls, kind: Kind, resumes: bool = False) -> None:
        self.failures: dict[str, str] = {}
        self.flush_wanted = False
        self.holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._calls = calls
        self._kind = kind
        self._resumes = resumes
        self._sequence = itertools.count()
        self._held = HeldLeases()
        self._acks = Acknowledgements(calls)
        self._notice = WaitingNotice(f"no event in queue {calls.settings.name!r}")
        self._touched = time.monotonic()
        self._heartbeat = Heartbeat(self._say_alive, calls.settings.lease_s / 4)

    @property
    def unsettled(self) -> int:
        """How many leases are held here."""
        return len(self._held)

    def join(self, group: str) -> str:
        """Join a stream as a consumer group; return a name of the stream that no other has."""
        return str(self._calls.call("join", group, self._resumes))

    def get(self, group: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Lease up to ``max_records``, waiting up to ``timeout_s``; True at the stream's end."""
        self.touch()
        sequence = next(self._sequence)
        call = (group, self.holder, sequence, self._resumes, max_records, timeout_s)
        fields, places, lots = self._calls.call("get_many", call)
        delivery = Delivery(*fields)
        self.flush_wanted = delivery.flush
        if delivery.tokens:
            self._notice.reset()
            self._heartbeat.start()
        elif not delivery.ended:
            self._notice.report(self._why_empty)
        if delivery.ended:
            self.failures = delivery.failures
        taken: list[Taken] = []
        for token, record in self._hold(delivery, Checked(delivery.records, places, lots)):
            if not isinstance(record, ForeignItem):
                taken.append(record)
                continue
            parts = self._decode(record)
            if parts:
                keys = [part.id for part in parts if part.id is not None]
                self._held.add(token, keys, delivery.lost_by.get(token, ()))
            else:
                self._calls.call("ack", [token])
            taken += parts
        return taken, bool(delivery.ended)

    def ack(self, ids: Iterable[EventId]) -> None:
        """Acknowledge records that the next stage has.

        This does not wait for the queue's answer; an acknowledgement without one is sent again. A
        lease that has ended meanwhile is not acknowledged: another reader has its record now.
        """
        self.touch()
        self._end(self._held.finish(ids))
        self._acks.confirm()

    def reject(self, refusals: Iterable[Refusal]) -> None:
        """Have the queue put records into its quarantine, each with its reason."""
        self.touch()
        for refusal in refusals:
            if refusal.id is not None:
                self._end(self._held.finish([refusal.id], refusal.reason))

    def release(self, failure: str | None = None) -> int:
        """Give back all that is held; with a ``failure``, as records that may have caused it."""
        tokens = self._held.clear()
        if tokens:
            self._calls.call("release", tokens, failure)
        return len(tokens)

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Ask the queue which of these are leased to us at this moment, and forget the others."""
        tokens = self._held.tokens_of(ids)
        current = set(self._calls.call("held", list(set(tokens.values()))))
        self._held.forget({key: token for key, token in tokens.items() if token not in current})
        return {key for key, token in tokens.items() if token in current}

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before and were lost with it."""
        return self._held.lost_by(key)

    def touch(self) -> None:
        """Note that work goes on; without such signs, leases are not kept alive for ever."""
        self._touched = time.monotonic()

    def _end(self, finished: Finished) -> None:
        if finished.acknowledged:
            self._acks.send(finished.acknowledged)
        if finished.rejected:
            self._calls.call("reject", finished.rejected)

    def _hold(self, delivery: Delivery, checked: Checked) -> list[tuple[int, Record]]:
        """Return what is leased, whole; what was taken back meanwhile is left out."""
        leases = dict(zip(delivery.tokens, checked.records, strict=True))
        # Held before their pixels are here, which may take a while.
        for token, record in leases.items():
            if not isinstance(record, ForeignItem):
                self._held.add(token, [record.id], delivery.lost_by.get(token, ()))
        if not checked.lots:
            return list(leases.items())
        whole = unpack(self._calls, delivery.tokens, checked)
        self._held.forget({leases[token].id: token for token in leases if token not in whole})
        return list(whole.items())

    def _decode(self, item: ForeignItem) -> list[Taken]:
        if self._kind == "events":
            return [item_to_event(item.payload, item.stream, item.position)]
        return list(item_to_results(item.payload, item.stream, item.position))

    def _say_alive(self) -> None:
        self._acks.confirm()
        if not len(self._held):
            return
        if time.monotonic() - self._touched > _STALL_S:
            log.error("no sign of work for %.0f s: what is held goes back", _STALL_S)
            return
        self._calls.heartbeat(self.holder, [])

    def _why_empty(self) -> str:
        """Say where to look when a reader gets nothing."""
        now: QueueStatistics = self._calls.call("statistics")
        if now.quarantining:
            return f"{now.quarantining} rejected events wait to be written: {now.problem}"
        if now.open_producers:
            held = f", {now.leased} events under lease" if now.leased else ""
            return f"open producers: {', '.join(now.open_producers)}{held}"
        if now.ended:
            return "its stream has been read to the end; the next one is waited for"
        settings = self._calls.settings
        others = sorted(set(known_actors()) - {f"{settings.namespace}/{settings.name}"})
        return (
            "no producer has opened it: start one, with this queue's name; other named actors in "
            f"this cluster: {', '.join(others) or 'none'}"
        )


class NativeAdmin:
    """Looks at our own queue."""

    leases = True

    def __init__(self, calls: ActorCalls, uid: str) -> None:
        self.uid = uid
        self._calls = calls

    @property
    def promise(self) -> str:
        """What is promised of the records in this queue."""
        spool = self._calls.settings.spool
        if spool is not None:
            return f"loses nothing, whatever dies: what it holds is on disk too, in {spool}"
        return (
            "loses nothing if a reader or producer dies; but what it holds is in memory only, and "
            "is lost if Ray or its machine dies"
        )

    def statistics(self) -> QueueStatistics:
        """Return what went through the queue and what is in it."""
        statistics: QueueStatistics = self._calls.call("statistics")
        return statistics

    def size(self) -> int:
        """Return how many records can be taken now."""
        return int(self._calls.call("size"))


def _by_size(records: Sequence[Event | Result]) -> Iterator[list[Event | Result]]:
    """Group records so that a call moves a bounded number of bytes.

    The arrays of a call share one object in Ray's memory, which stays as long as any of them is
    used.
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
