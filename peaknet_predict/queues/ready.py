"""The records of a queue that wait for a reader, and the room that is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from peaknet_predict.queues.records import Entry


class ReadyLines:
    """A bounded first-in first-out line of records, and a second line that isolates some.

    A record that has cost two readers may be a poison message. It stands in the second line, from
    which records are handed out one by one, so that no other record is blamed for its next loss.

    Parameters
    ----------
    max_events, max_bytes
        Capacity. A record larger than ``max_bytes`` is accepted by an empty queue, because it could
        never be accepted otherwise.

    Attributes
    ----------
    nbytes
        Size of the records in both lines.
    largest
        Most records that were ever here at once.
    redeliveries
        Records that were put back.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        if max_events < 1 or max_bytes < 1:
            raise ValueError(
                f"a queue needs room: max_events is {max_events} and max_bytes {max_bytes}, "
                "both must be at least 1"
            )
        self.nbytes = 0
        self.largest = 0
        self.redeliveries = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._line: deque[Entry] = deque()
        self._isolated: deque[Entry] = deque()
        self._reserved = 0
        self._reserved_bytes = 0

    def __len__(self) -> int:
        return len(self._line) + len(self._isolated)

    @property
    def full(self) -> bool:
        """Whether there is no room, not even for the smallest record."""
        return not self.has_room(0)

    @property
    def has_isolated(self) -> bool:
        """Whether a record that may be a poison message is here."""
        return bool(self._isolated)

    def has_room(self, nbytes: int) -> bool:
        """Whether a record of this size can be added."""
        number = len(self) + self._reserved
        full = (
            number >= self._max_events
            or self.nbytes + self._reserved_bytes + nbytes > self._max_bytes
        )
        return not full or not number

    def reserve(self, entry: Entry) -> None:
        """Take up room for a record that is neither ready nor leased but still in memory."""
        self._reserved += 1
        self._reserved_bytes += entry.nbytes

    def free(self, entry: Entry) -> None:
        """Give back the room that `reserve` took up."""
        self._reserved -= 1
        self._reserved_bytes -= entry.nbytes

    def append(self, entry: Entry) -> None:
        """Add a record at the end."""
        self._line_of(entry).append(entry)
        self.nbytes += entry.nbytes
        self.largest = max(self.largest, len(self))

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Put records back where they came from: to the front, in their order."""
        for entry in reversed(entries):
            self._line_of(entry).appendleft(entry)
            self.nbytes += entry.nbytes
            self.redeliveries += 1

    def take(self, max_records: int) -> list[Entry]:
        """Take records from the front of the first line."""
        return self._took([self._line.popleft() for _ in range(min(max_records, len(self._line)))])

    def take_isolated(self) -> Entry:
        """Take one record that may be a poison message."""
        return self._took([self._isolated.popleft()])[0]

    def _took(self, entries: list[Entry]) -> list[Entry]:
        self.nbytes -= sum(entry.nbytes for entry in entries)
        return entries

    def _line_of(self, entry: Entry) -> deque[Entry]:
        return self._isolated if entry.may_be_poison else self._line
