"""Client of our own queue actor: leases, acknowledgements, and puts that may be repeated."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peaknet_predict.queues.address import QueueError
from peaknet_predict.queues.cluster import known_actors
from peaknet_predict.queues.patience import Patience
from peaknet_predict.queues.records import ForeignItem, Kind, Record
from peaknet_predict.queues.state import Delivery
from peaknet_predict.queues.wire import item_to_event, item_to_results
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)

Taken = Event | Result | Refusal

_PUT_BYTES = 64 * 2**20  # most bytes of one put: some 16 events of 4 MB
_HICCUP_S = 60.0  # how long a queue may be out of reach, or restarting, before a call fails
_POLL_S = 2.0  # longest single wait inside the actor; bounds how late a signal is noticed
_ACKS_UNDER_WAY = 32  # more unanswered acknowledgements than that are waited for
_STALL_S = 600.0  # without a sign of work for so long, what is held is not kept any longer


class NativeQueue:
    """Client of our own `QueueActor`.

    What `get` returns is leased: a thread says to the queue that this process is alive, and the
    records stay ours until `ack`, `refuse` or `release`. Every call that changes the queue can be
    repeated, and is, if its answer is lost.

    Attributes
    ----------
    failures
        At the end of the stream: producers that ended early, and why.
    flush_wanted
        Whether the queue waits for what is held here before it gives out more.
    uid
        Names the queue apart from every other.
    holder
        Names this client to the queue.
    resumes
        Whether this reader takes the place of one that died, and is not to wait for another stream
        if this one has been read to its end meanwhile.
    """

    native = True

    def __init__(self, handle: Any, name: str, kind: Kind, description: Any) -> None:
        self.failures: dict[str, str] = {}
        self.flush_wanted = False
        self.resumes = False
        self.uid = str(description.uid)
        self.holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._address = description.address
        self._handle = handle
        self._kind = kind
        self._name = name
        self._waiting = Patience(f"no event in queue {name!r}")
        self._requests = itertools.count()
        self._producers: set[str] = set()
        self._lock = threading.Lock()
        self._tokens: dict[EventId, int] = {}
        self._parts: dict[int, int] = {}  # how many of a lease's parts are under way
        self._refused: dict[int, str] = {}
        self._lost_by: dict[EventId, tuple[str, ...]] = {}
        self._unconfirmed: deque[tuple[Any, list[int]]] = deque()
        self._touched = time.monotonic()
        self._heart: threading.Thread | None = None

    @property
    def promise(self) -> str:
        """What is promised of records in this queue."""
        if self._address.spool is not None:
            return f"no event lost: leased, and on disk in {self._address.spool}"
        return "no event lost while the queue's process lives: leased, but in memory only"

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of`` that together make the stream."""
        self._call("open", producer, of)
        self._producers.add(producer)
        self._keep_alive()

    def announce(self, producer: str, of: int) -> None:
        """Open for another process, which is to say itself that it is alive."""
        self._call("open", producer, of)

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; ``failure`` says why it is incomplete."""
        self._call("close", producer, failure, end_markers)
        self._producers.discard(producer)

    def vouch(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Close the parts of all producers of a name: what one left undone, others have done.

        ``failure`` says what is wrong with all of it.
        """
        self._call("vouch", prefix, failure, end_markers)
        self._producers = {name for name in self._producers if not name.startswith(prefix)}

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
        patience = Patience(f"queue {self._name!r} is full; waiting")
        accepted = 0
        for left in _by_size(records):
            while left:
                if stop is not None and stop.is_set():
                    return accepted
                taken, problem = self._call("put_many", (producer, left, _POLL_S))
                self.touch()
                left = left[taken:]
                accepted += taken
                if taken:
                    patience.reset()
                else:
                    patience.mention(lambda why=problem: why or self._why_full())  # type: ignore[misc]
        return accepted

    def get(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Lease up to ``max_records``, waiting up to ``timeout_s`` for the first; True at the end.

        Parameters
        ----------
        reader
            Names the job that reads; processes that share one job (the ranks of a run) share it.
        """
        self.touch()
        request = next(self._requests)
        call = (reader, self.holder, request, self.resumes, max_records, timeout_s)
        delivery = Delivery(*self._call("get_many", call))
        self.flush_wanted = delivery.flush
        if delivery.tokens:
            self._waiting.reset()
        elif not delivery.ended:
            self._waiting.mention(self._why_empty)
        if delivery.ended:
            self.failures = delivery.failures
        taken: list[Taken] = []
        for token, record in zip(delivery.tokens, delivery.records, strict=True):
            parts = self._decode(record)
            with self._lock:
                self._parts[token] = len(parts)
                for part in parts:
                    assert part.id is not None
                    # It may come again to whoever had lost it: the old lease is over.
                    self._parts.pop(self._tokens.get(part.id, -1), None)
                    self._tokens[part.id] = token
                    if token in delivery.lost_by:
                        self._lost_by[part.id] = tuple(delivery.lost_by[token])
            if not parts:
                self._call("ack", [token])
                self._parts.pop(token)
            taken += parts
        if delivery.tokens:
            self._keep_alive()
        return taken, bool(delivery.ended)

    def take(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """As `get`, but acknowledged at once: for readers that need no promise."""
        taken, ended = self.get(reader, max_records, timeout_s)
        self.ack([part.id for part in taken if part.id is not None])
        return taken, ended

    def ack(self, ids: Iterable[EventId]) -> None:
        """Say that the next stage has these: the queue need not keep them any longer.

        The queue's answer is not waited for; what is not answered is sent again. Of those whose
        lease has ended meanwhile, nothing is said: others have them now.
        """
        self.touch()
        done, reasons = self._finish(ids, None)
        if done:
            self._send_acknowledgement(done)
        self._confirm()
        if reasons:
            self._call("refuse", reasons)

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        """Have the queue put these into its quarantine, each with its reason."""
        self.touch()
        reasons: dict[int, str] = {}
        done: list[int] = []
        for refusal in refusals:
            if refusal.id is not None:
                more, why = self._finish([refusal.id], refusal.reason)
                done += more
                reasons |= why
        if reasons:
            self._call("refuse", reasons)

    def release(self, failure: str | None = None) -> int:
        """Give back all that is held; with a ``failure``, as events that may have caused it."""
        with self._lock:
            tokens = list(self._parts)
            self._tokens.clear()
            self._parts.clear()
            self._refused.clear()
            self._lost_by.clear()
        if tokens:
            self._call("release", tokens, failure)
        return len(tokens)

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Ask the queue which of these are leased to us at this moment, and forget the others."""
        with self._lock:
            tokens = {key: self._tokens[key] for key in ids if key in self._tokens}
        current = set(self._call("held", list(set(tokens.values()))))
        with self._lock:
            for key, token in tokens.items():
                if token not in current and self._tokens.get(key) == token:
                    del self._tokens[key]
                    self._parts.pop(token, None)
                    self._refused.pop(token, None)
        return {key for key, token in tokens.items() if token in current}

    @property
    def unsettled(self) -> int:
        """How many leases are held here."""
        return len(self._parts)

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before us and were lost."""
        return self._lost_by.get(key, ())

    def touch(self) -> None:
        """Note that the work goes on; without a sign of it, leases are not kept alive for ever."""
        self._touched = time.monotonic()

    def size(self) -> int:
        """Return how many events can be taken now."""
        return int(self._call("size"))

    def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx of a stream that the queue has never accepted."""
        return int(self._call("first_missing", stream, rank))

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

    def _why_empty(self) -> str:
        """Say what a reader that gets nothing should look at."""
        now = self.statistics()
        if now.open_producers:
            held = f", {now.leased} events under lease" if now.leased else ""
            return f"open producers: {', '.join(now.open_producers)}{held}"
        if now.ended:
            return "its stream has been read to the end; the next one is waited for"
        others = sorted(set(known_actors()) - {f"{self._address.namespace}/{self._name}"})
        return (
            "no producer has opened it: start one, with this queue's name; other named actors in "
            f"this cluster: {', '.join(others) or 'none'}"
        )

    def _why_full(self) -> str | None:
        """Say what a producer that waits for room should look at."""
        now = self.statistics()
        if now.acknowledged or now.quarantined or now.leased:
            return None
        return "nobody has read from it: start its reader, with this queue's name"

    def _finish(
        self, ids: Iterable[EventId], refused: str | None
    ) -> tuple[list[int], dict[int, str]]:
        """Count parts of leases as done; return tokens to acknowledge, and to refuse."""
        done: list[int] = []
        reasons: dict[int, str] = {}
        with self._lock:
            for key in ids:
                token = self._tokens.pop(key, None)
                self._lost_by.pop(key, None)
                if token is None or token not in self._parts:
                    continue
                if refused is not None:
                    self._refused.setdefault(token, refused)
                self._parts[token] -= 1
                if self._parts[token] > 0:
                    continue
                del self._parts[token]
                if token in self._refused:
                    reasons[token] = self._refused.pop(token)
                else:
                    done.append(token)
        return done, reasons

    def _decode(self, record: Record) -> list[Taken]:
        if not isinstance(record, ForeignItem):
            return [record]
        if self._kind == "events":
            return [item_to_event(record.payload, record.stream, record.position)]
        return list(item_to_results(record.payload, record.stream, record.position))

    def _keep_alive(self) -> None:
        if self._heart is None or not self._heart.is_alive():
            interval_s = min(self._address.lease_s, self._address.producer_timeout_s) / 4
            self._heart = threading.Thread(
                target=_beat, args=(weakref.ref(self), interval_s), name="heartbeat", daemon=True
            )
            self._heart.start()

    def _send_acknowledgement(self, tokens: list[int]) -> None:
        with self._lock:
            self._unconfirmed.append((self._handle.ack.remote(tokens), tokens))

    def _confirm(self) -> None:
        """Look at the answers to acknowledgements; send again what was not answered.

        Left alone, a lost one would be a lease that nobody ends for as long as we live.
        """
        import ray

        with self._lock:
            sent, self._unconfirmed = self._unconfirmed, deque()
        for reference, tokens in sent:
            patience_s = _POLL_S if len(sent) > _ACKS_UNDER_WAY else 0
            answered, _ = ray.wait([reference], timeout=patience_s)
            if not answered:
                with self._lock:
                    self._unconfirmed.append((reference, tokens))
                continue
            try:
                ray.get(reference)
            except ray.exceptions.ActorUnavailableError:
                self._send_acknowledgement(tokens)
            except ray.exceptions.RayActorError as error:
                raise QueueError(_gone(self._name, error, self._address.spool)) from error

    def _say_alive(self) -> None:
        import ray

        self._confirm()
        stalled = time.monotonic() - self._touched > _STALL_S
        if stalled and self._parts:
            log.error("no sign of work for %.0f s: what is held goes back", _STALL_S)
        holder = self.holder if self._parts and not stalled else ""
        if holder or self._producers:
            ray.get(self._handle.hear.remote(holder, list(self._producers)), timeout=_HICCUP_S)

    def _call(self, method: str, *args: Any) -> Any:
        import ray

        deadline = time.monotonic() + _HICCUP_S
        while True:
            try:
                return ray.get(getattr(self._handle, method).remote(*args))
            except ray.exceptions.ActorUnavailableError as error:
                # It may have been carried out; done again, it changes nothing.
                if time.monotonic() > deadline:
                    raise QueueError(_unanswered(self._name, method)) from error
                time.sleep(0.5)
            except ray.exceptions.RayActorError as error:
                raise QueueError(_gone(self._name, error, self._address.spool)) from error


def _beat(queue: weakref.ref[NativeQueue], interval_s: float) -> None:
    """Say now and then that a client is alive, for as long as it is."""
    import ray

    while True:
        time.sleep(interval_s)
        client = queue()
        if client is None or not ray.is_initialized():
            return
        try:
            client._say_alive()
        except (ray.exceptions.ActorDiedError, SystemExit):
            return  # the queue is gone, as its users find out; or Ray ends with this process
        except Exception as error:
            log.debug("heartbeat: %s", error)
        del client


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
        f"queue {name!r} did not answer a {method} for {_HICCUP_S:.0f} s. Look at the network and "
        "at the Ray logs of the actor's node, then restart this run"
    )


def _gone(name: str, error: Exception, spool: str | None) -> str:
    kept = (
        f"what was still in it is in its spool {spool}: a queue made with that spool goes on"
        if spool is not None
        else "and what was still in it is lost; a queue with a spool would have kept it"
    )
    return (
        f"the actor of queue {name!r} is gone, {kept}. The Ray logs of its node say why "
        f"({str(error).splitlines()[0]}). Restart the producer and this run"
    )
