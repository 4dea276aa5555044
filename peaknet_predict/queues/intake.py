"""How records come into a queue."""

from __future__ import annotations

from peaknet_predict.queues.journal import Journal
from peaknet_predict.queues.ready import ReadyLines
from peaknet_predict.queues.records import Entry
from peaknet_predict.queues.settlements import Settlements


class Intake:
    """Accepts records for which there is room, here and in the journal.

    Parameters
    ----------
    ready
        Where accepted records wait for a reader.
    settlements
        Where records go that must be quarantined at once.
    journal
        Where accepted records are written down.

    Attributes
    ----------
    problem
        Why nothing is accepted although there is room; None if records are accepted.
    """

    def __init__(
        self, ready: ReadyLines, settlements: Settlements, journal: Journal | None
    ) -> None:
        self.problem: str | None = None
        self._ready = ready
        self._settlements = settlements
        self._journal = journal

    def accept(self, entry: Entry) -> bool:
        """Accept a record; False if there is no room for it."""
        if not self._ready.has_room(entry.nbytes):
            return False
        if self._journal is not None:
            try:
                self._journal.put(entry)
            except OSError as error:
                # Like a full queue: the producer waits, and is told why.
                self.problem = f"the spool cannot be written: {error}"
                return False
            self.problem = None
        if entry.reason is None:
            self._ready.append(entry)
        else:
            self._settlements.reject(entry, entry.reason)
        return True
