"""What the launchers of the Triton kernels have in common.

The number of channels determines the tile sizes, as measured on an H200 (docs/benchmarks): trying
them out at the start would take longer than it gains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(operator: Callable[P, R]) -> Callable[P, R]:
    """Make the device of an operator's first tensor current: Triton launches on that one."""

    @functools.wraps(operator)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device(cast(Tensor, args[0]).device):
            return operator(*args, **kwargs)

    return launched


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below a size."""
    return int(triton.next_power_of_2(size))
