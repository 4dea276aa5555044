"""Faults, seeded, on the real processes; then every event is looked for, by its identity.

Producers, ranks, writers and queue actors are killed, stopped and asked to end at random moments,
also between a result's acceptance and its acknowledgement; disks fill up and directories vanish.
What is killed is started again, as a batch system or a person would. At the end every event that
was fed must be in exactly one CXI file or in the quarantine::

    python -m benchmarks.reliability.chaos --runs 10 --events 2000 --faults 30
        [--ranks 2] [--seed 1]

Ray's token and the current directory's file system are used; nothing else is touched.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.cxi.file import read_ids
from peaknet_predict.queues import Queue, QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect
from peaknet_predict.queues.native import NativeReader
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.queues.statistics import QueueStatistics
from peaknet_predict.types import EventId, Result

REPOSITORY = Path(__file__).parents[2]
LEASE_S = 3.0
_CHANCE = "CHAOS_KILL_BEFORE_ACK"  # in the environment: how likely that is, for each call
_LIMIT_S = 900.0  # a run that has not ended by itself then has failed


class FragileQueueWriter(QueueWriter):
    """May be killed when the output queue has results that the input queue does not know of."""

    def _accepted(self, results: list[Result]) -> None:
        _perhaps_die()
        super()._accepted(results)


def fragile_command() -> None:
    """Be `peaknet-predict`, but perhaps die between a file's new name and its acknowledgement."""
    from peaknet_predict.cli import run

    acknowledge = NativeReader.ack

    def ack(self: NativeReader, ids: Iterable[EventId]) -> None:
        _perhaps_die()
        acknowledge(self, ids)

    NativeReader.ack = ack  # type: ignore[method-assign]
    run()


def _perhaps_die() -> None:
    if random.random() < float(os.environ.get(_CHANCE, "0")):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Part:
    """One process of the run, started again until it has done its work."""

    name: str
    words: list[str]
    directory: Path
    resuming: Sequence[str] = ()
    fragility: float = 0.0
    done_with: tuple[int, ...] = (0,)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    codes: list[int] = field(default_factory=list)

    def start(self) -> None:
        again = self.resuming if self.starts else ()
        environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment[_CHANCE] = str(self.fragility)
        program = "from benchmarks.reliability.chaos import fragile_command; fragile_command()"
        with open(self.directory / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, *self.words, *again],
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self.starts += 1

    def ended(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if len(self.codes) < self.starts:
            self.codes.append(code)
        return True

    def pid(self) -> int | None:
        return None if self.process is None or self.ended() else self.process.pid

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, or of the one process that there is."""
        pid = self.pid()
        if pid is None:
            return []
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        ranks = [int(child) for child in children if "LOCAL_RANK" in _environment(int(child))]
        return ranks or [pid]


def _statistics(queue: Queue) -> QueueStatistics:
    statistics = queue.admin.statistics()
    assert statistics is not None
    return statistics


def _move(path: Path, to: Path) -> None:
    path.rename(to)


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return ""


class Run:
    """One run of the chain, with its faults."""

    def __init__(
        self, directory: Path, cluster: str, seed: int, events: int, ranks: int, rate_hz: float
    ) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.events = events
        self.log: list[str] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        name = f"chaos-{seed}-{os.getpid()}"
        self.queues = {
            kind: QueueAddress(
                f"{name}-{kind}",
                max_events=64,
                lease_s=LEASE_S,
                producer_timeout_s=45.0,
                max_losses=8,
                spool=str(directory / f"spool-{kind}"),
                quarantine=str(directory / "quarantine"),
            )
            for kind in ("in", "out")
        }
        self.clients = {
            "in": connect_queue(self.queues["in"], "events"),
            "out": connect_queue(self.queues["out"], "results"),
        }
        self.cxi = directory / "cxi"
        self.cxi.mkdir()
        self.stream = f"stream-{seed}"
        self.feeds = [
            Part(f"feed{rank}", self._feed(cluster, rank, rate_hz / 2), directory)
            for rank in (0, 1)
        ]
        self.predict = Part(
            "predict",
            ["predict", "-c", str(self._configuration(cluster, ranks))],
            directory,
            resuming=("--data.init_args.resume", "true"),
            fragility=0.005,
            done_with=(0, 4),
        )
        self.writers = [
            Part(f"writer{n}", self._writer(cluster), directory, ("--resume", "true"), 0.03)
            for n in (0, 1)
        ]

    def _settings(self, kind: str) -> list[str]:
        address = self.queues[kind]
        settings = {"name": address.name, "max_events": address.max_events}
        settings |= {"lease_s": address.lease_s, "max_losses": address.max_losses}
        settings |= {"producer_timeout_s": address.producer_timeout_s, "spool": address.spool}
        return [word for key, value in settings.items() for word in (f"--queue.{key}", str(value))]

    def _feed(self, cluster: str, rank: int, rate_hz: float) -> list[str]:
        words = ["feed", "--address", cluster, *self._settings("in"), "--source", "Simulator"]
        shape = {"num_events": self.events // 2, "panels": 1, "height": 32, "width": 32}
        for key, value in {**shape, "seed": rank}.items():
            words += [f"--source.{key}", str(value)]
        words += ["--rank", str(rank), "--producers", "2", "--stream", self.stream]
        return [*words, "--rate_hz", str(rate_hz)]

    def _writer(self, cluster: str) -> list[str]:
        words = ["write-cxi", "--address", cluster, *self._settings("out")]
        return [
            *words,
            "--directory",
            str(self.cxi),
            "--events_per_file",
            "20",
            "--grace_s",
            "5",
        ]

    def _configuration(self, cluster: str, ranks: int) -> Path:
        def queue(kind: str) -> dict[str, Any]:
            words = self._settings(kind)
            pairs = zip(words[::2], words[1::2], strict=True)
            return {key.removeprefix("--queue."): yaml.safe_load(value) for key, value in pairs}

        model = yaml.safe_load((REPOSITORY / "configs" / "models" / "snr.yaml").read_text())
        writer = {
            "class_path": "benchmarks.reliability.chaos.FragileQueueWriter",
            "init_args": {"queue": queue("out")},
        }
        data = {"address": cluster, "queue": queue("in"), "batch_size": 8, "grace_s": 10}
        configuration = {
            **model,
            "trainer": {
                "accelerator": "cpu",
                "devices": ranks,
                "strategy": "ddp" if ranks > 1 else "auto",
                "callbacks": [writer],
            },
            "data": {"class_path": "peaknet_predict.data.QueueDataModule", "init_args": data},
        }
        path = self.directory / "predict.yaml"
        path.write_text(yaml.safe_dump(configuration))
        return path

    def faults(self) -> dict[str, tuple[float, Callable[[], str | None]]]:
        """Return every kind of fault with its weight; a fault says whom it hit."""
        feeds, writers, predict = self.feeds, self.writers, [self.predict]
        return {
            "kill a producer": (4, lambda: self._send(feeds, signal.SIGKILL)),
            "stop a producer": (2, lambda: self._stop(feeds)),
            "kill a rank": (3, lambda: self._send_rank(signal.SIGKILL)),
            "stop a rank": (2, self._stop_rank),
            "end the prediction": (1, lambda: self._send(predict, signal.SIGTERM)),
            "kill the prediction": (1, lambda: self._send(predict, signal.SIGKILL)),
            "kill a writer": (5, lambda: self._send(writers, signal.SIGKILL)),
            "stop a writer": (3, lambda: self._stop(writers)),
            "end a writer": (2, lambda: self._send(writers, signal.SIGTERM)),
            "kill the input queue": (2, lambda: self._kill_queue("in")),
            "kill the output queue": (2, lambda: self._kill_queue("out")),
            "fill a writer's disk": (2, self._fill_disk),
            "take the directory away": (1, self._take_directory),
        }

    def go(self, faults: int, every_s: float) -> None:
        """Run to the end, with so many faults on the way."""
        parts = [*self.writers, self.predict, *self.feeds]
        for part in parts:
            part.start()
        # Processes that have not begun yet teach nothing.
        self._wait(lambda: _statistics(self.clients["out"]).accepted > 0, "the first result")
        kinds = self.faults()
        deadline = time.monotonic() + _LIMIT_S
        left, due = faults, time.monotonic()
        while not self._over():
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"the run does not end: {self.state()}")
            for at, undo in [pair for pair in self._later if pair[0] <= now]:
                self._later.remove((at, undo))
                undo()
            if left and now >= due:
                names = list(kinds)
                weights = [kinds[name][0] for name in names]
                name = self.random.choices(names, weights)[0]
                whom = kinds[name][1]()
                if whom is not None:
                    self.log.append(f"{name} ({whom})")
                    left -= 1
                    due = now + self.random.uniform(0.5, 1.5) * every_s
            self._start_again(parts)
            time.sleep(0.05)
        if left:
            self.log.append(f"{left} faults were left when the stream had ended")

    def check(self) -> dict[str, Any]:
        """Look for every event; return what was found."""
        wanted = {
            EventId(self.stream, rank, idx) for rank in (0, 1) for idx in range(self.events // 2)
        }
        found = collections.Counter(
            key for path in sorted(self.cxi.glob("*.cxi")) for key in read_ids(path)
        )
        in_files = sum(found.values())
        found.update(
            EventId(line["stream"], line["rank"], line["idx"])
            for line in read_index(self.directory / "quarantine")
        )
        return {
            "fed": len(wanted),
            "in files": in_files,
            "in quarantine": sum(found.values()) - in_files,
            "lost": len(wanted - set(found)),
            "duplicated": sum(count > 1 for count in found.values()),
            "unknown": len(set(found) - wanted),
            "faults": len([line for line in self.log if "were left" not in line]),
            "starts": {p.name: p.starts for p in [*self.feeds, self.predict, *self.writers]},
        }

    def end(self) -> None:
        """Leave nothing behind."""
        import ray

        for part in (self.predict, *self.feeds, *self.writers):
            for pid in {*part.ranks(), part.pid()} - {None}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid or 0), signal.SIGKILL)
            if part.process is not None:
                part.process.wait()
        for address in self.queues.values():
            ray.kill(ray.get_actor(address.name, namespace=address.namespace))

    def state(self) -> str:
        """Say how things stand, for the error of a run that does not end."""
        parts = [*self.feeds, self.predict, *self.writers]
        states = {part.name: part.codes if part.ended() else "running" for part in parts}
        return f"{states}; {[_statistics(client) for client in self.clients.values()]}"

    def _over(self) -> bool:
        feeds = all(part.ended() and part.codes[-1] == 0 for part in self.feeds)
        predict = self.predict.ended() and self.predict.codes[-1] in self.predict.done_with
        writers = all(part.ended() and part.codes[-1] in (0, 3) for part in self.writers)
        return feeds and predict and writers and self._drained()

    def _start_again(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if not part.ended() or part.codes[-1] in part.done_with:
                continue
            if part in self.writers and part.codes[-1] == 3 and self._drained():
                continue
            if part.codes[-1] == 2:
                raise RuntimeError(f"{part.name} does not understand its command line")
            part.start()

    def _drained(self) -> bool:
        now = _statistics(self.clients["out"])
        return bool(now.ended and not now.ready and not now.leased)

    def _send(self, parts: Sequence[Part], number: signal.Signals) -> str | None:
        alive = [part for part in parts if part.pid() is not None]
        if not alive:
            return None
        part = self.random.choice(alive)
        os.kill(part.pid() or 0, number)
        return part.name

    def _stop(self, parts: Sequence[Part]) -> str | None:
        alive = [part for part in parts if part.pid() is not None]
        if not alive:
            return None
        part = self.random.choice(alive)
        self._stop_for(part.pid() or 0)
        return part.name

    def _send_rank(self, number: signal.Signals) -> str | None:
        ranks = self.predict.ranks()
        if not ranks:
            return None
        pid = self.random.choice(ranks)
        os.kill(pid, number)
        return f"{pid} of {len(ranks)}"

    def _stop_rank(self) -> str | None:
        ranks = self.predict.ranks()
        if not ranks:
            return None
        self._stop_for(pid := self.random.choice(ranks))
        return f"{pid} of {len(ranks)}"

    def _stop_for(self, pid: int) -> None:
        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        os.kill(pid, signal.SIGSTOP)
        # Some shorter than the lease, some longer.
        self._undo_after(self.random.uniform(0.5, 3.0) * LEASE_S, go_on)

    def _kill_queue(self, kind: str) -> str | None:
        import ray

        address = self.queues[kind]
        handle = ray.get_actor(address.name, namespace=address.namespace)
        try:
            pid = ray.get(handle.__ray_call__.remote(lambda actor: os.getpid()), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None  # it has just been killed
        os.kill(pid, signal.SIGKILL)
        return address.name

    def _fill_disk(self) -> str | None:
        alive = [part for part in self.writers if part.pid() is not None]
        if not alive:
            return None
        part = self.random.choice(alive)
        pid = part.pid() or 0
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        def free() -> None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

        self._undo_after(self.random.uniform(1.0, 4.0), free)
        return part.name

    def _take_directory(self) -> str | None:
        away = self.cxi.with_name("cxi-away")
        if away.exists():
            return None
        self.cxi.rename(away)
        self._undo_after(self.random.uniform(1.0, 3.0), lambda: _move(away, self.cxi))
        return str(self.cxi.name)

    def _undo_after(self, seconds: float, undo: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} does not come: {self.state()}")
            time.sleep(0.2)


def chaos(
    directory: Path,
    cluster: str,
    seed: int,
    events: int,
    faults: int,
    ranks: int,
    every_s: float,
    rate_hz: float,
) -> dict[str, Any]:
    """Do one run and return what was found, with the seconds it took and its faults."""
    run = Run(directory, cluster, seed, events, ranks, rate_hz)
    began = time.monotonic()
    try:
        run.go(faults, every_s)
        return {
            "seed": seed,
            **run.check(),
            "seconds": round(time.monotonic() - began),
            "log": run.log,
        }
    finally:
        run.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--every_s", type=float, default=4.0)
    parser.add_argument("--rate_hz", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep logs and files of the runs there")
    arguments = parser.parse_args()
    cluster = connect("local")
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
            directory = Path(temporary)
            if arguments.keep is not None:
                directory = arguments.keep / str(seed)
                directory.mkdir(parents=True)
            found = chaos(
                directory,
                cluster,
                seed,
                arguments.events,
                arguments.faults,
                arguments.ranks,
                arguments.every_s,
                arguments.rate_hz,
            )
        print(json.dumps(found), flush=True)
        failed += bool(found["lost"] or found["duplicated"] or found["unknown"])
    print(f"{arguments.runs} runs, {failed} with a lost, doubled or unknown event")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
