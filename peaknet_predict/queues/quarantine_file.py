"""An HDF5 file of a rejected event, whatever it consists of."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from peaknet_predict.process.text import printable
from peaknet_predict.queues.wire import Opaque, described
from peaknet_predict.types import Event, Result

_TEXT = 10_000  # characters kept of an object that is no array
_PARTS = 100  # most parts of a list that are kept


def as_hdf5(attributes: dict[str, Any], record: Any) -> bytes:
    """Return an HDF5 file with all parts of a record."""
    import h5py

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for field, value in attributes.items():
            file.attrs[field] = _text(value) if isinstance(value, str) else value
        for field, value in _parts(record).items():
            if not isinstance(value, np.ndarray) or not _wrote_array(file, field, value):
                file.attrs[field] = _text(value)
            elif isinstance(value, np.ma.MaskedArray):
                file[f"{field}_mask"] = np.ma.getmaskarray(value)
    return image.getvalue()


def _wrote_array(file: Any, field: str, value: np.ndarray[Any, Any]) -> bool:
    try:
        file[field] = value
    except Exception:  # a dtype that HDF5 does not have
        return False
    return True


def _text(value: Any) -> str:
    """Return an object's text, with characters escaped that an attribute cannot hold."""
    if isinstance(value, str):
        return printable(value[:_TEXT])[:_TEXT]
    if isinstance(value, float | Opaque):
        return str(value)[:_TEXT]
    return described(value, _TEXT)


def _parts(record: Any) -> dict[str, Any]:
    """Return the parts of a record, by name."""
    if isinstance(record, Event | Result):
        parts = {"image": record.image, "photon_energy": record.photon_energy}
        if record.bad_bits is not None:
            parts["bad_bits"] = record.bad_bits
        if isinstance(record, Result):
            parts["peaks"] = record.peaks
        return parts
    payload = getattr(record, "payload", record)
    if isinstance(payload, list | tuple):
        items = {f"item_{k}": part for k, part in enumerate(payload[:_PARTS])}
        return items | {"items": len(payload)}
    return {"item": payload}
