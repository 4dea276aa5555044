"""How records leave a queue: acknowledged, or quarantined once the quarantine has them on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from peaknet_predict.process.text import printable
from peaknet_predict.queues.journal import Journal
from peaknet_predict.queues.ready import ReadyLines
from peaknet_predict.queues.records import Entry
from peaknet_predict.types import EventId

_REASONS_KEPT = 100


class Settlements:
    """Settles records, and counts the readers that each of them has cost.

    A rejected record is settled only when the quarantine has it on disk. Until then it waits here,
    takes up room in the queue and keeps the stream from ending.

    Parameters
    ----------
    ready
        The room in it that waiting records take up.
    max_losses
        How many readers a record may cost before it is quarantined as a poison message.
    quarantine
        Takes a record and the reason. Returns False if it is not on disk yet; `confirm` is then
        told when it is. Without one, rejected records are counted and dropped.
    journal
        Where settlements are written down.

    Attributes
    ----------
    quarantined
        How many records are in the quarantine.
    reasons
        The latest rejected records, each with its reason.
    """

    def __init__(
        self,
        ready: ReadyLines,
        max_losses: int,
        quarantine: Callable[[Entry, str], bool | None] | None,
        journal: Journal | None,
    ) -> None:
        self.quarantined = 0
        self.reasons: deque[str] = deque(maxlen=_REASONS_KEPT)
        self._ready = ready
        self._max_losses = max_losses
        self._quarantine = quarantine
        self._journal = journal
        self._waiting: dict[EventId, Entry] = {}

    def __len__(self) -> int:
        """Return how many rejected records wait for the quarantine's disk."""
        return len(self._waiting)

    @property
    def has_quarantine(self) -> bool:
        """Whether rejected records are kept anywhere."""
        return self._quarantine is not None

    def acknowledge(self, entry: Entry) -> None:
        """Settle a record that the next stage has."""
        self._write(entry, quarantined=False)

    def reject(self, entry: Entry, reason: str) -> None:
        """Quarantine a record; it is settled as soon as it is on disk there."""
        entry.reason = reason = printable(reason)
        self.reasons.append(f"{entry.id}: {reason}")
        if self._journal is not None:
            self._journal.note(entry)
        # It is kept here first, so that it is not lost if the quarantine raises.
        self._waiting[entry.id] = entry
        self._ready.reserve(entry)
        if self._quarantine is None or self._quarantine(entry, reason) is not False:
            self.confirm([entry.id])

    def confirm(self, keys: Iterable[EventId]) -> None:
        """Settle records that the quarantine has on disk now."""
        for key in keys:
            entry = self._waiting.pop(key, None)
            if entry is not None:
                self._ready.free(entry)
                self.quarantined += 1
                self._write(entry, quarantined=True)

    def count_loss(self, entry: Entry, holder: str, reason: str) -> bool:
        """Count a reader that was lost with a record; True if that exceeds the limit.

        The record is then quarantined as a poison message.
        """
        entry.losses += 1
        entry.lost_by.append(holder)
        if entry.losses >= self._max_losses:
            self.reject(entry, f"cost {entry.losses} readers, the last time: {reason}")
            return True
        if self._journal is not None:
            self._journal.note(entry)
        return False

    def _write(self, entry: Entry, quarantined: bool) -> None:
        if self._journal is not None:
            self._journal.settled(entry.id, quarantined)
