"""What a queue holds: events, results, and what other programs put."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from peaknet_predict.queues.wire import named
from peaknet_predict.types import Event, EventId, Result

Kind = Literal["events", "results"]

END_MARKER = "END"
"""What a reader that knows only ``get`` is handed at the end of a queue of results."""

_SUSPECTED_AFTER = 2  # losses; by chance, a record is hardly ever there at two of them
_DEPTH = 4  # of lists in lists; what is deeper is no event
_TEXT = 200  # characters kept of an object that is none of ours


@dataclass(slots=True)
class Opaque:
    """Stands for an object of a class that other processes may not know: its type and its text.

    Handed on as it came, it would raise in every process that takes it.
    """

    description: str

    def __repr__(self) -> str:
        return self.description


@dataclass(slots=True)
class ForeignItem:
    """An item put by a program that knows only ``put``; decoded by whoever takes it.

    Attributes
    ----------
    payload
        The object as it came.
    stream
        Name of the stream it belongs to, which no other stream of any queue has.
    position
        How many items had come this way before, which identifies it when nothing inside does.
    """

    payload: Any
    stream: str
    position: int

    @property
    def id(self) -> EventId:
        """The identity that the decoded event will have, or one made from the position."""
        rank, idx = named(self.payload) or (-1, self.position)
        return EventId(self.stream, rank, idx)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in the payload, one or two levels deep."""
        return _nbytes(self.payload, depth=2)


Record = Event | Result | ForeignItem


@dataclass(slots=True)
class Entry:
    """A record in a queue, and what has happened to it there.

    Attributes
    ----------
    record
        The record.
    id, nbytes
        Of the record.
    losses
        How often a reader died, fell silent or failed while it held this.
    lost_by
        Those readers.
    reason
        Why it is to be quarantined; None if it is not.
    """

    record: Record
    id: EventId
    nbytes: int
    losses: int = 0
    lost_by: list[str] = field(default_factory=list)
    reason: str | None = None

    @property
    def is_suspected(self) -> bool:
        """Whether this may be a poison message, which costs every reader that takes it."""
        return self.losses >= _SUSPECTED_AFTER


def entry_of(record: Record) -> Entry:
    """Return a fresh entry for a record."""
    return Entry(record, record.id, record.nbytes)


def sanitized(value: Any, depth: int = _DEPTH) -> Any:
    """Return a foreign object with everything in it that is neither plain data nor array replaced.

    Readers in other environments can then unpickle it, and a spool can write it.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.dtype.kind != "V":
        pixels = np.asarray(value)
        if isinstance(value, np.ma.MaskedArray):
            return np.ma.MaskedArray(pixels, np.ma.getmaskarray(value))
        return pixels
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
        return value.item()
    if isinstance(value, list | tuple) and depth > 0:
        parts = [sanitized(part, depth - 1) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return Opaque(_described(value))


def _described(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"(its repr fails: {type(error).__name__})"
    return f"{type(value).__name__} {text}"[:_TEXT]


def _nbytes(value: Any, depth: int) -> int:
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, str | bytes):
        return len(value)
    if depth > 0 and isinstance(value, list | tuple):
        return sum(_nbytes(part, depth - 1) for part in value)
    return 0
