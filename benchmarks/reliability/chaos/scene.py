"""What a run consists of: its queues, its commands, its disks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.reliability.chaos.cluster import Cluster
from benchmarks.reliability.chaos.disks import Disk
from benchmarks.reliability.chaos.events import MIN_PEAKS
from benchmarks.reliability.chaos.parts import Part

SceneKind = Literal["spool", "memory", "peer", "foreign"]
"""Queues with spools; without; with psana-ray's producer and an old file writer at ours; theirs."""

_COMMAND = "benchmarks.reliability.chaos.fragile"
_PEER = "benchmarks.reliability.chaos.peer"
_OWN = "benchmarks.reliability.chaos.prediction"
_EVENTS = "benchmarks.reliability.chaos.events"
MAX_EVENTS = 64
"""Capacity of each queue."""
EVENTS_PER_FILE = 20
_DISKS = ("spool-in", "spool-out", "quarantine", "cxi")


@dataclass(frozen=True)
class Plan:
    """What a run is to be.

    Attributes
    ----------
    seed, kind, events, ranks
        As the words say.
    rate_hz
        Of all producers together.
    fragility
        How likely a process dies before an acknowledgement: of ranks a tenth of it.
    quarantine_bytes
        Of each queue.
    """

    seed: int
    kind: SceneKind
    events: int
    ranks: int
    rate_hz: float
    fragility: float
    quarantine_bytes: int

    @property
    def lease_s(self) -> float:
        """Leases are short where others may take over."""
        return 30.0 if self.kind == "foreign" else 3.0


class Scene:
    """The parts of a run, ready to be started.

    Parameters
    ----------
    plan
        What they are to be.
    directory
        Where their files go.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self.disks = {name: Disk(directory / f"disk-{name}") for name in _DISKS}
        self.cxi = self.disks["cxi"].directory / "cxi"
        self.cxi.mkdir()
        self.quarantine = self.disks["quarantine"].directory / "kept"
        self.kept_by_peer = directory / "peer.pickle"
        self.stream = f"chaos-{plan.seed}"
        self.cluster = Cluster(directory / "cluster.log")
        self._make_queues()
        half, rate_hz = plan.events // 2, plan.rate_hz / 2
        self.producers = {rank: half for rank in (0, 1)}
        feeds, peers, writers, readers = 2, 0, 2, 0
        if plan.kind == "peer":
            feeds, peers, writers, readers = 1, 1, 0, 1
        elif plan.kind == "foreign":
            feeds, peers, writers, readers = 0, 1, 1, 0
            self.producers = {0: plan.events}
            half, rate_hz = plan.events, plan.rate_hz
        self.feeds = [
            Part(f"feed{n}", "feed", self._feed(n, half, rate_hz, feeds), directory)
            for n in range(feeds)
        ]
        self.peers = [
            Part(
                f"peer{n}",
                "peer",
                lambda n=n: self._peer("in", "produce", n, half, rate_hz),  # type: ignore[misc]
                directory,
            )
            for n in range(feeds, feeds + peers)
        ]
        configuration = self._configuration()
        resume = ("--data.init_args.resume", "true")
        self.predict = Part(
            "predict",
            "predict",
            lambda: self._predict(configuration),
            directory,
            resume,
            plan.fragility / 10,
        )
        self.writers = [
            Part(
                f"writer{n}",
                "write-cxi",
                self._writer,
                directory,
                ("--resume", "true"),
                plan.fragility,
            )
            for n in range(writers)
        ]
        self.readers = [
            Part("reader", "peer", lambda: self._peer("out", "consume", "peer.pickle"), directory)
            for _ in range(readers)
        ]

    @property
    def parts(self) -> list[Part]:
        """All of them, consumers first."""
        return [*self.readers, *self.writers, self.predict, *self.peers, *self.feeds]

    def settings(self, end: str) -> dict[str, Any]:
        """Return the address of the queue at one ``end``, ``in`` or ``out``."""
        plan = self.plan
        settings: dict[str, Any] = {
            "name": f"chaos-{end}",
            "max_events": MAX_EVENTS,
            "lease_s": plan.lease_s,
            # Above what a restart on a busy machine takes.
            "producer_timeout_s": 120.0,
            "max_losses": 30,
            "quarantine": str(self.quarantine),
            "quarantine_bytes": plan.quarantine_bytes,
            "idle_timeout_s": 30.0 if end == "in" else 45.0,
        }
        if plan.kind in ("spool", "peer"):
            settings["spool"] = str(self.disks[f"spool-{end}"].directory / "log")
        return settings

    def name(self, end: str) -> str:
        """Return the name of a queue."""
        return str(self.settings(end)["name"])

    def begin_again(self) -> None:
        """Make another cluster, and the queues again from their spools."""
        self.cluster.end()
        self.cluster = Cluster(self.directory / "cluster.log")
        self._make_queues()  # waits for those of the old cluster to let go of their spools

    def make_queue(self, end: str) -> None:
        """Make a queue."""
        kind = "events" if end == "in" else "results"
        self.cluster.make(kind, self.settings(end), foreign=self.plan.kind == "foreign")

    def end(self, keep_disks: bool = False) -> None:
        """Leave nothing behind but files, those on the disks only if asked to."""
        for part in self.parts:
            part.end()
        self.cluster.end()
        for disk in self.disks.values():
            disk.end(keep_disks)

    def _make_queues(self) -> None:
        for end in ("in", "out"):
            self.make_queue(end)

    def _queue_words(self, end: str) -> list[str]:
        pairs = self.settings(end).items()
        return [word for key, value in pairs for word in (f"--queue.{key}", str(value))]

    def _feed(self, rank: int, events: int, rate_hz: float, of: int) -> Any:
        def words() -> Sequence[str]:
            source = {"num_events": events, "rank": rank}
            return (
                *(_COMMAND, "feed", "--address", self.cluster.address, *self._queue_words("in")),
                *("--source", f"{_EVENTS}.Planned"),
                *(f"--source.{key}={value}" for key, value in source.items()),
                *("--rank", str(rank), "--producers", str(of), "--stream", self.stream),
                *("--rate_hz", str(rate_hz)),
            )

        return words

    def _peer(self, end: str, does: str, *words: object) -> Sequence[str]:
        return (_PEER, self.cluster.address, self.name(end), does, *map(str, words))

    def _predict(self, configuration: Path) -> Sequence[str]:
        address = f"--data.init_args.address={self.cluster.address}"
        return (_COMMAND, "predict", "-c", str(configuration), address)

    def _writer(self) -> Sequence[str]:
        return (
            *(_COMMAND, "write-cxi", "--address", self.cluster.address),
            *self._queue_words("out"),
            *("--directory", str(self.cxi), "--events_per_file", str(EVENTS_PER_FILE)),
            *("--min_peaks", str(MIN_PEAKS), "--grace_s", "5"),
        )

    def _configuration(self) -> Path:
        ranks = self.plan.ranks
        prefix = "peaknet_predict."
        configuration = {
            "model": {
                "class_path": f"{prefix}module.PeakNetModule",
                "init_args": {
                    "net": {"class_path": f"{_OWN}.Threshold"},
                    "preprocess": [{"class_path": f"{prefix}preprocess.MergeBatchChannelDims"}],
                },
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": ranks,
                "strategy": "ddp" if ranks > 1 else "auto",
                "callbacks": [
                    {
                        "class_path": f"{_OWN}.FragileQueueWriter",
                        "init_args": {"queue": self.settings("out")},
                    }
                ],
            },
            "data": {
                "class_path": f"{prefix}data.QueueDataModule",
                "init_args": {"queue": self.settings("in"), "batch_size": 8, "grace_s": 10},
            },
        }
        path = self.directory / "predict.yaml"
        path.write_text(yaml.safe_dump(configuration))
        return path
