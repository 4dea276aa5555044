"""Kinds of items that a queue of events may be given, and what has to become of each.

An item is what psana-ray's producer puts: ``[rank, idx, image, photon_energy]``. Each kind is wrong
in one way of its own, or odd and legal all the same.
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import enum
import importlib
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

RANK = 5
"""The rank of all items that state one that can be kept, but for some whose idx is peculiar."""

WRITTEN = "written"
AT_PUT = "refused at put"

Image = np.ndarray[Any, Any]
Make = Callable[[int, Image], Any]


_NEGATIVE = {"idx: -1", "idx: -2**63", "rank: -1"}


class Kind(NamedTuple):
    """One kind of item.

    Attributes
    ----------
    name
        What is peculiar about it.
    fate
        `WRITTEN` if it is legal, `AT_PUT` if it cannot be pickled, or what the reason in the
        quarantine must contain.
    make
        Makes the item for an idx out of a good image.
    """

    name: str
    fate: str
    make: Make

    @property
    def is_written_of_ours(self) -> bool:
        """Whether an event of these parts is legal where a producer of our own puts it."""
        # Only what knows no negative numbers of its own takes them for none.
        return self.fate == WRITTEN or self.name in _NEGATIVE

    @property
    def is_refused_at_put(self) -> bool:
        """Whether no queue ever sees it."""
        return self.fate == AT_PUT


class Raises:
    """Every method that a reader might call raises."""

    def _raise(self, *args: Any) -> Any:
        raise ZeroDivisionError("from a method of a foreign class")

    __eq__ = __len__ = __repr__ = __str__ = __array__ = __bool__ = __float__ = __iter__ = _raise
    __int__ = __index__ = __complex__ = __format__ = __getitem__ = __lt__ = __add__ = _raise
    __hash__ = None  # type: ignore[assignment]
    nbytes = dtype = shape = ndim = property(_raise)


class Lies:
    """Looks like an array at a first glance."""

    dtype = np.dtype(np.float32)
    shape = (1, 32, 32)
    ndim = 3
    size = 1024
    nbytes = -(10**9)

    def reshape(self, *args: Any) -> Lies:
        return self

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.zeros((1, 32, 32), np.float32)


class LongText:
    """Its text is endless to everybody who asks for it."""

    def __repr__(self) -> str:
        return "long " * 10**6


class WrongText:
    """Its text is no text."""

    def __repr__(self) -> Any:
        return 42


class Exits:
    """Asking for its text ends the process that asks."""

    def __repr__(self) -> str:
        sys.exit(9)

    __float__ = __len__ = __array__ = __repr__


class Interrupts:
    """Asking for its text is like Ctrl-C."""

    def __repr__(self) -> str:
        raise KeyboardInterrupt

    __float__ = __len__ = __array__ = __repr__


class Slow:
    """Takes its time to become an object again."""

    def __reduce__(self) -> Any:
        return _slowly, ()


def _slowly() -> str:
    time.sleep(0.02)
    return "slow"  # and not None, which ends a stream


class Unpicklable:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise ZeroDivisionError("cannot be pickled")


class Unpickled:
    """Raises where it is unpickled."""

    def __init__(self, error: type[BaseException], *args: Any) -> None:
        self.what = error, args

    def __reduce__(self) -> Any:
        return _raise, self.what


def _raise(error: type[BaseException], args: tuple[Any, ...]) -> None:
    raise error(*args)


class MissingModule:
    """Of a module that is not where it is unpickled."""

    def __reduce__(self) -> Any:
        return importlib.import_module, ("a_module_that_nobody_has",)


class Colour(enum.IntEnum):
    """An integer with a name."""

    RED = 9500


class Derived(np.ndarray):
    """An array of a class of its own."""


class DerivedMasked(np.ma.MaskedArray):
    """A masked array of a class of its own."""


class Evil(np.ndarray):
    """An array whose properties raise."""

    @property
    def nbytes(self) -> Any:
        raise ZeroDivisionError("no size")

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("no arithmetic")

    def __len__(self) -> int:
        raise ZeroDivisionError("no length")


class Number(float):
    """A number of a class of its own, whose methods raise."""

    def __float__(self) -> float:
        raise ZeroDivisionError("no number")

    __repr__ = __str__ = __float__  # type: ignore[assignment]


class Integer(int):
    """An integer of a class of its own, whose methods raise."""

    def __int__(self) -> int:
        raise ZeroDivisionError("no integer")

    __repr__ = __str__ = __index__ = __hash__ = __int__  # type: ignore[assignment]


class Sequence(list):  # type: ignore[type-arg]
    """A list of a class of its own."""

    def __len__(self) -> int:
        raise ZeroDivisionError("no length")


class Quadruple(NamedTuple):
    """An item with names."""

    rank: int
    idx: int
    image: Image
    photon_energy: float


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: int


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args: value


def _with_image(make: Callable[[Image], Any]) -> Make:
    return lambda idx, image: [RANK, idx, make(image), 9500.0]


def _with_energy(energy: Any) -> Make:
    return lambda idx, image: [RANK, idx, image, energy]


def _with_identity(make: Callable[[int], tuple[Any, Any]]) -> Make:
    return lambda idx, image: [*make(idx), image, 9500.0]


def _nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def _cycle() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return own


def _cyclic_dictionary() -> dict[str, Any]:
    own: dict[str, Any] = {}
    own["own"] = own
    return own


def _forged_mask(image: Image) -> Any:
    masked = np.ma.MaskedArray(image.copy(), image > 1e9)
    masked.__dict__["_mask"] = np.zeros((3, 5), np.bool_)
    return masked


def _masked(image: Image) -> Any:
    mask = np.zeros(image.shape, np.bool_)
    mask[..., 0, :3] = True
    return np.ma.MaskedArray(image, mask)


def _structured(image: Image) -> Image:
    return np.zeros(image.shape, [("counts", "f4"), ("quality", "u1")])


def _objects(image: Image, value: Any) -> Image:
    filled = np.empty(image.shape, object)
    filled.fill(value)
    return filled


def _pictures() -> Iterator[tuple[str, str, Callable[[Image], Any]]]:
    """Yield what may stand in place of the image."""
    no_array = "not an ndarray"
    for name, value in _values().items():
        yield f"image: {name}", no_array, _always(value)
    yield "image: nested lists", no_array, lambda image: image.tolist()
    yield "image: bytes of an array", no_array, lambda image: image.tobytes()
    yield "image: array.array", no_array, lambda image: array.array("f", image.ravel())
    yield "image: bytearray", no_array, lambda image: bytearray(image.tobytes())
    yield "image: NumPy scalar", no_array, lambda image: image.ravel()[0]
    yield "image: torch tensor", no_array, _tensor
    yield "image: sparse matrix", no_array, _sparse
    yield "image: pretends to be an array", no_array, lambda image: Lies()
    yield "image: list of arrays", no_array, lambda image: [image, image]
    yield "image: object array", no_array, lambda image: image.astype(object)
    yield "image: object array of a cycle", no_array, lambda image: _objects(image, _cycle())
    yield "image: object array that raises", no_array, lambda image: _objects(image, Raises())
    yield "image: structured", no_array, _structured
    yield "image: record array", no_array, lambda image: _structured(image).view(np.recarray)
    yield "image: void", no_array, lambda image: np.zeros(image.shape, "V7")
    yield "image: masked objects", no_array, lambda image: np.ma.MaskedArray(image.astype(object))
    yield "image: masked records", no_array, lambda image: np.ma.MaskedArray(_structured(image))
    yield "image: masked constant", "has shape", lambda image: np.ma.masked
    yield "image: mask of another shape", no_array, _forged_mask
    yield "image: 0-d", "has shape", lambda image: np.array(3.0, np.float32)
    yield "image: 1-d", "has shape", lambda image: image[0, 0]
    yield "image: 4-d", "has shape", lambda image: image[None]
    yield "image: 5-d", "has shape", lambda image: image[None, None]
    yield "image: 32-d", "has shape", lambda image: np.zeros((1,) * 32, np.float32)
    yield "image: no panel", "is empty", lambda image: image[:0]
    yield "image: no row", "is empty", lambda image: image[:, :0]
    yield "image: no column", "is empty", lambda image: image[..., :0]
    yield "image: masked and empty", "is empty", lambda image: np.ma.MaskedArray(image[:0])
    yield "image: too large", "max_event_bytes", lambda image: np.zeros((9, 256, 256), np.float32)
    for dtype in ("complex64", "complex128", "bool", "datetime64[s]"):
        yield f"image: {dtype}", f"dtype {dtype}", _cast(dtype)
    yield "image: clongdouble", "dtype complex256", _cast("clongdouble")
    yield "image: timedelta64", "timedelta64", _cast("timedelta64[s]")
    yield "image: longdouble", "which torch cannot hold", _cast("longdouble")
    yield "image: text", "<U", lambda image: image.astype(str)
    yield "image: byte strings", "|S", lambda image: image.astype("S4")
    yield "image: empty text", "<U1", lambda image: np.empty(image.shape, "U0")
    yield "image: 0-d text with a NUL", "could not be read", lambda i: np.array("a\0b\n\ud800c")
    nothing = "no pixel of the image is finite"
    yield "image: all NaN", nothing, lambda image: np.full_like(image, np.nan)
    yield "image: all inf", nothing, lambda image: np.full_like(image, np.inf)
    yield "image: all -inf", nothing, lambda image: np.full_like(image, -np.inf)
    yield "image: all masked", nothing, lambda image: np.ma.MaskedArray(image, np.ones(1, bool))
    yield "image: all dead", nothing, lambda image: np.full(image.shape, 65535, np.uint16)
    yield "image: Fortran order", WRITTEN, np.asfortranarray
    yield "image: negative strides", WRITTEN, lambda image: image[:, ::-1, ::-1]
    yield "image: every second column", WRITTEN, lambda image: image.repeat(2, axis=-1)[..., ::2]
    yield "image: read-only", WRITTEN, _read_only
    yield "image: big-endian float32", WRITTEN, _cast(">f4")
    yield "image: big-endian uint16", WRITTEN, _cast(">u2")
    for dtype in ("float16", "float64", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        yield f"image: {dtype}", WRITTEN, _cast(dtype)
    yield "image: one panel without its axis", WRITTEN, lambda image: image[0]
    yield "image: matrix", WRITTEN, lambda image: image[0].view(np.matrix)
    yield "image: derived class", WRITTEN, lambda image: image.view(Derived)
    yield "image: derived class that raises", WRITTEN, lambda image: image.view(Evil)
    yield "image: dtype with a note", WRITTEN, _with_note
    yield "image: masked", WRITTEN, _masked
    yield "image: masked, nothing masked", WRITTEN, np.ma.MaskedArray
    yield "image: derived masked class", WRITTEN, lambda image: _masked(image).view(DerivedMasked)
    yield "image: hard mask", WRITTEN, lambda image: _masked(image).harden_mask()


def _cast(dtype: str) -> Callable[[Image], Image]:
    return lambda image: np.asarray(np.rint(image)).astype(np.int64).astype(dtype)


def _read_only(image: Image) -> Image:
    image = image.copy()
    image.flags.writeable = False
    return image


def _with_note(image: Image) -> Image:
    return image.astype(np.dtype("f4", metadata={"unit": "ADU"}))


def _tensor(image: Image) -> Any:
    import torch

    return torch.from_numpy(image.copy())


def _sparse(image: Image) -> Any:
    import scipy.sparse

    return scipy.sparse.csr_array(image[0])


def _values() -> dict[str, Any]:
    """Return objects that are neither an image, nor a number, nor an item."""
    return {
        "None": None,
        "nothing but text": "text",
        "text with a NUL": "a\0b",
        "half a surrogate pair": "\ud800",
        "text with line breaks": "one\n12:00:00 INFO forged\r\x1b[2J",
        "bytes": b"\0\xff\n",
        "a set": {1, 2},
        "a frozen set of NaN": frozenset({float("nan")}),
        "a dictionary": {"rank": 5},
        "a cyclic dictionary": _cyclic_dictionary(),
        "a cyclic list": _cycle(),
        "lists in lists": _nested(300),
        "Ellipsis": ...,
        "NotImplemented": NotImplemented,
        "a type": int,
        "a function": len,
        "a lambda": lambda: 0,
        "a module": types,
        "a range": range(3),
        "a slice": slice(1, 2),
        "an exception": ValueError("an item"),
        "a deque": collections.deque([1]),
        "a counter": collections.Counter("abc"),
        "a date": datetime.datetime(2026, 11, 28),
        "a UUID": uuid.UUID(int=5),
        "a named tuple": Point(1, 2),
        "a dtype": np.dtype("f4"),
        "a class that raises": Raises(),
        "a long text": LongText(),
        "a wrong text": WrongText(),
        "a class that exits": Exits(),
        "a class that interrupts": Interrupts(),
        "slow to unpickle": Slow(),
    }


def _energies() -> Iterator[tuple[str, str, Any]]:
    """Yield what may stand in place of the photon energy."""
    for name, value in _values().items():
        yield f"energy: {name}", "photon energy", value
    bad = {
        "NaN": float("nan"),
        "infinite": float("inf"),
        "-infinite": float("-inf"),
        "0": 0.0,
        "negative": -9500.0,
        "tiny": 5e-324,
        "10**400": 10**400,
        "an integer of 5000 digits": 10**5000,
        "-10**5000": -(10**5000),
        "True": True,
        "complex": 9500 + 0j,
        "complex64": np.complex64(9500),
        "digits": "9500",
        "digits in bytes": b"9500",
        "datetime64": np.datetime64(9500, "s"),
        "timedelta64": np.timedelta64(9500, "s"),
        "not a time": np.datetime64("NaT"),
        "longdouble beyond float": np.longdouble("1e4000"),
        "float16 NaN": np.float16("nan"),
        "NumPy text": np.str_("9500"),
        "NumPy bool": np.bool_(True),
        "an array of two": np.array([9500.0, 1.0]),
        "an array of none": np.array([]),
        "a list of one": [9500.0],
        "object array": np.array([None], object),
        "a decimal number beyond float": decimal.Decimal("1e500"),
        "joules": 1.5e-15,
    }
    for name, value in bad.items():
        yield f"energy: {name}", "photon energy", value
    good = {
        "int": 9500,
        "float32": np.float32(9500),
        "float16": np.float16(9504),
        "int64": np.int64(9500),
        "uint16": np.uint16(9500),
        "longdouble": np.longdouble(9500),
        "derived class that raises": Number(9500.0),
        "an integer of a class": Integer(9500),
        "IntEnum": Colour.RED,
        "0-d array": np.array(9500.0),
    }
    for name, value in good.items():
        yield f"energy: {name}", WRITTEN, value


def _identities() -> Iterator[tuple[str, str, Callable[[int], tuple[Any, Any]]]]:
    """Yield what may stand in place of rank and idx."""
    no_identity = "must be integers from 0"
    for name, value in _values().items():
        yield f"idx: {name}", no_identity, _always((RANK, value))
    bad: dict[str, Callable[[int], tuple[Any, Any]]] = {
        "idx: -1": lambda idx: (RANK, -1),
        "idx: -2**63": lambda idx: (RANK, -(2**63)),
        "idx: 2**63": lambda idx: (RANK, 2**63),
        "idx: 2**64": lambda idx: (RANK, 2**64 + idx),
        "idx: 5000 digits": lambda idx: (RANK, 10**5000 + idx),
        "idx: True": lambda idx: (RANK, True),
        "idx: float": lambda idx: (RANK, float(idx)),
        "idx: NaN": lambda idx: (RANK, float("nan")),
        "idx: complex": lambda idx: (RANK, complex(idx)),
        "idx: digits": lambda idx: (RANK, str(idx)),
        "idx: NumPy bool": lambda idx: (RANK, np.bool_(False)),
        "idx: float64": lambda idx: (RANK, np.float64(idx)),
        "idx: datetime64": lambda idx: (RANK, np.datetime64(idx, "s")),
        "idx: timedelta64": lambda idx: (RANK, np.timedelta64(idx, "s")),
        "idx: array": lambda idx: (RANK, np.array([idx])),
        "idx: 0-d array": lambda idx: (RANK, np.array(idx)),
        "idx: uint64 beyond int64": lambda idx: (RANK, np.uint64(2**63 + idx)),
        "rank: -1": lambda idx: (-1, idx),
        "rank: 2**63": lambda idx: (2**63, idx),
        "rank: 2**64": lambda idx: (2**64, idx),
        "rank: text": lambda idx: ("five\n", idx),
        "rank: None": lambda idx: (None, idx),
        "rank: float": lambda idx: (5.0, idx),
        "rank: True": lambda idx: (True, idx),
        "rank: a class that raises": lambda idx: (Raises(), idx),
    }
    for name, make in bad.items():
        yield name, no_identity, make
    good: dict[str, Callable[[int], tuple[Any, Any]]] = {
        "idx: int64": lambda idx: (RANK, np.int64(idx)),
        "idx: uint64": lambda idx: (RANK, np.uint64(idx)),
        "idx: a class whose methods raise": lambda idx: (RANK, Integer(idx)),
        "rank: uint8": lambda idx: (np.uint8(RANK), idx),
        "rank: IntEnum": lambda idx: (Colour.RED, idx),
        "rank: 2**63 - 1": lambda idx: (2**63 - 1, idx),
    }
    for name, make in good.items():
        yield name, WRITTEN, make


def _items() -> Iterator[tuple[str, str, Make]]:
    """Yield what may stand in place of a whole item."""
    no_item = "expected [rank, idx, image, photon_energy]"
    for name, value in _values().items():
        if value is not None:  # the end of a stream
            yield f"item: {name}", no_item, _always(value)
    yield "item: empty list", no_item, lambda idx, image: []
    yield "item: three parts", no_item, lambda idx, image: [RANK, idx, image]
    yield "item: five parts", no_item, lambda idx, image: [RANK, idx, image, 9500.0, 0]
    yield "item: the image alone", no_item, lambda idx, image: image
    yield "item: an integer", no_item, lambda idx, image: 10**5000
    yield "item: an item in a list", no_item, lambda idx, image: [[RANK, idx, image, 9500.0]]
    yield "item: 100,000 Nones", no_item, lambda idx, image: [None] * 10**5
    yield "item: array of its parts", no_item, _array_of_parts
    yield "item: its parts in a dictionary", no_item, _as_dictionary
    yield "item: tuple", WRITTEN, lambda idx, image: (RANK, idx, image, 9500.0)
    yield "item: named tuple", WRITTEN, lambda idx, image: Quadruple(RANK, idx, image, 9500.0)
    yield "item: derived list", WRITTEN, lambda idx, image: Sequence([RANK, idx, image, 9500.0])
    errors: list[tuple[type[BaseException], tuple[Any, ...]]] = [
        (ValueError, ("no",)),
        (MemoryError, ()),
        (RecursionError, ()),
        (StopIteration, ()),
        (GeneratorExit, ()),
        (SystemExit, (0,)),
        (SystemExit, ("a\nforged line",)),
        (KeyboardInterrupt, ()),
        (BaseException, ("no",)),
        (UnicodeDecodeError, ("utf-8", b"\xff", 0, 1, "no")),
        (OSError, (28, "No space left on device")),
        (Exception, ("\ud800\0\n",)),
    ]
    cannot = "cannot be unpickled"
    for error, args in errors:
        name = f"item: unpickling raises {error.__name__}{args or ''!a}"
        yield name, cannot, _with_image(_always(Unpickled(error, *args)))
    yield "item: of a missing module", cannot, lambda idx, image: [RANK, idx, MissingModule(), 0]
    yield "item: an error of Ray's", no_item, _error_of_ray
    yield "item: 100,000 lists in lists", AT_PUT, lambda idx, image: _nested(100_000)
    yield "item: generator", AT_PUT, lambda idx, image: [RANK, idx, (k for k in image), 9500.0]
    yield "item: cannot be pickled", AT_PUT, lambda idx, image: [RANK, idx, Unpicklable(), 9500.0]
    yield "item: a lock", AT_PUT, lambda idx, image: [RANK, idx, threading.Lock(), 9500.0]
    yield "item: an open file", AT_PUT, lambda idx, image: [RANK, idx, sys.__stderr__, 9500.0]
    yield "item: a frame", AT_PUT, lambda idx, image: [RANK, idx, sys._getframe(), 9500.0]


def _error_of_ray(idx: int, image: Image) -> Any:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def _array_of_parts(idx: int, image: Image) -> Image:
    parts = np.empty(4, object)
    parts[:] = [RANK, idx, image, 9500.0]
    return parts


def _as_dictionary(idx: int, image: Image) -> dict[str, Any]:
    return {"rank": RANK, "idx": idx, "image": image, "photon_energy": 9500.0}


def kinds() -> list[Kind]:
    """Return all kinds, each with a name of its own."""
    found = [
        *(Kind(name, fate, _with_image(make)) for name, fate, make in _pictures()),
        *(Kind(name, fate, _with_energy(value)) for name, fate, value in _energies()),
        *(Kind(name, fate, _with_identity(make)) for name, fate, make in _identities()),
        *(Kind(*item) for item in _items()),
    ]
    assert len({kind.name for kind in found}) == len(found)
    return found


GOOD = Kind("good", WRITTEN, lambda idx, image: [RANK, idx, image, 9500.0])
"""What an item should be."""
