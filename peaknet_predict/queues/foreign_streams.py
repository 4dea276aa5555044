"""The streams of programs that know only ``put``: their names and their ends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peaknet_predict.keys import KeySet

FOREIGN = "a program that knows only put"
"""Stands for all such programs among a queue's producers: they do not identify themselves."""


_UNNAMED = -1  # the rank of items that state no identity


class ForeignStreams:
    """Names streams that have no name, and knows whether one is open.

    A stream opens with its first item and ends with an end item. If a rank's idx does not grow, its
    producer has been started again, and what follows is a new stream. After a restart of the queue
    an item goes on in an earlier stream only if its rank has events there: a reader may have had
    others, never synced and now forgotten, under the names that come next.

    Parameters
    ----------
    uid
        Identifies the queue among all others, past and future; streams are named after it.

    Attributes
    ----------
    items
        How many items have come.
    is_open
        Whether items have come since the last end item.
    is_closed
        Whether the last of them was an end item.
    """

    def __init__(self, uid: str) -> None:
        self.items = 0
        self.is_open = False
        self.is_closed = False
        self._uid = uid
        self._life = 0
        self._label = (0, 0)  # the present stream: the life in which it began, and its number there
        self._last: dict[int, int] = {}  # the latest idx of each rank
        self._unheard: set[int] = set()  # ranks of which nothing has come since a restart

    def open(self) -> bool:
        """Note that an item is offered; True if that opens a stream."""
        opens = not self.is_open
        self.is_open, self.is_closed = True, False
        return opens

    def close(self) -> None:
        """End the stream. An end item comes once per reader, and all of them mean one end."""
        if not self.is_closed:
            self._begin_next()
        self.is_open, self.is_closed = False, True

    def give_up(self) -> None:
        """End the stream for now; an item with a larger idx continues it."""
        self.is_open, self.is_closed = False, True

    def forget_end(self) -> None:
        """Forget that a stream has ended: another one begins."""
        self.is_closed = False

    def name_for(self, identity: tuple[int, int] | None) -> str:
        """Return the stream's name for an item that states ``identity`` as its (rank, idx)."""
        return self._name(self._next_label() if self._starts_anew(identity) else self._label)

    def follows(self, identity: tuple[int, int] | None) -> bool:
        """Whether an item is the next one of its rank, with none missing before it."""
        return identity is not None and identity[1] == self._last.get(identity[0], -1) + 1

    def accept(self, identity: tuple[int, int] | None) -> list[tuple[str, int]]:
        """Note that an item has been accepted; until then, `name_for` gives it the same name.

        Returns
        -------
        list of (str, int)
            Streams and ranks that have ended with this: their names never come again.
        """
        over: list[tuple[str, int]] = []
        if self._starts_anew(identity):
            name = self._name(self._label)
            over = [(name, rank) for rank in (_UNNAMED, *self._last)]
            self._begin_next()
        if identity is not None:
            rank, idx = identity
            self._last[rank] = idx
            self._unheard.discard(rank)
        self.items += 1
        return over

    def last_events(self) -> str:
        """Name the last event of each rank."""
        return self._named(self._last) or "none"

    def why_incomplete(self) -> str | None:
        """Say which ranks may have died with an earlier life of the queue, though others live.

        The producer that ends the stream is alive, so an only rank is not among them.
        """
        if not self._unheard or len(self._last) == 1:
            return None
        return (
            "nothing came from some of its ranks between the restart of this queue and the end of "
            "the stream, and psana-ray's producers end, without an error, when their queue dies. "
            f"The last events of those ranks: {self._named(self._unheard)}. If these are not all "
            "that they had, start it again for the rest"
        )

    def _named(self, ranks: Iterable[int]) -> str:
        return ", ".join(f"rank {rank} idx {self._last[rank]}" for rank in sorted(ranks)[:8])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data, for a spool."""
        return {
            "items": self.items,
            "is_open": self.is_open,
            "is_closed": self.is_closed,
            "life": self._life,
            "label": list(self._label),
            "last": list(self._last.items()),
        }

    def restore(self, uid: str, saved: dict[str, Any], keys: KeySet) -> None:
        """Take over what `to_json` returned, and what the accepted ``keys`` tell of later items.

        This begins another life. That it has begun must be on disk before an item is taken.
        """
        self._uid = uid
        self.items = saved["items"]
        self.is_open, self.is_closed = saved["is_open"], saved["is_closed"]
        self._life = saved["life"] + 1
        life, number = saved["label"]
        self._label = (life, number)
        self._last = {int(rank): int(idx) for rank, idx in saved["last"]}
        for stream, rank, bounds in keys.intervals():
            label = self._label_in(stream)
            if label is None or label < self._label:
                continue
            if label > self._label:
                self._label = label
                self._last.clear()
            if rank == _UNNAMED:
                self.items = max(self.items, bounds[-1])
            else:
                self._last[rank] = max(self._last.get(rank, -1), bounds[-1] - 1)
        self._unheard = set(self._last) if self.is_open else set()

    def _starts_anew(self, identity: tuple[int, int] | None) -> bool:
        if identity is None or identity[0] not in self._last:
            return self._label[0] < self._life
        return identity[1] <= self._last[identity[0]]

    def _begin_next(self) -> None:
        self._label = self._next_label()
        self._last.clear()
        self._unheard.clear()

    def _next_label(self) -> tuple[int, int]:
        life, number = self._label
        return (life, number + 1) if life == self._life else (self._life, 0)

    def _name(self, label: tuple[int, int]) -> str:
        return f"{self._uid}#{label[0]}.{label[1]}"

    def _label_in(self, name: str) -> tuple[int, int] | None:
        """Return the label in a stream's name; None if it is not a name given here."""
        match = re.fullmatch(rf"{re.escape(self._uid)}#(\d+)\.(\d+)", name)
        return None if match is None else (int(match[1]), int(match[2]))
