"""PeakNet whose answer is known: the full network runs, and then planted logits replace its output.

Random weights give noise for a class map, trained ones depend on the data; the cost of the peaks
after the network depends on their number, so a benchmark has to plant them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.models import PeakNet

STRIDE = 4  # PeakNet's logits are made at a quarter of the resolution


def planted_logits(panels: int, height: int, width: int, peaks_per_panel: int, seed: int) -> Tensor:
    """Return quarter-resolution logits (N, 2, H/4, W/4) float32 with so many blobs a panel."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = height // STRIDE, width // STRIDE
    y = torch.arange(rows)[:, None]
    x = torch.arange(columns)[None, :]
    logits = torch.zeros(panels, 2, rows, columns)
    logits[:, 1] = -4.0
    for panel in range(panels):
        centres = torch.rand(peaks_per_panel, 2, generator=generator)
        for fraction_y, fraction_x in centres.tolist():
            square = (y - fraction_y * rows) ** 2 + (x - fraction_x * columns) ** 2
            blob = 8.0 * torch.exp(-square / (2 * 0.8**2)) - 4.0
            logits[panel, 1] = torch.maximum(logits[panel, 1], blob)
    return logits


def noise_logits(panels: int, height: int, width: int, seed: int) -> Tensor:
    """Return quarter-resolution logits of white noise: the worst case for what follows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(panels, 2, height // STRIDE, width // STRIDE, generator=generator)


class PlantedPeakNet(PeakNet):
    """The default PeakNet, of which every value is computed and then multiplied by zero."""

    def __init__(self, planted: Tensor, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.register_buffer("planted", planted, persistent=False)
        full = F.interpolate(planted, scale_factor=STRIDE, mode="bilinear")
        self.register_buffer("planted_full", full, persistent=False)
        # A tensor, because a compiler sees through a multiplication by the number 0.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def plant(self, logits: Tensor) -> None:
        """Plant other quarter-resolution logits, (N, 2, H/4, W/4)."""
        self.get_buffer("planted").copy_(logits)
        full = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")
        self.get_buffer("planted_full").copy_(full)

    def coarse_logits(self, images_N1HW: Tensor) -> Tensor:
        """Run the network; return the planted logits."""
        logits = super().coarse_logits(images_N1HW)
        planted: Tensor = self.get_buffer("planted")
        return logits * self.get_buffer("zero") + planted[: len(logits)]

    def forward(self, images_N1HW: Tensor) -> Tensor:
        """Run the network; return the planted logits at full resolution."""
        logits = super().forward(images_N1HW)
        full: Tensor = self.get_buffer("planted_full")
        return logits * self.get_buffer("zero") + full[: len(logits)]
