"""Defects of detectors: hot, dead and noisy pixels, bad lines and clusters, tracks of particles.

All heights are in units of the readout noise. Shape legend: B events, P panels of an event, N =
B*P, H rows, W columns, T tracks, S steps of a track, L lines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peaknet_predict.simulation.draws import Draws

_TRACKS, _TRACK_STEPS = 3, 16
"""Most cosmic rays and electrons that cross a panel, and most pixels of a track."""

DEFECT_SIGMAS = (4.0, 3000.0)
"""What warm and hot pixels add to the signal, in units of the noise."""


def defects(draws: Draws, B: int, P: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Draw masks of hot, dead, noisy and negative pixels, and how far off their values are.

    A tenth of the events has none; in the others up to 1 % of the pixels are defective.
    """
    place = draws.uniform(B, P, height, width)
    defective = draws.chance(B, 1, 1, 1, probability=0.9)
    masks = []
    lower = torch.zeros(B, 1, 1, 1, device=draws.device)
    share = torch.zeros_like(place)
    for highest in (4e-3, 4e-3, 1e-3, 5e-4):
        fraction = defective * draws.log_uniform(B, 1, 1, 1, low=1e-6, high=highest)
        mask = (place >= lower) & (place < lower + fraction)
        # A number's place in its interval is another uniform deviate.
        share = torch.where(mask, (place - lower) / fraction, share)
        masks.append(mask)
        lower = lower + fraction
    low, high = DEFECT_SIGMAS
    return *masks, low * (share * math.log(high / low)).exp()


def bad_lines(draws: Draws, B: int, P: int, height: int, width: int) -> Tensor:
    """Draw rows and columns, or parts of them, that are off by 2 to 300 times the noise."""
    L = 2
    y = torch.arange(height, device=draws.device)[:, None]
    x = torch.arange(width, device=draws.device)
    size = draws.sign(B, P, L) * draws.log_uniform(B, P, L, low=2.0, high=300.0)
    size = size * draws.chance(B, P, L, probability=0.1)
    # The first is a row, the second a column; each begins on the panel or before it.
    row = y == (draws.uniform(B, P, 1, 1) * height).floor()
    column = x == (draws.uniform(B, P, 1, 1) * width).floor()
    along_x = x >= draws.uniform(B, P, 1, 1, low=-width, high=width)
    along_y = y >= draws.uniform(B, P, 1, 1, low=-height, high=height)
    of_row, of_column = size[..., None, None].unbind(2)
    return of_row * row * along_x + of_column * column * along_y


def bad_blocks(draws: Draws, B: int, P: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw clusters of 1 to 12 bad pixels along each edge: a mask, and their value."""
    y = torch.arange(height, device=draws.device)[:, None]
    x = torch.arange(width, device=draws.device)
    shape = (B, P, 1, 1)
    top, left = draws.uniform(*shape) * height, draws.uniform(*shape) * width
    tall = draws.log_uniform(*shape, low=1.0, high=12.0)
    wide = draws.log_uniform(*shape, low=1.0, high=12.0)
    rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + wide)
    rows = rows & draws.chance(*shape, probability=0.2)
    hot = draws.chance(*shape, probability=0.5)
    return rows & columns, hot * draws.log_uniform(*shape, low=5.0, high=1000.0)


def tracks(draws: Draws, B: int, P: int, height: int, width: int) -> Tensor:
    """Draw the tracks of cosmic rays and fast electrons, from single pixels to worms: (B*P, H*W).

    A track turns little by little, and what it leaves varies from pixel to pixel.
    """
    N, T, S = B * P, _TRACKS, _TRACK_STEPS
    step = torch.arange(S, device=draws.device)
    length = draws.log_uniform(N, T, 1, low=1.0, high=S + 0.99).floor()
    crossing = draws.chance(N, T, 1, probability=0.08)
    turn = 0.35 * draws.normal(N, T, S).cumsum(dim=-1)
    angle = draws.uniform(N, T, 1, high=2.0 * math.pi) + turn
    y = draws.uniform(N, T, 1) * height + angle.sin().cumsum(dim=-1)
    x = draws.uniform(N, T, 1) * width + angle.cos().cumsum(dim=-1)
    size = draws.log_uniform(N, T, 1, low=5.0, high=1000.0) * draws.uniform(N, T, S, low=0.3)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    size = size * (crossing & inside & (step < length))
    pixel = y.clamp(0, height - 1).long() * width + x.clamp(0, width - 1).long()
    left = torch.zeros(N, height * width, device=draws.device)
    return left.scatter_add_(1, pixel.flatten(1), size.flatten(1))
