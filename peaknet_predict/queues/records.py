"""What a queue holds: events, results, and what other programs put."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from peaknet_predict.queues.plain_data import is_plain_array, plain_identity, sanitized
from peaknet_predict.queues.wire import described, named
from peaknet_predict.types import Event, EventId, Result, identity_problem

Kind = Literal["events", "results"]

END_MARKER = "END"
"""What readers that know only ``get`` receive at the end of a queue of results."""

_POISON_AFTER = 2  # losses; two of them are hardly ever a coincidence
_TEXT = 1000  # characters kept of an object that is none of ours
_POINTER = 8  # bytes that a list has for each of its parts


@dataclass(slots=True)
class ForeignItem:
    """An item put by a program that knows only ``put``; its reader decodes it.

    Attributes
    ----------
    payload
        The object as it came.
    stream
        Name of the stream it belongs to, which no other stream of any queue has.
    position
        How many such items came before; identifies the item if nothing inside it does.
    """

    payload: Any
    stream: str
    position: int

    @property
    def id(self) -> EventId:
        """The identity that the decoded event will have, or one made from its position."""
        rank, idx = named(self.payload) or (-1, self.position)
        return EventId(self.stream, rank, idx)

    @property
    def nbytes(self) -> int:
        """About how many bytes the payload takes in memory."""
        return _nbytes(self.payload)


Record = Event | Result | ForeignItem


@dataclass(slots=True)
class Entry:
    """A record in a queue, and what has happened to it there.

    Attributes
    ----------
    record
        The record.
    id, nbytes
        The record's own.
    losses
        How many readers died, fell silent or failed while they held it.
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
    def may_be_poison(self) -> bool:
        """Whether this may be a poison message, which costs every reader that takes it."""
        return self.losses >= _POISON_AFTER


def entry_of(record: Record, uid: str = "") -> Entry:
    """Return a fresh entry for a record.

    A record that cannot be kept as it is (see `plain`) becomes an entry with a reason for
    quarantine, under an identity that can be kept. The same record always gets the same identity,
    so a repeated put adds nothing.

    Parameters
    ----------
    record
        Anything that came in place of a record.
    uid
        Identifies the queue; identities that are made up contain it.
    """
    try:
        record, reason = plain(record), None
    except ValueError as error:
        reason = str(error)
        record = _in_place_of(record, uid)
    return Entry(record, record.id, record.nbytes, reason=reason)


def _in_place_of(record: Event | Result | ForeignItem, uid: str) -> ForeignItem:
    """Return an item that can be kept, made of the parts of a record that cannot."""
    parts = [sanitized(getattr(record, name, None)) for name in ("image", "photon_energy")]
    key = EventId(*map(plain_identity, record.id))
    if identity_problem(key) is None:
        return ForeignItem([key.rank, key.idx, *parts], key.stream, _position_of(key))
    stated = [described(part, _TEXT) for part in key]
    # Parts that are neither text nor integers may differ and still have the same text.
    known = all(isinstance(part, str | int) for part in key)
    position = _position_of(key) if known else _position_of((*key, *parts))
    return ForeignItem([*stated, *parts], f"{uid}#refused", position)


def _position_of(parts: tuple[Any, ...]) -> int:
    """Return a number that distinguishes items that do not state an identity."""
    digest = hashlib.blake2b(digest_size=7)
    for part in parts:
        digest.update(_exactly(part))
    return int.from_bytes(digest.digest())


def purged(record: Event | Result) -> Event | Result:
    """Return a record without objects of foreign classes, so that any process can unpickle it.

    In their place is what they say of themselves: see `sanitized`.

    Raises
    ------
    TypeError
        If it is no record, or its identity is none.
    """
    if not isinstance(record, Event | Result):
        raise TypeError(f"only an Event or a Result can be put, not {described(record, 200)}")
    if _is_pure(record):
        return record
    if not isinstance(record.id, tuple) or len(record.id) != 3:
        raise TypeError(f"an id is (stream, rank, idx), not {described(record.id, 200)}")
    key = EventId(*map(plain_identity, record.id))
    image, energy = sanitized(record.image), sanitized(record.photon_energy)
    bits, put_at = sanitized(record.bad_bits), sanitized(record.put_at)
    if not isinstance(record, Result):
        return Event(key, image, energy, put_at, bits)
    peaks, bad_pixels = sanitized(record.peaks), sanitized(record.bad_pixels)
    return Result(
        key,
        image,
        peaks,
        energy,
        bad_pixels,
        put_at,
        bits,
        sanitized(record.saturation),
        sanitized(record.provenance),
    )


def _is_pure(record: Event | Result) -> bool:
    """Whether a record is what its annotations say, without any foreign class."""
    arrays = [record.image] if record.bad_bits is None else [record.image, record.bad_bits]
    numbers = [record.photon_energy, record.put_at]
    if isinstance(record, Result):
        arrays.append(record.peaks)
        numbers += [record.bad_pixels, record.saturation or 0.0]
        if type(record.provenance) not in (str, type(None)):
            return False
    return (
        type(record) in (Event, Result)
        and type(record.id) is EventId
        and list(map(type, record.id)) == [str, int, int]
        and all(map(is_plain_array, arrays))
        and all(type(one) is float or (type(one) is int and abs(one) < 2**63) for one in numbers)
    )


def plain(record: Record) -> Record:
    """Return a record that any reader can unpickle and a spool can write: see `purged`.

    An event that holds anything but an array and a number becomes an item that its reader refuses,
    under the event's own identity.

    Raises
    ------
    ValueError
        If its identity cannot be kept, or if it is a result that holds anything else.
    """
    if isinstance(record, ForeignItem):
        return record
    record = purged(record)
    problem = identity_problem(record.id)
    if problem is not None:
        raise ValueError(f"{described(tuple(record.id), 200)} cannot be kept: {problem}")
    if _is_pure(record) and type(record.photon_energy) is float:
        return record
    if isinstance(record, Result):
        raise ValueError(
            f"result {record.id}: image, peaks and mask must be arrays, its provenance text, and "
            "all else numbers"
        )
    image, energy, bits = record.image, record.photon_energy, record.bad_bits
    is_number = type(energy) in (int, float) and abs(energy) < 1e300
    if is_plain_array(image) and is_number and (bits is None or is_plain_array(bits)):
        put_at = record.put_at if type(record.put_at) in (int, float) else 0.0
        return Event(record.id, image, float(energy), put_at, bits)
    payload = [record.id.rank, record.id.idx, image, energy]
    return ForeignItem(payload, record.id.stream, _position_of(record.id))


def _exactly(part: Any) -> bytes:
    """Return bytes that are different for each integer, text and array."""
    if isinstance(part, np.ndarray):
        return part.tobytes()
    kind = type(part)
    text = hex(part) if kind is int else repr(part) if kind is str else described(part, _TEXT)
    return f"{kind.__name__} {text}\n".encode()


def _nbytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value), start=_POINTER * len(value))
    return len(value) if isinstance(value, str | bytes) else 0
