"""A peak finder without weights: it finds pixels far enough above their local background.

The idea is that of the threshold finders of the field (peakfinder8 in Cheetah, Barty et al., J.
Appl. Cryst. 47 (2014) 1118; "dispersion" in DIALS, Winter et al., Acta Cryst. D74 (2018) 85):
compare a pixel with the mean and standard deviation of its surroundings. Beamtimes start with it,
and a network should beat it. It takes the place of a network: panels in, logits per pixel out.

Shape legend: N panels of a batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peaknet_predict.models.background import Sides, Window, box_sum, clip

_NEVER = -100.0
"""Logit of pixels that cannot be a peak; finite, so that a softmax stays so."""

_CLIP = 6.0
"""Sigmas of the first pass to which pixels are clipped before the second: peaks and hot pixels then
hardly move the background. Less would also clip single photons on an almost empty background."""

_SUPPORT_CAP = 5.0
"""Most sigmas that one neighbour adds to a pixel's support, so that one hot neighbour is not
enough."""

_HOT_SIGMAS, _HOT_SPREAD = 20.0, 0.25
"""A hot pixel that bleeds exceeds the first, and its eight neighbours together have less than the
second share of its excess. Around the centre of a Gaussian peak they have 2.7 times as much (sigma
0.8 pixels) or more."""

_MIN_SIGMA_PER_QUANTUM = 0.45
"""Lower bound of sigma, in steps of the counts (photons). Below 0.2 photons a pixel counts are far
from normally distributed and two in one pixel are too common to be five sigmas."""

_BLOCK = 16
"""Pixels along each edge of the blocks over which the step of the counts is estimated, and between
the pixels that stand for the panel."""

_MIN_SIDE_PIXELS = 5
"""Background pixels below which a side of a row or column is ignored."""


_CPU_PANELS = 4
"""Panels that are classified at once on a CPU."""


class LocalSnr(nn.Module):
    """Class 1 where a pixel, or its neighbour, is significantly above the local background.

    The background of a pixel is taken over a square box around it and over the pieces of its row
    and of its column, without the pixels next to it; the highest mean and the largest standard
    deviation of the three count. So a line or an edge of higher counts along an axis (double-width
    pixels, borders of an ASIC) is background to the pixels on it. Each is computed twice, the
    second time with outliers of the first clipped, so that peaks do not hide one another. What is
    an outlier on a row or column is judged by the side of a pixel that has less: of two strong
    peaks on it, neither hides the other. A peak with others within `line_radius` on both sides may
    be hidden, and so may one below some 15 sigmas by another.

    A pixel is a seed if it exceeds its background by `threshold` sigmas and its eight neighbours
    together are significant too (`min_support`), which a hot pixel's are not. Pixels above
    `grow_threshold` that touch a seed join its peak.

    The result does not change when the input is scaled or shifted, apart from `noise_floor`.

    Parameters
    ----------
    threshold
        Excess over the background that makes a seed, sigmas.
    grow_threshold
        Excess that a neighbour of a seed needs, sigmas.
    min_support
        Significance of the eight neighbours' mean excess: the sum of their sigmas, each limited to
        5, over the square root of their number.
    box_radius
        The box has ``2 * box_radius + 1`` pixels along each edge.
    guard_radius
        The pixel and this many pixels on each side are left out of its background.
    line_radius
        Pixels on each side that are the background along the row and along the column.
    min_background_pixels
        Valid pixels that the box must have; a pixel with fewer is never a peak.
    noise_floor
        Lower bound of sigma, in units of the input (standard deviations of the event after
        `InstanceNorm`): no peaks from rounding errors where the detector shows no noise.

    Raises
    ------
    ValueError
        If a box or line has no pixels outside of the guard, or a threshold is not positive.
    """

    def __init__(
        self,
        threshold: float = 5.0,
        grow_threshold: float = 3.0,
        min_support: float = 4.0,
        box_radius: int = 7,
        guard_radius: int = 3,
        line_radius: int = 12,
        min_background_pixels: int = 20,
        noise_floor: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 0 <= guard_radius < min(box_radius, line_radius):
            raise ValueError(
                "guard_radius must be 0 or more and smaller than box_radius and line_radius; got "
                f"{guard_radius}, {box_radius} and {line_radius}"
            )
        if not 0 < grow_threshold <= threshold:
            raise ValueError(
                "grow_threshold must be positive and not above threshold; got "
                f"{grow_threshold} and {threshold}"
            )
        if noise_floor <= 0:
            raise ValueError(f"noise_floor must be positive; got {noise_floor}")
        self.threshold = threshold
        self.grow_threshold = grow_threshold
        self.min_support = min_support
        self.box_radius = box_radius
        self.guard_radius = guard_radius
        self.line_radius = line_radius
        self.min_background_pixels = min_background_pixels
        self.noise_floor = noise_floor

    def forward(self, images_N1HW: Tensor, valid_N1HW: Tensor | None = None) -> Tensor:
        """Classify every pixel.

        Parameters
        ----------
        images_N1HW
            (N, 1, H, W) of any size, normalised per event.
        valid_N1HW
            (N, 1, H, W) bool; pixels that are False (padding, masked), and those that are NaN or
            infinite, belong to no background and to no peak. All are valid by default.

        Returns
        -------
        Tensor
            (N, 2, H, W) float32. Channel 0 is 0. Channel 1 is the margin, in sigmas, of the
            condition that the pixel meets least well: class 1 where it is positive.
        """
        images_N1HW = images_N1HW.float()
        valid = torch.isfinite(images_N1HW)
        if valid_N1HW is not None:
            valid = valid & valid_N1HW
        if images_N1HW.device.type != "cpu":
            return self._classify(images_N1HW, valid)
        # A few panels at a time: larger temporaries leave the cache, and the C library hands them
        # back to the system after every operation (32 panels took seven times as long at once).
        chunks = zip(
            torch.split(images_N1HW, _CPU_PANELS), torch.split(valid, _CPU_PANELS), strict=True
        )
        return torch.cat([self._classify(images, mask) for images, mask in chunks])

    def _classify(self, images_N1HW: Tensor, valid: Tensor) -> Tensor:
        """Return the logits of float32 images, given the mask of their valid pixels."""
        weight = valid.float()
        x = torch.where(valid, images_N1HW, 0.0)
        # Squares of a large offset would leave no digits for the variance.
        offset = x.sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        x = (x - offset) * weight

        mean, sigma, usable = self._background(x, weight)
        snr = (x - mean) / sigma * weight

        seed = torch.where(valid & usable, self._seeds(snr, weight), _NEVER)
        touches_seed = F.max_pool2d(seed, kernel_size=3, stride=1, padding=1)
        grown = torch.minimum(snr - self.grow_threshold, touches_seed)
        margin = torch.where(valid, torch.maximum(seed, grown), _NEVER)
        return torch.cat([torch.zeros_like(margin), margin], dim=1)

    def _background(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and sigma of each pixel's background, and where they are reliable."""
        guard, floor = self.guard_radius, self.noise_floor
        box = Window(weight, self.box_radius, self.box_radius, guard, self.min_background_pixels)
        lines = [Sides(weight, dim, guard, self.line_radius, _MIN_SIDE_PIXELS) for dim in (3, 2)]
        # First pass: the bounds beyond which a pixel is an outlier. A bright pixel may hide behind
        # another one of its box, but hardly on its row and column as well.
        box_mean, box_sigma = box.mean_and_sigma(x, floor)
        typical = _panel_median(
            box_sigma[..., ::_BLOCK, ::_BLOCK], box.usable[..., ::_BLOCK, ::_BLOCK]
        )
        clipped = box.clip(x, box_mean, box_sigma, _CLIP)
        line_values = []
        for line in lines:
            mean, sigma = line.lower(x, floor)
            # A line without a single photon must not make outliers of all photons.
            reach = _CLIP * torch.maximum(sigma, typical)
            clipped = clip(clipped, mean, reach, line.usable) * weight
            line_values.append(clip(x, mean, reach, line.usable) * weight)

        # Second pass.
        mean, sigma = box.mean_and_sigma(clipped, floor)
        deviation = (box.clip(clipped, mean, sigma, _CLIP) - mean) * weight * box.usable
        sigma = torch.maximum(sigma, _MIN_SIGMA_PER_QUANTUM * _quantum(deviation))
        for line, values in zip(lines, line_values, strict=True):
            line_mean, line_sigma = line.mean_and_sigma(values, floor)
            mean = torch.where(line.usable, torch.maximum(mean, line_mean), mean)
            sigma = torch.where(line.usable, torch.maximum(sigma, line_sigma), sigma)
        return mean, sigma, box.usable

    def _seeds(self, snr: Tensor, weight: Tensor) -> Tensor:
        """Return by how many sigmas each pixel qualifies as a seed; negative where it does not."""
        capped = snr.clamp(-_SUPPORT_CAP, _SUPPORT_CAP)
        centers = torch.cat([capped, weight, snr], dim=1)
        neighbours = box_sum(centers, 1, 1) - centers
        capped_sum, count, excess = neighbours.chunk(3, dim=1)
        support = capped_sum * count.clamp(min=1.0).rsqrt()
        seed = torch.minimum(snr - self.threshold, support - self.min_support)
        # Besides the hot pixel, those into which its charge bleeds: it is their neighbour.
        hot = (snr > _HOT_SIGMAS) & (excess < _HOT_SPREAD * snr)
        near_hot = F.max_pool2d(hot.float(), kernel_size=3, stride=1, padding=1)
        return torch.where(near_hot > 0, _NEVER, seed)


def _quantum(deviation: Tensor) -> Tensor:
    """Estimate the step of the counts on each panel, (N, 1, 1, 1): a photon, in the input's units.

    `deviation` is the pixels' distance from the background, clipped; 0 where there is none.

    A Poisson distributed number of photons has equal variance and third central moment, so the
    third moment over the variance is the step; noise that is symmetric makes it small or zero. The
    median over blocks keeps peaks out.
    """
    block = (min(_BLOCK, deviation.shape[2]), min(_BLOCK, deviation.shape[3]))
    powers = torch.cat([deviation.square(), deviation**3], dim=1)
    variance, third = F.avg_pool2d(powers, block).chunk(2, dim=1)
    return _panel_median(third / variance, variance > 0).clamp(min=0.0)


def _panel_median(values: Tensor, usable: Tensor) -> Tensor:
    """Return the median of each panel's usable values, (N, 1, 1, 1); 0 where there is none."""
    values = torch.where(usable, values, torch.nan)
    median = torch.nanquantile(values.flatten(1), 0.5, dim=1)
    return median.nan_to_num(0.0).view(-1, 1, 1, 1)
