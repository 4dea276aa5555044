"""Sources and networks that fail or hang after a while, for tests of what happens then."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

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


class HangingNet(nn.Module):
    """Hangs after a while for as long as there is a file ``hold`` in the current directory.

    With ``deaf`` it does so outside Python, where no handler of a signal runs.
    """

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.deaf = deaf
        self.calls = 0

    def forward(self, images_N1HW: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2 and Path("hold").exists():
            Path("hanging").touch()
            if self.deaf:
                mutex = ctypes.create_string_buffer(64)
                while True:
                    ctypes.CDLL(None).pthread_mutex_lock(mutex)
            while Path("hold").exists():
                time.sleep(0.05)
        return torch.cat([torch.zeros_like(images_N1HW), images_N1HW - 3], dim=1)


class HangingSource(EventSource):
    """Hangs behind its fifth event."""

    def __len__(self) -> int:
        return 10

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        for idx in range(first, 5):
            yield idx, np.zeros((1, 32, 32), np.float32), 9500.0
        while True:
            time.sleep(0.05)
