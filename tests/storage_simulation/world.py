"""One history: the programs, the disk, the clock and the scheduler, all driven by one seed."""

from __future__ import annotations

import random
from unittest import mock

from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.queues.quarantine import Quarantine, read_index
from peaknet_predict.queues.state import QueueState
from peaknet_predict.types import EventId
from tests.storage_simulation import cxi_on_disk
from tests.storage_simulation.disk import Disk, ProcessDisk
from tests.storage_simulation.ledger import Ledger
from tests.storage_simulation.producers import Feed, PsanaJob
from tests.storage_simulation.queue_process import (
    LEASE_S,
    PRODUCER_TIMEOUT_S,
    TICK_S,
    Node,
    QueueProcess,
    SimulatedSpool,
)
from tests.storage_simulation.readers import Hoarder, Predictor, Reader, Writer

_BEATS = 5  # ticks between two signs of life


class World:
    """Programs on one machine: producers, two queues, predictors and a writer; run after run.

    Parameters
    ----------
    seed
        Decides everything.

    Attributes
    ----------
    ledger
        What has been promised to whom.
    log
        What happened, to explain a failure.
    run_number, writer_number
        Which run goes on, and which stream of results is written.
    input_told, output_told, output_was_told
        Whether any reader of the run has been told the end; or an end that silence made.
    output_closing, output_closed
        Whether a predictor is closing the results' stream for all, and whether that is on disk.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.disk = Disk(rng)
        self.ledger = Ledger()
        self.now = 0.0
        self.steps = 0
        self.log: list[str] = []
        for path in ("/spools", "/cxi"):
            directory, name = self.disk.parent(path)
            directory.change((name, self.disk.new_directory()))
        self.disk.root.sync()
        self.input = QueueProcess(self, "input")
        self.output = QueueProcess(self, "output")
        self.queues = [self.input, self.output]
        self.predictors = [Predictor(self, k, 2) for k in range(2)]
        self.writer = Writer(self)
        self.hoarder = Hoarder(self)
        self.readers: list[Reader] = [*self.predictors, self.writer, self.hoarder]
        self.producers: list[Feed | PsanaJob] = []
        self.run_number = self.writer_number = 0
        self.loss = rng.choice((0.0, 0.02, 0.1))  # of answers
        self.disk_is_bad = False
        self.segment_bytes = rng.choice((1500, 4000, 20_000))
        self.quarantine_bytes = rng.choice((10**9, 10**9, 300))
        self._capacity = rng.choice((5, 20, 60)), rng.choice((10**9, 10**9, 300))
        self._max_losses = 12  # chance alone should hardly ever make an event a poison message
        self._most = rng.choice((3, 20, 80))  # events of a producer
        self._events_per_file = rng.choice((3, 8, 20))
        self._openings_at_end: dict[tuple[str, int], int] = {}  # of each stream that was read
        self._foreign = rng.choice((0.0, 0.3, 1.0))  # how many runs are fed by psana-ray
        self.begin_run()

    @property
    def nodes(self) -> list[Node]:
        """All processes."""
        return [*self.queues, *self.producers, *self.readers]

    @property
    def is_run_over(self) -> bool:
        """Whether readers of both queues have been told the end."""
        told = self.output_told or (self.output_was_told and self.output_closed)
        return self.input_told and told

    def begin_run(self) -> None:
        """Start another run, for readers that have been told the end of the one before."""
        self.run_number += 1
        self.writer_number += 1
        self.input_told = self.output_told = self.output_was_told = False
        self.output_closing = self.output_closed = False
        self.producers = [one for one in self.producers if one.may_start()]
        rng, run = self.rng, self.run_number
        if rng.random() < self._foreign:
            self.producers.append(
                PsanaJob(self, run, rng.choice((1, 3)), rng.randint(1, self._most))
            )
        else:
            of = rng.choice((1, 1, 2))
            self.producers += [
                Feed(self, run, k, of, rng.randint(0, self._most)) for k in range(of)
            ]
        for reader in self.readers:
            reader.die()

    # What programs ask of the world.

    def note(self, what: str) -> None:
        """Remember what happens."""
        self.log.append(f"{self.steps}: {what}")

    def fault(self, call: str) -> str | None:
        """Say which fault the disk shows in a call."""
        if not self.disk_is_bad:
            return None
        chance = self.rng.random()
        if call == "fsync":
            return self.rng.choice(("drop", "keep")) if chance < 0.15 else None
        if call in ("write", "pwrite"):
            return self.rng.choice(("fail", "short")) if chance < 0.1 else None
        return "fail" if chance < 0.04 else None

    def answers(self) -> bool:
        """Whether an answer arrives."""
        return self.rng.random() >= self.loss

    def clock(self) -> float:
        """Return the time."""
        return self.now

    def queue_died(self, queue: QueueProcess) -> None:
        """Hear that a queue's process is dead: programs that know only ``put`` end with it."""
        if queue is self.input:
            for producer in self.producers:
                if isinstance(producer, PsanaJob):
                    producer.die()

    def make_spool(self, queue: QueueProcess) -> SimulatedSpool:
        """Return a queue's spool."""
        return SimulatedSpool(queue.directory, self.segment_bytes, fs=queue.disk)

    def make_quarantine(self, queue: QueueProcess) -> Quarantine:
        """Return a queue's quarantine; both have the same directory."""
        return Quarantine("/quarantine", self.quarantine_bytes, queue=queue.name, fs=queue.disk)

    def make_state(self, queue: QueueProcess) -> QueueState:
        """Return a queue's state."""
        return QueueState(
            "events" if queue is self.input else "results",
            *(*self._capacity, LEASE_S, PRODUCER_TIMEOUT_S, self._max_losses),
            uid=queue.name,
            first_token=queue.first_token,
            clock=queue.clock,
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
            run=writer.group,
            owner=writer.holder,
            still_ours=writer.still_ours,
        )

    # What must hold at every moment.

    def check_memory(self, queue: QueueProcess) -> None:
        """A queue that has just started knows all that it has ever confirmed."""
        keys = queue.state.keys
        if queue is self.input:
            for (stream, rank), below in self.ledger.below.items():
                found = keys.first_missing(stream, rank)
                assert found >= below, f"forgotten: {stream} {rank} from {found} on, of {below}"
        else:
            forgotten = [key for key in self.ledger.delivered if key not in keys]
            assert not forgotten, f"forgotten: results {forgotten}"

    def tell_end(self, queue: QueueProcess, run: int) -> None:
        """Hear that a reader has been told the end."""
        openings = self._openings_at_end.get((queue.name, run), 0)
        queue.openings_ended = max(queue.openings_ended, openings)
        if queue is self.input:
            self.input_told |= run == self.run_number
        elif run == self.writer_number and self.output_closing:
            self.output_told = self.output_closed = True
        elif run == self.writer_number:
            # Silence made this end: whoever writes the files starts another writer.
            self.writer_number += 1
            self.output_was_told = True

    def check_end(self, queue: QueueProcess, run: int) -> None:
        """The end may be told: all producers have closed or are silent, and all is settled."""
        self._openings_at_end[queue.name, run] = queue.openings
        if run != (self.run_number if queue is self.input else self.writer_number):
            return  # what one reader of a run was told holds for all of them
        self.ledger.seen[f"ends of the {queue.name}"] += 1
        begun = queue.openings > queue.openings_ended
        assert begun, f"run {run} is told the end of an earlier one by the {queue.name}"
        for producer in queue.parts:
            # Or its part was closed for silence, and that is said: the stream is incomplete.
            known = queue.may_be_closed(producer) or producer in queue.state.streams.failures
            assert known, f"the end is told while {producer} is alive"
            self.ledger.seen["parts closed for silence"] += 1
        refused = {
            EventId(line["stream"], line["rank"], line["idx"])
            for line in read_index("/quarantine", ProcessDisk(self.disk, lambda call: None))
        }
        if queue is self.input:
            for job in self.producers:
                if isinstance(job, PsanaJob):
                    assert not (job.is_alive and job.has_put), "the end before psana-ray's"
            at_end = {self.ledger.serials.get(key) for key in refused}
            at_end |= set(self.ledger.delivered.values())
            left = sorted(self.ledger.confirmed - at_end)
            assert not left, f"the input tells the end before these are settled: {left}"
        else:
            missing = set(self.ledger.delivered) - self.ledger.written - refused
            assert not missing, f"the output tells the end before these are: {sorted(missing)}"

    def check_balance(self) -> None:
        """Every accepted event is in one state; names and spools do not grow without bound."""
        for queue in self.queues:
            if not queue.is_alive:
                continue
            state = queue.state
            left = len(state.ready) + len(state.leases) + len(state.settlements)
            assert state.accepted == state.acknowledged + state.quarantined + left
        names = {key.stream for key in self.ledger.serials if "#" in key.stream}
        starts = self.ledger.seen["starts of psana-ray"]
        assert len(names) <= 2 * starts, f"{starts} starts of psana-ray have {len(names)} names"

    def check_size(self, queue: QueueProcess) -> None:
        """Beside one event that is kept, a spool is not much larger than two segments."""
        limit = 5 * self.segment_bytes + 1000
        assert queue.spool_bytes <= limit, f"one event keeps {queue.spool_bytes} bytes"
        self.ledger.seen["spools beside one event"] += 1

    # Time.

    def elapse(self, seconds: float, stopped: list[Node]) -> None:
        """Let time pass, in which some processes are stopped and the others say they are alive."""
        running = [queue for queue in self.queues if queue not in stopped]
        for queue in self.queues:
            if queue in stopped:
                queue.ran_s += min(seconds, 2 * TICK_S)  # so much it may take for its own time
        end, beats = self.now + seconds, 0
        while self.now < end:
            step = min(TICK_S, end - self.now)
            self.now += step
            for queue in running:
                queue.run_for(step)
            beats += 1
            if beats % _BEATS == 0:
                self._beat(running, stopped)

    def _beat(self, running: list[QueueProcess], stopped: list[Node]) -> None:
        alive = [queue.is_alive for queue in self.queues]
        for queue in self.queues:
            queue.is_alive = queue.is_alive and queue in running
        for node in self.nodes:
            if node.is_alive and node not in stopped:
                node.say_alive()
        for queue, is_alive in zip(self.queues, alive, strict=True):
            if queue.is_alive:
                queue.state.tick()
            queue.is_alive = is_alive

    def cut_power(self) -> None:
        """Let all processes die, and lose what is not on disk."""
        self.note("the power fails")
        self.ledger.seen["power cuts"] += 1
        for node in self.nodes:
            node.die()
        self.disk.lose_power()

    def flip(self, path: str, position: int, bit: int) -> None:
        """Flip a bit of a file, wherever it is kept."""
        for found, file in self.disk.files():
            if found == path and position < len(file.data):
                file.data[position] ^= 1 << bit
                if position < len(file.on_disk):
                    changed = bytearray(file.on_disk)
                    changed[position] ^= 1 << bit
                    file.on_disk = bytes(changed)


def run_history(seed: int, steps: int) -> World:
    """Let one history happen; raises AssertionError if something is lost, doubled or damaged."""
    from tests.storage_simulation.check import check_all_places
    from tests.storage_simulation.scheduler import Scheduler

    world = World(seed)
    tokens = random.Random(seed)
    with (
        cxi_on_disk.exchanged(),
        mock.patch("time.time", world.clock),
        mock.patch("time.monotonic", world.clock),
        mock.patch("os.getpid", return_value=1),
        mock.patch("secrets.token_hex", lambda length: f"{tokens.getrandbits(8 * length):x}"),
    ):
        scheduler = Scheduler(world)
        scheduler.run(steps)
        check_all_places(world)
    return world
