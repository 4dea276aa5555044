"""The vocabulary: what an event, a batch and a result are, with shape, dtype and unit.

Shape legend, used as a suffix of array names throughout the package::

    B  events of a batch          H  rows of a panel (slow scan, y)
    P  panels of an event         W  columns of a panel (fast scan, x)
    N  panels of a batch (B*P)    C  classes of the network's output
    M  peaks

This module needs neither torch nor Ray, so that the process that writes files stays light.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from peaknet_predict.pixels import Bits, find_bad_pixels, split_masked, unpack_mask

if TYPE_CHECKING:
    from torch import Tensor

Image = npt.NDArray[Any]
"""(P, H, W) or (H, W) | any real dtype, detector counts (ADU or photons), as received."""

Peaks = npt.NDArray[np.float64]
"""(M, 3) | float64, columns panel, y, x: 0-based pixel indices of the original panel, top-left
origin, pixel centres on integers."""


ANYONE = "*"
"""Stands for any process, where it is not known which one had an event."""


class EventId(NamedTuple):
    """Which event this is; unique for as long as a queue lives.

    A producer process counts ``idx`` from 0 and a queue may outlive a run, so ``(rank, idx)`` alone
    would repeat; ``stream`` names the opening of the stream that the event came through.
    """

    stream: str
    rank: int
    idx: int

    def __str__(self) -> str:
        return f"{self.stream}:{self.rank}:{self.idx}"


_LONGEST_STREAM = 255


def identity_problem(key: EventId) -> str | None:
    """Say why an event of this identity cannot be kept in files; ``None`` if it can.

    A file holds rank and idx as 64-bit integers and the stream's name as text without NUL; a name
    with a line break could forge lines of a log.
    """
    stream, rank, idx = key
    if not isinstance(stream, str) or not stream.isprintable() or len(stream) > _LONGEST_STREAM:
        return f"the stream's name must be at most {_LONGEST_STREAM} printable characters"
    for name, value in (("rank", rank), ("idx", idx)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            return f"{name} must be an integer, not a {type(value).__name__}"
        if not -(2**63) <= value < 2**63:
            return f"{name} does not fit in 64 bits"
    return None


@dataclass(slots=True)
class Event:
    """One detector readout on its way into the program.

    Attributes
    ----------
    id
        Identity; travels with the event to its result.
    image
        (P, H, W) or (H, W), detector counts. A masked array is taken apart: ``image`` becomes its
        pixels, ``bad_bits`` its mask.
    photon_energy
        eV.
    put_at
        When it entered the input queue, seconds since 1970; 0 if that is not known.
    bad_bits
        Pixels that the producer declares bad, as `peaknet_predict.pixels.pack_mask` writes them;
        None if it declares none. Pixels whose values say so are bad as well.
    taken_at
        When this process took it from the input queue, seconds since 1970; 0 if it came from none.
    """

    id: EventId
    image: Image
    photon_energy: float
    put_at: float = 0.0
    bad_bits: Bits | None = None
    taken_at: float = 0.0

    def __post_init__(self) -> None:
        self.image, masked = split_masked(self.image)
        if masked is not None:
            self.bad_bits = masked

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes, by which a queue bounds its memory."""
        return _nbytes(self.image, self.bad_bits)


@dataclass(slots=True)
class Result:
    """One event with its peaks on its way out of the program.

    Attributes
    ----------
    id
        Identity of the event.
    image
        (P, H, W) or (H, W): the original pixels, exactly as received. Empty where a prediction
        without a `QueueWriter` returns its results (`drop_pixels`).
    peaks
        (M, 3) float64, see `Peaks`.
    photon_energy
        eV.
    bad_pixels
        Number of pixels that were left out because they are no measurement.
    put_at
        When the event entered the input queue, seconds since 1970; 0 if that is not known.
    bad_bits
        Which pixels were left out, as `peaknet_predict.pixels.pack_mask` writes them; empty if none
        was, None if that is not known (results of other programs).
    saturation
        Counts from which on a pixel is saturated; None if that is not known.
    provenance
        What the peaks depend on (network, weights, operating point, mask...), as JSON, see
        docs/formats.md; None if that is not known.
    taken_at
        When this process took the event from the input queue, as `Event.taken_at`.
    """

    id: EventId
    image: Image
    peaks: Peaks
    photon_energy: float
    bad_pixels: int = 0
    put_at: float = 0.0
    bad_bits: Bits | None = None
    saturation: float | None = None
    provenance: str | None = None
    taken_at: float = 0.0

    def __post_init__(self) -> None:
        self.image, masked = split_masked(self.image)
        if masked is not None:
            self.bad_bits = masked

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes, by which a queue bounds its memory."""
        return _nbytes(self.image, self.bad_bits, self.peaks)

    def drop_pixels(self) -> None:
        """Let go of pixels and mask; the image is then empty: (P, 0, 0) or (0, 0)."""
        self.image = np.empty((*self.image.shape[:-2], 0, 0), self.image.dtype)
        self.bad_bits = None

    def bad_mask(self) -> npt.NDArray[np.bool_] | None:
        """Return the mask of bad pixels, bool of the image's shape; None if there are none.

        Where the result does not say, the pixels' values do (`find_bad_pixels`).
        """
        if self.bad_bits is None:
            bad = find_bad_pixels(self.image)
            return bad if bad.any() else None
        return unpack_mask(self.bad_bits, self.image.shape) if self.bad_bits.size else None


def _nbytes(*arrays: Any) -> int:
    """Return the bytes of arrays; what stands in their place has none."""
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@dataclass(slots=True)
class Refusal:
    """An item that cannot be processed, and why, in words for the log and the run's balance."""

    id: EventId | None
    reason: str

    def __str__(self) -> str:
        return f"event {self.id if self.id is not None else '(unknown)'}: {self.reason}"


class EventBatch:
    """Events of one shape and dtype, gathered for one call of `predict_step`.

    This is a plain class on purpose. Lightning casts the tensors of dataclasses and collections to
    the Trainer's precision, and raw detector counts must not be rounded to bfloat16.

    Attributes
    ----------
    images_BPHW
        (B, P, H, W) tensor of detector counts, the events' own dtype, host memory (pinned where a
        GPU will read it). ``B`` is one of the sizes that batches may have; rows from
        ``len(events)`` on are padding.
    events
        The events whose pixels fill the first rows, in order of arrival.
    refused
        Items refused while this batch was gathered; they are counted with it.
    """

    __slots__ = ("events", "images_BPHW", "refused")

    def __init__(self, images_BPHW: Tensor, events: list[Event], refused: list[Refusal]) -> None:
        self.images_BPHW = images_BPHW
        self.events = events
        self.refused = refused


@dataclass(slots=True)
class PeakBatch:
    """What became of one `EventBatch`: every event of it is in exactly one of the two lists."""

    results: list[Result]
    refused: list[Refusal] = field(default_factory=list)
