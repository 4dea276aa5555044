"""Steps that bring pixels to a common scale.

Shape legend: B events, P panels of an event, H rows, W columns; N = B*P panels of a batch, h rows
and w columns of blocks of pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.preprocess.base import Transform
from peaknet_predict.preprocess.kernels import triton_steps


class InstanceNorm(Transform):
    """Bring each event to mean 0 and variance 1, over all its panels together.

    ``(x - mean) / sqrt(var + eps)`` with the biased variance, in float32. Bad pixels, which are NaN
    by then, take no part and become 0, the mean. Padded pixels do take part, with the value 0,
    because the weights were trained that way.

    Parameters
    ----------
    eps
        Added to the variance, square detector counts.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise the images; the mask stays."""
        # Not `valid`: that leaves out the padding too.
        finite_BPHW = torch.isfinite(images_BPHW)
        over = (1, 2, 3)
        # An event without a single good pixel must not divide by zero.
        count_B111 = finite_BPHW.sum(dim=over, keepdim=True).clamp(min=1).to(torch.float32)
        images_BPHW = torch.where(finite_BPHW, images_BPHW, 0.0)
        mean_B111 = images_BPHW.sum(dim=over, keepdim=True) / count_B111
        # Deviations before squares: detector offsets of 1e4 would leave no digits in float32.
        deviation_BPHW = torch.where(finite_BPHW, images_BPHW - mean_B111, 0.0)
        variance_B111 = deviation_BPHW.square().sum(dim=over, keepdim=True) / count_B111
        return deviation_BPHW * torch.rsqrt(variance_B111 + self.eps), valid_BPHW


_MIN_OF_TYPICAL = 0.1
"""Lower bound of a pixel's sigma, as a fraction of its panel's typical sigma. A shadow or a dead
region has little noise, which must not be blown up."""

_MIN_PER_QUANTUM = 0.45
"""Lower bound of sigma in steps of the counts (photons). Where there are fewer than 0.2 photons a
pixel, sigma says little: single photons would stand ten and more sigmas above it."""

_MIN_EPSILONS = 4.0
"""Lower bound of sigma, in float32 steps of the background: below are rounding errors."""

_STEP_SHARE = 0.5
"""How much of the neighbouring blocks' typical difference in brightness counts as noise. Beside a
step (the border of an ASIC or of a shadow) the background is not known any better. On a smooth
slope the difference is negligible."""

_MIN_SHARE_OF_BLOCK = 0.25
"""Share of its pixels that must be valid for a block to count."""

_LINEAR_SIGMAS = 4.0
"""Up to here the output is in sigmas; beyond, it grows with their logarithm."""


class LocalNorm(Transform):
    """Bring each pixel to its excess over the local background, in local sigmas, compressed.

    Mean and variance of the valid pixels are taken in blocks. A block's background is the median
    of its own and its eight neighbours' statistics, so that peaks, hot pixels and bad columns,
    which fill few of the nine, take no part, however strong they are. Between the blocks' centres
    it is interpolated. Other regions and other panels matter only for lower bounds of sigma. The
    result changes neither with the unit nor with the offset of a panel.

    An excess z of up to 4 sigmas stays as it is, in float32 resolution; beyond, it becomes
    ``4 (1 + ln(z / 4))`` (with the sign of z), which has the same slope there. So a peak of 1e4
    sigmas is 35: it neither saturates nor dwarfs the others, and bfloat16 resolves the noise.

    Pixels that are not valid become 0, the background.

    Parameters
    ----------
    block
        Pixels along each edge of a block. Three of them should be large against a peak and small
        against the features of the background.
    """

    def __init__(self, block: int = 8) -> None:
        super().__init__()
        if block < 2:
            raise ValueError(f"block is {block}; a variance needs blocks of at least 2x2 pixels")
        self.block = block

    def forward(self, images_BPHW: Tensor, valid_BPHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise the images; the mask stays."""
        steps = triton_steps(images_BPHW)
        if steps is not None:
            return self._in_kernels(steps, images_BPHW, valid_BPHW), valid_BPHW
        size = images_BPHW.shape[-2:]
        usable_BPHW = valid_BPHW & torch.isfinite(images_BPHW)
        x_NHW = torch.where(usable_BPHW, images_BPHW, 0.0).flatten(0, 1)
        background_N2hw = self._background(x_NHW, usable_BPHW.flatten(0, 1))
        mean_NHW, sigma_NHW = (
            F.interpolate(
                background_N2hw, scale_factor=self.block, mode="bilinear", align_corners=False
            )[..., : size[0], : size[1]]
        ).unbind(1)
        # Without noise there is no excess either: a constant panel becomes 0.
        z_NHW = torch.where(sigma_NHW > 0, (x_NHW - mean_NHW) / sigma_NHW, 0.0)
        z_BPHW = _compressed(z_NHW).view(images_BPHW.shape)
        return torch.where(usable_BPHW, z_BPHW, 0.0), valid_BPHW

    def _in_kernels(self, steps: Any, images_BPHW: Tensor, valid_BPHW: Tensor) -> Tensor:
        """Do the same on a GPU, in two passes over the pixels."""
        least = _MIN_SHARE_OF_BLOCK * self.block**2
        mean, variance, step, known = steps.block_statistics(
            images_BPHW, valid_BPHW, self.block, least
        )
        levels = _panel_levels(mean, variance.sqrt(), step, known)
        background_N2hw = steps.background(mean, variance, known, *levels, _STEP_SHARE)
        out_BPHW: Tensor = steps.normalise(
            images_BPHW, valid_BPHW, background_N2hw, self.block, _LINEAR_SIGMAS
        )
        return out_BPHW

    def _background(self, x_NHW: Tensor, usable_NHW: Tensor) -> Tensor:
        """Return mean and sigma of each block's background, (N, 2, h, w)."""
        mean, variance, step, known = self._block_statistics(x_NHW, usable_NHW)
        sigma = variance.sqrt()
        panel_mean, panel_sigma, floor = (
            level_N[:, None, None] for level_N in _panel_levels(mean, sigma, step, known)
        )
        near = _neighbourhood(known)
        anything = near.any(-1)
        means = _neighbourhood(mean)
        near_mean = torch.where(anything, _median(means, near), panel_mean)
        spread = _median((means - near_mean.unsqueeze(-1)).abs(), near)
        near_sigma = torch.where(anything, _median(_neighbourhood(sigma), near), panel_sigma)
        near_sigma = torch.hypot(near_sigma, _STEP_SHARE * spread)
        return torch.stack([near_mean, torch.maximum(near_sigma, floor)], dim=1)

    def _block_statistics(
        self, x_NHW: Tensor, usable_NHW: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each block's mean, variance, step of the counts, and whether they are known.

        All are (N, h, w). A Poisson distributed number of photons has equal variance and third
        central moment, so the third moment over the variance is a photon in the input's unit;
        noise that is symmetric makes it small or zero.
        """
        edge = self.block
        _, height, width = x_NHW.shape
        fill = (0, -width % edge, 0, -height % edge)
        split = (len(x_NHW), -(-height // edge), edge, -(-width // edge), edge)
        x = F.pad(x_NHW, fill).reshape(split)
        weight = F.pad(usable_NHW, fill, value=False).reshape(split).to(x.dtype)
        over = (2, 4)
        count = weight.sum(over, keepdim=True)
        mean = x.sum(over, keepdim=True) / count.clamp(min=1.0)
        # Deviations before powers: squares of a detector's offset would leave no digits.
        deviation = (x - mean) * weight
        squares = deviation.square().sum(over, keepdim=True)
        variance = squares / (count - 1).clamp(min=1.0)
        step = (deviation * deviation.square()).sum(over, keepdim=True) / squares
        known = count >= _MIN_SHARE_OF_BLOCK * edge**2
        mean, variance, step, known = (t[:, :, 0, :, 0] for t in (mean, variance, step, known))
        return mean, variance, step, known


def _panel_levels(
    mean_Nhw: Tensor, sigma_Nhw: Tensor, step_Nhw: Tensor, known_Nhw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each panel's typical mean and sigma, and the lower bound of sigma; all (N,)."""
    known_NK = known_Nhw.flatten(1)
    mean_N = _median(mean_Nhw.flatten(1), known_NK)
    sigma_N = _median(sigma_Nhw.flatten(1), known_NK)
    rounding_N = _MIN_EPSILONS * torch.finfo(mean_Nhw.dtype).eps * mean_N.abs()
    # The median over blocks keeps peaks out of the estimate.
    varied_NK = known_NK & (sigma_Nhw.flatten(1) > rounding_N[:, None])
    varied_NK &= torch.isfinite(step_Nhw.flatten(1))
    quantum_N = _median(step_Nhw.flatten(1), varied_NK).clamp(min=0.0)
    floor_N = torch.maximum(_MIN_OF_TYPICAL * sigma_N, _MIN_PER_QUANTUM * quantum_N)
    return mean_N, sigma_N, torch.maximum(floor_N, rounding_N)


def _neighbourhood(values_Nhw: Tensor) -> Tensor:
    """Return each block's value and its eight neighbours', (N, h, w, 9); 0 beyond the border."""
    height, width = values_Nhw.shape[1:]
    around = F.pad(values_Nhw, (1, 1, 1, 1), value=0)
    return torch.stack(
        [around[:, y : y + height, x : x + width] for y in range(3) for x in range(3)], dim=-1
    )


def _median(values: Tensor, usable: Tensor) -> Tensor:
    """Return the median of the usable values along the last axis (the lower one of two), or 0."""
    ordered = torch.where(usable, values, torch.inf).sort(dim=-1).values
    count = usable.sum(dim=-1, keepdim=True)
    middle = ordered.gather(-1, (count - 1).clamp(min=0) // 2)
    return torch.where(count > 0, middle, 0.0).squeeze(-1)


def _compressed(z: Tensor) -> Tensor:
    """Return z up to `_LINEAR_SIGMAS`, and from there on a logarithm of the same slope."""
    size = z.abs()
    logarithm = _LINEAR_SIGMAS * (1 + torch.log(size.clamp(min=_LINEAR_SIGMAS) / _LINEAR_SIGMAS))
    return torch.where(size <= _LINEAR_SIGMAS, z, torch.copysign(logarithm, z))
