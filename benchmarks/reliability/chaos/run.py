"""One run: a scene, its faults, and its end."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.reliability.chaos.faults import Faults
from benchmarks.reliability.chaos.parts import Part, WrongError
from benchmarks.reliability.chaos.scene import Plan, Scene
from benchmarks.reliability.chaos.verdict import Verdict

_LIMIT_S = 900.0  # a run that has not ended by itself then has failed
_LOOK_S = 0.05
_ORPHANS_S = 45.0  # what ranks may take to their end when their supervisor has been killed
_ASK_S = 0.5  # between two questions to the queues


class Run:
    """Takes a scene to its end, with faults on the way, and starts again what they have ended."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)
        self.faults = Faults(scene, self.random)
        self._deadline = time.monotonic() + _LIMIT_S
        self._counts: dict[str, Any] = {}
        self._asked_at = 0.0

    def go(self, faults: int, every_s: float, only: Mapping[str, float]) -> None:
        """Run to the end, with so many faults, drawn with these weights.

        Raises
        ------
        WrongError
            If a process ends as it should not, or the run does not end.
        """
        scene = self.scene
        for part in scene.parts:
            if part not in scene.feeds:
                part.start()
        for part in scene.feeds:
            part.start()
        # Processes that have not begun yet teach nothing.
        self._until(self._has_begun, "a result")
        left, due = faults, time.monotonic()
        while not self._is_over():
            now = time.monotonic()
            self.faults.later.do_due(now)
            if left and now >= due:
                kind = self.random.choices(list(only), list(only.values()))[0]
                if self.faults.do(kind):
                    left -= 1
                    due = now + self.random.uniform(0.5, 1.5) * every_s
                else:
                    due = now + _ASK_S
            self._look()
        self.faults.later.do_all()
        self._strike_balance()
        if left:
            self.faults.log.append(f"{left} were left when the stream had ended")

    def _strike_balance(self) -> None:
        """Let a writer end by itself, if the last one was killed when all had been written."""
        writers = self.scene.writers
        last = max((one.last for one in writers), key=lambda life: life.ended_at, default=None)
        if last is not None and last.code != 0 and self.faults.lost is None:
            writers[0].start()
            self._until(lambda: writers[0].last.code is not None, "the balance")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            self.faults.later.do_due(time.monotonic())
            self._look(restart=False)
            self._check_time(what)

    def _look(self, restart: bool = True) -> None:
        self._check_time("the end")
        for part in self.scene.parts:
            if part in self.scene.writers and self._results_may_be_incomplete(part):
                part.hit("results incomplete")
            part.look()
        if self.faults.cluster_dead:
            if not any(part.is_alive for part in self.scene.parts):
                self.scene.begin_again()
                self.faults.cluster_dead = False
                self._counts.clear()
        elif restart:
            self._start_again()
        time.sleep(_LOOK_S)

    def _results_may_be_incomplete(self, writer: Part) -> bool:
        """Whether a fault has ended, in a writer's time, the prediction that it writes for."""
        if writer.last.code is not None or "results incomplete" in writer.last.hits:
            return False
        lives = [life for life in self.scene.predict.lives if life.was_disturbed]
        since = writer.last.started_at - _ORPHANS_S
        return any(life.ended_at >= since for life in lives)

    def _start_again(self) -> None:
        scene, lost = self.scene, self.faults.lost
        if lost == "in" and not scene.predict.is_alive:
            for feed in scene.feeds:
                # One that was just starting has made itself another queue, which nobody reads.
                if feed.is_alive and "end" not in feed.last.hits:
                    feed.hit("end")
                    feed.signal(signal.SIGTERM)
        if lost == "out" and not any(p.is_alive for p in (scene.predict, *scene.writers)):
            if self._count("out", "accepted") < 0 and not self._has_done(scene.predict):
                scene.make_queue("out")
                self._counts.clear()
        for part in scene.parts:
            if part.is_alive or not part.lives or self._has_done(part):
                continue
            if lost == "in" and part not in scene.writers:
                continue  # what it held is gone: there is nothing to go on with
            if lost == "out" and part is not scene.predict and scene.predict.last.code == 1:
                continue
            if part in scene.writers and (self._is_queue_gone() or not self._is_writer_wanted()):
                continue
            part.start()

    def _has_done(self, part: Part) -> bool:
        code = part.last.code
        if part is self.scene.predict:
            return code in (0, 4)
        return code == 0 or part.kind == "peer"

    def _is_queue_gone(self) -> bool:
        """Whether the output queue was lost, and nothing more comes for another one."""
        gone = self.faults.lost == "out" and self._has_done(self.scene.predict)
        return gone and self._count("out", "accepted") < 0

    def _is_writer_wanted(self) -> bool:
        """Whether there is something to write, or will be."""
        if self.faults.storage.directory_away:
            return False
        if self._count("out", "ready") + self._count("out", "leased") > 0:
            return True
        now = self._counts.get("out")
        return isinstance(now, dict) and not now["ended"]

    def _is_over(self) -> bool:
        scene = self.scene
        if any(part.is_alive for part in scene.parts) or self.faults.cluster_dead:
            return False
        if any(part.lives and part.last.code is None for part in scene.parts):
            return False
        if self.faults.lost != "in":
            if not all(self._has_done(p) for p in (scene.predict, *scene.feeds, *scene.peers)):
                return False
        if scene.plan.kind == "foreign" or self.faults.storage.directory_away:
            return not self.faults.storage.directory_away
        self._asked_at = 0.0
        if self._is_queue_gone():
            return True
        waiting = self._count("out", "ready") + self._count("out", "leased")
        if waiting > 0:
            return False
        return isinstance(self._counts.get("out"), dict) and self._counts["out"]["ended"]

    def _has_begun(self) -> bool:
        if self.scene.plan.kind == "foreign":  # whose queues count nothing
            return "first batch" in self.scene.predict.said()
        return self._count("out", "accepted") > 0

    def _count(self, end: str, what: str) -> int:
        """Return a count of a queue, as of a moment ago; below zero if it does not answer."""
        if time.monotonic() - self._asked_at > _ASK_S:
            self._counts = {
                one: self.scene.cluster.statistics(self.scene.name(one)) for one in ("in", "out")
            }
            self._asked_at = time.monotonic()
        now = self._counts.get(end)
        return -1 if now is None else int(now[what])

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self._deadline:
            states = {p.name: [one.code for one in p.lives] for p in self.scene.parts}
            raise WrongError(f"{what} does not come: {states}; {self._counts}")


def chaos(
    plan: Plan,
    directory: Path,
    faults: int,
    every_s: float,
    only: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Do one run and return what was found, with the seconds it took and its faults."""
    began = time.monotonic()
    scene = Scene(plan, directory)
    failed = True
    try:
        run = Run(scene, plan.seed)
        problem = None
        try:
            run.go(faults, every_s, only or run.faults.possible())
        except WrongError as error:
            problem = str(error)
            run.faults.later.do_all()
        verdict = Verdict(scene, run.faults.lost)
        found = verdict.found() if problem is None else {"problems": [problem]}
        failed = bool(found["problems"])
        return {
            "seed": plan.seed,
            "scene": plan.kind,
            **found,
            "faults": len([line for line in run.faults.log if "were left" not in line]),
            "starts": sum(len(part.lives) for part in scene.parts),
            "codes": {part.name: [life.code for life in part.lives] for part in scene.parts},
            "seconds": round(time.monotonic() - began),
            "log": run.faults.log,
        }
    finally:
        scene.end(keep_disks=failed)
