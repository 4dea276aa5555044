"""The queue as a Ray actor: long polling around `QueueState`, and psana-ray's three methods."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from peaknet_predict.queues.address import QueueAddress
from peaknet_predict.queues.claim_check import (
    OUT_OF_REACH,
    Checked,
    Claims,
    Places,
    Reference,
    check_in,
    check_out,
)
from peaknet_predict.queues.clock import RunningClock, Ticker
from peaknet_predict.queues.dispatch import Delivery
from peaknet_predict.queues.group_commit import GroupCommit
from peaknet_predict.queues.quarantine import Quarantine, kept_earlier
from peaknet_predict.queues.records import END_MARKER, ForeignItem, Kind, Record
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.queues.unpickling import contain_unpickling
from peaknet_predict.queues.waiting import Linger, WaitingCalls
from peaknet_predict.queues.wire import event_to_item, results_to_item
from peaknet_predict.types import Event, Result

log = logging.getLogger(__name__)

T = TypeVar("T")

PROTOCOL = 6
"""Version of the methods below; a client refuses to talk to another one."""

_TICK_S = 0.5  # how often leases and producers are checked while nobody calls

_BORDER_S = 5.0  # how long a producer waits, where it begins and ends, for a disk that fails

LINGER_S = 0.005
"""Pause after an answer during which readers that want more records than there are wait.

An answer costs the queue's process about a millisecond, each record in it a few microseconds. While
events arrive faster than this, several share an answer.
"""

_NOTHING = Delivery([], [], {}, False, False, {})


class Description(NamedTuple):
    """What kind of queue this is. No other queue, past or future, has its ``uid``."""

    protocol: int
    kind: Kind
    uid: str
    address: QueueAddress


class QueueActor:
    """A named queue in the cluster, for any number of producers and readers.

    ``put``, ``get`` and ``size`` are psana-ray's; programs that know nothing else can use them. The
    other methods are for our own clients: they move many events per call, wait in the actor instead
    of polling, and tell "empty" from "ended". Each may be called again if its answer is lost. Those
    that move records take one argument and return a plain tuple, because Ray unpacks every argument
    for itself, and pickles a tuple faster than a class.

    Every method runs in the actor's one event loop, so the state is never changed by two at once. A
    method that changes the state answers the calls that wait for that change (`_serve`).
    """

    def __init__(self, kind: Kind, address: QueueAddress) -> None:
        contain_unpickling()
        self._address = address
        self._tick_s = min(_TICK_S, address.lease_s / 4, address.producer_timeout_s / 4)
        self._spool = None if address.spool is None else Spool(address.spool)
        books = self._spool.replay.books if self._spool is not None else None
        uid = books["uid"] if books else f"{address.name}-{secrets.token_hex(4)}"
        self._quarantine = Quarantine(address.quarantine, address.quarantine_bytes, uid)
        self._state = QueueState(
            kind,
            address.max_events,
            address.max_bytes,
            address.lease_s,
            address.producer_timeout_s,
            address.max_losses,
            uid=uid,
            # Larger than any token of an earlier life.
            first_token=time.time_ns(),
            clock=RunningClock(longest_gap_s=2 * self._tick_s),
            quarantine=lambda entry, reason: self._quarantine.keep(
                entry.id, reason, entry.record, entry.losses
            ),
            journal=self._spool,
        )
        if self._spool is not None:
            found = self._spool.replay
            self._state.restore(
                *(found.entries, found.keys, found.books, found.accepted, found.quarantined),
                kept=kept_earlier(self._quarantine, {entry.id for entry in found.entries}),
            )
            # The queue's name must not change with the next life, nor its streams' come again.
            self._spool.books(self._state.streams.to_json())
            try:
                self._spool.sync()
            except OSError:
                if found.books is None:
                    raise
                # Nothing is taken before it is on disk: the spool begins another file first.
            found.entries = []  # the state's, from now on
        self._claims = Claims()
        self._producers = WaitingCalls[bool](self._serve)
        self._readers = WaitingCalls[Delivery](self._serve)
        self._linger = Linger(LINGER_S, self._serve)
        self._commit = GroupCommit(self._spool)
        self._ticker = Ticker(
            self._tick_s,
            lambda: self._change(self._state.tick),
            lambda: self._change(lambda: self._state.settlements.confirm(self._quarantine.retry())),
            self._commit.tidy,
        )

    async def put(self, item: Any) -> bool:
        """Take one item (psana-ray's method): False when full, ``None`` ends the stream."""
        taken = self._change(lambda: self._state.put_foreign(item))
        # Answering "full" would make the producer put it a second time.
        await self._commit.wait_long()
        return taken

    async def get(self) -> Any:
        """Return one item, or ``None`` when there is none (psana-ray's method)."""
        record = self._change(self._state.get_foreign)
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
        """Return protocol version, kind, name and settings."""
        return Description(PROTOCOL, self._state.kind, self._state.streams.uid, self._address)

    async def open(self, producer: str, of: int) -> str | None:
        """Announce a producer, one of ``of``; return why that is not on disk, None if it is."""
        self._change(lambda: self._state.open(producer, of))
        return await self._commit.wait_long(_BORDER_S)

    async def close(self, producer: str, failure: str | None, end_markers: int) -> None:
        """End a producer's part of the stream.

        Whoever has closed it may leave; if that were forgotten in a power cut, all would wait.
        """
        self._change(lambda: self._state.close(producer, failure, end_markers))
        await self._commit.wait_long(_BORDER_S)

    async def close_group(self, prefix: str, failure: str | None, end_markers: int) -> None:
        """End the part of each producer whose name has a prefix; forget their own failures."""
        self._change(lambda: self._state.close_group(prefix, failure, end_markers))
        await self._commit.wait_long(_BORDER_S)

    async def put_many(
        self,
        call: tuple[str, Sequence[Record], float],
        elsewhere: tuple[list[Places], list[Reference]] | None = None,
        *contents: Any,
    ) -> tuple[int, str | None]:
        """Take records as room appears.

        Parameters
        ----------
        call
            The producer, the records, and for how many seconds to wait for room.
        elsewhere, *contents
            Where in lots the records' pixels lie, and the lots; and these as Ray has mapped them.

        Returns
        -------
        int, str or None
            How many were taken, and what other than lack of room kept out the rest: for one,
            `OUT_OF_REACH`.
        """
        producer, records, timeout_s = call
        if elsewhere is not None:
            if not all(isinstance(lot, list) for lot in contents):
                return 0, OUT_OF_REACH
            records = check_out(Checked(list(records), *elsewhere), contents, self._claims)
        taken = 0

        def put() -> bool | None:
            nonlocal taken
            taken += self._state.put(producer, records[taken:])
            return True if taken == len(records) else None

        # Try at once: a record that the queue knows or refuses needs no room.
        if self._change(put) is None:
            await self._producers.answer(object(), put, timeout_s)
        problem = await self._commit.wait()
        if problem is not None:
            return 0, problem  # the queue has them but may lose them: put them again
        return taken, self._state.intake.problem or self._quarantine.problem

    async def join(self, group: str, resumes: bool) -> str:
        """Note a consumer group; return the name of the stream that it reads."""
        return self._change(lambda: self._state.streams.join(group, resumes))

    async def get_many(self, call: tuple[str, str, int, bool, int, float]) -> tuple[Any, ...]:
        """Lease records as soon as there are any; return the end, or nothing after the timeout.

        A reader learns at once that it gets nothing more until it has settled what it holds. While
        events come faster than one in `LINGER_S`, a reader that asks for several waits up to that
        long for more.

        Parameters
        ----------
        call
            Group, holder, sequence and ``resumes`` of `QueueState.ask`; most records; most seconds
            to wait for them.

        Returns
        -------
        tuple
            The fields of a `Delivery`; where in lots the records' pixels lie; and the lots.
        """
        group, holder, sequence, resumes, max_records, timeout_s = call

        def take() -> Delivery | None:
            delivery = self._state.take(group, holder, sequence, max_records)
            if delivery.tokens:
                self._linger.begin()
            return delivery if delivery.tokens or delivery.ended or delivery.flush else None

        def give_back(delivery: Delivery) -> None:
            self._change(lambda: self._state.release(delivery.tokens))

        delivery = self._change(lambda: self._state.ask(group, holder, sequence, resumes))
        if delivery is None:
            delivery = await self._readers.answer(
                (holder, sequence), take, timeout_s, max_records, give_back
            )
        if delivery is not None and delivery.ended and await self._commit.wait() is not None:
            # What was settled last could come back, with nobody left to read it. It asks again.
            delivery = None
        delivery = delivery or _NOTHING
        light = check_in(delivery.records, self._claims)
        return tuple(delivery._replace(records=light.records)), light.places, light.lots

    async def pixels(self, tokens: list[int]) -> dict[int, tuple[Any, Any]]:
        """Return image and mask of leased records themselves; stale tokens are left out."""
        records = {token: self._state.leases.record_of(token) for token in tokens}
        return {
            token: (record.image, record.bad_bits)
            for token, record in records.items()
            if isinstance(record, Event | Result)
        }

    async def ack(self, tokens: list[int]) -> list[int]:
        """End leases whose records the next stage has; return the stale tokens."""
        return self._change(lambda: self._state.ack(tokens))

    async def reject(self, reasons: dict[int, str]) -> list[int]:
        """Quarantine leased records, each for a reason; return the stale tokens."""
        return self._change(lambda: self._state.reject(reasons))

    async def release(self, tokens: list[int], failure: str | None) -> None:
        """Give leased records back."""
        self._change(lambda: self._state.release(tokens, failure))

    async def held(self, tokens: list[int]) -> list[int]:
        """Return those of the tokens that are current."""
        return self._change(lambda: self._state.held(tokens))

    async def heartbeat(self, holder: str, producers: list[str]) -> None:
        """Note that a process is alive, as a holder of leases and as producers."""
        self._state.heartbeat(holder, producers)

    async def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx of a stream that was never accepted.

        A producer goes on from there, so everything before it has to be on disk.
        """
        first = self._state.keys.first_missing(stream, rank)
        await self._commit.wait_long()
        return first

    async def statistics(self) -> QueueStatistics:
        """Return counts of what went through and of what is here."""
        statistics = self._change(self._state.statistics)
        problems = statistics.problem, self._commit.problem, self._quarantine.problem
        statistics.problem = next((problem for problem in problems if problem), None)
        return statistics

    def _change(self, act: Callable[[], T]) -> T:
        """Do something that may change the state, then answer the calls that waited for it."""
        # Here, because any call may be the first one after a restart.
        self._ticker.start()
        try:
            return act()
        finally:
            self._serve()

    def _serve(self) -> None:
        state = self._state

        def is_worth_trying(wanted: int) -> bool:
            """Whether to answer a reader with what is ready, rather than let it wait."""
            if state.streams.ended:
                return True
            ready = len(state)
            return ready > 0 and (ready >= wanted or state.ready.full or self._linger.is_over())

        while True:
            self._producers.serve(lambda wanted: not state.ready.full)
            # Readers that took records have left room for producers.
            if not self._readers.serve(is_worth_trying):
                return
