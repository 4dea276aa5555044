"""The leases that a reader holds, and which parts of each are still under way."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peaknet_predict.types import EventId


@dataclass(slots=True)
class Finished:
    """Leases whose parts are all done: tokens to acknowledge, and tokens to reject with reasons."""

    acknowledged: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)


class HeldLeases:
    """The leases of one reader, by the identities of what is in them; any thread may call.

    A record of ours is one part. An item of another program's may hold several results: its lease
    ends when the last of them is done, and it is rejected if one of them was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[EventId, int] = {}
        self._parts_left: dict[int, int] = {}
        self._rejected: dict[int, str] = {}
        self._lost_by: dict[EventId, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._parts_left)

    def add(self, token: int, parts: Sequence[EventId], lost_by: Iterable[str] = ()) -> None:
        """Note a new lease; ``lost_by`` are the holders that had its record before."""
        before = tuple(lost_by)
        with self._lock:
            self._parts_left[token] = len(parts)
            for key in parts:
                # The record has come back to the reader that lost it: the old lease is over.
                self._parts_left.pop(self._tokens.get(key, -1), None)
                self._tokens[key] = token
                if before:
                    self._lost_by[key] = before

    def finish(self, ids: Iterable[EventId], rejected: str | None = None) -> Finished:
        """Count parts as done, or as rejected for a reason; return the leases that are done."""
        finished = Finished()
        with self._lock:
            for key in ids:
                token = self._tokens.pop(key, None)
                self._lost_by.pop(key, None)
                if token is None or token not in self._parts_left:
                    continue
                if rejected is not None:
                    self._rejected.setdefault(token, rejected)
                self._parts_left[token] -= 1
                if self._parts_left[token] > 0:
                    continue
                del self._parts_left[token]
                if token in self._rejected:
                    finished.rejected[token] = self._rejected.pop(token)
                else:
                    finished.acknowledged.append(token)
        return finished

    def tokens_of(self, ids: Iterable[EventId]) -> dict[EventId, int]:
        """Return the tokens of those that are held."""
        with self._lock:
            return {key: self._tokens[key] for key in ids if key in self._tokens}

    def forget(self, stale: dict[EventId, int]) -> None:
        """Forget leases that the queue has ended."""
        with self._lock:
            for key, token in stale.items():
                if self._tokens.get(key) == token:
                    del self._tokens[key]
                    self._parts_left.pop(token, None)
                    self._rejected.pop(token, None)

    def clear(self) -> list[int]:
        """Forget everything; return the tokens that were held."""
        with self._lock:
            tokens = list(self._parts_left)
            self._tokens.clear()
            self._parts_left.clear()
            self._rejected.clear()
            self._lost_by.clear()
        return tokens

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before and were lost with it."""
        return self._lost_by.get(key, ())
