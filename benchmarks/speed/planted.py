"""Logits whose peaks are known, planted after the network.

Random weights give noise for a class map, trained ones depend on the data; the cost of the peaks
after the network depends on their number, so a benchmark has to plant them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.module import PeakNetModule
from peaknet_predict.network_output import NetworkOutput

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


class PlantedModule(PeakNetModule):
    """The module as users run it; planted logits take the place of what its network has computed.

    They are written over the network's output, in its dtype and strides, behind whatever is
    compiled: a compiler that saw them would leave out the network.

    Parameters
    ----------
    planted
        (N, 2, H/4, W/4) float32, for as many panels as a batch has, or more.
    """

    def __init__(self, planted: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planted: dict[int, Tensor] = {}
        self.plant(planted)

    def plant(self, planted: Tensor) -> None:
        """Plant other quarter-resolution logits."""
        full = F.interpolate(planted, scale_factor=STRIDE, mode="bilinear")
        # Not buffers: bf16-true would round them.
        self._planted = {STRIDE: planted, 1: full}

    def _logits(self, counts_BPHW: Tensor, bad_bits_BK: Tensor | None = None) -> NetworkOutput:
        output = super()._logits(counts_BPHW, bad_bits_BK)
        return output._replace(logits_NCHW=self.planted_over(output.logits_NCHW))

    def planted_over(self, logits: Tensor) -> Tensor:
        """Write the planted logits over a network's, of either resolution."""
        stride = STRIDE if logits.shape[2:] == self._planted[STRIDE].shape[2:] else 1
        self._planted[stride] = self._planted[stride].to(logits.device)
        return logits.copy_(self._planted[stride][: len(logits)])
