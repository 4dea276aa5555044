"""Ctrl-C and SIGTERM as a request to stop, instead of an exception in the middle of anything."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long, unless told otherwise, a process may take from a request to stop to its end."""

_MARGIN_S = 10.0  # beyond the grace, for what is not asked whether its time is over
_EXIT_INCOMPLETE = 3


@contextmanager
def stop_requests(grace_s: float = GRACE_S) -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set while the block runs.

    Whoever works in the block looks at it between two pieces of work, finishes what it holds and
    leaves. A second signal raises `KeyboardInterrupt` at once. A process that is still there some
    seconds after ``grace_s``, because something hangs, is ended: what it holds goes back when its
    leases end.

    Enter it after the Ray cluster has been joined: Ray installs a handler of its own, which would
    end the process. Outside the main thread, where Python knows no signals, the event is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        _end_after(grace_s + _MARGIN_S)
        name = signal.Signals(number).name
        log.warning("%s: finishing what is under way; once more stops at once", name)

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_after(seconds: float) -> None:
    def end() -> None:
        log.error("still here %.0f s after the request to stop: ended at once", seconds)
        os._exit(_EXIT_INCOMPLETE)

    watchdog = threading.Timer(seconds, end)
    watchdog.daemon = True
    watchdog.start()
