"""The faults: what each does to a running scene, and how it is undone."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.reliability.chaos.parts import Part
from benchmarks.reliability.chaos.scene import Scene, SceneKind
from benchmarks.reliability.chaos.storage_faults import Later, StorageFaults

_OURS: tuple[SceneKind, ...] = ("spool", "memory", "peer")
_ALL: tuple[SceneKind, ...] = (*_OURS, "foreign")
_SPOOLED: tuple[SceneKind, ...] = ("spool", "peer")
_FILES: tuple[SceneKind, ...] = ("spool", "memory", "foreign")
_RERUN: tuple[SceneKind, ...] = ("spool",)
_BACK_S = 25.0  # what a producer needs, on a busy machine, to be started again
_SECOND_SIGNAL_S = (0.05, 4.0)  # signals within a second are one


@dataclass(frozen=True)
class Kind:
    """How often a fault is drawn, and in which scenes nothing may be lost by it."""

    weight: float
    scenes: Sequence[SceneKind]


KINDS: dict[str, Kind] = {
    "kill-feed": Kind(3, _OURS),
    "pause-feed": Kind(1, _OURS),
    "end-feed": Kind(1, _RERUN),
    "end-feed-twice": Kind(1, _RERUN),
    "kill-rank": Kind(3, _OURS),
    "pause-rank": Kind(2, _ALL),
    "kill-supervisor": Kind(1, _RERUN),
    "end-predict": Kind(1, _RERUN),
    "end-predict-twice": Kind(1, _RERUN),
    "kill-writer": Kind(4, ("spool", "memory")),
    "pause-writer": Kind(2, _FILES),
    "end-writer": Kind(1, ("spool", "memory")),
    "end-writer-twice": Kind(1, ("spool", "memory")),
    "pause-queue": Kind(2, _ALL),
    "kill-input": Kind(2, _RERUN),
    "kill-output": Kind(2, _RERUN),
    "lose-input": Kind(1, ("memory",)),
    "lose-output": Kind(1, ("memory",)),
    "kill-raylet": Kind(0.7, _RERUN),
    "kill-gcs": Kind(0.5, _RERUN),
    "fill-writer": Kind(2, ("spool", "memory")),
    "fill-spool": Kind(2, _SPOOLED),
    "fill-quarantine": Kind(2, _OURS),
    "take-directory": Kind(1, ("spool", "memory")),
    "take-quarantine": Kind(1, _OURS),
    "pause-peer": Kind(3, ("peer", "foreign")),
}
"""Besides, processes die at random just before an acknowledgement: ``die-before-ack``."""


class Faults:
    """Does faults to a scene.

    Parameters
    ----------
    scene
        The scene.
    chance
        Draws whom they hit.

    Attributes
    ----------
    log
        What was done.
    lost
        The queue that was killed without a spool; None if none was.
    cluster_dead
        Whether the cluster has been killed and not been made again.
    later
        What ends the faults that pass.
    storage
        Those of disks and directories.
    """

    def __init__(self, scene: Scene, chance: random.Random) -> None:
        self.log: list[str] = []
        self.lost: Literal["in", "out"] | None = None
        self.cluster_dead = False
        self._scene = scene
        self._random = chance
        self.later = Later()
        self.storage = StorageFaults(scene, chance, self.later)

    def possible(self) -> dict[str, float]:
        """Return the kinds that this scene may be done, with their weights."""
        kind = self._scene.plan.kind
        disks = self._scene.disks.values()
        full = all(disk.can_be_full for disk in disks)
        return {
            name: one.weight
            for name, one in KINDS.items()
            if kind in one.scenes and (full or not name.startswith("fill-"))
        }

    def do(self, kind: str) -> bool:
        """Do a fault of a kind; False if there is nothing that it could hit now."""
        if self.cluster_dead or (self.lost is not None and kind.startswith("lose-")):
            return False
        whom = self._acts()[kind]()
        if whom is None:
            return False
        self.log.append(f"{kind} ({whom})")
        return True

    def _acts(self) -> dict[str, Callable[[], str | None]]:
        scene = self._scene
        feeds, writers, predict = scene.feeds, scene.writers, [scene.predict]
        return {
            "kill-feed": lambda: self._kill(feeds),
            "pause-feed": lambda: self._pause(feeds),
            "end-feed": lambda: self._end(self._feeds_that_may_end()),
            "end-feed-twice": lambda: self._end(self._feeds_that_may_end(), twice=True),
            "kill-rank": self._kill_rank,
            "pause-rank": self._pause_rank,
            "kill-supervisor": lambda: self._kill(predict),
            "end-predict": lambda: self._end(predict),
            "end-predict-twice": lambda: self._end(predict, twice=True),
            "kill-writer": lambda: self._kill(writers),
            "pause-writer": lambda: self._pause(writers),
            "end-writer": lambda: self._end(writers),
            "end-writer-twice": lambda: self._end(writers, twice=True),
            "pause-queue": self._pause_queue,
            "kill-input": lambda: self._kill_queue("in"),
            "kill-output": lambda: self._kill_queue("out"),
            "lose-input": lambda: self._lose_queue("in"),
            "lose-output": lambda: self._lose_queue("out"),
            "kill-raylet": lambda: self._kill_cluster("raylet"),
            "kill-gcs": lambda: self._kill_cluster("gcs_server"),
            "fill-writer": lambda: self.storage.fill("cxi"),
            "fill-spool": lambda: self.storage.fill(self._random.choice(("spool-in", "spool-out"))),
            "fill-quarantine": lambda: self.storage.fill("quarantine"),
            "take-directory": self.storage.take_directory,
            "take-quarantine": self.storage.take_quarantine,
            "pause-peer": lambda: self._pause([*scene.peers, *scene.readers]),
        }

    def _one_of(self, parts: Sequence[Part]) -> Part | None:
        alive = [part for part in parts if part.is_alive]
        return self._random.choice(alive) if alive else None

    def _kill(self, parts: Sequence[Part]) -> str | None:
        part = self._one_of(parts)
        if part is None:
            return None
        part.hit("kill")
        part.signal(signal.SIGKILL)
        return part.name

    def _end(self, parts: Sequence[Part], twice: bool = False) -> str | None:
        part = self._one_of(parts)
        if part is None or "end" in part.last.hits:
            return None
        number = self._random.choice((signal.SIGTERM, signal.SIGINT))
        part.hit("end")
        part.signal(number)
        if twice:
            life = part.last

            def again() -> None:
                if life.process.poll() is None:
                    life.second_signal_at = time.monotonic()
                    life.process.send_signal(number)

            self.later.do(self._random.uniform(*_SECOND_SIGNAL_S), again)
        return f"{part.name}, {number.name}"

    def _feeds_that_may_end(self) -> list[Part]:
        """Return producers that others keep the stream open for, until they are back."""
        scene = self._scene
        rate_hz = scene.plan.rate_hz / len(scene.feeds)
        busy = []
        for rank, feed in enumerate(scene.feeds):
            fed = scene.cluster.first_missing(scene.name("in"), scene.stream, rank)
            if fed is not None and scene.producers[rank] - fed > rate_hz * _BACK_S:
                busy.append(feed)
        return [feed for feed in scene.feeds if feed.is_alive and set(busy) - {feed}]

    def _pause(self, parts: Sequence[Part]) -> str | None:
        part = self._one_of(parts)
        if part is None:
            return None
        part.hit("paused")
        return f"{part.name}, {self._stop(part.pid):.1f} s"

    def _kill_rank(self) -> str | None:
        predict = self._scene.predict
        pids = predict.ranks() if predict.is_alive else []
        if not pids:
            return None
        pid = self._random.choice(pids)
        predict.hit("rank killed")
        predict.signal(signal.SIGKILL, pid)
        return f"{pid} of {len(pids)}"

    def _pause_rank(self) -> str | None:
        predict = self._scene.predict
        pids = predict.ranks() if predict.is_alive else []
        if not pids:
            return None
        pid = self._random.choice(pids)
        predict.hit("rank paused")
        return f"{pid} of {len(pids)}, {self._stop(pid):.1f} s"

    def _stop(self, pid: int) -> float:
        """Stop a process for some time, shorter or longer than a lease."""
        seconds = self._random.uniform(1.0, 9.0)
        part = self._scene.predict
        part.signal(signal.SIGSTOP, pid)
        self.later.do(seconds, partial(part.signal, signal.SIGCONT, pid))
        return seconds

    def _pause_queue(self) -> str | None:
        name = self._scene.name(self._random.choice(("in", "out")))
        pid = self._scene.cluster.pid_of(name)
        return None if pid is None else f"{name}, {self._stop(pid):.1f} s"

    def _kill_queue(self, end: str) -> str | None:
        pid = self._scene.cluster.pid_of(self._scene.name(end))
        if pid is None:
            return None
        self._scene.predict.signal(signal.SIGKILL, pid)
        return str(pid)

    def _lose_queue(self, end: Literal["in", "out"]) -> str | None:
        scene = self._scene
        whom = self._kill_queue(end) if scene.predict.is_alive else None
        if whom is None:
            return None
        self.lost = end
        parts = [*scene.feeds, scene.predict] if end == "in" else [scene.predict, *scene.writers]
        for part in parts:
            if part.is_alive:
                part.hit("queue gone")
        return whom

    def _kill_cluster(self, program: Literal["raylet", "gcs_server"]) -> str | None:
        self.later.do_all()
        for part in self._scene.parts:
            if part.is_alive:
                part.hit("cluster")
        self._scene.cluster.kill(program)
        self.cluster_dead = True
        return program
