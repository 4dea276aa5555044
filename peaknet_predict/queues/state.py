"""What a queue holds and promises, as a plain class: no Ray, no threads, and the clock is given.

The actor wraps it; keeping it apart lets tests drive every order of calls, and time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from peaknet_predict.keys import KeySet
from peaknet_predict.queues.leases import LeaseBook
from peaknet_predict.queues.records import (
    END_MARKER,
    Entry,
    ForeignItem,
    Kind,
    Record,
    entry_of,
    sanitized,
)
from peaknet_predict.queues.streams import StreamBook
from peaknet_predict.queues.wire import named
from peaknet_predict.types import ANYONE, EventId

_SUSPECT_AFTER = 2  # losses after which a record is handed out alone
_REASONS_KEPT = 100


class Delivery(NamedTuple):
    """The answer to a request for records: leases, or nothing yet, or the end.

    Attributes
    ----------
    tokens
        Of the leases: each holds for as long as its reader is heard of.
    records
        What is leased, in the same order.
    lost_by
        Of tokens whose record other readers held before and did not bring to an end: those readers,
        as far as is known; `ANYONE` may have, before a restart of the queue.
    ended
        Whether the stream has ended for this reader.
    flush
        Whether nothing more will come before the reader has brought to an end all it holds.
    failures
        At the end: producers that ended their part of the stream early, and why.
    """

    tokens: list[int]
    records: list[Record]
    lost_by: dict[int, list[str]]
    ended: bool
    flush: bool
    failures: dict[str, str]


@dataclass(slots=True)
class QueueStatistics:
    """Counts since the queue was first made, and what it holds now (sizes in events and bytes).

    ``accepted == acknowledged + quarantined + ready + leased`` at any time.
    """

    accepted: int = 0
    acknowledged: int = 0
    quarantined: int = 0
    duplicates: int = 0
    redeliveries: int = 0
    ready: int = 0
    ready_bytes: int = 0
    leased: int = 0
    leased_bytes: int = 0
    largest: int = 0
    open_producers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    quarantine: list[str] = field(default_factory=list)
    ended: bool = False
    problem: str | None = None


class Journal(Protocol):
    """Where a queue writes down what must survive it."""

    def put(self, entry: Entry) -> None:
        """Write down an accepted record; raises OSError if that is not possible."""

    def settled(self, key: EventId, quarantined: bool) -> None:
        """Write down that a record has been acknowledged, or quarantined."""

    def books(self, books: dict[str, Any]) -> None:
        """Write down the state of the `StreamBook`."""


class QueueState:
    """A bounded first-in first-out queue whose records are leased, acknowledged and never doubled.

    A record that was accepted is ready, leased, acknowledged or quarantined, and in one of these
    states only. A put of a key that was accepted before is a success that changes nothing. A lease
    ends with the acknowledgement, or the record is ready again. The end of the stream is a state:
    all producers have closed it, nothing is ready, nothing leased.

    A record whose reader is lost twice is a suspect: it is handed out alone, to a reader that holds
    nothing else, so that no other record is blamed for it. After ``max_losses`` it is quarantined.

    Parameters
    ----------
    kind
        What the records are; decides how readers that know only ``get`` are served.
    max_events, max_bytes
        Capacity, of what is ready. A record larger than ``max_bytes`` is still accepted by a queue
        with nothing ready, because it could never be accepted otherwise.
    lease_s, producer_timeout_s
        How long a reader or a producer may be silent.
    max_losses
        How many readers a record may cost.
    uid
        Names this queue apart from every other, past and future.
    clock
        Seconds that only go forward.
    quarantine
        Takes what is quarantined, with the reason.
    journal
        Where to write down what must survive.
    """

    def __init__(
        self,
        kind: Kind,
        max_events: int,
        max_bytes: int,
        lease_s: float = 30.0,
        producer_timeout_s: float = 60.0,
        max_losses: int = 5,
        uid: str = "queue",
        first_token: int = 0,
        clock: Callable[[], float] = time.monotonic,
        quarantine: Callable[[Entry, str], None] = lambda entry, reason: None,
        journal: Journal | None = None,
    ) -> None:
        if max_events < 1 or max_bytes < 1:
            raise ValueError(
                f"a queue needs room: max_events is {max_events} and max_bytes {max_bytes}, "
                "both must be at least 1"
            )
        self.kind = kind
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.producer_timeout_s = producer_timeout_s
        self.max_losses = max_losses
        self.streams = StreamBook(uid)
        self.leases = LeaseBook(lease_s, first_token)
        self.keys = KeySet()
        self._clock = clock
        self._quarantine = quarantine
        self._journal = journal
        self._ready: deque[Entry] = deque()
        self._suspects: deque[Entry] = deque()
        self._ready_bytes = 0
        self._largest = self._redeliveries = 0
        self.accepted = self.acknowledged = self.quarantined = self.duplicates = 0
        self._reasons: deque[str] = deque(maxlen=_REASONS_KEPT)
        self._problem: str | None = None

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects)

    @property
    def full(self) -> bool:
        """Whether there is no room, not even for the smallest record."""
        return not self._has_room(0)

    @property
    def drained(self) -> bool:
        """Whether the stream has ended and everything in it has been brought to an end."""
        return self.streams.ended and not len(self) and not len(self.leases)

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of`` that together make the stream."""
        self.streams.open(producer, of, self._clock(), self.drained)
        self._note_books()

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; ``failure`` says why it is incomplete.

        ``end_markers`` is how many readers that know only ``get`` will be handed `END_MARKER`.
        """
        if self.streams.close(producer, failure, end_markers):
            self._note_books()

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Close the parts of all producers of a name: what one left undone, others have done."""
        self.streams.close_group(prefix, failure, end_markers)
        self._note_books()

    def put(self, producer: str, records: Sequence[Record]) -> int:
        """Take records in order for as long as there is room; the answer is how many were taken.

        A record whose key was accepted before counts as taken, and changes nothing.
        """
        self.streams.hear(producer, self._clock())
        for taken, record in enumerate(records):
            if record.id in self.keys:
                self.duplicates += 1
                continue
            if self.streams.fell_silent(producer):
                self.open(producer)  # it only slept
            if not self.streams.is_open(producer):
                raise ValueError(
                    f"producer {producer!r} has not opened this queue, or its part is closed"
                )
            if not self._accept(entry_of(record)):
                return taken
        return len(records)

    def put_foreign(self, payload: Any) -> bool:
        """Take an item from a program that knows only ``put``; ``None`` ends its stream."""
        if payload is None or (isinstance(payload, str) and payload == END_MARKER):
            self.streams.end_foreign()
            self._note_books()
            return True
        self.streams.begin_if_ended(self.drained)
        self.streams.begin_foreign()
        if self.full:
            return False
        name = named(payload) if self.kind == "events" else None
        stream = self.streams.foreign_stream(name)
        item = ForeignItem(sanitized(payload), stream, self.streams.foreign_items)
        if not self._accept(entry_of(item)):
            return False
        self.streams.foreign_items += 1
        return True

    def ask(self, reader: str, holder: str, request: int, resumes: bool = False) -> Delivery | None:
        """Hear a request for records; the answer if it does not depend on what is here.

        Parameters
        ----------
        reader
            Names the job that reads; it is told the end once.
        holder
            Names the process that reads: it is what must be heard of.
        request
            A number that grows from request to request of a holder. If it repeats, the answer does.
        resumes
            Whether the reader takes the place of one that died: it is then at the end of a stream
            that others have read to its end, instead of waiting for the next.
        """
        self.tick()
        self.leases.hear(holder, self._clock())
        if self.streams.join(reader, self.drained, resumes):
            self._note_books()
        again = self.leases.granted(holder, request)
        if again is not None:
            return self._delivery(again, flush=False)
        if self.streams.is_at_end(reader):
            return self._end()
        return None

    def take(self, reader: str, holder: str, request: int, max_records: int) -> Delivery:
        """Lease up to ``max_records``, as the answer to a request that `ask` could not answer."""
        self.leases.hear(holder, self._clock())  # it has waited all the while
        if self.streams.is_at_end(reader):
            return self._end()
        holds_nothing = self.leases.holds_nothing(holder)
        if self._suspects:
            # Alone: not beside what this reader still holds, and with nothing that comes after.
            taken = [self._pop(self._suspects)] if holds_nothing else []
            flush = True
        elif (alone := self.leases.held_alone(holder)) is not None and self._is_suspect(alone):
            taken, flush = [], True
        elif self._ready:
            taken = [self._pop(self._ready) for _ in range(min(max_records, len(self._ready)))]
            flush = self.streams.ended and not self._ready
        elif self.drained and self.streams.end_for(reader):
            self._note_books()
            return self._end()
        else:
            return Delivery([], [], {}, False, self.streams.ended and not holds_nothing, {})
        return self._delivery(self.leases.grant(holder, request, taken), flush)

    def get_foreign(self) -> Record | str | None:
        """Take one record for a program that knows only ``get``: a record, the end, or nothing.

        Such a program acknowledges nothing: what it is handed counts as acknowledged.
        """
        self.tick()
        for records in (self._ready, self._suspects):
            if records:
                entry = self._pop(records)
                self._settle(entry)
                return entry.record
        if self.drained and self.streams.end_markers > 0 and self.kind == "results":
            self.streams.end_markers -= 1
            self.streams.end_seen = True
            self._note_books()
            return END_MARKER
        return None

    def ack(self, tokens: Iterable[int]) -> list[int]:
        """End leases whose records the next stage has; the answer is the tokens that were stale."""
        stale = []
        for token in tokens:
            entry = self.leases.end(token)
            if entry is None:
                stale.append(token)
                continue
            self._settle(entry)
        return stale

    def reject(self, reasons: dict[int, str]) -> list[int]:
        """Quarantine leased records, each for a reason; the answer is the stale tokens."""
        stale = []
        for token, reason in reasons.items():
            entry = self.leases.end(token)
            if entry is None:
                stale.append(token)
            else:
                self._into_quarantine(entry, reason)
        return stale

    def release(self, tokens: Iterable[int], failure: str | None = None) -> None:
        """Give records back; with a ``failure``, as after the death of their holder."""
        holders = {token: self.leases.holder_of(token) for token in tokens}
        back: list[Entry] = []
        for token in sorted(holders):
            entry, holder = self.leases.end(token), holders[token]
            if entry is None or holder is None:
                continue
            if failure is None:
                back.append(entry)
            elif not self._lost(entry, holder, failure):
                back.append(entry)
        self._put_back(back)

    def held(self, tokens: Iterable[int]) -> list[int]:
        """Return those of the tokens that are current."""
        self.tick()
        return [token for token in tokens if self.leases.holder_of(token) is not None]

    def heartbeat(self, holder: str, producers: Iterable[str]) -> None:
        """Note that a process is alive, as a reader and as producers."""
        now = self._clock()
        self.leases.hear(holder, now)
        for producer in producers:
            self.streams.hear(producer, now)

    def tick(self) -> bool:
        """Take back what silent readers hold, close the parts of silent producers; True if any."""
        now = self._clock()
        changed = False
        for holder, tokens in self.leases.silent(now):
            reason = f"its reader was silent for {self.leases.lease_s:g} s"
            entries = [(self.leases.end(token), holder) for token in tokens]
            back = [e for e, who in entries if e is not None and not self._lost(e, who, reason)]
            self._put_back(back)
            changed = True
        if self.streams.close_silent(now, self.producer_timeout_s):
            self._note_books()
            changed = True
        return changed

    def restore(
        self,
        entries: list[Entry],
        keys: KeySet,
        books: dict[str, Any] | None,
        accepted: int,
        quarantined: int,
    ) -> None:
        """Take over what a journal kept of an earlier life of this queue."""
        self.keys = keys
        self.accepted, self.quarantined = accepted, quarantined
        self.acknowledged = accepted - quarantined - len(entries)
        if books is not None:
            self.streams.restore(books, self._clock())
        for entry in entries:
            # Leases died with the earlier life; whoever had one may have brought it to its end.
            entry.lost_by.append(ANYONE)
            self._ready.append(entry)
            self._ready_bytes += entry.nbytes
            if isinstance(entry.record, ForeignItem):
                self.streams.foreign_items = max(
                    self.streams.foreign_items, entry.record.position + 1
                )
        self._largest = len(self._ready)

    def statistics(self) -> QueueStatistics:
        """Return what went through and what is here."""
        self.tick()
        return QueueStatistics(
            accepted=self.accepted,
            acknowledged=self.acknowledged,
            quarantined=self.quarantined,
            duplicates=self.duplicates,
            redeliveries=self._redeliveries,
            ready=len(self),
            ready_bytes=self._ready_bytes,
            leased=len(self.leases),
            leased_bytes=self.leases.nbytes,
            largest=self._largest,
            open_producers=self.streams.open_producers,
            failures=dict(self.streams.failures),
            quarantine=list(self._reasons),
            ended=self.streams.ended,
            problem=self._problem,
        )

    @property
    def problem(self) -> str | None:
        """Why nothing can be accepted although there is room."""
        return self._problem

    def _has_room(self, size: int) -> bool:
        full = len(self) >= self.max_events or self._ready_bytes + size > self.max_bytes
        return not full or not len(self)

    def _accept(self, entry: Entry) -> bool:
        if not self._has_room(entry.nbytes):
            return False
        if self._journal is not None:
            try:
                self._journal.put(entry)
            except OSError as error:
                # As if it were full: the producer waits, and is told why.
                self._problem = f"the spool cannot be written: {error}"
                return False
            self._problem = None
        self.keys.add(entry.id)
        self._ready.append(entry)
        self._ready_bytes += entry.nbytes
        self.accepted += 1
        self._largest = max(self._largest, len(self))
        return True

    def _pop(self, records: deque[Entry]) -> Entry:
        entry = records.popleft()
        self._ready_bytes -= entry.nbytes
        return entry

    def _put_back(self, entries: list[Entry]) -> None:
        """Put records back where they came from: the front, in their order."""
        for entry in reversed(entries):
            (self._suspects if self._is_suspect(entry) else self._ready).appendleft(entry)
            self._ready_bytes += entry.nbytes
            self._redeliveries += 1

    def _is_suspect(self, entry: Entry) -> bool:
        return entry.losses >= _SUSPECT_AFTER

    def _lost(self, entry: Entry, holder: str, reason: str) -> bool:
        """Count a reader's loss; True if the record has cost too many and is quarantined."""
        entry.losses += 1
        entry.lost_by.append(holder)
        if entry.losses < self.max_losses:
            return False
        self._into_quarantine(entry, f"cost {entry.losses} readers, the last time: {reason}")
        return True

    def _into_quarantine(self, entry: Entry, reason: str) -> None:
        self._quarantine(entry, reason)
        self._settle(entry, quarantined=True)
        self._reasons.append(f"{entry.id}: {reason}")

    def _settle(self, entry: Entry, quarantined: bool = False) -> None:
        if quarantined:
            self.quarantined += 1
        else:
            self.acknowledged += 1
        if self._journal is not None:
            self._journal.settled(entry.id, quarantined)

    def _note_books(self) -> None:
        if self._journal is not None:
            self._journal.books(self.streams.to_json())

    def _end(self) -> Delivery:
        return Delivery([], [], {}, True, False, dict(self.streams.failures))

    def _delivery(self, granted: list[tuple[int, Entry]], flush: bool) -> Delivery:
        return Delivery(
            [token for token, _ in granted],
            [entry.record for _, entry in granted],
            {token: list(entry.lost_by) for token, entry in granted if entry.lost_by},
            False,
            flush,
            {},
        )
