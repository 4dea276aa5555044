"""The items that other programs put into our queues and take out of them.

psana-ray puts the list ``[rank, idx, image, photon_energy]`` into an input queue. The file writers
of its pipelines take lists of tuples ``(image, peaks, photon_energy)`` from an output queue, where
``peaks`` is a list of ``[panel, y, x]``. Items that do not fit are refused one by one, with a
reason.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from peaknet_predict.pixels import unpack_mask
from peaknet_predict.process.stopping import uninterrupted
from peaknet_predict.process.text import printable
from peaknet_predict.types import Event, EventId, Refusal, Result, identity_problem


def event_to_item(event: Event) -> list[Any]:
    """Return the list that a reader of psana-ray's queue expects.

    An image with declared bad pixels goes out as a masked array.
    """
    image = event.image
    if event.bad_bits is not None:
        image = np.ma.MaskedArray(image, unpack_mask(event.bad_bits, image.shape))
    return [event.id.rank, event.id.idx, image, event.photon_energy]


def item_to_event(item: Any, stream: str, position: int) -> Event | Refusal:
    """Decode what psana-ray's producer puts.

    Parameters
    ----------
    item
        ``[rank, idx, image, photon_energy]``, or anything at all.
    stream
        Name of the stream the item came through.
    position
        The item's place in the stream; names the event where the item itself does not.
    """
    unnamed = EventId(stream, -1, position)
    if not isinstance(item, list | tuple) or len(item) != 4:
        return Refusal(
            unnamed, f"expected [rank, idx, image, photon_energy], got {_describe(item)}"
        )
    rank, idx, image, photon_energy = item
    name = named(item)
    if name is None:
        return Refusal(
            unnamed,
            "rank and idx must be integers from 0 to 2^63 - 1, "
            f"got {_describe(rank)} and {_describe(idx)}",
        )
    identity = EventId(stream, *name)
    if not isinstance(image, np.ndarray):
        return Refusal(identity, f"image is {_describe(image)}, not an ndarray")
    energy = _as_float(photon_energy)
    if energy is None:
        return Refusal(identity, f"photon energy is {_describe(photon_energy)}, not a number")
    return Event(identity, image, energy)


def named(item: Any) -> tuple[int, int] | None:
    """Return the rank and idx that a producer's item states; None without any that fit."""
    if not isinstance(item, list | tuple) or len(item) != 4:
        return None
    rank, idx = item[0], item[1]
    if identity_problem(EventId("", rank, idx)) is not None:
        return None
    # Negative ranks stand for items that state none.
    return (int(rank), int(idx)) if rank >= 0 and idx >= 0 else None


def results_to_item(results: list[Result]) -> list[tuple[Any, list[list[float]], float]]:
    """Return the list of ``(image, peaks, photon_energy)`` that the old file writers expect."""
    return [
        (
            result.image,
            # The panel number as an integer-valued float, as the predecessor's lists have it.
            result.peaks.tolist(),
            result.photon_energy,
        )
        for result in results
    ]


def item_to_results(item: Any, stream: str, position: int) -> list[Result | Refusal]:
    """Decode a list of ``(image, peaks, photon_energy)`` tuples, named by stream and position."""
    if not isinstance(item, list | tuple):
        return [
            Refusal(
                EventId(stream, -1, position),
                f"expected a list of (image, peaks, photon_energy), got {_describe(item)}",
            )
        ]
    return [_decode_result(part, EventId(stream, position, n)) for n, part in enumerate(item)]


def _decode_result(part: Any, identity: EventId) -> Result | Refusal:
    if not isinstance(part, list | tuple) or len(part) != 3:
        return Refusal(identity, f"expected (image, peaks, photon_energy), got {_describe(part)}")
    image, peaks, photon_energy = part
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        return Refusal(identity, f"image is {_describe(image)}, not an ndarray (panels, H, W)")
    try:
        table = np.asarray(peaks, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError, OverflowError):
        return Refusal(identity, f"peaks are not [panel, y, x] triples: {_describe(peaks)}")
    energy = _as_float(photon_energy)
    if energy is None:
        return Refusal(identity, f"photon energy is {_describe(photon_energy)}, not a number")
    return Result(identity, image, table, energy)


def _as_float(value: Any) -> float | None:
    """Return a number as a float, infinity for one that is too large; None for what is none."""
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None  # digits in a text may have any meaning
    try:
        return float(value)
    except OverflowError:
        return math.inf


@dataclass(slots=True)
class Opaque:
    """Stands for an object of a class that other processes may not know: its type and its text.

    Passed on as it came, it would raise in every process that takes it.
    """

    description: str

    def __repr__(self) -> str:
        return self.description


def cannot_unpickle(error: BaseException) -> Opaque:
    """Return what stands for an object that could not be unpickled."""
    with uninterrupted():
        try:
            text = f": {error}"
        except BaseException:
            text = ""
    return Opaque(printable(f"cannot be unpickled: {type(error).__name__}{text}"[:500])[:500])


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an ndarray of shape {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return described(value, 80)


class _Short(reprlib.Repr):
    """Texts of objects, without ever making the text of a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxlong = self.maxother = 1000

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write a number of more than 4300 digits in decimal.
        return repr(x) if x.bit_length() < 4096 else f"(an integer of {x.bit_length()} bits)"

    def repr_instance(self, x: object, level: int) -> str:
        try:
            return repr(x)[: self.maxother]
        except BaseException as error:
            return f"(its repr fails: {type(error).__name__})"


def described(value: Any, length: int) -> str:
    """Return an object's type and the beginning of its text, on one line; never raises."""
    if isinstance(value, Opaque):
        return value.description[:length]
    # The methods of a foreign class may raise anything, also what a signal raises.
    with uninterrupted():
        try:
            text = _Short().repr(value)
        except BaseException as error:
            text = f"(its repr fails: {type(error).__name__})"
    return printable(f"{type(value).__name__} {text}"[:length])[:length]
