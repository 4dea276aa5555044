"""What a queue holds and promises, as a plain class without Ray, threads or a clock of its own.

The actor wraps it. Kept apart, it can be tested in every order of calls, at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.queues.address import QueueAddress
from peaknet_predict.queues.dispatch import Delivery, next_records
from peaknet_predict.queues.intake import Intake
from peaknet_predict.queues.journal import Journal
from peaknet_predict.queues.leases import LeaseBook
from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.ready import ReadyLines
from peaknet_predict.queues.records import (
    END_MARKER,
    Entry,
    ForeignItem,
    Kind,
    Record,
    entry_of,
)
from peaknet_predict.queues.settlements import Settlements
from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.queues.streams import StreamBook
from peaknet_predict.queues.wire import named
from peaknet_predict.types import ANYONE, EventId

__all__ = ["Delivery", "QueueState", "QueueStatistics"]


class QueueState:
    """A bounded first-in first-out queue whose records are leased, acknowledged and never doubled.

    An accepted record is in exactly one state: ready, leased, acknowledged, quarantined, or waiting
    for the quarantine's disk. Putting a key that was accepted before succeeds and changes nothing.
    A lease ends with an acknowledgement, or the record is ready again. The end of the stream is a
    state: all producers have closed it, and every record has been settled.

    Parameters
    ----------
    kind
        What the records are; decides how readers that know only ``get`` are served.
    max_events, max_bytes
        Capacity, of what is ready.
    lease_s, producer_timeout_s, max_losses
        As for `QueueAddress`.
    uid
        Names this queue apart from every other, past and future.
    first_token, clock
        Where lease tokens count from; a monotonic clock in seconds.
    quarantine
        Takes what is quarantined, with the reason. Returns False if it is not on disk yet:
        `Settlements.confirm` is then told when it is.
    journal
        Where to write down what must survive.
    """

    def __init__(
        self,
        kind: Kind,
        max_events: int,
        max_bytes: int,
        lease_s: float = QueueAddress.lease_s,
        producer_timeout_s: float = QueueAddress.producer_timeout_s,
        max_losses: int = QueueAddress.max_losses,
        uid: str = "queue",
        first_token: int = 0,
        clock: Callable[[], float] = time.monotonic,
        quarantine: Callable[[Entry, str], bool | None] | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.kind = kind
        self.producer_timeout_s = producer_timeout_s
        self.keys = KeySet()
        self.streams = StreamBook(
            uid,
            lambda: not (len(self.ready) or len(self.leases) or len(self.settlements)),
            journal,
        )
        self.leases = LeaseBook(lease_s, first_token)
        self.ready = ReadyLines(max_events, max_bytes)
        self.settlements = Settlements(self.ready, max_losses, quarantine, journal)
        self.intake = Intake(self.ready, self.settlements, journal)
        self.accepted = self.acknowledged = self.duplicates = 0
        self._clock = clock

    def __len__(self) -> int:
        return len(self.ready)

    @property
    def quarantined(self) -> int:
        """How many records are in the quarantine, on disk."""
        return self.settlements.quarantined

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of`` that together make the stream."""
        self.streams.open(producer, of, self._clock())

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; parameters as for `roles.Producer.close`."""
        self.streams.close(producer, failure, end_markers)

    def close_group(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End the part of each producer whose name has a prefix; forget their own failures."""
        self.streams.close_group(prefix, failure, end_markers)

    def put(self, producer: str, records: Sequence[Record]) -> int:
        """Take records in order while there is room; return how many were taken.

        A record whose key was accepted before counts as taken, and changes nothing. A record that
        cannot be kept as it is goes into the quarantine, and counts as taken too.

        Raises
        ------
        ValueError
            If the producer has not opened the queue.
        """
        self.streams.hear(producer, self._clock())
        for taken, record in enumerate(records):
            entry = entry_of(record, self.streams.uid)
            if entry.id in self.keys:
                self.duplicates += 1
                continue
            self.streams.check_open(producer, self._clock())
            if not self._accept(entry):
                return taken
        return len(records)

    def put_foreign(self, payload: Any) -> bool:
        """Take an item from a program that knows only ``put``; ``None`` ends its stream."""
        payload = sanitized(payload)
        if payload is None or (isinstance(payload, str) and payload == END_MARKER):
            self.streams.close_foreign()
            return True
        self.streams.open_foreign()
        foreign = self.streams.foreign
        identity = named(payload) if self.kind == "events" else None
        item = ForeignItem(payload, foreign.name_for(identity), foreign.items)
        if not self._accept(entry_of(item)):
            return False
        self.streams.accept_foreign(identity, self.keys)
        return True

    def ask(self, group: str, holder: str, sequence: int, resumes: bool = False) -> Delivery | None:
        """Hear a request for records; return an answer if that does not depend on what is here.

        Parameters
        ----------
        group, holder
            The consumer group that reads; the process, which must be heard from.
        sequence
            A number that grows with each request of a holder. A repeated number gets the same
            answer.
        resumes
            As for `connect_queue`.
        """
        self.tick()
        self.leases.hear(holder, self._clock())
        self.streams.join(group, resumes)
        again = self.leases.granted(holder, sequence)
        if again is not None:
            return Delivery.of(again, flush=False)
        if self.streams.groups.is_at_end(group):
            return Delivery.end(self.streams.failures)
        return None

    def take(self, group: str, holder: str, sequence: int, max_records: int) -> Delivery:
        """Lease up to ``max_records``, as the answer to a request that `ask` could not answer."""
        self.leases.hear(holder, self._clock())  # it was alive while it waited
        if self.streams.end_for(group):
            return Delivery.end(self.streams.failures)
        ended = self.streams.ended
        entries, flush = next_records(self.ready, self.leases, holder, max_records, ended)
        granted = self.leases.grant(holder, sequence, entries) if entries else []
        return Delivery.of(granted, flush)

    def get_foreign(self) -> Record | str | None:
        """Take one record for a program that knows only ``get``: a record, the end, or nothing.

        Such a program acknowledges nothing: what it is handed counts as acknowledged.
        """
        self.tick()
        if len(self.ready):
            (entry,) = self.ready.take(1) or [self.ready.take_isolated()]
            self.settlements.acknowledge(entry)
            self.acknowledged += 1
            return entry.record
        if self.kind == "results" and self.streams.take_end_marker():
            return END_MARKER
        return None

    def ack(self, tokens: Iterable[int]) -> list[int]:
        """End leases whose records the next stage has; return the stale tokens."""
        entries, stale = self.leases.end_all(tokens)
        for entry in entries.values():
            self.settlements.acknowledge(entry)
            self.acknowledged += 1
        return stale

    def reject(self, reasons: dict[int, str]) -> list[int]:
        """Quarantine leased records, each for a reason; return the stale tokens."""
        entries, stale = self.leases.end_all(reasons)
        for token, entry in entries.items():
            self.settlements.reject(entry, reasons[token])
        return stale

    def release(self, tokens: Iterable[int], failure: str | None = None) -> None:
        """Give records back; with a ``failure``, as after the death of their holder."""
        back: list[Entry] = []
        for token in sorted(tokens):
            holder = self.leases.holder_of(token)
            entry = self.leases.end(token)
            if entry is None or holder is None:
                continue
            if failure is None or not self.settlements.count_loss(entry, holder, failure):
                back.append(entry)
        self.ready.put_back(back)

    def held(self, tokens: Iterable[int]) -> list[int]:
        """Return those of the tokens that are current."""
        self.tick()
        return [token for token in tokens if self.leases.holder_of(token) is not None]

    def heartbeat(self, holder: str, producers: Iterable[str]) -> None:
        """Note that a process is alive, as a holder of leases (if it is one) and as producers."""
        now = self._clock()
        if holder:
            self.leases.hear(holder, now)
        for producer in producers:
            self.streams.hear(producer, now)

    def tick(self) -> None:
        """Take back what silent holders hold, and close the parts of silent producers."""
        now = self._clock()
        for _, tokens in self.leases.silent(now):
            self.release(tokens, f"its reader was silent for {self.leases.lease_s:g} s")
        self.streams.close_silent(now, self.producer_timeout_s)

    def restore(
        self,
        entries: list[Entry],
        keys: KeySet,
        books: dict[str, Any] | None,
        accepted: int,
        quarantined: int,
        kept: Mapping[EventId, str] = MappingProxyType({}),
    ) -> None:
        """Take over what a journal kept of an earlier life of this queue.

        ``kept`` are the records that the quarantine has, with reasons; the journal may not know of
        them.
        """
        self.keys = keys
        self.accepted, self.settlements.quarantined = accepted, quarantined
        self.acknowledged = accepted - quarantined - len(entries)
        if books is not None:
            self.streams.restore(books, keys, self._clock(), self.producer_timeout_s)
        for entry in entries:
            reason = kept.get(entry.id, entry.reason)
            if reason is not None and self.settlements.has_quarantine:
                self.settlements.reject(entry, reason)
            else:
                # Leases died with the earlier life; their holders may have settled the records.
                entry.lost_by.append(ANYONE)
                self.ready.append(entry)

    def statistics(self) -> QueueStatistics:
        """Return counts of what went through and of what is here."""
        self.tick()
        return _statistics_of(self)

    def _accept(self, entry: Entry) -> bool:
        if not self.intake.accept(entry):
            return False
        self.keys.add(entry.id)
        self.accepted += 1
        return True


def _statistics_of(state: QueueState) -> QueueStatistics:
    return QueueStatistics(
        accepted=state.accepted,
        acknowledged=state.acknowledged,
        quarantined=state.quarantined,
        quarantining=len(state.settlements),
        duplicates=state.duplicates,
        redeliveries=state.ready.redeliveries,
        ready=len(state.ready),
        ready_bytes=state.ready.nbytes,
        leased=len(state.leases),
        leased_bytes=state.leases.nbytes,
        largest=state.ready.largest,
        open_producers=state.streams.open_producers,
        failures=dict(state.streams.failures),
        quarantine=list(state.settlements.reasons),
        ended=state.streams.ended,
        problem=state.intake.problem,
    )
