"""Time in the queue's process: a clock that stops while the process is stopped, and a ticker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class RunningClock:
    """Seconds during which this process has run.

    While a process is stopped, or its machine sleeps, it hears from nobody; the others are not to
    blame for that silence. So this clock counts at most ``longest_gap_s`` between two readings;
    read more often, it keeps pace with ``clock``.

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


class Ticker:
    """Does some work at regular intervals, even while nobody calls.

    Parameters
    ----------
    interval_s
        Seconds between two rounds.
    work
        Called in each round, one after another. An exception is logged and does not keep the others
        from running.
    """

    def __init__(self, interval_s: float, *work: Callable[[], Awaitable[None] | None]) -> None:
        self._interval_s = interval_s
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start, once there is an event loop; a second call does nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            for work in self._work:
                try:
                    pending = work()
                    if pending is not None:
                        await pending
                except Exception:
                    log.exception("a queue's regular work")
