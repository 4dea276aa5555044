"""The records of a spool that are not settled, and which segments are needed for them."""

from __future__ import annotations

from collections.abc import Iterable

from peaknet_predict.queues.replay import SpoolReader, Unsettled
from peaknet_predict.types import EventId


class LiveRecords:
    """Knows for every segment what in it is still needed.

    Parameters
    ----------
    found
        What the last life of the queue left.

    Attributes
    ----------
    records
        What is not settled, in the order in which it was accepted.
    """

    def __init__(self, found: SpoolReader) -> None:
        self.records = found.unsettled
        self._bytes = sum(record.size for record in found.unsettled.values())
        self._sizes = found.sizes
        self._in: dict[int, dict[EventId, None]] = {number: {} for number in found.sizes}
        for key, record in found.unsettled.items():
            self._in[record.number][key] = None
        # Where the last record moved out of a segment ends: until that is on disk, the segment is
        # needed.
        self._moved_to = found.moved_to

    def resize(self, number: int, size: int) -> None:
        """Note how large a segment is; a new one is the last."""
        self._sizes[number] = size
        self._in.setdefault(number, {})

    def add(self, record: Unsettled) -> None:
        """Take in a record that has been appended."""
        self.records[record.entry.id] = record
        self._in[record.number][record.entry.id] = None
        self._bytes += record.size

    def settle(self, key: EventId) -> bool:
        """Forget a record; False if there is none of this name."""
        record = self.records.pop(key, None)
        if record is None:
            return False
        del self._in[record.number][key]
        self._bytes -= record.size
        return True

    def repeat(self, records: Iterable[tuple[Unsettled, int]], number: int) -> None:
        """Note that a new segment's beginning, which is on disk, repeats records that end there."""
        for record, end in records:
            del self._in[record.number][record.entry.id]
            record.number, record.end = number, end
            self._in[number][record.entry.id] = None

    def move(self, record: Unsettled, number: int, end: int, size: int) -> None:
        """Note that a record has been appended once more, which is not known to be on disk."""
        self._moved_to[record.number] = (number, end)
        self.repeat([(record, end)], number)
        self._bytes += size - record.size
        record.size = size

    def behind(self, number: int, position: int) -> list[Unsettled]:
        """Return the records that end behind a position of a segment."""
        records = (self.records[key] for key in self._in.get(number, ()))
        return [record for record in records if record.end > position]

    def to_move(self, current: int, segment_bytes: int) -> Unsettled | None:
        """Return the record to move forward where few of them keep many segments, or None."""
        oldest = next(number for number, keys in self._in.items() if keys or number == current)
        kept = sum(size for number, size in self._sizes.items() if number >= oldest)
        if oldest == current or kept <= 2 * (self._bytes + segment_bytes):
            return None
        return self.records[next(iter(self._in[oldest]))]

    def first_needed(self, current: int, synced: int) -> int:
        """Return the oldest segment that must stay, given how far the current one is on disk."""
        for number, keys in self._in.items():
            has_moved = self._moved_to.get(number, (0, 0)) <= (current, synced)
            if keys or not has_moved:
                return number
        return current

    def before(self, number: int) -> list[int]:
        """Return the segments older than one."""
        return [older for older in self._in if older < number]

    def forget(self, number: int) -> None:
        """Forget a segment that is no longer needed."""
        del self._in[number], self._sizes[number]
        self._moved_to.pop(number, None)
