"""What a queue holds and promises, as a plain class: no Ray, no clock, no threads.

The actor wraps it; keeping it apart lets tests drive every order of calls.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from peaknet_predict.types import Event, Result

Kind = Literal["events", "results"]

END_MARKER = "END"
"""What a reader that knows only ``get`` is handed at the end of a queue of results."""


@dataclass(slots=True)
class ForeignItem:
    """An item put by a program that knows only ``put``; decoded by whoever takes it.

    Attributes
    ----------
    payload
        The object as it came.
    position
        How many items had come this way before, which identifies it when nothing inside does.
    stream
        How many streams of such items had ended before; names the stream it belongs to.
    """

    payload: Any
    position: int
    stream: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in the payload, one or two levels deep."""
        return _nbytes(self.payload, depth=2)


Record = Event | Result | ForeignItem


_AT_ITS_END = -1


def _nbytes(value: Any, depth: int) -> int:
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if depth > 0 and isinstance(value, list | tuple):
        return sum(_nbytes(part, depth - 1) for part in value)
    return 0


@dataclass(slots=True)
class QueueStatistics:
    """Counts since the queue was made, and what it holds now (sizes in events and bytes)."""

    accepted: int = 0
    delivered: int = 0
    ready: int = 0
    ready_bytes: int = 0
    largest: int = 0
    open_producers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    ended: bool = False


class QueueState:
    """A bounded first-in first-out queue whose end of stream is a state, not an item.

    Producers open the stream and close it. The stream has ended when as many producers as announced
    have opened and closed it, and it is drained when, besides, nothing is left to take. A stream
    opened after that is a new *generation*: a reader that joins a queue which another reader has
    already seen to its end waits for the next generation instead of ending at once, so that a
    detached queue can serve one run after another.

    Parameters
    ----------
    kind
        What the records are; decides how readers that know only ``get`` are served.
    max_events, max_bytes
        Capacity. An event larger than ``max_bytes`` is still accepted by an empty queue, because it
        could never be accepted otherwise.
    """

    def __init__(self, kind: Kind, max_events: int, max_bytes: int) -> None:
        if max_events < 1 or max_bytes < 1:
            raise ValueError(
                f"a queue needs room: max_events is {max_events} and max_bytes {max_bytes}, "
                "both must be at least 1"
            )
        self.kind = kind
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.generation = 0
        self._ready: deque[Record] = deque()
        self._ready_bytes = 0
        self._open: set[str] = set()
        self._closed: set[str] = set()
        self._expected = 0
        self._foreign_items = 0
        self._foreign_streams = 0
        self._foreign_closed = False
        self._end_markers = 0
        self._end_seen = False
        self._readers: dict[str, int] = {}
        self._failures: dict[str, str] = {}
        self._accepted = self._delivered = self._largest = 0

    @property
    def ended(self) -> bool:
        """Whether every announced producer has closed the stream."""
        all_closed = bool(self._closed) and len(self._closed) >= self._expected
        return not self._open and (all_closed or self._foreign_closed)

    @property
    def drained(self) -> bool:
        """Whether the stream has ended and everything in it has been taken."""
        return self.ended and not self._ready

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of`` that together make the stream."""
        if producer in self._open:
            return
        self._begin_if_ended()
        self._open.add(producer)
        self._closed.discard(producer)
        self._expected = max(self._expected, of)

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream; ``failure`` says why it is incomplete.

        ``end_markers`` is how many readers that know only ``get`` will be handed `END_MARKER`.
        """
        if producer not in self._open:
            return
        self._open.discard(producer)
        self._closed.add(producer)
        self._end_markers = end_markers
        if failure is not None:
            self._failures[producer] = failure

    def put(self, producer: str, records: list[Record]) -> int:
        """Take records in order for as long as there is room; the answer is how many were taken."""
        if producer not in self._open:
            raise ValueError(f"producer {producer!r} has not opened this queue, or has closed it")
        return self._take(records)

    def put_foreign(self, payload: Any) -> bool:
        """Take an item from a program that knows only ``put``; ``None`` ends its stream."""
        if payload is None or (isinstance(payload, str) and payload == END_MARKER):
            # Once per reader, by psana-ray's rule: one stream ends, however often it is said.
            self._foreign_streams += not self._foreign_closed
            self._foreign_closed = True
            return True
        self._begin_if_ended()
        # A queue that only ever sees foreign puts must not look ended because of an earlier run.
        self._foreign_closed = False
        if not self._take([ForeignItem(payload, self._foreign_items, self._foreign_streams)]):
            return False
        self._foreign_items += 1
        return True

    @property
    def failures(self) -> dict[str, str]:
        """Producers of this generation that ended early, and why."""
        return dict(self._failures)

    def get(self, reader: str, max_records: int) -> tuple[list[Record], bool]:
        """Take up to ``max_records``; the second value says that ``reader`` is at the end."""
        self._join(reader)
        if self._readers[reader] == _AT_ITS_END:
            # The ranks of a run share a name: what one was told holds for all, even if the next
            # run has begun meanwhile.
            return [], True
        if not self._ready:
            at_end = self.ended and self._readers[reader] <= self.generation
            if at_end:
                self._readers[reader] = _AT_ITS_END
                self._end_seen = True
                # Left over, they would end whoever reads the next run.
                self._end_markers = 0
            return [], at_end
        taken = [self._pop() for _ in range(min(max_records, len(self._ready)))]
        return taken, False

    def get_foreign(self) -> Record | str | None:
        """Take one record for a program that knows only ``get``: a record, the end, or nothing."""
        if self._ready:
            return self._pop()
        if self.ended and self._end_markers > 0 and self.kind == "results":
            self._end_markers -= 1
            self._end_seen = True
            return END_MARKER
        return None

    def statistics(self) -> QueueStatistics:
        """Return what went through and what is here."""
        return QueueStatistics(
            accepted=self._accepted,
            delivered=self._delivered,
            ready=len(self._ready),
            ready_bytes=self._ready_bytes,
            largest=self._largest,
            open_producers=sorted(self._open),
            failures=self.failures,
            ended=self.ended,
        )

    def __len__(self) -> int:
        return len(self._ready)

    def _begin_if_ended(self) -> None:
        if not self.ended:
            return
        if not self._ready:
            self.generation += 1
            self._end_seen = False
            self._failures.clear()
        self._closed.clear()
        self._expected = 0
        self._foreign_closed = False
        self._end_markers = 0

    def _join(self, reader: str) -> None:
        if reader not in self._readers:
            over = self.drained and self._end_seen
            self._readers[reader] = self.generation + 1 if over else self.generation

    def _take(self, records: list[Record]) -> int:
        for taken, record in enumerate(records):
            size = record.nbytes
            full = len(self._ready) >= self.max_events or self._ready_bytes + size > self.max_bytes
            if full and self._ready:
                return taken
            self._ready.append(record)
            self._ready_bytes += size
            self._accepted += 1
            self._largest = max(self._largest, len(self._ready))
        return len(records)

    def _pop(self) -> Record:
        record = self._ready.popleft()
        self._ready_bytes -= record.nbytes
        self._delivered += 1
        return record
