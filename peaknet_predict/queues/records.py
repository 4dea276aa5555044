"""What a queue holds: events, results, and what other programs put."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from peaknet_predict.queues.wire import Opaque, described, named
from peaknet_predict.types import Event, EventId, Result, identity_problem

Kind = Literal["events", "results"]

END_MARKER = "END"
"""What readers that know only ``get`` receive at the end of a queue of results."""

_POISON_AFTER = 2  # losses; two of them are hardly ever a coincidence
_DEPTH = 4  # of nested lists; anything deeper is not an event
_TEXT = 1000  # characters kept of an object that is none of ours
_LONGEST_INTEGER = 4096  # bits
_PLAIN = frozenset({type(None), bool, float, complex, str, bytes})


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
    key = record.id
    if identity_problem(key) is None:
        return ForeignItem([int(key.rank), int(key.idx), *parts], key.stream, _position_of(key))
    stated = [described(part, _TEXT) for part in key]
    return ForeignItem([*stated, *parts], f"{uid}#refused", _position_of(key))


def _position_of(key: EventId) -> int:
    """Return a number that distinguishes items that do not state an identity."""
    exactly = "\n".join(_exactly(part) for part in key)
    return int.from_bytes(hashlib.blake2b(exactly.encode(), digest_size=7).digest())


def plain(record: Record) -> Record:
    """Return a record that any reader can unpickle and a spool can write: see `sanitized`.

    An event that holds anything but an array and a number becomes an item that its reader refuses,
    under the event's own identity.

    Raises
    ------
    ValueError
        If its identity cannot be kept, or if it is a result that holds anything else.
    """
    if isinstance(record, ForeignItem):
        return record
    problem = identity_problem(record.id)
    if problem is not None:
        raise ValueError(f"{described(tuple(record.id), 200)} cannot be kept: {problem}")
    arrays = [record.image, record.peaks] if isinstance(record, Result) else [record.image]
    if record.bad_bits is not None:
        arrays.append(record.bad_bits)
    if isinstance(record, Result) and type(record.provenance) not in (str, type(None)):
        raise ValueError(f"result {record.id}: its provenance must be text")
    if all(_is_plain(array) for array in arrays) and type(record.photon_energy) is float:
        return record
    if isinstance(record, Result):
        raise ValueError(f"result {record.id}: image, peaks and mask must be arrays of numbers")
    image, energy = sanitized(record.image), sanitized(record.photon_energy)
    bits = sanitized(record.bad_bits)
    is_number = type(energy) in (int, float) and abs(energy) < 1e300
    if _is_plain(image) and is_number and (bits is None or _is_plain(bits)):
        return replace(record, image=image, photon_energy=float(energy), bad_bits=bits)
    payload = [int(record.id.rank), int(record.id.idx), image, energy]
    return ForeignItem(payload, record.id.stream, _position_of(record.id))


def sanitized(value: Any, depth: int = _DEPTH) -> Any:
    """Return a foreign object in which all but plain data and arrays is replaced.

    Readers in other environments can then unpickle it, and a spool can write it. Never raises.
    """
    kind = type(value)
    if kind in _PLAIN or (kind is int and value.bit_length() <= _LONGEST_INTEGER):
        return value
    if _is_plain(value):
        return value
    if kind is list and depth > 0:
        return [sanitized(part, depth - 1) for part in value]
    if kind is tuple and depth > 0:
        return tuple(sanitized(part, depth - 1) for part in value)
    try:
        base = _without_its_class(value)
    except Exception:  # a foreign class's methods may raise anything
        base = value
    if isinstance(base, np.ma.MaskedArray):
        return base
    return Opaque(described(value, _TEXT)) if base is value else sanitized(base, depth)


def _without_its_class(value: Any) -> Any:
    """Return an object of a class derived from plain data as plain data; others as they are."""
    if isinstance(value, np.ma.MaskedArray):
        pixels = np.asarray(value)
        mask = np.array(np.ma.getmaskarray(value))
        return np.ma.MaskedArray(pixels, mask) if _is_plain(pixels) else pixels
    if type(value) is not np.ndarray and isinstance(value, np.ndarray):
        return np.asarray(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, np.complexfloating):
        return complex(value)
    for base in (float, complex, str, bytes, list, tuple, int):
        if isinstance(value, base) and type(value) is not base:
            # Without asking the derived class, whose methods may do anything.
            return base.__add__(value, base())  # type: ignore[operator]
    return value


def _is_plain(value: Any) -> bool:
    """Whether an array consists of its bytes, and its dtype's name says how to read them."""
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return dtype.kind in "biufcSUmM" and np.dtype(dtype.str) == dtype and dtype.itemsize > 0


def _exactly(part: Any) -> str:
    """Return a text that is different for each integer and each text."""
    if isinstance(part, int):
        return hex(part)
    return repr(str(part)) if isinstance(part, str) else described(part, _TEXT)


def _nbytes(value: Any, depth: int) -> int:
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, str | bytes):
        return len(value)
    if depth > 0 and isinstance(value, list | tuple):
        return sum(_nbytes(part, depth - 1) for part in value)
    return 0
