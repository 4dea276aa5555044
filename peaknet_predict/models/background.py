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
        powers = torch.cat([x, x.square()], dim=1)
        mean, square = (self._sum(powers) / self._divisor).chunk(2, dim=1)
        # Rounding may leave the difference below zero.
        return mean, (square - mean.square()).clamp(min=floor**2).sqrt()

    def clip(self, x: Tensor, mean: Tensor, sigma: Tensor, num_sigmas: float) -> Tensor:
        """Clip `x` to `num_sigmas` around the mean where the statistics are usable."""
        reach = num_sigmas * sigma
        clipped = torch.minimum(torch.maximum(x, mean - reach), mean + reach)
        # Invalid pixels stay 0.
        return torch.where(self.usable, clipped * self._weight, x)


def box_sum(x_NCHW: Tensor, radius_y: int, radius_x: int) -> Tensor:
    """Return the sum over the box around each pixel; pixels outside the panel are 0."""
    return _window_sum(_window_sum(x_NCHW, 3, radius_x), 2, radius_y)


def _window_sum(x_NCHW: Tensor, dim: int, radius: int) -> Tensor:
    """Return sums over ``2 * radius + 1`` pixels along an axis, from sums over 1, 2, 4, 8, ...

    About 2 log2(width) additions of whole images: several times faster than pooling or cumulative
    sums, without the rounding errors of the latter.
    """
    if radius == 0:
        return x_NCHW
    size, width = x_NCHW.shape[dim], 2 * radius + 1
    padding = (radius, radius) if dim == 3 else (0, 0, radius, radius)
    # Pixel i of `power` holds the sum over pixels i ... i + power_width - 1.
    power, power_width = F.pad(x_NCHW, padding), 1
    # The width is odd, so its first part is one pixel wide.
    total, done = power.narrow(dim, 0, size), 1
    while done < width:
        length = power.shape[dim] - power_width
        power = power.narrow(dim, 0, length) + power.narrow(dim, power_width, length)
        power_width *= 2
        if width & power_width:
            total = total + power.narrow(dim, done, size)
            done += power_width
    return total
