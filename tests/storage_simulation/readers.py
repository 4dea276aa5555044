"""The programs that read the simulated queues."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peaknet_predict.cxi.directory import CxiWriteError
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.queues.records import ForeignItem, Record
from peaknet_predict.queues.wire import item_to_event
from peaknet_predict.types import EventId, Refusal, Result
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.events import (
    energy_of,
    is_bad,
    is_filtered,
    is_poison,
    serial_in,
    shown_in,
)
from tests.storage_simulation.queue_process import Killed, Node, QueueProcess, Ticket

if TYPE_CHECKING:
    from tests.storage_simulation.world import World


class Unreachable(Exception):
    """The queue's process is dead."""


@dataclass
class Held:
    """What a reader has leased."""

    token: int
    record: Record
    lost_by: list[str] = field(default_factory=list)


class Reader(Node):
    """A process that leases records of a queue, to the end of one stream.

    Attributes
    ----------
    run
        Which one, by the count of the world.
    has_ended
        Whether it has been told the end of the stream.
    """

    def __init__(self, world: World, name: str, queue: QueueProcess) -> None:
        super().__init__(world, name)
        self.queue = queue
        self.held: list[Held] = []
        self.done: list[int] = []  # tokens to be acknowledged

    @property
    def holder(self) -> str:
        """Names this life to the queue."""
        return f"{self.name}.{self.life}"

    @property
    def group(self) -> str:
        """The consumer group."""
        return f"run {self.run}"

    def start(self) -> None:
        """Begin a life that holds nothing."""
        self.begin()
        self.run = self.world.run_number
        self.held, self.done = [], []
        self.has_ended = self.flush_wanted = False
        self._sequences = itertools.count()
        self._asked: int | None = None
        self._ending: Ticket | None = None

    def is_told(self) -> bool:
        """Whether the end has been decided, and is on its way: nothing else is to be done."""
        if self._ending is None:
            return False
        if self._ending.outcome is not None:
            if self._ending.outcome:
                self.world.tell_end(self.queue, self.run)
                self.has_ended = self.world.answers()
            self._ending = None
        return True

    def say_alive(self) -> None:
        """Say that what it holds is still being worked on."""
        if self.queue.is_alive:
            self.queue.state.heartbeat(self.holder, [])

    def get(self, most: int) -> None:
        """Lease records; ask again, under the same number, if the answer is lost."""
        if self._asked is None:
            self._asked = next(self._sequences)
        state = self.queue.state
        delivery = state.ask(self.group, self.holder, self._asked)
        if delivery is None:
            delivery = state.take(self.group, self.holder, self._asked, most)
            if delivery.ended:
                self.world.check_end(self.queue, self.run)
        if delivery.ended:
            self._ending = self.queue.wait()  # it is told when all before it is on disk
        elif not self.world.answers():
            return
        self._asked = None
        self.flush_wanted = delivery.flush
        self.held += [
            Held(token, record, delivery.lost_by.get(token, []))
            for token, record in zip(delivery.tokens, delivery.records, strict=True)
        ]

    def acknowledge(self) -> None:
        """Say what is done; say it again if the answer is lost."""
        if self.done:
            self.queue.state.ack(self.done)
            if self.world.answers():
                self.done = []


class Hoarder(Reader):
    """A reader that holds one event for long, and then gives it back."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "hoarder", world.input)

    def step(self) -> None:
        """Take an event; or, seldom, give it back."""
        if self.is_told() or self.has_ended:
            return
        if not self.held:
            self.get(1)
        elif self.world.rng.random() < 0.005:
            self.give_back()

    def give_back(self) -> None:
        """Give back what it holds."""
        self.queue.state.release([held.token for held in self.held])
        self.held = []


class Predictor(Reader):
    """A reader that puts a result for every good event, and rejects the others."""

    def __init__(self, world: World, rank: int, of: int) -> None:
        super().__init__(world, f"predictor {rank}", world.input)
        self._rank, self._of = rank, of
        self.results: list[tuple[int, Result]] = []
        self.waits: tuple[list[int], list[Result], Ticket] | None = None

    @property
    def producers(self) -> str:
        """How the names of a run's producers of results begin."""
        return f"predict:{self.run}:"

    @property
    def producer(self) -> str:
        """Names this life to the output queue."""
        return f"{self.producers}{self._rank}.{self.life}"

    def start(self) -> None:
        """Begin a life that holds nothing."""
        super().start()
        self.results, self.waits = [], None
        self._opening: Ticket | None = None
        self._asked_s = 0.0
        self._closing: Ticket | None = None
        self._is_open = False

    def may_start(self) -> bool:
        """Whether the run still goes on."""
        return not self.world.output_closed

    def say_alive(self) -> None:
        """Say that it is at work, to both queues."""
        super().say_alive()
        output = self.world.output
        if self._is_open and output.is_alive:
            output.state.heartbeat("", [self.producer])
            output.hear(self.producer)

    def step(self) -> None:
        """Do one of the things that there are to do."""
        output = self.world.output
        if not self._is_open:
            if self.world.output_closed:
                self.die()
            elif output.is_alive:
                self._open()
            return
        if self.is_told():
            return
        what: list[Callable[[], object]] = [self._put] if self.results or self.waits else []
        what += [self._predict] if self.held else []
        what += [self.acknowledge] if self.done else []
        what += [self._take] if len(self.held) + len(self.results) < 6 else []
        if self.has_ended and output.is_alive:
            what = [self._close]
        if what:
            self.world.rng.choice(what)()

    def _open(self) -> None:
        """Open the output, and wait until that is on disk; ask again where it is not."""
        output = self.world.output
        if self._opening is None:
            output.state.open(self.producer, self._of)
            output.openings += 1
            self._opening, self._asked_s = output.wait(), output.ran_s
        elif self._opening.outcome is not None:
            self._is_open, self._opening = self._opening.outcome, None
            # By now another may have closed the parts of all.
            if self._is_open and self.producer in output.state.streams.open_producers:
                output.parts[self.producer] = self._asked_s  # the queue has heard of it then

    def _take(self) -> None:
        self.get(3)

    def _close(self) -> None:
        """End the results' stream for all: the input's end means that nothing is under way."""
        output = self.world.output
        known = output.state.streams.to_json()
        if self.producer not in (*known["open"], *known["closed"]):
            self.die()  # its opening was lost with a full disk, so it has to be started again
        elif self._closing is None:
            for name in [name for name in output.parts if name.startswith(self.producers)]:
                del output.parts[name]
            self.world.output_closing = True
            output.state.close_group(self.producers, None, 1)
            self._closing = output.wait()
        elif self._closing.outcome is not None:
            self.world.output_closed |= self._closing.outcome
            if self._closing.outcome and self.world.answers():
                self.die()
            self._closing = None

    def _predict(self) -> None:
        held = self.held.pop(0)
        record = held.record
        assert not isinstance(record, Result)
        serial = serial_in(record)
        self.world.ledger.identify(record.id, serial)
        if is_poison(serial):
            self.die()
            return
        if isinstance(record, ForeignItem):
            event = item_to_event(record.payload, record.stream, record.position)
        else:
            event = record
        if isinstance(event, Refusal):
            assert is_bad(serial)
            self.queue.state.reject({held.token: event.reason})
        elif not event.photon_energy > 0:
            assert is_bad(serial)
            self.queue.state.reject({held.token: "it has no photon energy"})
        else:
            assert event.photon_energy == energy_of(serial), f"damaged: event {serial}"
            peaks = np.zeros((0 if is_filtered(serial) else 1, 3))
            result = Result(event.id, event.image, peaks, event.photon_energy)
            self.results.append((held.token, result))

    def _put(self) -> None:
        output = self.world.output
        if self.waits is not None:
            tokens, put, ticket = self.waits
            if ticket.outcome is not None:
                self.waits = None
                if ticket.outcome:
                    delivered = self.world.ledger.delivered
                    delivered |= {one.id: shown_in(one.image) for one in put}
                if ticket.outcome and self.world.answers():
                    self.done += tokens
                    self.results = [one for one in self.results if one[0] not in tokens]
        elif self.results and output.is_alive:
            try:
                taken = output.state.put(self.producer, [result for _, result in self.results])
            except ValueError:
                self._is_open = False  # the power failed before its opening was on disk
                return
            output.hear(self.producer)
            if taken:
                tokens = [token for token, _ in self.results[:taken]]
                put = [result for _, result in self.results[:taken]]
                self.waits = tokens, put, output.wait()


class Writer(Reader):
    """The reader that writes CXI files."""

    writer: CxiWriter

    def __init__(self, world: World) -> None:
        super().__init__(world, "writer", world.output)
        self._tokens: dict[EventId, int] = {}
        self._is_open = False

    def start(self) -> None:
        """Begin a life; it has no files before the disk lets it look."""
        super().start()
        self.run = self.world.writer_number
        self._tokens, self._is_open = {}, False

    def may_start(self) -> bool:
        """Whether the run still goes on."""
        return not self.world.output_told

    def step(self) -> None:
        """Do one of the things that there are to do."""
        if self.is_told():
            return
        cxi_on_disk.run_as(self.disk)
        try:
            if not self._is_open:
                self.writer = self.world.make_writer(self)
                self._is_open = True
            what: list[Callable[[], object]] = [self._write]
            if self.queue.is_alive:
                what += [self.acknowledge] if self.done else []
                what += [self._take] if len(self.held) < 6 else []
            if self.has_ended:
                what = [self._close]
            self.world.rng.choice(what)()
        except (CxiWriteError, Unreachable):
            pass  # another time: what is in memory stays there

    def _close(self) -> None:
        self._settle(self.writer.close())
        self.die()

    def _take(self) -> None:
        self.get(3)

    def _write(self) -> None:
        if not self.held:
            if self.flush_wanted or self.world.rng.random() < 0.02:
                self._settle(self.writer.flush())
            else:
                self._settle(self.writer.record_filtered())
            return
        held = self.held[0]
        result = held.record
        assert isinstance(result, Result)
        self.world.ledger.identify(result.id, shown_in(result.image))
        if held.lost_by:
            self._settle(self.writer.take_over_from(held.lost_by))
        self._tokens[result.id] = held.token
        settled = self.writer.add(result)
        self.held.pop(0)
        self._settle(settled)

    def _settle(self, settled: list[EventId]) -> None:
        self.world.ledger.written.update(settled)
        for key in settled:
            token = self._tokens.pop(key, None)
            if token is not None:
                self.done.append(token)

    def still_ours(self, ids: Any) -> set[EventId]:
        """Ask the queue which events may still be written here."""
        if not self.queue.is_alive:
            raise Unreachable
        try:
            current = set(self.queue.state.held([self._tokens[key] for key in ids]))
        except Killed as death:
            death.args[0].die()
            raise Unreachable from None
        return {key for key in ids if self._tokens[key] in current}
