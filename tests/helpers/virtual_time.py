"""Threads on a clock of their own, which goes on only while all of them sleep."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class Killed(BaseException):
    """Raised in a task that has been killed, wherever it sleeps."""


class Task:
    """One thread that takes turns with the others."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.paused_until = 0.0
        self.killed = False
        self.ended = False
        self.error: BaseException | None = None
        self.turn = threading.Semaphore(0)
        self._act = act

    def run(self, back: threading.Semaphore) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self._act()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        back.release()


class VirtualTime:
    """Runs tasks one at a time, each until it sleeps or ends, in the order of their alarms.

    So every run of the same tasks is the same, and hours take milliseconds.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._back = threading.Semaphore(0)
        self._numbers = itertools.count()
        self._alarms: list[tuple[float, int, Task]] = []
        self.current: Task | None = None

    def now(self) -> float:
        return self._now

    def start(self, act: Callable[[], None], at: float | None = None) -> Task:
        """Start a task, now or at a time."""
        task = Task(act)
        threading.Thread(target=task.run, args=(self._back,), daemon=True).start()
        self._set_alarm(self._now if at is None else at, task)
        return task

    def sleep(self, seconds: float) -> None:
        """Let others have their turn; for tasks."""
        task = self.current
        assert task is not None
        self._set_alarm(self._now + max(seconds, 1e-3), task)
        self._back.release()
        task.turn.acquire()
        if task.killed:
            raise Killed

    def run(self, until: float) -> bool:
        """Run all tasks to their end; False if some still run at a time."""
        while self._alarms:
            at, _, task = heapq.heappop(self._alarms)
            if task.paused_until > at and not task.killed:
                self._set_alarm(task.paused_until, task)
                continue
            overdue = at > until
            if overdue:
                task.killed = True
            self._now = max(self._now, at)
            self.current = task
            task.turn.release()
            self._back.acquire()
            if task.error is not None:
                raise task.error
            if overdue:
                self._kill_the_rest()
                return False
        return True

    def _kill_the_rest(self) -> None:
        for _, _, task in self._alarms:
            task.killed = True
            task.turn.release()
            self._back.acquire()
        self._alarms.clear()

    def _set_alarm(self, at: float, task: Task) -> None:
        heapq.heappush(self._alarms, (at, next(self._numbers), task))
