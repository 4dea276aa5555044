"""Mean and standard deviation of each pixel's surroundings, for `snr`.

All tensors are (N, C, H, W): N panels of a batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Window:
    """The background of each pixel: the box around it without a guard region in the middle.

    Parameters
    ----------
    weight
        (N, 1, H, W) float; 1 for pixels that count as background, 0 for others.
    radius_y, radius_x
        Pixels on each side; a radius of 0 makes the box a line.
    guard_radius
        Pixels on each side that are left out, along with the pixel itself.
    min_pixels
        Least number of valid pixels for usable statistics.

    Attributes
    ----------
    usable
        (N, 1, H, W) bool.
    """

    def __init__(
        self, weight: Tensor, radius_y: int, radius_x: int, guard_radius: int, min_pixels: int
    ) -> None:
        self._weight = weight
        self._outer = radius_y, radius_x
        self._guard = min(guard_radius, radius_y), min(guard_radius, radius_x)
        count = self._sum(weight)
        self._divisor = count.clamp(min=1.0)
        self.usable = count >= min_pixels

    def _sum(self, values: Tensor) -> Tensor:
        return box_sum(values, *self._outer) - box_sum(values, *self._guard)

    def mean_and_sigma(self, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, at least `floor`; `x` must be 0 at invalid pixels."""
        mean, variance = _moments(self._sum(torch.cat([x, x.square()], dim=1)), self._divisor)
        return mean, variance.clamp(min=floor**2).sqrt()

    def clip(self, x: Tensor, mean: Tensor, sigma: Tensor, num_sigmas: float) -> Tensor:
        """Clip `x` to `num_sigmas` around the mean where the statistics are usable."""
        return clip(x, mean, num_sigmas * sigma, self.usable) * self._weight


def clip(x: Tensor, mean: Tensor, reach: Tensor, usable: Tensor) -> Tensor:
    """Bring `x` to within `reach` of `mean`, where these are usable."""
    clipped = torch.minimum(torch.maximum(x, mean - reach), mean + reach)
    return torch.where(usable, clipped, x)


class Sides:
    """The pixels along a row or column on each side of each pixel, without those next to it.

    A line of higher counts shows on both sides of a pixel that is on it, another peak on one.

    Parameters
    ----------
    weight
        As for `Window`.
    dim
        3: along rows. 2: along columns.
    guard_radius, radius
        The pixels on a side are those from ``guard_radius + 1`` to ``radius`` away.
    min_pixels
        Valid pixels that make a side usable.

    Attributes
    ----------
    usable
        (N, 1, H, W) bool: whether one side is, at least.
    """

    def __init__(
        self, weight: Tensor, dim: int, guard_radius: int, radius: int, min_pixels: int
    ) -> None:
        self._dim, self._guard, self._radius = dim, guard_radius, radius
        counts = self._sums(weight)
        self._divisors = [count.clamp(min=1.0) for count in (*counts, counts[0] + counts[1])]
        # Added to what an unusable side has, so that the other one has less.
        self._penalties = [torch.where(count >= min_pixels, 0.0, torch.inf) for count in counts]
        self.usable = torch.maximum(*counts) >= min_pixels

    def _sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the pixels before and after each pixel."""
        size, length = values.shape[self._dim], self._radius - self._guard
        sums = _running_sums(_padded(values, self._dim, self._radius), self._dim, length)
        after = self._radius + self._guard + 1
        return sums.narrow(self._dim, 0, size), sums.narrow(self._dim, after, size)

    def lower(self, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, at least `floor`, of the side that has less of each.

        `x` is 0 where it is not valid. Where no side is usable, both are infinite.
        """
        sums = self._sums(torch.cat([x, x.square()], dim=1))
        means, variances = [], []
        for side, penalty in enumerate(self._penalties):
            mean, variance = _moments(sums[side], self._divisors[side])
            means.append(mean + penalty)
            variances.append(variance + penalty)
        return torch.minimum(*means), torch.minimum(*variances).clamp(min=floor**2).sqrt()

    def mean_and_sigma(self, x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, at least `floor`, of both sides together."""
        before, after = self._sums(torch.cat([x, x.square()], dim=1))
        mean, variance = _moments(before + after, self._divisors[2])
        return mean, variance.clamp(min=floor**2).sqrt()


def _moments(sums: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance from sums of values and squares; rounding may leave it below 0."""
    mean, square = (sums / divisor).chunk(2, dim=1)
    return mean, square - mean.square()


def box_sum(x_NCHW: Tensor, radius_y: int, radius_x: int) -> Tensor:
    """Return the sum over the box around each pixel; pixels outside the panel are 0."""
    return _window_sum(_window_sum(x_NCHW, 3, radius_x), 2, radius_y)


def _window_sum(x_NCHW: Tensor, dim: int, radius: int) -> Tensor:
    """Return sums over ``2 * radius + 1`` pixels along an axis."""
    if radius == 0:
        return x_NCHW
    return _running_sums(_padded(x_NCHW, dim, radius), dim, 2 * radius + 1)


def _padded(x_NCHW: Tensor, dim: int, radius: int) -> Tensor:
    return F.pad(x_NCHW, (radius, radius) if dim == 3 else (0, 0, radius, radius))


def _running_sums(x_NCHW: Tensor, dim: int, width: int) -> Tensor:
    """Return the sums of ``width`` pixels along an axis, from each pixel that has so many.

    They are made of sums over 1, 2, 4, 8, ...: about 2 log2(width) additions of whole images,
    several times faster than pooling or cumulative sums, without the rounding errors of the latter.
    """
    size = x_NCHW.shape[dim] - width + 1
    # Pixel i of `power` holds the sum over pixels i ... i + power_width - 1.
    power, power_width = x_NCHW, 1
    total: Tensor | None = None
    done = 0
    while True:
        if width & power_width:
            part = power.narrow(dim, done, size)
            total = part if total is None else total + part
            done += power_width
        if done == width:
            assert total is not None
            return total
        length = power.shape[dim] - power_width
        power = power.narrow(dim, 0, length) + power.narrow(dim, power_width, length)
        power_width *= 2
