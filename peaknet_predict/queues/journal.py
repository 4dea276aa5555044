"""The write-ahead log of a queue, as its state sees it."""

from __future__ import annotations

from typing import Any, Protocol

from peaknet_predict.queues.records import Entry
from peaknet_predict.types import EventId


class Journal(Protocol):
    """Where a queue writes down what must survive its process."""

    def put(self, entry: Entry) -> None:
        """Write down an accepted record; raises OSError if that is not possible."""

    def note(self, entry: Entry) -> None:
        """Write down the readers that a record has cost, and why it is to be quarantined."""

    def settled(self, key: EventId, quarantined: bool) -> None:
        """Write down that a record has been acknowledged, or is in the quarantine on disk."""

    def books(self, books: dict[str, Any]) -> None:
        """Write down the state of the `StreamBook`."""
