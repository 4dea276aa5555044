"""What has to be true when a run has ended: events, bytes, counts and records."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py

from benchmarks.reliability.chaos.events import Fate, differs, truth
from benchmarks.reliability.chaos.peer import kept
from benchmarks.reliability.chaos.records import Records
from benchmarks.reliability.chaos.scene import EVENTS_PER_FILE, MAX_EVENTS, Scene
from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.cxi.journal import read_journal
from peaknet_predict.keys import KeySet
from peaknet_predict.queues.quarantine import read_index

Key = tuple[int, int]
"""Rank and idx."""

_SHOWN = 5
_HELD_BY_RANK = 64  # what a rank may hold at most: batches of eight, some under way
_HELD_BY_WRITER = 3 * EVENTS_PER_FILE + 16


class Verdict:
    """Looks at what a run has left.

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
        self._problems: list[str] = []
        self._places: dict[Key, list[Fate]] = collections.defaultdict(list)
        self._by_pixels = {
            truth(*key).image.tobytes(): key for key in self._wanted() if self._names_nothing
        }

    def found(self) -> dict[str, Any]:
        """Return the counts, and every contradiction."""
        for path in sorted(self._scene.cxi.glob("*.cxi")):
            self._look_into_file(path)
        self._look_into_peers_file()
        filtered = self._look_into_journals()
        self._look_into_quarantine()
        counts = self._count(filtered)
        records = Records(self._scene, self._lost)
        self._problems += records.problems(counts)
        problems = self._problems
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        return {**counts, "problems": problems[:20] + more}

    def _wanted(self) -> Iterator[Key]:
        for rank, events in self._scene.producers.items():
            for idx in range(events):
                yield rank, idx

    @property
    def _names_nothing(self) -> bool:
        """Whether the queues hand on results without their identities."""
        return self._scene.plan.kind in ("peer", "foreign")

    def _look_into_file(self, path: Path) -> None:
        for event in read_cxi(path):
            key: Key | None = event.id.rank, event.id.idx
            if self._scene.plan.kind == "foreign":
                key = self._by_pixels.get(event.image.tobytes())
            what = event.image, event.peaks, event.photon_energy
            self._compare(key, f"{path.name}: {event.id}", what, on_slab=True)

    def _look_into_peers_file(self) -> None:
        if not self._scene.kept_by_peer.exists():
            return
        for image, peaks, energy in kept(self._scene.kept_by_peer):
            key = self._by_pixels.get(image.tobytes())
            self._compare(key, "peer", (image, peaks, energy))

    def _compare(
        self, key: Key | None, where: str, what: tuple[Any, Any, float], on_slab: bool = False
    ) -> None:
        if key is None or key[1] >= self._scene.producers.get(key[0], 0):
            self._problems.append(f"{where}: no such event was fed")
            return
        self._places[key].append("written")
        problem = differs(key, *what, on_slab=on_slab)
        if problem is not None:
            self._problems.append(f"{where}: {problem}")

    def _look_into_journals(self) -> int:
        everything = KeySet()
        for path in self._scene.cxi.glob("*_journal_*.jsonl"):
            everything.update(read_journal(path.read_bytes()).filtered)
        if self._scene.plan.kind != "foreign":
            for key in everything:
                self._places[key.rank, key.idx].append("filtered")
        return len(everything)

    def _look_into_quarantine(self) -> None:
        directory = self._scene.quarantine
        is_limited = self._scene.plan.quarantine_bytes < 2**20
        for line in read_index(directory):
            key = line["rank"], line["idx"]
            if key[1] >= self._scene.producers.get(key[0], 0):
                self._problems.append(f"quarantine: no such event was fed: {line}")
                continue
            self._places[key].append("quarantined")
            one = truth(*key)
            if one.reason not in line["reason"]:
                self._problems.append(f"quarantine: wrong reason: {line}")
            if line["file"] is None:
                if not is_limited:
                    self._problems.append(f"quarantine: no data are kept: {line}")
                continue
            with h5py.File(directory / line["file"]) as file:
                data = file.get("image", file.get("item_2"))
                if one.image.dtype.kind != "U" and (
                    data is None or data[()].tobytes() != one.image.tobytes()
                ):
                    self._problems.append(f"quarantine: other pixels: {line}")

    def _count(self, filtered: int) -> dict[str, int]:
        lost, twice = [], []
        fates: collections.Counter[Fate] = collections.Counter()
        for key in self._wanted():
            places = self._places[key]
            expected = truth(*key).fate
            if self._scene.readers and expected == "filtered":
                expected = "written"  # an old file writer filters nothing
            fates.update(places)
            if not places and not (expected == "filtered" and self._filters_namelessly):
                lost.append(key)
            elif len(places) > 1:
                twice.append(key)
            elif places and places[0] != expected:
                self._problems.append(f"{key} is {places[0]}, and not {expected}")
        if self._filters_namelessly:
            fates["filtered"] = filtered
        if twice:
            self._problems.append(f"twice: {[(k, self._places[k]) for k in twice[:_SHOWN]]}")
        never_fed = self._never_fed()
        lost = [key for key in lost if key not in never_fed]
        if len(lost) > self._may_be_lost():
            self._problems.append(f"lost: {lost[:_SHOWN]}")
        return {
            "fed": sum(self._scene.producers.values()) - len(never_fed),
            "written": fates["written"],
            "filtered": fates["filtered"],
            "quarantined": fates["quarantined"],
            "lost": len(lost),
            "twice": len(twice),
        }

    @property
    def _filters_namelessly(self) -> bool:
        return self._scene.plan.kind == "foreign"

    def _never_fed(self) -> set[Key]:
        """Return what a producer, whose queue was gone, has kept for itself."""
        if self._lost != "in":
            return set()
        records = Records(self._scene, self._lost)
        return {key for key in self._wanted() if key[1] >= records.fed(key[0])}

    def _may_be_lost(self) -> int:
        """Return how much was, at most, in a queue that was killed without a spool."""
        held = {"in": self._scene.plan.ranks * _HELD_BY_RANK, "out": 2 * _HELD_BY_WRITER}
        return 0 if self._lost is None else MAX_EVENTS + held[self._lost]
