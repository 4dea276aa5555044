"""What happens next in a history: a step of a program, a fault, or the passing of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peaknet_predict.queues.synced_mark import MarkFile
from tests.storage_simulation.disk import Killed, PowerCut, ProcessDisk
from tests.storage_simulation.producers import Feed
from tests.storage_simulation.queue_process import LEASE_S, PRODUCER_TIMEOUT_S, Node, QueueProcess
from tests.storage_simulation.readers import Reader

if TYPE_CHECKING:
    from tests.storage_simulation.world import World

_DRAINING = 40_000  # steps within which all that is left has to come to its end
_PASSING, _PASSING_STEPS = 60, 3000  # events that pass by one that is kept, and steps for that

Action = Callable[[], None]


class Scheduler:
    """Lets things happen in a world, in an order that its seed decides."""

    def __init__(self, world: World) -> None:
        self._world = world
        rng = world.rng
        # Histories differ in what goes wrong in them.
        often = rng.choice((0.3, 1.0, 3.0))
        faults = Faults(world)
        self._actions: list[tuple[Action, float]] = [
            (self._step_producer, 18.0),
            (self._step_predictor, 32.0),
            (self._step_writer, 16.0),
            (self._step_hoarder, 2.0 * rng.choice((0, 0, 1))),
            (self._begin_sync, 16.0),
            (self._end_sync, 20.0),
            (self._tick, 4.0),
            (self._say_alive, 4.0),
            (self._restart, 14.0),
            (self._begin_run, 4.0),
            (faults.stop_some, 0.6),
            (faults.kill, 0.4 * often),
            (faults.doom, 0.8 * often),
            (faults.cut_power, 0.3 * often),
            (faults.fill_disk, 0.2 * often * rng.choice((0, 1, 4))),
            (faults.spoil_disk, 0.2 * often * rng.choice((0, 1, 4))),
            (faults.mend_disk, 0.8),
            (faults.flip_a_bit, 0.2 * often * rng.choice((0, 1, 3))),
        ]
        self._hoarder_keeps = False

    def run(self, steps: int) -> None:
        """Let so many things happen, and then, without faults, let all come to its end."""
        actions, weights = zip(*self._actions, strict=True)
        for action in self._world.rng.choices(actions, weights, k=steps):
            self._do(action)
            if self._world.steps % 16 == 0:
                self._world.check_balance()
        self._finish()

    def _do(self, action: Action) -> None:
        world = self._world
        world.steps += 1
        try:
            world.elapse(0.05, [])
            action()
        except Killed as death:
            node: Node = death.args[0]
            world.note(f"{node.name} dies")
            node.die()
        except PowerCut:
            world.cut_power()

    # Steps of the programs.

    def _step_producer(self) -> None:
        world = self._world
        alive = [one for one in world.producers if one.is_alive]
        if alive and world.input.is_alive:
            world.rng.choice(alive).step()

    def _step_predictor(self) -> None:
        world = self._world
        alive = [predictor for predictor in world.predictors if predictor.is_alive]
        if alive and world.input.is_alive:
            world.rng.choice(alive).step()

    def _step_writer(self) -> None:
        if self._world.writer.is_alive:
            self._world.writer.step()

    def _step_hoarder(self) -> None:
        world = self._world
        if world.hoarder.is_alive and world.input.is_alive:
            world.hoarder.step()

    def _begin_sync(self) -> None:
        ready = [queue for queue in self._world.queues if queue.sync is None and queue.tickets]
        if ready:
            self._world.rng.choice(ready).begin_sync()

    def _end_sync(self) -> None:
        ready = [queue for queue in self._world.queues if queue.sync is not None]
        if ready:
            self._world.rng.choice(ready).end_sync()

    def _tick(self) -> None:
        queue = self._world.rng.choice(self._world.queues)
        if queue.is_alive:
            queue.tick()

    def _say_alive(self) -> None:
        for node in self._world.nodes:
            if node.is_alive:
                node.say_alive()

    def _restart(self) -> None:
        dead = [node for node in self._world.nodes if not node.is_alive and node.may_start()]
        for node in self._world.rng.sample(dead, self._world.rng.randint(0, len(dead))):
            node.start()

    def _begin_run(self) -> None:
        if self._world.is_run_over:
            self._world.begin_run()

    # The end of a history.

    def _finish(self) -> None:
        """Mend and restart everything, and bring all that is under way to its end."""
        world = self._world
        world.loss = 0.0
        world.disk_is_bad = False
        world.disk.capacity = None
        for queue in world.queues:
            if queue.flipped is not None:
                queue.flip_back()
        for node in world.nodes:
            node.dies_after = None
        if world.rng.random() < 0.1:
            self._keep_one()
        for producer in world.producers:
            producer.stop_early()
        for _ in range(_DRAINING):
            self._do(self._drain)
            if world.is_run_over:
                if self._is_empty():
                    break
                world.begin_run()  # for what came after the end that silence made
                for producer in world.producers:
                    producer.stop_early()
        else:
            raise AssertionError(f"it does not come to its end: {self._state()}")
        self._world.ledger.seen["steps with the ways to their ends"] += self._world.steps
        # What has been settled must survive whatever comes, and nothing be refused or forgotten.
        world.cut_power()
        for queue in world.queues:
            queue.start()
            assert queue.is_alive

    def _keep_one(self) -> None:
        """Let much go through beside one event that its reader keeps: the spool must stay small."""
        world = self._world
        queue, hoarder = world.input, world.hoarder
        for producer in world.producers:
            producer.total += _PASSING
        self._hoarder_keeps = True
        for _ in range(_PASSING_STEPS):
            self._do(self._drain)
            if hoarder.is_alive and queue.is_alive and not hoarder.held:
                self._do(hoarder.step)
            done = all(producer.is_done for producer in world.producers)
            if world.input_told or (done and self._is_alone(hoarder)):
                break
        self._hoarder_keeps = False
        if self._is_alone(hoarder):
            # What has been moved forward stays where it was until that is on disk.
            if queue.sync is None:
                queue.begin_sync()
            queue.end_sync()
            queue.tick()
            world.check_size(queue)

    def _is_alone(self, reader: Reader) -> bool:
        """Whether all that is left in a queue is what one reader holds."""
        if not (reader.is_alive and reader.queue.is_alive and reader.held):
            return False
        state = reader.queue.state
        left = len(state) + len(state.leases) + len(state.settlements)
        return left == len(reader.held) == len(state.held([one.token for one in reader.held]))

    def _drain(self) -> None:
        world = self._world
        actions = (
            *(self._step_predictor, self._step_predictor, self._step_writer),
            *(self._drain_queues, self._step_producer, self._restart, self._tick),
        )
        world.rng.choice(actions)()

    def _drain_queues(self) -> None:
        world = self._world
        for queue in world.queues:
            if queue.is_alive:
                if queue.sync is None:
                    queue.begin_sync()
                queue.end_sync()
        if world.hoarder.held and world.input.is_alive and not self._hoarder_keeps:
            world.hoarder.give_back()
        if world.rng.random() < 0.2:
            # For what the dead have left.
            world.elapse(LEASE_S + 1.0, [])
            self._revive_unheard()
        self._tick()

    def _revive_unheard(self) -> None:
        """Start what has vanished before the queue knew of it for good: nobody else would."""
        streams = self._world.input.state.streams if self._world.input.is_alive else None
        for feed in self._world.producers:
            if isinstance(feed, Feed) and streams is not None:
                known = feed.producer in (*streams.open_producers, *streams.failures)
                feed.is_gone = feed.is_gone and known

    def _is_empty(self) -> bool:
        states = [queue.state for queue in self._world.queues if queue.is_alive]
        left = [len(one) + len(one.leases) + len(one.settlements) for one in states]
        return len(left) == 2 and not sum(left)

    def _state(self) -> str:
        queues = [queue for queue in self._world.queues if queue.is_alive]
        alive = {queue.name: queue.state.statistics() for queue in queues}
        return f"{alive}, log {self._world.log[-20:]}"


class Faults:
    """What goes wrong in a world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def stop_some(self) -> None:
        """Stop some processes for a while, and let the others go on."""
        world = self._world
        stopped = world.rng.choice((world.readers, [world.input], [world.output], world.nodes))
        if world.rng.random() < 0.4:
            stopped = [world.rng.choice(world.nodes)]
        seconds = world.rng.choice((1.0, LEASE_S + 1.0, PRODUCER_TIMEOUT_S + 1.0))
        world.note(f"{', '.join(node.name for node in stopped)}: stopped for {seconds} s")
        world.ledger.seen["stops"] += 1
        world.elapse(seconds, list(stopped))

    def kill(self) -> None:
        """Kill a process."""
        node = self._world.rng.choice(self._world.nodes)
        if node.is_alive:
            self._world.note(f"{node.name} is killed")
            self._world.ledger.seen["kills"] += 1
            node.die()
            if isinstance(node, Feed) and self._world.rng.random() < 0.3:
                node.is_gone = node.producer in self._world.input.parts

    def doom(self) -> None:
        """Let a process die, or the power fail, at one of the next calls of the disk."""
        node = self._world.rng.choice(self._world.nodes)
        if node.is_alive:
            self._world.ledger.seen["kills"] += 1
            node.dies_after = self._world.rng.randint(0, 40)
            node.dies_of = self._world.rng.choice((Killed, Killed, PowerCut))

    def cut_power(self) -> None:
        """Let the power fail."""
        raise PowerCut

    def fill_disk(self) -> None:
        """Leave little room on the disk."""
        disk = self._world.disk
        disk.capacity = disk.used + self._world.rng.choice((0, 10, 500, 3000))
        self._world.note(f"the disk is full at {disk.capacity} bytes")
        self._world.ledger.seen["full disks"] += 1

    def spoil_disk(self) -> None:
        """Let the disk fail now and then."""
        self._world.disk_is_bad = True
        self._world.note("the disk is bad")
        self._world.ledger.seen["bad disks"] += 1

    def mend_disk(self) -> None:
        """Let the disk be as it should."""
        self._world.disk_is_bad = False
        self._world.disk.capacity = None

    def flip_a_bit(self) -> None:
        """Damage the spool of a queue that is dead, where it has been synced."""
        world = self._world
        queue = world.rng.choice(world.queues)
        if queue.flipped:
            return
        queue.die()
        places = self._places_to_flip(queue)
        if not places:
            return
        path, size = world.rng.choice(places)
        queue.flipped = path, world.rng.randrange(size), world.rng.randrange(8)
        world.note(f"bit {queue.flipped} flips")
        world.flip(*queue.flipped)

    def _places_to_flip(self, queue: QueueProcess) -> list[tuple[str, int]]:
        """Return files of a spool, each with how many bytes of it are known to have been synced."""
        places: list[tuple[str, int]] = []
        # As in its next life, the mark that is read is on disk from then on.
        disk = ProcessDisk(self._world.disk, lambda call: None)
        mark = MarkFile(Path(queue.directory) / "synced", disk).mark
        if mark is None:
            return places
        for path, file in self._world.disk.files(queue.directory):
            name = path.rpartition("/")[2]
            if name == "synced":
                places.append((path, len(file.data)))
            elif name.endswith(".spool"):
                number = int(name.removesuffix(".spool"))
                size = len(file.data) if number < mark.number else mark.size
                if number <= mark.number and size:
                    places += 3 * [(path, size)]
        return places
