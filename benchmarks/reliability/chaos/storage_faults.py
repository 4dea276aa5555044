"""Faults of disks and directories, and what ends the faults that pass."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from benchmarks.reliability.chaos.scene import Scene


class Later:
    """Calls that are to be made later."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, Callable[[], None]]] = []

    def do(self, seconds: float, call: Callable[[], None]) -> None:
        """Have a call made so much later."""
        self._calls.append((time.monotonic() + seconds, call))

    def do_due(self, now: float) -> None:
        """Make those whose time has come."""
        for pair in [pair for pair in self._calls if pair[0] <= now]:
            self._calls.remove(pair)
            pair[1]()

    def do_all(self) -> None:
        """Make all of them."""
        self.do_due(float("inf"))


class StorageFaults:
    """Fills disks and takes directories away; each returns whom it hit, None if nobody.

    Parameters
    ----------
    scene
        Whose disks.
    chance
        Draws for how long.
    later
        Undoes them.

    Attributes
    ----------
    directory_away
        Whether the writers' directory is not there.
    """

    def __init__(self, scene: Scene, chance: random.Random, later: Later) -> None:
        self.directory_away = False
        self._scene = scene
        self._random = chance
        self._later = later
        self._full: set[str] = set()

    def fill(self, name: str) -> str | None:
        """Leave no room on a disk for a while."""
        if name in self._full:
            return None
        disk = self._scene.disks[name]
        disk.fill()
        self._full.add(name)

        def free() -> None:
            disk.free()
            self._full.discard(name)

        self._later.do(self._random.uniform(1.0, 8.0), free)
        return name

    def take_directory(self) -> str | None:
        """Rename the writers' directory for a while."""
        cxi = self._scene.cxi
        away = cxi.with_name("cxi-away")
        if self.directory_away or not cxi.is_dir():
            return None
        if any(part.is_alive and not part.has_begun for part in self._scene.writers):
            return None  # its first life would make the directory
        cxi.rename(away)
        self.directory_away = True
        for part in self._scene.writers:
            if part.is_alive:
                # One that has just been started may find that it is not there.
                part.hit("directory away")

        def bring_back() -> None:
            away.rename(cxi)
            self.directory_away = False

        self._later.do(self._random.uniform(1.0, 4.0), bring_back)
        return cxi.name

    def take_quarantine(self) -> str | None:
        """Put a file in the place of the quarantine for a while."""
        kept = self._scene.quarantine
        away = kept.with_name("kept-away")
        if away.exists() or not kept.is_dir():
            return None
        kept.rename(away)
        kept.touch()

        def bring_back() -> None:
            kept.unlink()
            away.rename(kept)

        self._later.do(self._random.uniform(1.0, 5.0), bring_back)
        return kept.name
