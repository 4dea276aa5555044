"""The records that the commands of a run have left: whether they say what has happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from benchmarks.reliability.chaos.scene import Scene


class Records:
    """The balances of a run.

    Parameters
    ----------
    scene
        The scene, its queues still there.
    lost
        The queue that was killed without a spool; None if none was.
    """

    def __init__(self, scene: Scene, lost: Literal["in", "out"] | None) -> None:
        self._scene = scene
        self._lost = lost

    def problems(self, counts: Mapping[str, int]) -> list[str]:
        """Return every contradiction between the records, or with what was found."""
        found = self._of_feeds() if self._lost != "in" else []
        found += self._of_predictions()
        if self._scene.writers:
            found += self._of_writers(counts)
        if self._lost is None and self._scene.plan.kind != "foreign":
            found += self._of_queues(counts)
        return found

    def fed(self, rank: int) -> int:
        """Return how many events a producer has put, as its records say."""
        name = f"feed_balance.rank{rank}" if rank else "feed_balance"
        records = [*self._scene.directory.glob(f"{name}.json")]
        records += self._scene.directory.glob(f"{name}_*.json")
        stages = [_read(path)["stages"]["feed"] for path in records]
        return max((int(one["fed"] + one["fed_before"]) for one in stages), default=0)

    def _of_feeds(self) -> list[str]:
        found = []
        for rank, feed in enumerate(self._scene.feeds):
            if feed.last.code == 0 and self.fed(rank) != self._scene.producers[rank]:
                found.append(f"{feed.name} says that it has fed {self.fed(rank)}")
        return found

    def _of_predictions(self) -> list[str]:
        found = []
        for path in sorted(self._scene.directory.glob("predict_balance*.json")):
            stages = _read(path)["stages"]
            counts = stages["predict"]
            done = counts["predicted"] + counts["quarantined"] + counts["given_back"]
            if counts["received"] != done:
                found.append(f"{path.name}: {counts}")
            queues = [stages[name] for name in ("input", "output") if name in stages]
            found += [f"{path.name}: {queue}" for queue in queues if not _adds_up(queue)]
        predict = self._scene.predict
        if predict.last.code == 0:
            problem = _read(self._scene.directory / "predict_balance.json")["problem"]
            if problem is not None:
                found.append(f"predict ended with 0, and its record says {problem}")
        return found

    def _of_writers(self, counts: Mapping[str, int]) -> list[str]:
        found = []
        runs: dict[str, Any] = {}
        paths = self._scene.cxi.glob("*_balance*.json")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
            record = _read(path)
            runs[str(record.get("run"))] = record  # the latest, after those of killed writers
        writers: dict[str, Any] = {}
        written = filtered = 0
        for run, record in runs.items():
            together = record["stages"].get("files")
            if together is None or not self._adds_up(together):
                found.append(f"run {run} of the writers does not add up: {together}")
                continue
            written += together["cxi"]["written"]
            filtered += together["cxi"]["filtered"]
            for name, one in record["writers"].items():
                if one is not None and not self._adds_up(one):
                    found.append(f"writer {name} does not add up: {one}")
                writers[name] = writers.get(name) or one
        # Where a queue was lost, its run has no balance if all of its writers were killed, too.
        if self._lost is None and (written, filtered) != (counts["written"], counts["filtered"]):
            found.append(f"the writers say written {written}, filtered {filtered}")
        if self._scene.plan.kind == "foreign":
            return found  # such a queue does not name its readers
        return found + self._of_each_writer(writers)

    def _adds_up(self, report: Mapping[str, Any]) -> bool:
        # What a writer had in hand when its queue was lost was lost with it.
        return _all_accounted(report) or (self._lost == "out" and report["problem"] is not None)

    def _of_each_writer(self, writers: Mapping[str, Any]) -> list[str]:
        """Compare the writers' own balances, null for one that was killed, with their ends."""
        found = []
        # A writer is named after its machine, its process, and at random.
        by_pid = {int(name.split("-")[-2]): one for name, one in writers.items()}
        for part in self._scene.writers:
            for life in part.lives:
                balance = by_pid.get(life.process.pid)
                if life.code == 0 and balance is None:
                    found.append(f"{part.name}, process {life.process.pid}, has left no balance")
        return found

    def _of_queues(self, counts: Mapping[str, int]) -> list[str]:
        scene = self._scene
        delivered = counts["written"] + counts["filtered"]
        expected = {
            "in": {"accepted": counts["fed"], "acknowledged": delivered},
            "out": {"accepted": delivered, "acknowledged": delivered, "quarantined": 0},
        }
        expected["in"]["quarantined"] = counts["quarantined"]
        found = []
        for end, wanted in expected.items():
            now = scene.cluster.statistics(scene.name(end))
            if now is None:
                found.append(f"queue {end} does not answer")
                continue
            wanted |= {"ready": 0, "leased": 0, "quarantining": 0}
            wrong = {key: now[key] for key, value in wanted.items() if now[key] != value}
            if wrong or now["failures"] or not now["ended"]:
                found.append(f"queue {end} counts {wrong} instead of {wanted}: {now}")
        return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _adds_up(queue: Mapping[str, Any]) -> bool:
    if "accepted" not in queue:
        return True  # it could not be asked, or does not count
    parts = ("acknowledged", "quarantined", "quarantining", "ready", "leased")
    return bool(queue["accepted"] == sum(queue[part] for part in parts))


def _all_accounted(report: Mapping[str, Any]) -> bool:
    cxi = report["cxi"]
    filtered = cxi["filtered"] - cxi["filtered_elsewhere"]
    done = cxi["written"] + filtered + cxi["duplicates"] + cxi["handed_over"]
    return bool(report["taken"] == done + report["refused"] + report["given_back"])
