"""A source whose events cost nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from peaknet_predict.sources import EventSource
from peaknet_predict.types import Image


class Small(EventSource):
    """So many events of one small image."""

    def __init__(self, num_events: int, side: int = 16) -> None:
        self.num_events = num_events
        self.side = side

    def __len__(self) -> int:
        return self.num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        image = np.random.default_rng(0).normal(100, 5, (1, self.side, self.side))
        for idx in range(first, self.num_events):
            yield idx, image.astype(np.float32), 9500.0
