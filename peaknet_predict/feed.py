"""The producer: events from a source into an input queue."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peaknet_predict.process.balance import path_of_rank, queue_balance, write_balance
from peaknet_predict.process.files import expanded
from peaknet_predict.process.last_words import LastWords
from peaknet_predict.process.settings import check_rate, check_seconds
from peaknet_predict.process.stopping import GRACE_S, stop_requests
from peaknet_predict.queues import Queue, QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.cluster import connect, vital_signs
from peaknet_predict.sources import EventSource, SkippedFile
from peaknet_predict.types import Event, EventId, identity_problem

log = logging.getLogger(__name__)

_NEXT_STEP = (
    "Look at the cluster (`ray status`), and start again with the same --stream: it goes on behind "
    "the last event that the queue has"
)

EVENTS_PER_PUT = 8
"""Most events per put: enough to hide a call, few enough to start the reader early."""

_LOOK_S = 0.5  # how late a stop is noticed while a source gives nothing


@dataclass(frozen=True)
class FeedReport:
    """What a producer did."""

    stream: str
    events: int
    seconds: float
    interrupted: bool

    def __str__(self) -> str:
        rate = self.events / self.seconds if self.seconds > 0 else 0.0
        return f"fed {self.events} events in {self.seconds:.1f} s ({rate:.1f} events/s)"


def new_stream_id() -> str:
    """Return a name for one opening of a stream that no other opening has."""
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return f"{socket.gethostname()}-{os.getpid()}-{started}-{secrets.token_hex(3)}"


def feed(
    source: EventSource,
    queue: QueueAddress,
    address: str = "auto",
    rate_hz: float | None = None,
    num_events: int | None = None,
    loop: bool = False,
    rank: int = 0,
    producers: int = 1,
    stream: str | None = None,
    grace_s: float = GRACE_S,
    balance: str | None = "feed_balance.json",
) -> FeedReport:
    """Push events into an input queue, and mark the end of the stream.

    Ctrl-C and SIGTERM end it between two puts; the stream is then marked as incomplete.

    Parameters
    ----------
    source
        Where the events come from.
    queue
        The input queue; made if it is not there.
    address
        The Ray cluster: ``auto``, or ``host:port``.
    rate_hz
        Events per second; as fast as the queue takes them by default.
    num_events
        Stop after this many events; by default after the source's last.
    loop
        Begin again at the end of the source. Without ``num_events`` it goes on until interrupted.
    rank
        This producer's number, for the identity of its events.
    producers
        How many producers make the stream together: it ends when all of them have finished.
    stream
        A unique name for this stream. Started again with that name, a producer that was killed goes
        on after the last event that the queue has accepted. By default a new name.
    grace_s
        How long it may take to end after Ctrl-C or SIGTERM.
    balance
        File for the record of the run: what was fed, and what the queue says of its events. Ranks
        above 0 add their number to the name. None writes none.

    Raises
    ------
    ValueError
        If a number is out of range, or if this process cannot read the source's events.
    peaknet_predict.queues.ClusterError, peaknet_predict.queues.QueueError
        If the cluster or the queue cannot be used.
    """
    if rate_hz is not None:
        check_rate("rate_hz", rate_hz)
    if num_events is not None and num_events < 0:
        raise ValueError(f"num_events is {num_events}; give 0 or more")
    problem = identity_problem(EventId(stream or "", rank, 0))
    if problem is not None or rank < 0:
        raise ValueError(
            f"stream {stream!r}, rank {rank}: {problem or 'rank must be 0 or more'}; no file could "
            "hold such events"
        )
    if producers < 1:
        raise ValueError(f"producers is {producers}; give the number of producers, at least 1")
    check_seconds("grace_s", grace_s, zero=True)
    balance = None if balance is None else str(expanded(balance))
    source.check()
    connect(address)
    return push(
        source,
        connect_queue(queue, "events"),
        rate_hz,
        num_events,
        loop,
        rank,
        producers,
        stream,
        grace_s,
        balance,
    )


def push(
    source: EventSource,
    queue: Queue,
    rate_hz: float | None = None,
    num_events: int | None = None,
    loop: bool = False,
    rank: int = 0,
    producers: int = 1,
    stream: str | None = None,
    grace_s: float = GRACE_S,
    balance: str | None = None,
) -> FeedReport:
    """Push events into a connected queue; parameters as for `feed`."""
    first = 0 if stream is None else queue.producer.first_missing(stream, rank)
    if first:
        log.info("stream %s: the queue has had the events before %d", stream, first)
    stream = stream or new_stream_id()
    producer = f"feed:{stream}:{rank}"
    queue.producer.open(producer, of=producers)
    started = time.monotonic()
    read = fed = 0
    failure: str | None = "the producer ended early"

    def record() -> dict[str, Any]:
        report = FeedReport(stream, fed, time.monotonic() - started, failure is not None)
        return {"stages": {"feed": _counts(report, rank, first, source.skipped)}}

    path = None if balance is None else path_of_rank(balance, rank)
    last_words = None
    if path is not None:
        who = f"feed (stream {stream}, rank {rank})"
        last_words = LastWords(who, path, _NEXT_STEP, vital_signs())
        last_words.note(record())
    with stop_requests(grace_s) as stop:
        try:
            events = _identified(source, stream, rank, num_events, loop, first)
            reader = _ReadAhead(events, started, rate_hz)
            with contextlib.closing(reader):
                while batch := reader.next(fed, stop):
                    read += len(batch)
                    if rate_hz is not None:
                        stop.wait(max(0.0, started + fed / rate_hz - time.monotonic()))
                    if stop.is_set():
                        break
                    for event in batch:
                        event.put_at = time.time()
                    fed += queue.producer.put(producer, batch, stop)
                    if last_words is not None:
                        last_words.note(record())
            # A signal that comes with the last event interrupts nothing.
            failure = None if reader.ended and fed == read else "interrupted"
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            try:
                queue.producer.close(producer, failure)
            except QueueError as error:
                failure = failure or f"{type(error).__name__}: {error}"
                raise
            finally:
                report = FeedReport(stream, fed, time.monotonic() - started, failure is not None)
                if path is not None and last_words is not None:
                    counts = _counts(report, rank, first, source.skipped)
                    _write_balance(path, queue, counts, failure)
                    last_words.done()
    return report


def _counts(
    report: FeedReport, rank: int, first: int, skipped: Sequence[SkippedFile]
) -> dict[str, Any]:
    return {
        "stream": report.stream,
        "rank": rank,
        "fed": report.events,
        "fed_before": first,
        "seconds": report.seconds,
        "skipped_files": [asdict(file) for file in skipped],
    }


def _write_balance(
    path: Path, queue: Queue, counts: Mapping[str, Any], problem: str | None
) -> None:
    """Write the record of this producer's run as JSON, even if the queue is gone."""
    try:
        there = queue_balance(queue.admin)
    except QueueError as error:
        there = {"promise": queue.admin.promise, "problem": str(error)}
    try:
        write_balance(path, {"problem": problem, "stages": {"feed": counts, "input": there}})
    except OSError as error:
        log.error("the balance could not be written to %s: %s", path, error)


def _identified(
    source: EventSource, stream: str, rank: int, num_events: int | None, loop: bool, first: int
) -> Iterator[Event]:
    """Yield the source's events, numbered from 0 on through every pass of a loop."""
    length = len(source)
    endless = loop and length > 0
    done, begin = divmod(first, length) if endless else (0, min(first, length))
    passes = itertools.count(done) if endless else range(1)
    records = (r for n in passes for r in source.events(begin if n == done else 0))
    left = None if num_events is None else max(0, num_events - first)
    for idx, (_, image, photon_energy) in enumerate(itertools.islice(records, left), first):
        yield Event(EventId(stream, rank, idx), image, photon_energy)


def is_due(started: float, number: int, rate_hz: float | None) -> bool:
    """Return whether it is time for an event.

    Parameters
    ----------
    started
        When event 0 was due, on the monotonic clock in seconds.
    number
        Which event, from 0.
    rate_hz
        Events per second; with None every event is due.
    """
    return rate_hz is None or time.monotonic() >= started + number / rate_hz


class _ReadAhead:
    """Reads a source in a thread of its own, and groups what is there for one put.

    Reading and putting overlap, and no event that has been read waits for one that has not: a
    source that hangs keeps nothing back. What the source raises is raised here, once all that was
    read before it has gone out.

    Parameters
    ----------
    events
        Of the source.
    started
        When event 0 was due, on the monotonic clock in seconds.
    rate_hz
        Events per second; with None every event is due.

    Attributes
    ----------
    ended
        Whether the source has been read to its end.
    """

    def __init__(self, events: Iterator[Event], started: float, rate_hz: float | None) -> None:
        self.ended = False
        self._started = started
        self._rate_hz = rate_hz
        self._there: queue.Queue[Event | BaseException | None] = queue.Queue(EVENTS_PER_PUT)
        self._failure: BaseException | None = None
        self._over = threading.Event()
        # A daemon: whoever has asked to stop does not wait for a source that hangs.
        self._thread = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no further; do not wait for a source that hangs."""
        self._over.set()
        self._thread.join(2 * _LOOK_S)

    def next(self, fed: int, stop: threading.Event) -> list[Event]:
        """Return the next put's events: what has been read and is due, or what comes first.

        Empty at the source's end, or if there is nothing when ``stop`` is set.
        """
        batch: list[Event] = []
        while not self.ended and len(batch) < EVENTS_PER_PUT:
            if batch and not is_due(self._started, fed + len(batch), self._rate_hz):
                break
            try:
                found = self._there.get(block=not batch, timeout=_LOOK_S)
            except queue.Empty:
                if batch or stop.is_set():
                    break
                continue
            if isinstance(found, Event):
                batch.append(found)
            else:
                self.ended, self._failure = True, found
        if not batch and self._failure is not None:
            raise self._failure
        return batch

    def _read(self, events: Iterator[Event]) -> None:
        failure: BaseException | None = None
        try:
            for event in events:
                if not self._offer(event):
                    return
        except BaseException as error:
            failure = error
        self._offer(failure)

    def _offer(self, found: Event | BaseException | None) -> bool:
        while not self._over.is_set():
            with contextlib.suppress(queue.Full):
                self._there.put(found, timeout=_LOOK_S)
                return True
        return False
