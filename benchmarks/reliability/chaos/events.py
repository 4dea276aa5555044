"""Events whose pixels, peaks and fate are known from their numbers.

Backgrounds lie around 100 counts and peaks above 1000, so that a threshold finds exactly the
pixels that were planted, in every batch and on every machine. Every event has other pixels: they
name it where a queue does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peaknet_predict.sources import EventSource
from peaknet_predict.types import Image

MIN_PEAKS = 3
"""`write-cxi` filters what has fewer."""

_KINDS: tuple[tuple[tuple[int, int, int], str], ...] = (
    ((1, 32, 32), "float32"),
    ((2, 16, 32), "uint16"),
    ((4, 8, 32), "int32"),
    ((2, 48, 64), "float32"),  # large enough to lie in a lot of Ray's store
)
_EVENTS_PER_KIND = 100  # then the next shape and dtype: batches and files have one each
_CELL = 8  # pixels along each edge of the cells that have one peak at most
_DEAD = {"float32": np.nan, "uint16": 65535, "int32": -(2**31)}

Fate = Literal["written", "filtered", "quarantined"]


@dataclass(frozen=True)
class Truth:
    """What an event is, and what has to become of it.

    Attributes
    ----------
    image
        (P, H, W), or what stands in its place.
    photon_energy
        eV.
    peaks
        (M, 3) float64, panel, y, x in raster order.
    fate
        Where it has to end.
    reason
        A part of the reason of its refusal.
    """

    image: Image
    photon_energy: float
    peaks: npt.NDArray[np.float64]
    fate: Fate
    reason: str = ""


@lru_cache(maxsize=8192)
def truth(rank: int, idx: int) -> Truth:
    """Return event ``idx`` of a producer."""
    random = np.random.default_rng((rank, idx))
    (panels, height, width), dtype = _KINDS[idx // _EVENTS_PER_KIND % len(_KINDS)]
    image = random.integers(90, 111, (panels, height, width)).astype(dtype)
    few = idx % 10 in (3, 7)
    count = int(random.integers(0, MIN_PEAKS) if few else random.integers(MIN_PEAKS, 13))
    rows = height // _CELL
    cells = random.choice(panels * rows * (width // _CELL), count, replace=False)
    peaks = []
    for cell in cells.tolist():
        panel, row, column = np.unravel_index(cell, (panels, rows, width // _CELL))
        # Within the cell, and never touching the next one.
        h, w = random.integers(1, 4, 2).tolist()
        y, x = int(row) * _CELL + 2, int(column) * _CELL + 2
        image[panel, y : y + h, x : x + w] = random.integers(1000, 2000, (h, w))
        peaks.append((float(panel), y + (h - 1) / 2, x + (w - 1) / 2, y, x))
    image[:, ::_CELL, int(random.integers(0, 4)) * _CELL] = _DEAD[dtype]
    peaks.sort(key=lambda peak: (peak[0], peak[3], peak[4]))
    table = np.array([peak[:3] for peak in peaks], np.float64).reshape(-1, 3)
    good = Truth(image, 9000 + idx / 8 + rank, table, "filtered" if few else "written")
    return _spoiled(good, rank, idx) if idx % 25 == 11 else good


def _spoiled(good: Truth, rank: int, idx: int) -> Truth:
    """Return what takes the event's place and has to be refused."""
    words = f"run.h5: frame {idx} of {rank} is unreadable: planned"
    image, energy = good.image, good.photon_energy
    kinds: list[tuple[Image, float, str]] = [
        (image, np.nan, "photon energy is nan"),
        (image, 0.0, "photon energy"),
        (np.full_like(image, np.nan, dtype=np.float32), energy, "no pixel of the image is finite"),
        (np.array(words), energy, words),
        (image.astype(np.complex64), energy, "complex64"),
        (image[:, :0], energy, "is empty"),
        (image[None], energy, "has shape"),
    ]
    spoiled, energy, reason = kinds[idx // 25 % len(kinds)]
    return Truth(spoiled, energy, good.peaks[:0], "quarantined", reason)


class Planned(EventSource):
    """The first events of a producer."""

    def __init__(self, num_events: int, rank: int = 0) -> None:
        self.num_events = num_events
        self.rank = rank

    def __len__(self) -> int:
        return self.num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        for idx in range(first, self.num_events):
            one = truth(self.rank, idx)
            yield idx, one.image, one.photon_energy


def differs(
    key: tuple[int, int], image: Any, peaks: Any, photon_energy: float, on_slab: bool = False
) -> str | None:
    """Say how what came out differs from what went in, bit by bit; None if it does not.

    Peaks may come in any order. Those that were ``on_slab`` carry the rounding of the sum with
    their panel's offset.
    """
    one = truth(*key)
    if image.shape != one.image.shape or image.dtype != one.image.dtype:
        return f"its image is {image.dtype} {image.shape}"
    if image.tobytes() != one.image.tobytes():
        return "its pixels differ"
    if photon_energy != one.photon_energy:
        return f"its photon energy is {photon_energy}, and not {one.photon_energy}"
    expected = one.peaks.copy()
    if on_slab:
        offsets = expected[:, 0] * one.image.shape[1]
        expected[:, 1] = (expected[:, 1] + offsets) - offsets
    found = np.asarray(peaks, np.float64).reshape(-1, 3)
    if sorted(map(tuple, found.tolist())) != sorted(map(tuple, expected.tolist())):
        return f"its peaks are {found.tolist()}, and not {expected.tolist()}"
    return None
