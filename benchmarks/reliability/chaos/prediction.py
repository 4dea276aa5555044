"""What a prediction of the harness has of its own: its network, and a fragile writer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.reliability.chaos.fragile import perhaps_die
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.types import Result


class Threshold(nn.Module):
    """Class 1 where a pixel has more than 500 counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return (images_N1HW - 500) * self.weight.reshape(1, 2, 1, 1)


class FragileQueueWriter(QueueWriter):
    """May be killed when the output queue has results that the input queue does not know of."""

    def _accepted(self, results: list[Result]) -> None:
        perhaps_die()
        super()._accepted(results)
