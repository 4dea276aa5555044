"""A clock that stands still while its process does."""

from __future__ import annotations

import time
from collections.abc import Callable


class RunningClock:
    """Seconds during which this process has run.

    While a process is stopped, or its machine sleeps, it hears of nobody: that silence is its own.
    Read more often than every ``longest_gap_s``, this clock keeps pace with the other one; of a
    longer time between two readings it counts that much.

    Parameters
    ----------
    longest_gap_s
        Most seconds that are counted between two readings.
    clock
        Seconds that only go forward, whether this process runs or not.
    """

    def __init__(self, longest_gap_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_gap_s = longest_gap_s
        self._clock = clock
        self._read_at = clock()
        self._elapsed_s = 0.0

    def __call__(self) -> float:
        """Return how long this process has run since the clock was made."""
        now = self._clock()
        self._elapsed_s += min(now - self._read_at, self._longest_gap_s)
        self._read_at = now
        return self._elapsed_s
