"""Log notices of long waits, so that no process hangs silently."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_REPORT_S = 30.0


class WaitingNotice:
    """Reports a wait every 30 seconds while it lasts."""

    def __init__(self, waiting_for: str) -> None:
        self._waiting_for = waiting_for
        self._since = self._reported = time.monotonic()

    def report(self, why: Callable[[], str | None] = lambda: None) -> None:
        """Write the notice if it is due; ``why`` is asked only then."""
        now = time.monotonic()
        if now - self._reported >= _REPORT_S:
            self._reported = now
            reason = why()
            text = f" ({reason})" if reason else ""
            log.warning("%s for %.0f s%s", self._waiting_for, now - self._since, text)

    def reset(self) -> None:
        """Begin a new wait."""
        self._since = self._reported = time.monotonic()
