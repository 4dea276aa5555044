"""The programs that fill the simulated queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peaknet_predict.types import EventId
from tests.storage_simulation.events import event_of, item_of, serial_of
from tests.storage_simulation.queue_process import Node, Ticket

if TYPE_CHECKING:
    from tests.storage_simulation.world import World


class Feed(Node):
    """A producer that goes on where the queue has its stream, as `feed --stream` does.

    Parameters
    ----------
    run, rank, of
        Which run of the world it feeds, as which of how many producers.
    total
        How many events it has.

    Attributes
    ----------
    is_done
        Whether it has closed its part of the stream.
    is_gone
        Whether it has vanished for good.
    """

    def __init__(self, world: World, run: int, rank: int, of: int, total: int) -> None:
        super().__init__(world, f"feed {rank} of run {run}")
        self.run, self.rank, self.of, self.total = run, rank, of, total
        self.stream = f"s{run}"
        self.producer = f"feed:{self.stream}:{rank}"
        self.is_done = self.is_gone = False
        self.next: int | None = None

    def start(self) -> None:
        """Begin a life that knows nothing of the one before."""
        self.begin()
        self.next = None
        self.waits: tuple[int, Ticket] | None = None
        self._opening: Ticket | None = None
        self._closing: Ticket | None = None
        self._is_open = False

    def may_start(self) -> bool:
        """Whether there is something left to do, and somebody to do it."""
        return not (self.is_done or self.is_gone)

    def stop_early(self) -> None:
        """Read no more of the source."""
        reached = self.world.ledger.below.get((self.stream, self.rank), 0)
        self.total = max(self.next or 0, reached)

    def say_alive(self) -> None:
        """Say that its part of the stream goes on."""
        queue = self.world.input
        if self._is_open and queue.is_alive:
            queue.state.heartbeat("", [self.producer])
            queue.hear(self.producer)

    def step(self) -> None:
        """Put events, or learn that they are safe, or end."""
        queue = self.world.input
        if self.waits is not None:
            self._learn(*self.waits)
        elif self.next is None:
            first_missing = queue.state.keys.first_missing(self.stream, self.rank)
            self.waits = first_missing, queue.wait()
        elif not self._is_open:
            self._open()
        elif self._opening is not None:
            # It has not begun before that is on disk.
            if self._opening.outcome is not None:
                self._is_open, self._opening = self._opening.outcome, None
        elif self.next < self.total:
            self._put(self.next)
        else:
            self._close()

    def _close(self) -> None:
        queue = self.world.input
        if self._closing is None:
            queue.parts.pop(self.producer, None)
            queue.state.close(self.producer, None, 1)
            self._closing = queue.wait()
        elif self._closing.outcome is not None:
            if self._closing.outcome and self.world.answers():
                self.is_done = True
                self.die()
            self._closing = None

    def _open(self) -> None:
        queue = self.world.input
        queue.state.open(self.producer, self.of)
        queue.parts[self.producer] = queue.ran_s
        self._opening = queue.wait()
        queue.openings += 1
        self._is_open = True

    def _learn(self, first_missing: int, ticket: Ticket) -> None:
        if ticket.outcome is None:
            return
        self.waits = None
        if ticket.outcome and self.world.answers():
            ledger = self.world.ledger
            below = (self.stream, self.rank)
            for idx in range(ledger.below.get(below, 0), first_missing):
                ledger.confirm(serial_of(self.run, self.rank, idx))
            ledger.below[below] = max(ledger.below.get(below, 0), first_missing)
            self.next = first_missing

    def _put(self, first: int) -> None:
        queue, rng = self.world.input, self.world.rng
        keys = [
            EventId(self.stream, self.rank, idx)
            for idx in range(first, min(first + rng.randint(1, 6), self.total))
        ]
        events = [event_of(key, serial_of(self.run, self.rank, key.idx)) for key in keys]
        try:
            taken = queue.state.put(self.producer, events)
        except ValueError:
            self._is_open = False  # the power failed before its opening was on disk
            return
        queue.hear(self.producer)
        if taken:
            self.waits = first + taken, queue.wait()


class PsanaJob(Node):
    """A program of several ranks that knows only ``put``, as psana-ray's producers do.

    What a queue has no room for is put again. When the queue's process dies, it ends, without an
    error. Started again, it counts from 0.
    """

    def __init__(self, world: World, run: int, ranks: int, total: int) -> None:
        super().__init__(world, f"psana-ray of run {run}")
        self.run, self.total = run, total
        self.is_done = False
        self._ranks = ranks
        self._serials = iter(range(10_000))

    def start(self) -> None:
        """Begin a life that knows nothing of the one before."""
        self.begin()
        self.world.ledger.seen["starts of psana-ray"] += 1
        self.has_put = False
        self._next = [0] * self._ranks
        self._offered: tuple[int, int] | None = None  # rank and serial number
        self._ends = 0
        self._waits: tuple[int | None, Ticket] | None = None

    def may_start(self) -> bool:
        """Whether there is something left to do."""
        return not self.is_done

    def stop_early(self) -> None:
        """Read no more of the source; of a stream without any item nothing would be known."""
        self.total = 1

    def step(self) -> None:
        """Put an item, or learn that it is safe, or end."""
        queue = self.world.input
        if self._waits is not None:
            serial, ticket = self._waits
            if ticket.outcome is None:
                return
            if not ticket.outcome:
                self._waits = serial, queue.wait()  # the queue does not answer before
                return
            self._waits = None
            if serial is not None:
                self.world.ledger.confirm(serial)
                self.world.ledger.seen["of them from psana-ray"] += 1
        elif self._offered is None and sum(self._next) >= self.total:
            self._end()
        else:
            self._put()

    def _put(self) -> None:
        if self._offered is None:
            rank = self.world.rng.randrange(self._ranks)
            self._offered = rank, serial_of(self.run, 5, next(self._serials))
        rank, serial = self._offered
        queue = self.world.input
        if queue.state.put_foreign(item_of(rank, self._next[rank], serial)):
            self.has_put = True
            queue.openings += 1
            self._next[rank] += 1
            self._offered = None
            self._ends = 0
            self._waits = serial, queue.wait()
        else:
            self.world.ledger.seen["puts of psana-ray tried again"] += 1

    def _end(self) -> None:
        if self._ends == 2:  # one for each of its consumers
            self.is_done = True
            self.die()
            return
        queue = self.world.input
        self.has_put = False
        self._ends += 1
        queue.state.put_foreign(None)
        queue.openings += 1
        self._waits = None, queue.wait()
