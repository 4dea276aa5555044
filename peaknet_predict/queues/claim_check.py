"""Claim checks: pixels lie in Ray's object store, and a queue hands on where they lie.

A producer writes the arrays of some records into the store as one object, a lot, and tells the
queue which record has which of its arrays. The queue maps the lot: it reads the same memory, and
that memory stays for as long as it is mapped, whatever becomes of the producer. A reader is told
where the pixels lie and maps them too, and its own results name the same place. So the pixels of an
event are written once on their way from the producer through both queues to the file's writer.

The reference to a lot belongs to the process that made it. Once that is dead, a process on another
machine cannot follow the reference any more, and asks the queue for the pixels themselves.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from peaknet_predict.queues.plain_data import is_plain_array
from peaknet_predict.queues.records import ForeignItem, Record

Reference = Any
"""An ``ObjectRef`` of Ray, which has no type that is worth its name."""

INLINE_BYTES = 8192
"""Smaller arrays travel within the record: looking one up costs more than copying it."""

OUT_OF_REACH = "the queue cannot reach the pixels; they are written anew"
"""Why a queue takes no records: it cannot map their lots."""

_FIELDS = ("image", "bad_bits")  # of a record, that can be large

Places = dict[str, tuple[int, int]]
"""Of the fields of a record that lie in lots: in which of the lots, and which of its arrays."""


class Claim(NamedTuple):
    """Where an array lies: in which lot, and which of its arrays it is."""

    lot: Reference
    place: int


class Claims:
    """Which arrays of this process are mapped from lots.

    An array is known for as long as it exists, and so is the reference to its lot: the owner of a
    lot keeps it for as long as somebody has that.
    """

    def __init__(self) -> None:
        self._claims: dict[int, tuple[weakref.ref[Any], Claim]] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def note(self, array: Any, claim: Claim) -> None:
        """Note where an array lies, if nobody can change it."""
        if array.flags.writeable:
            return  # no part of the lot, but a copy: Ray makes one where it cannot map
        key = id(array)
        # The callback comes before the number can be that of another object.
        forget = weakref.ref(array, lambda _: self._claims.pop(key, None) and None)
        self._claims[key] = forget, claim

    def of(self, array: Any) -> Claim | None:
        """Return where an array lies; None if it is in no lot that is known."""
        known, claim = self._claims.get(id(array), (None, None))
        return claim if known is not None and known() is array else None


class Checked(NamedTuple):
    """Records without the arrays that lie in lots.

    Attributes
    ----------
    records
        The records, the fields that lie elsewhere being None.
    places
        Of each record, where these fields lie.
    lots
        References of the lots, by the numbers in ``places``.
    """

    records: list[Record]
    places: list[Places]
    lots: list[Reference]

    def after(self, taken: int) -> Checked:
        """Return what is left when the first ``taken`` records are gone."""
        return Checked(self.records[taken:], self.places[taken:], self.lots)


def check_in(records: Iterable[Record], claims: Claims, store: Any = None) -> Checked:
    """Take large arrays out of records.

    Parameters
    ----------
    records
        Left as they are; what is returned are copies.
    claims
        Where arrays lie already.
    store
        Writes a list of arrays into the object store and returns its reference, as ``ray.put``.
        Without, arrays that lie in no lot stay in their records.
    """
    numbers: dict[Reference, int] = {}
    places: list[Places] = []
    stripped: list[Record] = []
    new: list[Any] = []
    homeless: list[tuple[Places, str]] = []
    for record in records:
        found: Places = {}
        places.append(found)
        if isinstance(record, ForeignItem):
            stripped.append(record)
            continue
        light = record
        for field in _FIELDS:
            array = getattr(record, field)
            if not is_plain_array(array) or array.nbytes < INLINE_BYTES:
                continue
            claim = claims.of(array)
            if claim is not None:
                found[field] = numbers.setdefault(claim.lot, len(numbers)), claim.place
            elif store is not None:
                homeless.append((found, field))
                # Ray maps only what is in one piece.
                new.append(array if array.flags.forc else np.ascontiguousarray(array))
            else:
                continue
            if light is record:
                light = copy.copy(record)
            setattr(light, field, None)
        stripped.append(light)
    lots = list(numbers)
    if new:
        lots.append(store(new))
        for place, (found, field) in enumerate(homeless):
            found[field] = len(lots) - 1, place
    return Checked(stripped, places, lots)


def check_out(checked: Checked, contents: Sequence[Sequence[Any]], claims: Claims) -> list[Record]:
    """Give records their arrays back, and note where these lie.

    Parameters
    ----------
    checked
        What `check_in` returned, in another process; its records are completed in place.
    contents
        Of each lot, the arrays in it.
    claims
        Where to note them.
    """
    known: dict[tuple[int, int], Any] = {}
    for record, places in zip(checked.records, checked.places, strict=True):
        for field, (number, place) in places.items():
            array = contents[number][place]
            if (number, place) not in known:
                claims.note(array, Claim(checked.lots[number], place))
                known[number, place] = array
            setattr(record, field, array)
    return checked.records
