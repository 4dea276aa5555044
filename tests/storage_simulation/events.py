"""The events of the simulated world: each has a serial number, by which its bytes are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from peaknet_predict.queues.records import ForeignItem
from peaknet_predict.types import Event, EventId

_PER_RUN = 100_000
_PER_PRODUCER = 10_000
_SIZE = 16


def serial_of(run: int, producer: int, number: int) -> int:
    """Return the serial number of a producer's event: none occurs twice in a history."""
    assert number < _PER_PRODUCER
    return run * _PER_RUN + producer * _PER_PRODUCER + number


def image_of(serial: int) -> np.ndarray[Any, Any]:
    """Return the pixels of an event: no two are alike."""
    return np.arange(serial * _SIZE, (serial + 1) * _SIZE, dtype=np.uint32).reshape(1, 4, 4)


def energy_of(serial: int) -> float:
    """Return the photon energy of an event, eV."""
    return 9000.0 + serial / 128


def shown_in(image: np.ndarray[Any, Any]) -> int:
    """Return the serial number of the event that an image is of; every pixel must be right."""
    serial = int(image.flat[0]) // _SIZE
    assert image.dtype == np.uint32, f"damaged: an image of {image.dtype}"
    assert np.array_equal(image.ravel(), image_of(serial).ravel()), f"damaged: event {serial}"
    return serial


def is_bad(serial: int) -> bool:
    """Whether an event is rejected by its reader."""
    return serial % 7 == 3


def is_poison(serial: int) -> bool:
    """Whether an event kills its readers."""
    return serial % 61 == 17


def is_filtered(serial: int) -> bool:
    """Whether an event has too few peaks for a file."""
    return serial % 11 == 5


def event_of(key: EventId, serial: int) -> Event:
    """Return an event; a bad one has no photon energy."""
    return Event(key, image_of(serial), -1.0 if is_bad(serial) else energy_of(serial))


def item_of(rank: int, idx: int, serial: int) -> Any:
    """Return the item that a program puts which knows only ``put``; bad ones in many ways."""
    item = [rank, idx, image_of(serial), energy_of(serial)]
    if is_bad(serial):
        kind = serial // 7 % 4
        if kind == 0:
            item[3] = -1.0
        elif kind == 1:
            item[1] = 2**64 + serial  # no file can hold this
        elif kind == 2:
            item[2] = f"no image of {serial}"
        else:
            return f"no event {serial}"
    return item


def serial_in(record: Event | ForeignItem) -> int:
    """Return the serial number of what a queue hands out."""
    payload = record.image if isinstance(record, Event) else record.payload
    if isinstance(payload, list):
        payload = payload[2]
    if isinstance(payload, str):
        return serial_in_text(payload)
    assert isinstance(payload, np.ndarray)
    return shown_in(payload)


def serial_in_text(text: str) -> int:
    """Return the serial number in what stands in place of an image."""
    return int(text.rpartition(" ")[2])
