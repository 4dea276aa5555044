"""Random numbers for simulated shots: streams, distributions, and ranges kept from training."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Domain = Literal["training", "held_out"]
"""Which part of each range shots are drawn from; see `Band`."""

_MASK = (1 << 64) - 1

_POOL = 1 << 16
"""How many numbers are drawn ahead."""


class Band(NamedTuple):
    """A log-uniform range with a hole. Training draws outside of the hole, validation inside.

    Attributes
    ----------
    low, high
        Ends of the range, positive.
    hole_low, hole_high
        Ends of the hole, within the range.
    """

    low: float
    high: float
    hole_low: float
    hole_high: float


def stream_seed(*words: int) -> int:
    """Mix integers into the seed of a stream; any change to a word gives an unrelated one.

    Each word goes through the finaliser of SplitMix64, with its constants (Steele, Lea, Flood,
    *Fast splittable pseudorandom number generators*, OOPSLA 2014).

    Parameters
    ----------
    *words
        Integers of any size; the lowest 64 bits of each count.

    Returns
    -------
    int
        0 ... 2^63 - 1.
    """
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


class Draws:
    """A stream of random tensors on one device, float32 unless said otherwise.

    Parameters
    ----------
    device
        Where the tensors are made. Nothing is made elsewhere and copied.
    *words
        Name of the stream, see `stream_seed`.
    """

    def __init__(self, device: torch.device, *words: int) -> None:
        self.device = device
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(stream_seed(*words))
        self._pool, self._used = torch.empty(0, device=device), 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw uniformly from [low, high)."""
        unit = self._unit(math.prod(shape)).view(shape)
        return unit if (low, high) == (0.0, 1.0) else low + (high - low) * unit

    def _unit(self, count: int) -> Tensor:
        """Draw from [0, 1); a few at a time from a pool, which saves hundreds of small kernels."""
        if 4 * count > _POOL:
            return torch.rand(count, generator=self._generator, device=self.device)
        if self._used + count > len(self._pool):
            self._pool = torch.rand(_POOL, generator=self._generator, device=self.device)
            self._used = 0
        self._used += count
        return self._pool[self._used - count : self._used]

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """Draw numbers whose logarithm is uniform between those of `low` and `high`."""
        return low * torch.pow(high / low, self.uniform(*shape))

    def band(self, *shape: int, band: Band, domain: Domain) -> Tensor:
        """Draw log-uniformly from the part of a band that belongs to a domain."""
        if domain == "held_out":
            return self.log_uniform(*shape, low=band.hole_low, high=band.hole_high)
        hole = math.log(band.hole_high / band.hole_low)
        value = self.log_uniform(*shape, low=band.low, high=band.high * math.exp(-hole))
        # Above the hole's lower end the range continues at its upper one.
        return torch.where(value < band.hole_low, value, value * math.exp(hole))

    def normal(self, *shape: int) -> Tensor:
        """Draw normal deviates of mean 0 and variance 1."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def exponential(self, *shape: int) -> Tensor:
        """Draw exponential deviates of mean 1."""
        return -torch.log1p(-self.uniform(*shape))

    def chance(self, *shape: int, probability: float) -> Tensor:
        """Draw bools that are True with a probability."""
        return self.uniform(*shape) < probability

    def among(self, *shape: int, weights: tuple[float, ...]) -> Tensor:
        """Draw int64 indices with the given weights, which sum to 1."""
        unit, total = self.uniform(*shape), 0.0
        index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        for weight in weights[:-1]:
            total += weight
            index += unit >= total
        return index

    def poisson(self, mean: Tensor) -> Tensor:
        """Draw Poisson deviates of the given means; float32."""
        return torch.poisson(mean, generator=self._generator)

    def sign(self, *shape: int) -> Tensor:
        """Draw -1 or 1."""
        return 2.0 * self.chance(*shape, probability=0.5) - 1.0
