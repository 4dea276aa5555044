"""Objects of foreign classes as plain data: any process can unpickle it, any spool write it."""

from __future__ import annotations

from typing import Any

import numpy as np

from peaknet_predict.process.stopping import uninterrupted
from peaknet_predict.queues.wire import Opaque, described

_DEPTH = 4  # of lists in lists; what is deeper is no event
_TEXT = 1000  # characters kept of an object that is none of ours
_LONGEST_INTEGER = 4096  # bits
_PLAIN = frozenset({type(None), bool, float, complex, str, bytes})


def sanitized(value: Any, depth: int = _DEPTH) -> Any:
    """Return a foreign object with everything in it that is neither plain data nor array replaced.

    Readers in other environments can then unpickle it, and a spool can write it. Never raises.
    """
    kind = type(value)
    if kind in _PLAIN or (kind is int and value.bit_length() <= _LONGEST_INTEGER):
        return value
    if is_plain_array(value):
        return value
    if kind is list and depth > 0:
        return [sanitized(part, depth - 1) for part in value]
    if kind is tuple and depth > 0:
        return tuple(sanitized(part, depth - 1) for part in value)
    # The methods of a foreign class may raise anything, also what a signal raises.
    with uninterrupted():
        try:
            base = _without_its_class(value)
        except BaseException:
            base = value
    if base is value:
        return Opaque(described(value, _TEXT))
    return base if isinstance(base, np.ma.MaskedArray) else sanitized(base, depth)


def plain_identity(part: Any) -> Any:
    """Return a stream's name, rank or idx as a `str` or an `int`, if it is one, of any size."""
    if isinstance(part, int) and not isinstance(part, bool):
        return int.__add__(part, 0)
    return sanitized(part)


def is_plain_array(value: Any) -> bool:
    """Whether this is an array that is its bytes, and whose type's name says how to read them."""
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return dtype.kind in "biufcSUmM" and np.dtype(dtype.str) == dtype and dtype.itemsize > 0


def _without_its_class(value: Any) -> Any:
    """Return an object of a class derived from plain data as plain data; others as they are."""
    if isinstance(value, np.ma.MaskedArray):
        pixels = np.asarray(value)
        mask = np.array(np.ma.getmaskarray(value))
        return np.ma.MaskedArray(pixels, mask) if is_plain_array(pixels) else pixels
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
