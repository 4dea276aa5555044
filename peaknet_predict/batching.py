"""Events into batches: which events can be processed, and their pixels in one tensor.

Shape legend: B events of a batch, P panels of an event, H rows, W columns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from peaknet_predict.photon_energy import explain_implausible, is_plausible
from peaknet_predict.pixels import bits_problem
from peaknet_predict.types import Event, EventBatch, Image, Refusal, Result

MAX_EVENT_BYTES = 512 * 2**20
"""Larger images are refused unless told otherwise: eight times a JUNGFRAU 16M in float32."""

_REASON = 2000  # characters kept of a source's reason

_TORCH_DTYPES = {
    np.dtype(torch.empty(0, dtype=dtype).numpy().dtype): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
        torch.float16,
        torch.float32,
        torch.float64,
    )
}


def check_event(event: Event, max_bytes: int = MAX_EVENT_BYTES) -> str | None:
    """Say why an event cannot be processed; None if it can.

    An implausible photon energy is a reason: CrystFEL indexes nothing with it, silently.
    """
    return check_image(event, max_bytes) or _check_photon_energy(event.photon_energy)


def check_image(event: Event, max_bytes: int = MAX_EVENT_BYTES) -> str | None:
    """Say why no peaks can be found in an event's image; None if they can.

    An image that is a text is a source's reason why there are no pixels, see
    `peaknet_predict.sources.base.unreadable`.
    """
    image = event.image
    if not isinstance(image, np.ndarray):
        return f"image is {_shown(image)}, not an ndarray"
    if image.dtype.kind == "U" and image.ndim == 0:
        return f"the frame could not be read: {image}"[:_REASON]
    if image.ndim not in (2, 3):
        return f"image has shape {image.shape}; expected (panels, H, W) or (H, W)"
    if image.size == 0:
        return f"image is empty: shape {image.shape}"
    if image.nbytes > max_bytes:
        return f"image of {image.nbytes} bytes is larger than max_event_bytes, {max_bytes}"
    if image.dtype.kind not in "iuf":
        return f"image has dtype {image.dtype}; expected integers or floating point"
    if image.dtype.newbyteorder("=") not in _TORCH_DTYPES:
        return f"image has dtype {image.dtype}, which torch cannot hold"
    return None if event.bad_bits is None else bits_problem(event.bad_bits, image.shape)


def _check_photon_energy(value: Any) -> str | None:
    """Say why a photon energy cannot be used; other programs' events may hold anything."""
    try:
        # Raises for what is no real number, and for integers that no float can hold.
        math.isfinite(value)
        return None if is_plausible(value) else explain_implausible(float(value))
    except (TypeError, ValueError, OverflowError):
        return f"photon energy is {_shown(value)} eV; expected a number"


def _shown(value: Any) -> str:
    """Return the beginning of a value's text; of some values (10**5000) Python makes none."""
    try:
        text = str(value)
    except Exception:
        text = ""
    kind = "" if isinstance(value, float) else f"{type(value).__name__} "
    return f"{kind}{text}"[:80].rstrip()


class Batcher:
    """Gathers events of one shape and dtype until they make a batch.

    Items that cannot be processed are refused with a reason, and go out with the batch during which
    they came.

    Parameters
    ----------
    batch_size
        Most events of a batch.
    partial_sizes
        Smaller numbers of rows for batches that are not full. A batch has the smallest number that
        holds its events, so that a compiled network sees few shapes; the rest of its rows are 0.
    pin_memory
        Put the pixels where a GPU can fetch them while the CPU goes on.
    max_event_bytes
        Larger images are refused.
    check
        Says why an event cannot be processed, given the event and ``max_event_bytes``.

    Attributes
    ----------
    oldest_at
        When the first event of the batch came, on the monotonic clock; None without events.

    Raises
    ------
    ValueError
        If a size or limit makes no sense.
    """

    def __init__(
        self,
        batch_size: int,
        partial_sizes: Sequence[int] = (),
        pin_memory: bool = False,
        max_event_bytes: int = MAX_EVENT_BYTES,
        check: Callable[[Event, int], str | None] = check_event,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; a batch needs at least one event")
        if any(not 0 < size < batch_size for size in partial_sizes):
            raise ValueError(
                f"partial_sizes are {list(partial_sizes)}; give numbers from 1 to {batch_size - 1}"
            )
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes is {max_event_bytes}; give a positive number")
        self._sizes = [*sorted(partial_sizes), batch_size]
        self._pin_memory = pin_memory
        self._max_event_bytes = max_event_bytes
        self._check = check
        self._events: list[Event] = []
        self._refused: list[Refusal] = []
        self.oldest_at: float | None = None

    @property
    def room(self) -> int:
        """How many more events the batch takes."""
        return self._sizes[-1] - len(self._events)

    @property
    def is_full(self) -> bool:
        """Whether the batch is to go out."""
        return max(len(self._events), len(self._refused)) >= self._sizes[-1]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come since the batch before."""
        return not self._events and not self._refused

    def add(self, items: Sequence[Event | Result | Refusal]) -> Iterator[EventBatch]:
        """Take items in, and yield each batch that a change of shape or dtype ends early."""
        for item in items:
            refusal = self._refusal(item)
            if refusal is not None:
                self._refused.append(refusal)
                continue
            assert isinstance(item, Event)
            if self._events and _layout(self._events[0]) != _layout(item):
                yield self.take()
            if self.oldest_at is None:
                self.oldest_at = time.monotonic()
            self._events.append(item)

    def take(self) -> EventBatch:
        """Return the batch so far, and begin the next one."""
        events, refused = self._events, self._refused
        self._events, self._refused, self.oldest_at = [], [], None
        if not events:
            return without_events(refused)
        shape_PHW, dtype = _layout(events[0])
        size = next(size for size in self._sizes if size >= len(events))
        images_BPHW = torch.empty(
            (size, *shape_PHW), dtype=_TORCH_DTYPES[dtype], pin_memory=self._pin_memory
        )
        rows = images_BPHW.numpy()
        list(_copiers.map(_copy, rows, [event.image.reshape(shape_PHW) for event in events]))
        rows[len(events) :] = 0
        return EventBatch(images_BPHW, events, refused)

    def _refusal(self, item: Event | Result | Refusal) -> Refusal | None:
        if isinstance(item, Refusal):
            return item
        if isinstance(item, Result):
            return Refusal(item.id, "a result stands in a queue of events")
        reason = self._check(item, self._max_event_bytes)
        return None if reason is None else Refusal(item.id, reason)


def without_events(refused: list[Refusal]) -> EventBatch:
    """Return a batch of refusals alone or, without any, a mere reminder."""
    return EventBatch(torch.empty((0, 0, 0, 0)), [], refused)


# NumPy copies without the interpreter lock; one thread moves some 10 GB/s, a GPU takes in 50.
_copiers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="copy")


def _copy(row: Image, image: Image) -> None:
    np.copyto(row, image)


def _layout(event: Event) -> tuple[tuple[int, int, int], np.dtype[np.generic]]:
    """Return (P, H, W) and dtype in this machine's byte order: what events of a batch share."""
    shape = event.image.shape
    panels, height, width = (1, *shape) if len(shape) == 2 else shape
    return (panels, height, width), event.image.dtype.newbyteorder("=")
