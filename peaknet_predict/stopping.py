"""Ctrl-C and SIGTERM as a request to stop, instead of an exception in the middle of anything."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set while the block runs.

    Whoever works in the block looks at it between two pieces of work, finishes what it holds and
    leaves. A second signal raises `KeyboardInterrupt` at once.

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
