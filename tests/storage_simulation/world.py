"""One history: the programs, the disk, the clock and the scheduler, all driven by one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.queues.records import Record
from peaknet_predict.queues.spool import Spool
from peaknet_predict.queues.state import QueueState
from peaknet_predict.queues.synced_mark import MarkFile
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.disk import Disk, Killed, PowerCut, ProcessDisk
from tests.storage_simulation.nodes import (
    LEASE_S,
    MAX_LOSSES,
    STREAM,
    Feed,
    Node,
    Predictor,
    QueueProcess,
    Reader,
    SimulatedSpool,
    Writer,
    event_of,
)

_DRAINING = 40_000  # steps within which all that is left has to come to its end


class World:
    """Programs on one machine: a producer, two queues, two predictors and a writer.

    Parameters
    ----------
    seed
        Decides everything.

    Attributes
    ----------
    confirmed
        Events with an idx below this have been confirmed to the producer.
    log
        What happened, to explain a failure.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disk = Disk(self.rng)
        self.now = 0.0
        self.confirmed = 0
        self.steps = 0
        self.log: list[str] = []
        for path in ("/spools", "/cxi"):
            directory, name = self.disk.parent(path)
            directory.change((name, self.disk.new_directory()))
        self.disk.root.sync()
        self.input = QueueProcess(self, "input")
        self.output = QueueProcess(self, "output")
        self.feed = Feed(self)
        self.predictors = [Predictor(self, f"predictor {k}") for k in range(2)]
        self.writer = Writer(self)
        self.queues = [self.input, self.output]
        self.readers: list[Reader] = [*self.predictors, self.writer]
        self.nodes: list[Node] = [*self.queues, self.feed, *self.readers]
        self._faults = True
        self._disk_is_bad = False
        self._segment_bytes = self.rng.choice((1500, 4000, 20_000))
        self._capacity = self.rng.choice((5, 20, 60))
        self._events_per_file = self.rng.choice((2, 5, 9))
        self._loss = self.rng.choice((0.0, 0.02, 0.1))
        # Histories differ in what goes wrong in them.
        often = self.rng.choice((0.3, 1.0, 3.0))
        self._actions: list[tuple[Callable[[], None], float]] = [
            (self._step_feed, 10.0),
            (self._step_predictors, 24.0),
            (self._step_writer, 16.0),
            (self._begin_sync, 8.0),
            (self._end_sync, 10.0),
            (self._tick, 4.0),
            (self._heartbeat, 4.0),
            (self._restart, 6.0),
            (self._pass_time, 0.4),
            (self._kill, 0.4 * often),
            (self._doom, 0.8 * often),
            (self._cut_power, 0.15 * often),
            (self._fill_disk, 0.2 * often * self.rng.choice((0, 1, 4))),
            (self._spoil_disk, 0.2 * often * self.rng.choice((0, 1, 4))),
            (self._mend_disk, 0.8),
            (self._flip_a_bit, 0.2 * often * self.rng.choice((0, 1))),
        ]

    def run(self, steps: int) -> None:
        """Let so many things happen, and then, without faults, let all come to its end."""
        actions, weights = zip(*self._actions, strict=True)
        for action in self.rng.choices(actions, weights, k=steps):
            self._do(action)
            self._check_balance()
        self.finish()

    def finish(self) -> None:
        """Mend and restart everything, and bring all that is under way to its end."""
        self._faults = self._disk_is_bad = False
        self._loss = 0.0
        self.disk.capacity = None
        for queue in self.queues:
            if queue.flipped is not None:
                queue.flip_back()
        for node in self.nodes:
            node.dies_after = None
        self.feed.die()
        for _ in range(_DRAINING):
            self._do(self._drain_a_little)
            if self._is_drained():
                break
        else:
            raise AssertionError(f"it does not come to its end: {self._state()}")
        # What has been settled must survive whatever comes.
        self._cut_power_now()

    # What programs ask of the world.

    def note(self, what: str) -> None:
        """Remember what happens."""
        self.log.append(f"{self.steps}: {what}")

    def fault(self, call: str) -> str | None:
        """Say which fault the disk shows in a call."""
        if not self._disk_is_bad:
            return None
        chance = self.rng.random()
        if call == "fsync":
            return self.rng.choice(("drop", "keep")) if chance < 0.15 else None
        if call in ("write", "pwrite"):
            return self.rng.choice(("fail", "short")) if chance < 0.1 else None
        return "fail" if chance < 0.04 else None

    def answers(self) -> bool:
        """Whether an answer arrives."""
        return self.rng.random() >= self._loss

    def clock(self) -> float:
        """Return the time."""
        return self.now

    def confirm(self, below: int) -> None:
        """Hear that the producer has been told of events that they are safe."""
        self.confirmed = max(self.confirmed, below)

    def put(self, queue: QueueProcess, producer: str, records: Sequence[Record]) -> int:
        """Put records; open the queue if that has not been done."""
        try:
            return queue.state.put(producer, records)
        except ValueError:
            queue.state.open(producer)
            return 0

    def make_spool(self, directory: str, disk: ProcessDisk) -> Spool:
        """Return a queue's spool."""
        return SimulatedSpool(directory, self._segment_bytes, fs=disk)

    def make_state(self, queue: QueueProcess) -> QueueState:
        """Return a queue's state."""
        return QueueState(
            "events" if queue is self.input else "results",
            *(self._capacity, 10**9, LEASE_S, 1e9, MAX_LOSSES),
            uid=queue.name,
            first_token=queue.first_token,
            clock=self.clock,
            quarantine=lambda entry, reason: queue.quarantine.keep(
                entry.id, reason, entry.record, entry.losses
            ),
            journal=queue.spool,
        )

    def make_writer(self, writer: Writer) -> CxiWriter:
        """Return the writer of files."""
        return CxiWriter(
            "/cxi",
            events_per_file=self._events_per_file,
            min_peaks=1,
            max_peaks=2,
            owner=writer.holder,
            still_ours=writer.still_ours,
        )

    # What the scheduler does.

    def _do(self, action: Callable[[], None]) -> None:
        self.steps += 1
        self.now += 0.05
        try:
            action()
        except Killed as death:
            self._bury(death)
        except PowerCut:
            self._cut_power_now()

    def _bury(self, death: Killed) -> None:
        node: Node = death.args[0]
        self.note(f"{node.name} dies")
        node.die()

    def _step_feed(self) -> None:
        if self.feed.is_alive and self.input.is_alive:
            self.feed.step()

    def _step_predictors(self) -> None:
        alive = [predictor for predictor in self.predictors if predictor.is_alive]
        if alive and self.input.is_alive:
            self.rng.choice(alive).step()

    def _step_writer(self) -> None:
        if self.writer.is_alive:
            self.writer.step()

    def _begin_sync(self) -> None:
        ready = [queue for queue in self.queues if queue.sync is None and queue.tickets]
        if ready:
            self.rng.choice(ready).begin_sync()

    def _end_sync(self) -> None:
        ready = [queue for queue in self.queues if queue.sync is not None]
        if ready:
            self.rng.choice(ready).end_sync()

    def _tick(self) -> None:
        queue = self.rng.choice(self.queues)
        if queue.is_alive:
            queue.tick()

    def _heartbeat(self) -> None:
        for reader in self.readers:
            if reader.is_alive and reader.queue.is_alive:
                reader.queue.state.heartbeat(reader.holder, [])

    def _restart(self) -> None:
        dead = [node for node in self.nodes if not node.is_alive and node is not self.feed]
        if self._faults and not self.feed.is_alive:
            dead.append(self.feed)
        for node in self.rng.sample(dead, self.rng.randint(0, len(dead))):
            node.start()

    def _pass_time(self) -> None:
        self.now += self.rng.choice((1.0, LEASE_S + 1.0))

    def _kill(self) -> None:
        node = self.rng.choice(self.nodes)
        if node.is_alive:
            self.note(f"{node.name} is killed")
            node.die()

    def _doom(self) -> None:
        node = self.rng.choice(self.nodes)
        if node.is_alive:
            node.dies_after = self.rng.randint(0, 40)
            node.dies_of = self.rng.choice((Killed, Killed, PowerCut))

    def _cut_power(self) -> None:
        raise PowerCut

    def _cut_power_now(self) -> None:
        self.note("the power fails")
        for node in self.nodes:
            node.die()
        self.disk.lose_power()

    def _fill_disk(self) -> None:
        self.disk.capacity = self.disk.used + self.rng.choice((0, 10, 500, 3000))
        self.note(f"the disk is full at {self.disk.capacity} bytes")

    def _spoil_disk(self) -> None:
        self._disk_is_bad = True
        self.note("the disk is bad")

    def _mend_disk(self) -> None:
        self._disk_is_bad = False
        self.disk.capacity = None

    def _flip_a_bit(self) -> None:
        queue = self.rng.choice(self.queues)
        places = [] if queue.is_alive or queue.flipped else self._places_to_flip(queue)
        if not places:
            return
        path, size = self.rng.choice(places)
        queue.flipped = path, self.rng.randrange(size), self.rng.randrange(8)
        self.note(f"bit {queue.flipped} flips")
        self.flip(*queue.flipped)

    def _places_to_flip(self, queue: QueueProcess) -> list[tuple[str, int]]:
        """Return files of a spool, each with how many bytes of it are known to have been synced."""
        places: list[tuple[str, int]] = []
        disk = ProcessDisk(self.disk, lambda call: None)
        mark = MarkFile(Path(queue.directory) / "synced", disk).mark
        if mark is None:
            return places
        for path, file in self.disk.files(queue.directory):
            name = path.rpartition("/")[2]
            if name == "synced":
                places.append((path, len(file.data)))
            elif name.endswith(".spool"):
                number = int(name.removesuffix(".spool"))
                size = len(file.data) if number < mark.number else mark.size
                if number <= mark.number and size:
                    places.append((path, size))
        return places

    def flip(self, path: str, position: int, bit: int) -> None:
        """Flip a bit of a file, wherever it is kept."""
        for found, file in self.disk.files():
            if found == path and position < len(file.data):
                file.data[position] ^= 1 << bit
                if position < len(file.on_disk):
                    changed = bytearray(file.on_disk)
                    changed[position] ^= 1 << bit
                    file.on_disk = bytes(changed)

    # The end of a history.

    def _drain_a_little(self) -> None:
        action = self.rng.choice(
            (
                self._step_predictors,
                self._step_predictors,
                self._step_writer,
                self._drain_queues,
                self._drain_writer,
                self._restart,
                self._tick,
            )
        )
        action()

    def _drain_queues(self) -> None:
        for queue in self.queues:
            if queue.is_alive:
                if queue.sync is None:
                    queue.begin_sync()
                queue.end_sync()
        if self.rng.random() < 0.1:
            self.now += LEASE_S + 1.0  # for what the dead have left
        self._heartbeat()
        self._tick()

    def _drain_writer(self) -> None:
        if self.writer.is_alive and self.writer.queue.is_alive and not self.writer.held:
            self.writer.flush()
            self.writer.acknowledge()

    def _is_drained(self) -> bool:
        if not all(queue.is_alive for queue in self.queues):
            return False
        for queue in self.queues:
            state = queue.state
            if len(state) or len(state.leases) or len(state.settlements):
                return False
        return True

    def _state(self) -> str:
        alive = {queue.name: queue.state.statistics() for queue in self.queues if queue.is_alive}
        return f"{alive}, log {self.log[-20:]}"

    def _check_balance(self) -> None:
        if self.steps % 16:
            return
        for queue in self.queues:
            if not queue.is_alive:
                continue
            state = queue.state
            left = len(state.ready) + len(state.leases) + len(state.settlements)
            assert state.accepted == state.acknowledged + state.quarantined + left


def run_history(seed: int, steps: int) -> World:
    """Let one history happen; raises AssertionError if something is lost, doubled or damaged."""
    from tests.storage_simulation.check import check_all_places

    world = World(seed)
    tokens = random.Random(seed)
    with (
        cxi_on_disk.exchanged(),
        mock.patch("time.time", world.clock),
        mock.patch("time.monotonic", world.clock),
        mock.patch("secrets.token_hex", lambda length: f"{tokens.getrandbits(8 * length):x}"),
    ):
        world.run(steps)
        check_all_places(world)
    return world


__all__ = ["STREAM", "World", "event_of", "run_history"]
