"""A running average of the weights: that average is validated, kept and exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

_SHARE_OF_START = 9
"""Early on, the average covers only the latest updates, one in this many of all so far, so that
nothing is left of the random initial weights."""


class AveragedWeights(WeightAveraging):
    """Lightning's exponential weight averaging, with a start that forgets quickly.

    Lightning's own `EMAWeightAveraging` begins with the first step's weights and needs several
    times its horizon to forget them; a run of minutes is too short for that. It would also keep the
    average on the CPU, where the module is when it begins.

    Parameters
    ----------
    horizon_steps
        Steps over which the average reaches back.
    every_n_steps
        Steps between updates.
    """

    def __init__(self, horizon_steps: int = 500, every_n_steps: int = 5) -> None:
        if not 1 <= every_n_steps <= horizon_steps:
            raise ValueError(
                f"every_n_steps is {every_n_steps} and horizon_steps {horizon_steps}; the first "
                "must be at least 1, the second not smaller"
            )
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.horizon_steps = horizon_steps
        self.every_n_steps = every_n_steps
        self._weight_of_new = 1.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average, on the device that trains."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to update the average after this step."""
        if step_idx is None or step_idx % self.every_n_steps:
            return False
        self._weight_of_new = weight_of_new(
            step_idx // self.every_n_steps, self.every_n_steps / self.horizon_steps
        )
        return True

    def _average(self, average: Any, current: Sequence[Tensor], number: Any) -> None:
        torch._foreach_lerp_(list(average), list(current), self._weight_of_new)


def weight_of_new(number: int, least: float) -> float:
    """Return how much of the average the weights of update `number`, from 0, become."""
    return max(least, _SHARE_OF_START / (_SHARE_OF_START + number))
