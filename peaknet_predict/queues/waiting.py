"""Calls that wait inside the queue's process, which has one event loop and needs no locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Call(Generic[T]):
    """A waiting call: how to get its answer, how much it asks for, and what it got."""

    __slots__ = ("attempt", "future", "given", "wanted")

    def __init__(self, attempt: Callable[[], T | None], wanted: int) -> None:
        self.future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        self.attempt = attempt
        self.wanted = wanted
        self.given: T | None = None

    def answer(self) -> bool:
        """Try to answer; True if this call has its answer now."""
        if self.future.done():
            return False  # cancelled, and about to leave
        try:
            self.given = self.attempt()
        except Exception as error:
            self.future.set_exception(error)
            return True
        if self.given is None:
            return False
        self.future.set_result(self.given)
        return True


class WaitingCalls(Generic[T]):
    """Calls that wait for an answer, in the order in which they came.

    Each change of the queue answers them at once, with `serve`, instead of waking them up to look
    for themselves. So no wake-up can be lost, and a change costs as many attempts as it has
    answers, however many calls wait.

    Parameters
    ----------
    serve
        Serves these calls and all others that their answers may affect. Called when a call arrives,
        and when the time of an answered one has run out.
    """

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve
        self._calls: dict[Hashable, _Call[T]] = {}

    async def answer(
        self,
        key: Hashable,
        attempt: Callable[[], T | None],
        timeout_s: float,
        wanted: int = 1,
        give_back: Callable[[T], None] = lambda answer: None,
    ) -> T | None:
        """Wait for the answer to a call.

        Parameters
        ----------
        key
            Identifies the call. The same call made again replaces the one that waits, whose caller
            is gone.
        attempt
            Returns the answer, or None while there is none. It must not serve waiting calls.
        timeout_s
            Seconds until the last attempt; if that fails, the answer is None.
        wanted
            How much the call asks for: what `serve` passes to ``worth_trying``.
        give_back
            Takes an answer whose call was cancelled before it could be returned.
        """
        call = _Call(attempt, wanted)
        if (before := self._calls.pop(key, None)) is not None and not before.future.done():
            before.future.set_result(None)
        self._calls[key] = call
        self._serve()
        if call.future.done():
            return call.future.result()
        alarm = asyncio.get_running_loop().call_later(timeout_s, self._last_chance, key, call)
        try:
            return await call.future
        except asyncio.CancelledError:
            if call.given is not None:
                give_back(call.given)
            raise
        finally:
            alarm.cancel()
            self._leave(key, call)

    def serve(self, worth_trying: Callable[[int], bool]) -> bool:
        """Answer calls in their order, for as long as it is worth trying; True if any was."""
        served = False
        for key, call in list(self._calls.items()):
            if not worth_trying(call.wanted):
                break
            if call.answer():
                self._leave(key, call)
                served = True
        return served

    def _last_chance(self, key: Hashable, call: _Call[T]) -> None:
        self._leave(key, call)
        if call.answer():
            self._serve()
        elif not call.future.done():
            call.future.set_result(None)

    def _leave(self, key: Hashable, call: _Call[T]) -> None:
        if self._calls.get(key) is call:
            del self._calls[key]


class Linger:
    """A short pause after an answer, so that what arrives meanwhile goes out together.

    Parameters
    ----------
    seconds
        How long the pause is.
    at_its_end
        Called at the end of a pause during which `is_over` was asked.
    """

    def __init__(self, seconds: float, at_its_end: Callable[[], None]) -> None:
        self._seconds = seconds
        self._at_its_end = at_its_end
        self._until = 0.0
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Begin a pause, or begin it again."""
        self._until = asyncio.get_running_loop().time() + self._seconds

    def is_over(self) -> bool:
        """Whether there is no pause now."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._until:
            return True
        if self._alarm is None:
            self._alarm = loop.call_at(self._until, self._ring)
        return False

    def _ring(self) -> None:
        self._alarm = None
        self._at_its_end()
