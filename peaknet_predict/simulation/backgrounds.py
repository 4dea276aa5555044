"""What the detector sees besides Bragg spots: scattering, rings, shadows and jet streaks.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns. Parameters of an event are
(B, 1, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.simulation.cameras import Cameras
from peaknet_predict.simulation.draws import Draws
from peaknet_predict.simulation.scattering import (
    draw_grain,
    draw_scattering,
    draw_unevenness,
    weight,
)

LEVEL_PHOTONS = (0.01, 3000.0)
"""Mean background, photons per pixel: from thin jets at an FEL to long exposures at a
synchrotron."""


@dataclass(slots=True)
class Background:
    """The signal of the pixels without Bragg spots.

    Attributes
    ----------
    photons_BPHW
        Expected photons, shadows included.
    grain_BPHW
        Standard deviation of the structure in rings, photons. It hides spots as noise does.
    transmission_BPHW
        Transmission of shadows, 0 to 1: spots behind them are weaker by this factor.
    """

    photons_BPHW: Tensor
    grain_BPHW: Tensor
    transmission_BPHW: Tensor


def draw_background(draws: Draws, cameras: Cameras, height: int, width: int) -> Background:
    """Draw the backgrounds of a batch."""
    B, P = cameras.top_BP.shape
    y, x, q = cameras.polar(height, width)
    smooth, rings = draw_scattering(draws, q)
    # Polarisation, along x as at nearly every source: 1 - (x / r)^2.
    distance2 = cameras.distance_px_B[:, None, None, None].square()
    smooth = smooth * (1.0 - x.square() / (x.square() + y.square() + distance2))
    # Powders of few crystals have grainy rings of uneven strength.
    grain, spread = draw_grain(draws, B, P, height, width)
    rings = rings * draw_unevenness(draws, y, x)
    # Other unevenness: 30 % at most, over a quarter of a panel.
    bumps = F.interpolate(
        draws.normal(B * P, 1, 5, 5), size=(height, width), mode="bicubic", align_corners=True
    )
    strength = draws.chance(B, 1, 1, 1, probability=0.4) * draws.uniform(B, 1, 1, 1, high=0.3)
    smooth = smooth * torch.exp(strength * bumps.view(B, P, height, width))
    streak = _streak(draws, y, x, B)
    photons = smooth + rings * grain + streak
    # The drawn level is that of the event's mean, whatever the background consists of.
    mean = photons.mean(dim=(1, 2, 3), keepdim=True)
    low, high = LEVEL_PHOTONS
    level = draws.log_uniform(B, 1, 1, 1, low=low, high=high) / mean.clamp(min=1e-6)
    shadow = _shadows(draws, y, x, B, P)
    return Background(
        photons_BPHW=photons * level * shadow,
        grain_BPHW=rings * level * spread * shadow,
        transmission_BPHW=shadow,
    )


def _streak(draws: Draws, y: Tensor, x: Tensor, B: int) -> Tensor:
    """Draw the narrow bright line through the beam that a jet or the edge of a nozzle scatters."""
    strength = weight(draws, B, 1, 1, 1, probability=0.2, low=1.0, high=300.0)
    # Most jets fall or fly sideways, so half of the streaks lie near an axis. The others go through
    # the middle of the first panel, or most panels would never see one.
    angle = draws.uniform(B, 1, 1, 1, high=0.2)
    near_axis = (0.5 * math.pi) * draws.among(B, 1, 1, 1, weights=(0.5, 0.5)) + angle
    middle_y, middle_x = y[:, :1].mean(dim=2, keepdim=True), x[:, :1].mean(dim=3, keepdim=True)
    through = torch.atan2(middle_y, middle_x) + 0.2 * angle
    angle = torch.where(draws.chance(B, 1, 1, 1, probability=0.5), near_axis, through)
    along, across = y * angle.sin() + x * angle.cos(), y * angle.cos() - x * angle.sin()
    width = draws.log_uniform(B, 1, 1, 1, low=0.7, high=6.0)
    reach = draws.log_uniform(B, 1, 1, 1, low=60.0, high=1500.0)
    # Fringes along it, from the thickness of the jet.
    period = draws.log_uniform(B, 1, 1, 1, low=6.0, high=60.0)
    depth = draws.chance(B, 1, 1, 1, probability=0.5) * draws.uniform(B, 1, 1, 1)
    fringes = 1.0 + depth * (2.0 * math.pi * along / period).cos()
    profile = torch.exp(-0.5 * (across / width).square() - along.abs() / reach)
    return strength * profile * fringes


def _shadows(draws: Draws, y: Tensor, x: Tensor, B: int, P: int) -> Tensor:
    """Draw the transmission of beam stop, its arm and sample-holder edges, (B, P, H, W)."""
    sharp = draws.log_uniform(B, 1, 1, 1, low=0.4, high=8.0)
    opaque = 1.0 - draws.chance(B, 1, 1, 1, probability=0.5) * draws.uniform(B, 1, 1, 1, high=0.4)
    radius = draws.log_uniform(B, 1, 1, 1, low=8.0, high=120.0)
    stop = torch.sigmoid((radius - (y.square() + x.square()).sqrt()) / sharp)
    angle = draws.uniform(B, 1, 1, 1, high=2.0 * math.pi)
    along, across = y * angle.sin() + x * angle.cos(), y * angle.cos() - x * angle.sin()
    half = draws.log_uniform(B, 1, 1, 1, low=3.0, high=20.0)
    arm = torch.sigmoid((half - across.abs()) / sharp) * (along > 0.0)
    arm = arm * draws.chance(B, 1, 1, 1, probability=0.5)
    stop = torch.maximum(stop, arm) * draws.chance(B, 1, 1, 1, probability=0.5)
    # The edge of something, anywhere across a panel.
    angle = draws.uniform(B, P, 1, 1, high=2.0 * math.pi)
    middle_y, middle_x = y.mean(dim=2, keepdim=True), x.mean(dim=3, keepdim=True)
    beyond = (y - middle_y) * angle.sin() + (x - middle_x) * angle.cos()
    size = 0.5 * min(y.shape[2], x.shape[3])
    edge = torch.sigmoid((beyond - size * draws.uniform(B, P, 1, 1)) / sharp)
    edge = edge * draws.chance(B, P, 1, 1, probability=0.1)
    return 1.0 - opaque * torch.maximum(stop, edge)
