"""Batches on the host, from a queue of events."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue

from torch.utils.data import IterableDataset

from peaknet_predict.batching import MAX_EVENT_BYTES, Batcher, without_events
from peaknet_predict.process.settings import check_seconds
from peaknet_predict.process.stopping import GRACE_S, StopRequest, stop_requests
from peaknet_predict.queues import Queue
from peaknet_predict.types import Event, EventBatch, EventId, Refusal

_WAIT_S = 1.0  # longest wait for an event before the producer's health is checked
_REMIND_S = 0.05  # pause between two reminders that results are waited for
_STALL_S = 600.0  # a caller that has not come back for this long hangs
_ABANDON_S = 3.0  # longest wait for a call to the queue when leases are given back
_BEHIND_S = 0.002  # shortest wait, for a batch that is due while the caller is busy
_BATCHES_AHEAD = 2  # batches made before the caller asks for them


class QueueDataset(IterableDataset[EventBatch]):
    """Finished batches from a queue of events.

    A thread takes events and copies their pixels, once, from Ray's shared memory into the batch,
    while the caller works on earlier batches.

    Events of one shape and dtype share a batch; when either changes, the batch so far goes out
    short and a new one begins. Items that cannot be processed are refused one by one, with a
    reason, and travel with the batch to where results are counted.

    Events are leased: the code that brings results to the next stage calls `ack`, and `reject` for
    events that cannot be processed. While there is nothing to take, but results are outstanding, a
    batch without events comes out now and then: a reminder to fetch them.

    Parameters
    ----------
    queue
        Queue of events.
    group
        The consumer group of this job; the ranks of one run share it.
    batch_size
        Most events of a batch.
    partial_sizes
        Smaller numbers of rows that a batch may have, for batches that are not full; a batch has
        the smallest number of rows that holds its events, the rest of them zeros.
    max_latency_ms
        A batch goes out short when its first event has waited this long and nothing else is ready
        for the caller; by default it waits until it is full.
    pin_memory
        Put the pixels where a GPU can fetch them while the CPU goes on.
    check_producer
        Called while the queue is empty; raises if the producer that should fill it has failed.
    max_event_bytes
        Larger images are refused.
    grace_s
        How long the run may take to end after Ctrl-C or SIGTERM.

    Attributes
    ----------
    results_go_on
        Whether a next stage takes the results, and acknowledges events when it has them. Otherwise
        an `Acknowledger` does so when the results have been fetched.
    received
        Items taken from the queue so far.
    ended
        Whether the queue has reported the end of the stream.
    stop
        Set by Ctrl-C and SIGTERM; says how much time is left.
    interrupted
        Whether Ctrl-C or SIGTERM asked to take no more events; those taken before still came out.
    """

    def __init__(
        self,
        queue: Queue,
        group: str,
        batch_size: int,
        partial_sizes: Sequence[int] = (),
        max_latency_ms: float | None = None,
        pin_memory: bool = False,
        check_producer: Callable[[], None] | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        grace_s: float = GRACE_S,
    ) -> None:
        if max_latency_ms is not None and not 0 < max_latency_ms < math.inf:
            raise ValueError(f"max_latency_ms is {max_latency_ms}; give a positive number")
        check_seconds("grace_s", grace_s, zero=True)
        self._queue = queue
        self._group = group
        self._batcher = Batcher(batch_size, partial_sizes, pin_memory, max_event_bytes)
        self._max_latency_s = None if max_latency_ms is None else max_latency_ms / 1000
        self._check_producer = check_producer
        self.grace_s = grace_s
        self._active_at = time.monotonic()
        self._worked_at: float | None = None
        self._ready: SimpleQueue[EventBatch | BaseException | None] = SimpleQueue()
        self._permits = threading.Semaphore(_BATCHES_AHEAD - 1)
        self.stop = StopRequest(grace_s)
        self._abandoned = threading.Event()
        self._ingesting: threading.Thread | None = None
        self.results_go_on = False
        self.received = 0
        self.ended = False
        self.interrupted = False

    def __iter__(self) -> Iterator[EventBatch]:
        """Yield batches until the stream has ended, or a signal asks to stop."""
        self._ingesting = threading.Thread(target=self._ingest, name="ingest", daemon=True)
        with stop_requests(self.grace_s) as self.stop:
            self._ingesting.start()
            try:
                while (batch := self._ready.get()) is not None:
                    if isinstance(batch, BaseException):
                        raise batch
                    self._worked_at = time.monotonic()
                    yield batch
                    self._worked_at = None
                    self._permits.release()
            finally:
                self._abandon(None)

    def _ingest(self) -> None:
        """Fill batches until the end; pass any error on to the caller."""
        try:
            for batch in self._batches():
                self._ready.put(batch)
                self._permits.acquire()
                if self._abandoned.is_set():
                    return
            self._ready.put(None)
        except BaseException as error:
            # The caller waits for this, and nobody else will see the error.
            self._ready.put(error)

    def _batches(self) -> Iterator[EventBatch]:
        batcher = self._batcher
        while not self.ended and not self._abandoned.is_set():
            if self.stop.is_set():
                self.interrupted = True
                break
            if self.stalled:
                time.sleep(_WAIT_S)  # asking for more would look like work
                continue
            due_in_s = self._due_in_s()
            if due_in_s <= 0 and self._ready.empty():
                yield batcher.take()
                continue
            taken, self.ended = self._queue.reader.get(
                self._group, batcher.room, min(_WAIT_S, max(due_in_s, _BEHIND_S))
            )
            self.received += len(taken)
            if taken:
                self._active_at = time.monotonic()
                _note_taken(taken)
            yield from batcher.add(taken)
            # With flush, nothing more comes until these have become results.
            if batcher.is_full or (self._queue.reader.flush_wanted and not batcher.is_empty):
                yield batcher.take()
            elif not taken and not self.ended:
                if self._check_producer is not None and not self._queue.reader.flush_wanted:
                    self._check_producer()
                if self._should_remind():
                    yield without_events([])
        if not batcher.is_empty:
            yield batcher.take()

    def _should_remind(self) -> bool:
        """Whether the queue waits for results that the caller may not have fetched yet."""
        if not self._queue.reader.unsettled or not self._ready.empty():
            return False
        if self._queue.reader.flush_wanted:
            time.sleep(_REMIND_S)
        elif time.monotonic() - self._active_at < _WAIT_S:
            return False
        self._active_at = time.monotonic()
        return True

    def _due_in_s(self) -> float:
        """Return how long a batch may still wait for more events."""
        oldest_at = self._batcher.oldest_at
        if oldest_at is None or self._max_latency_s is None:
            return _WAIT_S
        return oldest_at + self._max_latency_s - time.monotonic()

    def ack(self, ids: Iterable[EventId]) -> None:
        """Acknowledge events whose results the next stage has."""
        self._queue.reader.ack(ids)

    def reject(self, refusals: Sequence[Refusal]) -> None:
        """Have these events put into quarantine."""
        self._queue.reader.reject(refusals)

    def release(self, failure: str | None = None) -> int:
        """Take nothing more, and give back what is held.

        With a ``failure``, it goes back as events that may have caused it.
        """
        # After an error, Lightning closes the iterator late or never.
        self._abandon(_ABANDON_S)
        return self._queue.reader.release(failure)

    def _abandon(self, timeout_s: float | None) -> None:
        """End the thread that takes events; what it took last is still held."""
        self._abandoned.set()
        self._permits.release()
        if self._ingesting is not None:
            self._ingesting.join(timeout_s)

    def touch(self) -> None:
        """Note that the run is alive although it waits."""
        if self._worked_at is not None:
            self._worked_at = time.monotonic()
        self._queue.reader.touch()

    @property
    def stalled(self) -> bool:
        """Whether the caller hangs: it took a batch ten minutes ago and has given no sign since.

        Nothing more is taken then, so that what is held goes to other readers.
        """
        worked_at = self._worked_at
        return worked_at is not None and time.monotonic() - worked_at > _STALL_S

    @property
    def queue(self) -> Queue:
        """The input queue."""
        return self._queue

    def size(self) -> int:
        """Return how many events wait in the queue."""
        return self._queue.admin.size()

    def problem(self) -> str | None:
        """Return, at the end of the loop, why the stream was not read whole; None if it was."""
        if self.interrupted and self._check_producer is not None:
            return (
                f"interrupted; {self.size()} events that had been read, and all behind them, were "
                "not processed: run the command again"
            )
        if self.interrupted:
            return f"interrupted; {self.size()} events are left in the input queue"
        if not self.ended:
            return (
                "the prediction loop ended before the input stream did; look for "
                "limit_predict_batches in the configuration"
            )
        if self._queue.reader.failures:
            return f"the input stream is incomplete: {self._queue.reader.failures}"
        return None


def _note_taken(items: Sequence[object]) -> None:
    """Write the time on events, from which the latency apart from the backlog follows."""
    now = time.time()
    for item in items:
        if isinstance(item, Event):
            item.taken_at = now
