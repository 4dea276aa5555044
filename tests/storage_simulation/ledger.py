"""What the programs of a history have been told, by which all that is stored is judged."""

from __future__ import annotations

from collections import Counter

from peaknet_predict.types import EventId


class Ledger:
    """Who has been promised what.

    Attributes
    ----------
    confirmed
        Serial numbers of events that their producers have been told are safe.
    below
        Of each (stream, rank) whose producer can go on in it: events with an idx below this have
        been confirmed.
    delivered
        Events whose results the output queue has confirmed, by identity, with serial numbers.
    written
        Identities that a writer has settled.
    seen
        How often things have happened: what a history reaches.
    """

    def __init__(self) -> None:
        self.confirmed: set[int] = set()
        self.below: dict[tuple[str, int], int] = {}
        self.delivered: dict[EventId, int] = {}
        self.written: set[EventId] = set()
        self.seen: Counter[str] = Counter()
        self.serials: dict[EventId, int] = {}

    def confirm(self, serial: int) -> None:
        """Hear that a producer has been told that an event is safe."""
        if serial not in self.confirmed:
            self.confirmed.add(serial)
            self.seen["events confirmed"] += 1

    def identify(self, key: EventId, serial: int) -> None:
        """Hear that a reader was handed an event under an identity; it must be its own."""
        known = self.serials.setdefault(key, serial)
        assert known == serial, f"events {known} and {serial} have one identity, {key}"
