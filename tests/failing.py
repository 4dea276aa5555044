"""A source and a network that fail after a while, for tests of what happens then."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from peaknet_predict.sources import EventSource
from peaknet_predict.types import Image


class FailingSource(EventSource):
    def __len__(self) -> int:
        return 100

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        for idx in range(9):
            yield idx, np.zeros((1, 32, 32), np.float32), 9500.0
        raise OSError("the tape has been eaten")


class FailingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images_N1HW: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("out of memory")
        return torch.cat([torch.zeros_like(images_N1HW), images_N1HW - 3], dim=1)
