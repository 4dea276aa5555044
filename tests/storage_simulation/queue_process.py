"""A simulated process, and the one that holds a queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peaknet_predict.queues.clock import RunningClock
from peaknet_predict.queues.quarantine import Quarantine
from peaknet_predict.queues.replay import SpoolError
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from tests.storage_simulation.disk import Killed, PowerCut, ProcessDisk

if TYPE_CHECKING:
    from tests.storage_simulation.world import World

LEASE_S = 10.0
PRODUCER_TIMEOUT_S = 60.0
TICK_S = 0.5


class Refused(AssertionError):
    """A spool was refused although nothing in it had been damaged."""


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

    def may_start(self) -> bool:
        """Whether anybody would start it again."""
        return True

    def say_alive(self) -> None:
        """Do what the thread does that says that this process is alive."""

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
    """A spool without the lock, which the simulated disk does not have.

    Attributes
    ----------
    moved
        How many records have been moved forward.
    """

    moved = 0

    def _compact(self) -> None:
        before = self.position
        super()._compact()
        self.moved += self.position != before

    def _claim(self) -> int:
        return self._fs.open(str(self.directory / "lock"), 0o102, 0o600)


class QueueProcess(Node):
    """A queue with its spool and its quarantine, put together as in `QueueActor`.

    Attributes
    ----------
    parts
        Producers that have opened the stream and not closed it, each with how long the queue had
        run when it heard of it last: kept here and not by the queue, which is judged by it.
    openings, openings_ended
        How often producers have opened the stream, and how many of these have come to their end.
    ran_s
        For how long the queue has run, in all its lives.
    """

    state: QueueState
    spool: SimulatedSpool
    quarantine: Quarantine

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.tickets: list[Ticket] = []
        self.sync: tuple[Callable[[], None], tuple[int, int]] | None = None
        self.flipped: tuple[str, int, int] | None = None
        self.parts: dict[str, float] = {}
        self.ran_s = 0.0
        self.openings = self.openings_ended = 0
        self._first_token = 1

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
            world.ledger.seen["damaged spools refused"] += 1
            self.flip_back()
        except OSError:
            self.die()

    def _open(self) -> None:
        world = self.world
        self.spool = world.make_spool(self)
        found = self.spool.replay
        self.quarantine = world.make_quarantine(self)
        self._first_token += 10**6
        self.clock = RunningClock(longest_gap_s=2 * TICK_S, clock=world.clock)
        self.state = world.make_state(self)
        self.state.restore(
            *(found.entries, found.keys, found.books, found.accepted, found.quarantined),
            kept=self.quarantine.look_up({entry.id for entry in found.entries}),
        )
        self.spool.books(self.state.streams.to_json())
        try:
            self.spool.sync()
        except OSError:
            if found.books is None:
                raise
        found.entries = []
        self.parts = {name: self.ran_s for name in self.parts if not self.may_be_closed(name)}
        world.check_memory(self)

    @property
    def spool_bytes(self) -> int:
        """How much the segments of its spool take."""
        files = self.world.disk.files(self.directory)
        return sum(len(file.data) for path, file in files if path.endswith(".spool"))

    @property
    def first_token(self) -> int:
        """A token that no earlier life has given out."""
        return self._first_token

    def run_for(self, seconds: float) -> None:
        """Let time pass in which this process runs; a queue looks at its clock all the while."""
        if self.is_alive:
            self.ran_s += seconds
            self.clock()

    def hear(self, producer: str) -> None:
        """Note that the queue has heard of a producer: its part is open, or has been closed."""
        if producer in self.state.streams.open_producers:
            self.openings += self.may_be_closed(producer)  # if it was, it has been opened again
            self.parts[producer] = self.ran_s
        elif self.may_be_closed(producer):
            self.parts.pop(producer, None)

    def may_be_closed(self, producer: str) -> bool:
        """Whether a producer has been silent for so long that the queue may close its part."""
        heard = self.parts.get(producer)
        return heard is None or self.ran_s - heard > PRODUCER_TIMEOUT_S

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
        self.world.ledger.seen["records moved forward"] += self.spool.moved
        self.spool.moved = 0

    def die(self) -> None:
        """End this life; nobody is answered any more."""
        super().die()
        for ticket in self.tickets:
            ticket.outcome = False
        self.tickets, self.sync = [], None
        self.world.queue_died(self)

    def flip_back(self) -> None:
        """Restore from a copy what was damaged."""
        assert self.flipped is not None
        path, position, bit = self.flipped
        self.world.flip(path, position, bit)
        self.flipped = None


__all__ = ["Killed", "Node", "PowerCut", "QueueProcess", "Refused", "Ticket"]
