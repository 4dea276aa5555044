"""Events left out of the files, on record before the queue may forget them."""

from __future__ import annotations

import time

from peaknet_predict.cxi.journal import Journal
from peaknet_predict.keys import KeySet
from peaknet_predict.types import EventId

_RECORD_AFTER_S = 1.0
_RECORD_AFTER = 256  # most events whose images the queue must keep until they are on record


class FilteredEvents:
    """Gathers events that a writer leaves out, and writes many at a time to its journal.

    Parameters
    ----------
    journal
        Of the writer.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[EventId] = []
        self._keys = KeySet()  # of those that wait
        self._since = 0.0

    def __contains__(self, key: EventId) -> bool:
        return key in self._keys

    def add(self, key: EventId) -> None:
        """Take an event, in memory only."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(key)
        self._keys.add(key)

    @property
    def due(self) -> bool:
        """Whether enough events wait, or have waited long enough."""
        if not self._waiting:
            return False
        old = time.monotonic() - self._since >= _RECORD_AFTER_S
        return old or len(self._waiting) >= _RECORD_AFTER

    def record(self) -> list[EventId]:
        """Record all waiting events, and return them.

        Raises
        ------
        OSError
            If that is not possible; they go on waiting.
        """
        if self._waiting:
            self._journal.append({"filtered": self._keys.to_json()})
        recorded, self._waiting, self._keys = self._waiting, [], KeySet()
        return recorded
