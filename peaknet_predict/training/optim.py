"""The optimiser's parameter groups and its rate in the course of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from torch import nn

END_OF_RATE = 0.01
"""Fraction of the full rate that is left at the end of a run."""

_LOOK_EVERY = 20
"""Steps between readings of the clock, which several processes must agree on."""


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those that do not.

    Decayed are the kernels of convolutions and linear layers. Norms, biases and the pyramid's
    fusion weights are not: zero is not neutral for them.
    """
    kernels = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    decayed = {id(module.weight) for module in net.modules() if isinstance(module, kernels)}
    trained = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    """Return the share of the full rate: a linear start, then half a cosine down to `END_OF_RATE`.

    Loshchilov and Hutter, "SGDR", arXiv:1608.03983, equation 5, without restarts.

    Parameters
    ----------
    step
        Optimiser steps taken.
    progress
        How much of the run is over, 0 to 1; more counts as 1.
    warmup_steps
        Steps of the linear start.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    warm_up = min(1.0, (step + 1) / max(warmup_steps, 1))
    return warm_up * (END_OF_RATE + (1 - END_OF_RATE) * cosine)


class Progress:
    """How much of a run is over, by the first of its limits.

    Those are `max_steps` or `max_epochs`, and `max_time`, of the Trainer: a run that ends by the
    clock slows down by the clock.

    Parameters
    ----------
    trainer
        The run's Trainer.

    Raises
    ------
    ValueError
        If the run has no limit.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        self._total_steps = float(trainer.estimated_stepping_batches)
        self._timer = _timer(trainer.callbacks)  # type: ignore[attr-defined]
        if math.isinf(self._total_steps) and self._timer is None:
            raise ValueError(
                "the learning rate falls towards the end of a run, and this one has no end: set "
                "trainer.max_steps or trainer.max_time"
            )
        self._looked_at = -1
        self._by_time = 0.0

    def __call__(self, step: int) -> float:
        """Return the share of the run that is over after so many steps."""
        by_steps = step / self._total_steps
        if self._timer is None:
            return by_steps
        several = self._trainer.world_size > 1
        if not several or step // _LOOK_EVERY != self._looked_at:
            self._looked_at = step // _LOOK_EVERY
            elapsed = self._timer.time_elapsed()
            remaining = self._timer.time_remaining() or 0.0
            self._by_time = elapsed / max(elapsed + remaining, 1e-9)
            if several:
                # Processes whose rates differ by their clocks would drift apart.
                self._by_time = self._trainer.strategy.broadcast(self._by_time)
        return max(by_steps, self._by_time)


def _timer(callbacks: Iterable[object]) -> Timer | None:
    timers = (callback for callback in callbacks if isinstance(callback, Timer))
    return next((timer for timer in timers if timer.time_remaining() is not None), None)
