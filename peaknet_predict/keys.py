"""Which events have been seen, in memory that does not grow with their number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from peaknet_predict.types import EventId


class KeySet:
    """A set of event identities, kept as intervals of ``idx`` for each (stream, rank).

    Producers count, so millions of events are a handful of intervals; only gaps cost memory.
    """

    def __init__(self, keys: Iterable[EventId] = ()) -> None:
        # For each (stream, rank), the sorted bounds [begin, end, begin, end, ...]: idx is in the
        # set if an odd number of bounds lies at or below it.
        self._bounds: dict[tuple[str, int], list[int]] = {}
        for key in keys:
            self.add(key)

    def __contains__(self, key: EventId) -> bool:
        bounds = self._bounds.get((key.stream, key.rank))
        return bounds is not None and bisect_right(bounds, key.idx) % 2 == 1

    def __len__(self) -> int:
        return sum(sum(b[1::2]) - sum(b[::2]) for b in self._bounds.values())

    def __iter__(self) -> Iterator[EventId]:
        for (stream, rank), bounds in self._bounds.items():
            for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
                yield from (EventId(stream, rank, idx) for idx in range(begin, end))

    def add(self, key: EventId) -> bool:
        """Add a key; False if it was there already."""
        bounds = self._bounds.setdefault((key.stream, key.rank), [])
        idx = int(key.idx)  # a NumPy integer overflows, and JSON does not take it
        at = bisect_right(bounds, idx)
        if at % 2 == 1:
            return False
        begins_after_one = at > 0 and bounds[at - 1] == idx
        ends_before_one = at < len(bounds) and bounds[at] == idx + 1
        if begins_after_one and ends_before_one:
            del bounds[at - 1 : at + 1]
        elif begins_after_one:
            bounds[at - 1] = idx + 1
        elif ends_before_one:
            bounds[at] = idx
        else:
            bounds[at:at] = [idx, idx + 1]
        return True

    def update(self, other: KeySet) -> None:
        """Add all keys of another set."""
        for stream, rank, bounds in other.intervals():
            mine = self._bounds.setdefault((stream, rank), [])
            ends = [*mine[1::2], *bounds[1::2]]
            intervals = sorted(zip([*mine[::2], *bounds[::2]], ends, strict=True))
            mine.clear()
            for begin, end in intervals:
                if mine and begin <= mine[-1]:
                    mine[-1] = max(mine[-1], end)
                else:
                    mine += [begin, end]

    def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx from 0 on that is not in the set."""
        bounds = self._bounds.get((stream, rank), [])
        at = bisect_right(bounds, 0)
        return bounds[at] if at % 2 == 1 else 0

    def forget(self, stream: str, rank: int) -> None:
        """Forget everything of one producer's stream."""
        self._bounds.pop((stream, rank), None)

    def intervals(self) -> Iterator[tuple[str, int, list[int]]]:
        """Iterate over (stream, rank, bounds)."""
        for (stream, rank), bounds in self._bounds.items():
            yield stream, rank, bounds

    def to_json(self) -> list[list[Any]]:
        """Return the set as lists, strings and numbers."""
        return [[stream, rank, bounds] for stream, rank, bounds in self.intervals()]

    @classmethod
    def from_json(cls, rows: list[list[Any]]) -> KeySet:
        """Return the set that `to_json` described."""
        keys = cls()
        for stream, rank, bounds in rows:
            keys._bounds[str(stream), int(rank)] = [int(bound) for bound in bounds]
        return keys
