"""The programs of the simulated world: queue processes, the producer, readers, and the writer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peaknet_predict.cxi.directory import CxiWriteError
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.records import Record
from peaknet_predict.queues.replay import SpoolError
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.types import Event, EventId, Result
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.disk import Killed, PowerCut, ProcessDisk

if TYPE_CHECKING:
    from tests.storage_simulation.world import World

STREAM = "s"
LEASE_S = 10.0
MAX_LOSSES = 12


class Unreachable(Exception):
    """The queue's process is dead."""


class Refused(AssertionError):
    """A spool was refused although nothing in it had been damaged."""


def image_of(idx: int) -> np.ndarray[Any, Any]:
    """Return the pixels of an event: no two are alike."""
    return np.arange(idx * 7, idx * 7 + 16, dtype=np.uint16).reshape(1, 4, 4)


def event_of(idx: int) -> Event:
    """Return an event; one in seven has no photon energy."""
    return Event(EventId(STREAM, 0, idx), image_of(idx), -1.0 if is_bad(idx) else 9000.0 + idx)


def is_bad(idx: int) -> bool:
    """Whether an event is rejected by its reader."""
    return idx % 7 == 3


def is_poison(idx: int) -> bool:
    """Whether an event kills its readers."""
    return idx % 61 == 17


def is_filtered(idx: int) -> bool:
    """Whether an event has too few peaks for a file."""
    return idx % 11 == 5


class Node:
    """A process with a life that ends at any of its calls of the disk.

    Attributes
    ----------
    life
        Counts its lives; 0 before the first.
    dies_after, dies_of
        After how many calls it will die, and with which exception; None if it will not.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.is_alive = False
        self.dies_after: int | None = None
        self.dies_of: type[BaseException] = Killed
        self.disk: ProcessDisk

    def before_call(self, call: str) -> str | None:
        """Die, or say which fault the disk shows."""
        if not self.is_alive:
            raise Killed(self)  # whatever a dead process does on its way out does not happen
        if self.dies_after is not None:
            if self.dies_after <= 0:
                raise self.dies_of(self)
            self.dies_after -= 1
        return self.world.fault(call)

    def begin(self) -> None:
        """Begin a new life."""
        self.life += 1
        self.is_alive = True
        self.dies_after = None
        self.disk = ProcessDisk(self.world.disk, self.before_call)

    def start(self) -> None:
        """Begin a life, as its program does."""
        raise NotImplementedError

    def die(self) -> None:
        """End this life; what it knew is gone."""
        self.is_alive = False
        self.dies_after = None


@dataclass
class Ticket:
    """A call that waits until what it has put is on disk."""

    wanted: tuple[int, int]
    outcome: bool | None = None  # confirmed, or not


class SimulatedSpool(Spool):
    """A spool without the lock, which the simulated disk does not have."""

    def _claim(self) -> int:
        return self._fs.open(str(self.directory / "lock"), 0o102, 0o600)


class QueueProcess(Node):
    """A queue with its spool and its quarantine, put together as in `QueueActor`."""

    state: QueueState
    spool: Spool
    quarantine: Quarantine

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.tickets: list[Ticket] = []
        self.sync: tuple[Callable[[], None], tuple[int, int]] | None = None
        self.flipped: tuple[str, int, int] | None = None
        self._first_token = 1
        self.first_books = False

    @property
    def directory(self) -> str:
        """Where its spool is."""
        return f"/spools/{self.name}"

    def start(self) -> None:
        """Begin a life, from the spool; stay dead if the disk does not let it."""
        world = self.world
        self.begin()
        self.tickets, self.sync = [], None
        try:
            self._open()
        except SpoolError as error:
            self.die()
            if isinstance(error.__cause__, OSError):
                return  # the disk is full or broken: another time
            if self.flipped is None:
                raise Refused(str(error)) from error
            world.note(f"{self.name}: refused as it should be")
            self.flip_back()
        except OSError:
            self.die()

    def _open(self) -> None:
        world = self.world
        self.spool = world.make_spool(self.directory, self.disk)
        found = self.spool.replay
        self.quarantine = Quarantine("/quarantine", 10**9, queue=self.name, fs=self.disk)
        self._first_token += 10**6
        self.state = world.make_state(self)
        self.state.restore(
            *(found.entries, found.keys, found.books, found.accepted, found.quarantined),
            kept=self.quarantine.look_up({entry.id for entry in found.entries}),
        )
        if found.books is None:
            self.spool.books(self.state.streams.to_json())
        found.entries = []

    @property
    def first_token(self) -> int:
        """A token that no earlier life has given out."""
        return self._first_token

    def wait(self) -> Ticket:
        """Return what a call waits for whose puts are to be on disk."""
        ticket = Ticket(self.spool.position)
        self.tickets.append(ticket)
        return ticket

    def begin_sync(self) -> None:
        """Do the first half of a group commit: see what has to be synced."""
        try:
            self.sync = self.spool.syncing(), self.spool.position
        except OSError:
            self._answer(lambda ticket: False)

    def end_sync(self) -> None:
        """Do the second half: sync it, and answer those who wait for it."""
        assert self.sync is not None
        (sync, reached), self.sync = self.sync, None
        try:
            sync()
        except OSError:
            self._answer(lambda ticket: False)
            return
        self._answer(lambda ticket: True if ticket.wanted <= reached else None)

    def _answer(self, outcome: Callable[[Ticket], bool | None]) -> None:
        for ticket in self.tickets:
            ticket.outcome = outcome(ticket)
        self.tickets = [ticket for ticket in self.tickets if ticket.outcome is None]

    def tick(self) -> None:
        """Do what the queue does while nobody calls."""
        self.state.tick()
        self.state.settlements.confirm(self.quarantine.retry())
        self.spool.tidy()

    def die(self) -> None:
        """End this life; nobody is answered any more."""
        super().die()
        for ticket in self.tickets:
            ticket.outcome = False
        self.tickets, self.sync = [], None

    def flip_back(self) -> None:
        """Restore from a copy what was damaged."""
        assert self.flipped is not None
        path, position, bit = self.flipped
        self.world.flip(path, position, bit)
        self.flipped = None


class Feed(Node):
    """A producer that goes on where the queue has its stream, as `feed --stream` does."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "feed")
        self.next: int | None = None
        self.waits: tuple[int, Ticket] | None = None

    def start(self) -> None:
        """Begin a life that knows nothing of the one before."""
        self.begin()
        self.next = self.waits = None

    def step(self) -> None:
        """Put events, or learn that they are safe."""
        queue = self.world.input
        if self.waits is not None:
            first_missing, ticket = self.waits
            if ticket.outcome is None:
                return
            self.waits = None
            if ticket.outcome and self.world.answers():
                self.world.confirm(first_missing)
                self.next = first_missing
            return
        if self.next is None:
            first_missing = queue.state.keys.first_missing(STREAM, 0)
            self.waits = first_missing, queue.wait()
            return
        count = self.world.rng.randint(1, 6)
        events = [event_of(idx) for idx in range(self.next, self.next + count)]
        taken = self.world.put(queue, "feed", events)
        if taken:
            self.waits = self.next + taken, queue.wait()


@dataclass
class Held:
    """What a reader has leased."""

    token: int
    record: Record
    lost_by: list[str] = field(default_factory=list)


class Reader(Node):
    """A process that leases records of a queue."""

    def __init__(self, world: World, name: str, queue: QueueProcess) -> None:
        super().__init__(world, name)
        self.queue = queue
        self.held: list[Held] = []
        self.done: list[int] = []  # tokens to be acknowledged
        self._sequences = itertools.count()
        self._asked: int | None = None

    @property
    def holder(self) -> str:
        """Names this life to the queue."""
        return f"{self.name}.{self.life}"

    def start(self) -> None:
        """Begin a life that holds nothing."""
        self.begin()
        self.held, self.done, self._asked = [], [], None

    def get(self, most: int) -> list[Held]:
        """Lease records; ask again, under the same number, if the answer is lost."""
        if self._asked is None:
            self._asked = next(self._sequences)
        state = self.queue.state
        delivery = state.ask("readers", self.holder, self._asked)
        delivery = delivery or state.take("readers", self.holder, self._asked, most)
        if not self.world.answers():
            return []
        self._asked = None
        taken = [
            Held(token, record, delivery.lost_by.get(token, []))
            for token, record in zip(delivery.tokens, delivery.records, strict=True)
        ]
        self.held += taken
        return taken

    def acknowledge(self) -> None:
        """Say what is done; say it again if the answer is lost."""
        if self.done:
            self.queue.state.ack(self.done)
            if self.world.answers():
                self.done = []


class Predictor(Reader):
    """A reader that puts a result for every good event, and rejects the others."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, world.input)
        self.results: list[tuple[int, Result]] = []
        self.waits: tuple[list[int], Ticket] | None = None

    def start(self) -> None:
        """Begin a life that holds nothing."""
        super().start()
        self.results, self.waits = [], None

    def step(self) -> None:
        """Do one of the things that there are to do."""
        what: list[Callable[[], object]] = [self._put] if self.results or self.waits else []
        what += [self._predict] if self.held else []
        what += [self.acknowledge] if self.done else []
        what += [self._take] if len(self.held) + len(self.results) < 6 else []
        if what:
            self.world.rng.choice(what)()

    def _take(self) -> None:
        self.get(3)

    def _predict(self) -> None:
        if not self.held:
            return
        held = self.held.pop(0)
        event = held.record
        assert isinstance(event, Event)
        idx = event.id.idx
        assert np.array_equal(event.image, image_of(idx)), f"event {idx} is not what was put"
        if is_poison(idx):
            self.die()
        elif is_bad(idx):
            self.queue.state.reject({held.token: "it has no photon energy"})
        else:
            peaks = np.zeros((0 if is_filtered(idx) else 1, 3))
            result = Result(event.id, event.image, peaks, event.photon_energy)
            self.results.append((held.token, result))

    def _put(self) -> None:
        output = self.world.output
        if self.waits is not None:
            tokens, ticket = self.waits
            if ticket.outcome is not None:
                self.waits = None
                if ticket.outcome and self.world.answers():
                    self.done += tokens
                    self.results = [one for one in self.results if one[0] not in tokens]
        elif self.results and output.is_alive:
            taken = self.world.put(output, "predict", [result for _, result in self.results])
            if taken:
                self.waits = [token for token, _ in self.results[:taken]], output.wait()


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
        self._tokens, self._is_open = {}, False

    def step(self) -> None:
        """Do one of the things that there are to do."""
        cxi_on_disk.run_as(self.disk)
        try:
            if not self._is_open:
                self.writer = self.world.make_writer(self)
                self._is_open = True
            what: list[Callable[[], object]] = [self._write]
            if self.queue.is_alive:
                what += [self.acknowledge] if self.done else []
                what += [self._take] if len(self.held) < 6 else []
            self.world.rng.choice(what)()
        except (CxiWriteError, Unreachable):
            pass  # another time: what is in memory stays there

    def flush(self) -> None:
        """Write what is in memory."""
        cxi_on_disk.run_as(self.disk)
        if self._is_open:
            self._settle(self.writer.flush())

    def _take(self) -> None:
        self.get(3)

    def _write(self) -> None:
        if not self.held:
            if self.world.rng.random() < 0.1:
                self._settle(self.writer.flush())
            return
        held = self.held[0]
        result = held.record
        assert isinstance(result, Result)
        assert np.array_equal(result.image, image_of(result.id.idx)), "not what was put"
        if held.lost_by:
            self._settle(self.writer.take_over_from(held.lost_by))
        self._tokens[result.id] = held.token
        settled = self.writer.add(result)
        self.held.pop(0)
        self._settle(settled)

    def _settle(self, settled: list[EventId]) -> None:
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


__all__ = ["Feed", "Killed", "Node", "PowerCut", "Predictor", "QueueProcess", "Writer"]
