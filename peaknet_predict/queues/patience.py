"""Long waits are mentioned in the log, so that a silent hang cannot happen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_REPORT_S = 30.0


class Patience:
    """Mentions a long wait now and then."""

    def __init__(self, waiting_for: str) -> None:
        self._waiting_for = waiting_for
        self._since = self._mentioned = time.monotonic()

    def mention(self, why: Callable[[], str | None] = lambda: None) -> None:
        """Say what is waited for, if it is time to; ``why`` is asked only then."""
        now = time.monotonic()
        if now - self._mentioned >= _REPORT_S:
            self._mentioned = now
            reason = why()
            text = f" ({reason})" if reason else ""
            log.warning("%s for %.0f s%s", self._waiting_for, now - self._since, text)

    def reset(self) -> None:
        """Begin a new wait."""
        self._since = self._mentioned = time.monotonic()
