"""Records as bytes, for the spool: a JSON skeleton and the arrays' own bytes behind it.

There is no pickle in it, so reading a spool runs no code from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from peaknet_predict.queues.records import ForeignItem, Record
from peaknet_predict.queues.wire import Opaque
from peaknet_predict.types import Event, EventId, Result

Buffer = bytes | memoryview


def encode(record: Record) -> tuple[bytes, list[Buffer]]:
    """Return the skeleton of a record and the bytes of its arrays."""
    buffers: list[Buffer] = []

    def part(value: Any) -> Any:
        if isinstance(value, np.ma.MaskedArray):
            return {"masked": [part(np.ma.getdata(value)), part(np.ma.getmaskarray(value))]}
        if isinstance(value, np.ndarray):
            flat = np.ascontiguousarray(value).reshape(-1)
            buffers.append(flat.view(np.uint8).data if flat.size else b"")
            return {"array": [value.dtype.str, list(value.shape), flat.nbytes]}
        if isinstance(value, bytes):
            buffers.append(value)
            return {"bytes": len(value)}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [part(one) for one in value]}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, Opaque):
            return {"opaque": value.description}
        return value

    fields: dict[str, Any]
    if isinstance(record, ForeignItem):
        fields = {"stream": record.stream, "position": record.position}
        fields["payload"] = part(record.payload)
    else:
        fields = {"id": list(record.id), "energy": float(record.photon_energy)}
        fields |= {"put_at": record.put_at, "image": part(record.image)}
        fields |= {"bad_bits": part(record.bad_bits)}
    if isinstance(record, Result):
        fields |= {"peaks": part(record.peaks), "bad_pixels": record.bad_pixels}
        fields |= {"saturation": record.saturation, "provenance": record.provenance}
    return json.dumps([type(record).__name__, fields]).encode(), buffers


def decode(skeleton: Buffer, data: memoryview) -> Record:
    """Return the record that `encode` made bytes of; its arrays are views of ``data``."""
    position = 0

    def whole(value: Any) -> Any:
        nonlocal position
        if not isinstance(value, dict):
            return value
        ((kind, what),) = value.items()
        if kind == "array":
            dtype, shape, size = what
            raw = data[position : position + size]
            position += size
            return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape)
        if kind == "bytes":
            position += what
            return bytes(data[position - what : position])
        if kind == "masked":
            pixels, mask = (whole(one) for one in what)
            return np.ma.MaskedArray(pixels, mask)
        if kind in ("list", "tuple"):
            parts: Sequence[Any] = [whole(one) for one in what]
            return parts if kind == "list" else tuple(parts)
        return complex(*what) if kind == "complex" else Opaque(what)

    name, fields = json.loads(bytes(skeleton))
    if name == "ForeignItem":
        return ForeignItem(whole(fields["payload"]), fields["stream"], fields["position"])
    stream, rank, idx = fields["id"]
    identity, energy = EventId(stream, rank, idx), fields["energy"]
    # In the order in which their bytes were written.
    image, bad_bits = whole(fields["image"]), whole(fields["bad_bits"])
    if name == "Event":
        return Event(identity, image, energy, fields["put_at"], bad_bits)
    peaks = whole(fields["peaks"])
    return Result(
        identity,
        image,
        peaks,
        energy,
        fields["bad_pixels"],
        fields["put_at"],
        bad_bits,
        fields["saturation"],
        fields["provenance"],
    )
