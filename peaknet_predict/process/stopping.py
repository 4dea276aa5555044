"""Ctrl-C and SIGTERM as a request to stop, instead of an exception in the middle of anything.

The first signal asks to finish what is under way, a second one to stop at once. Both work even if
the main thread hangs in foreign code, where Python runs no handlers: another thread reads signals
from the wake-up pipe, and ends the process when its time is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long a process may take to end after a request to stop, by default."""

_MARGIN_S = 10.0  # beyond the grace, for work that does not watch its time
_AT_ONCE_S = 5.0  # after a second signal, for giving back what is held
_ONE_REQUEST_S = 1.0  # signals so close together are one: batch systems reach a process twice
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXIT_INCOMPLETE = 3
_END = 0  # in the pipe: no signal, but the end of listening


class StopRequest(threading.Event):
    """Set by the first signal; tells all parts of the process how much time is left.

    Attributes
    ----------
    grace_s
        How long the process may take to end from then on.
    at_once
        Whether a second signal has come, or a first one before there was anything to finish.
    begun
        Whether there is anything to finish.
    """

    def __init__(self, grace_s: float = GRACE_S, begun: bool = True) -> None:
        super().__init__()
        self.grace_s = grace_s
        self.at_once = False
        self.begun = begun
        self._raised = False
        self._came_at: float | None = None
        self._watchdog: threading.Timer | None = None

    def set(self) -> None:
        """Ask to stop: the grace begins."""
        if self._came_at is None:
            self._came_at = time.monotonic()
        super().set()

    def out_of_time(self, margin_s: float = 0.0) -> bool:
        """Whether there was a request, and its grace is over, or will be in ``margin_s``."""
        if self._came_at is None:
            return False
        return time.monotonic() + margin_s - self._came_at > self.grace_s

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread, once, if there has been a second signal."""
        # `note` decides what a signal means; this handler may run late.
        if self.at_once and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def note(self, number: int) -> None:
        """Take notice of a signal."""
        name = signal.Signals(number).name
        if self._came_at is None and self.begun:
            log.warning("%s: finishing what is under way; once more stops at once", name)
            self._end_after(self.grace_s + _MARGIN_S)
            self.set()
        elif not self.at_once and not self._is_recent():
            self.at_once = True
            log.warning("%s: stopping at once", f"{name} again" if self.is_set() else name)
            self.set()
            self._end_after(_AT_ONCE_S)
            # Wake a main thread that waits: the signal may have gone to another thread. SIGINT,
            # because it does not kill the process if the block has just been left.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _is_recent(self) -> bool:
        return self._came_at is not None and time.monotonic() - self._came_at < _ONE_REQUEST_S

    def forget(self) -> None:
        """Let the process go on without interruptions: what was asked to stop has ended."""
        self._raised = True
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _end_after(self, seconds: float) -> None:
        def end() -> None:
            log.error("still here %.0f s after being asked to stop: ended", seconds)
            os._exit(_EXIT_INCOMPLETE)

        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, end)
        self._watchdog.daemon = True
        self._watchdog.start()


_current: StopRequest | None = None


@contextmanager
def stop_requests(grace_s: float = GRACE_S, begun: bool = True) -> Iterator[StopRequest]:
    """Yield an event that Ctrl-C and SIGTERM set while the block runs.

    Code in the block checks the event between two pieces of work, finishes what it holds and
    leaves. A second signal raises `KeyboardInterrupt`. If something hangs, so that the process is
    still in the block some seconds after ``grace_s`` or after a second signal, the process is
    ended: what it holds goes back when its leases end.

    A nested block has the same event. If ``begun`` is false in the outer block, there is nothing to
    finish before the inner one, and a first signal stops at once. Outside the main thread, where
    Python handles no signals, the event is never set.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest(grace_s, begun)
        return
    if _current is not None:
        _current.begun |= begun
        listen_again()
        yield _current
        return
    request = StopRequest(grace_s, begun)
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    listener = threading.Thread(target=_listen, args=(receiving, request), daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    before = {number: signal.signal(number, request.on_signal) for number in _SIGNALS}
    _current = request
    try:
        yield request
    finally:
        # Before our handlers are removed: a signal that has just come must not interrupt this.
        request.forget()
        os.write(sending, bytes([_END]))
        listener.join()
        request.forget()
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(sending)
        os.close(receiving)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay exceptions that signals raise until the block has ended.

    For work that must not stop halfway, such as writing a file: HDF5 calls Python functions and
    swallows what they raise. The block must be short: after a second signal, the watchdog ends a
    process that stays in it, see `stop_requests`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[tuple[int, FrameType | None]] = []
    handlers = {int(number): signal.getsignal(number) for number in _SIGNALS}
    try:
        with contextlib.ExitStack() as restored:
            for number, handler in handlers.items():
                if callable(handler):  # the system's handler ends the process and raises nothing
                    restored.callback(signal.signal, number, handler)
                    signal.signal(number, lambda *received: noted.append(received))
            yield
    finally:
        for number, frame in noted:
            handler = handlers[number]
            assert callable(handler)
            handler(number, frame)


def listen_again() -> None:
    """Restore our handlers after a library, such as Ray or Lightning, has set its own."""
    if _current is not None and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _current.on_signal)


def _listen(receiving: int, request: StopRequest) -> None:
    while True:
        for number in os.read(receiving, 64):
            if number == _END:
                return
            if number in _SIGNALS:
                request.note(number)
