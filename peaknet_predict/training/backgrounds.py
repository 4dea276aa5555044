"""What the detector sees besides Bragg spots: scattering, rings, shadows, the jet's streak.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns. Parameters of an event are
(B, 1, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.training.crystals import Cameras
from peaknet_predict.training.draws import Draws

ICE_Q = tuple(1.0 / d for d in (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92, 1.88))
"""1/d of the first reflections of hexagonal ice, inverse Angstrom (d spacings that programs mask,
as in Thorn et al., Acta Cryst. D73 (2017) 729)."""

_RINGS = 4
"""Sharp rings of an event besides those of ice: lipidic phases, grease, powders."""

LEVEL_PHOTONS = (0.01, 3000.0)
"""Mean background, photons per pixel: thin jets in an FEL to long exposures at a synchrotron."""


@dataclass(slots=True)
class Background:
    """What pixels expect without Bragg spots.

    Attributes
    ----------
    photons_BPHW
        Expected photons, shadows included.
    grain_BPHW
        Standard deviation of structure in the rings, photons: noise to whoever looks for spots.
    transmission_BPHW
        Of shadows, 0 to 1, for the spots.
    """

    photons_BPHW: Tensor
    grain_BPHW: Tensor
    transmission_BPHW: Tensor


def draw_background(draws: Draws, cameras: Cameras, height: int, width: int) -> Background:
    """Draw the backgrounds of a batch."""
    B, P = cameras.top_BP.shape
    y, x, q = cameras.polar(height, width)
    smooth = _smooth(draws, cameras, y, x, q)
    rings = _rings(draws, q, B)
    # Powders of few crystals are grainy and unevenly strong around the ring.
    grain, spread = _grain(draws, B, P, height, width)
    azimuth = torch.atan2(y, x)
    uneven = draws.chance(B, 1, 1, 1, probability=0.5) * draws.uniform(B, 1, 1, 1)
    waves = draws.among(B, 1, 1, 1, weights=(0.4, 0.3, 0.2, 0.1)) + 1.0
    phase = draws.uniform(B, 1, 1, 1, high=2.0 * math.pi)
    rings = rings * (1.0 + uneven * (waves * azimuth + phase).cos())
    # Unevenness that has no name: 30 % at most, over a quarter of a panel.
    bumps = F.interpolate(
        draws.normal(B * P, 1, 5, 5), size=(height, width), mode="bicubic", align_corners=True
    )
    strength = draws.chance(B, 1, 1, 1, probability=0.4) * draws.uniform(B, 1, 1, 1, high=0.3)
    smooth = smooth * torch.exp(strength * bumps.view(B, P, height, width))
    streak = _streak(draws, y, x, B)
    photons = smooth + rings * grain + streak
    # The level is that of the event's mean, whatever is on it.
    mean = photons.mean(dim=(1, 2, 3), keepdim=True)
    low, high = LEVEL_PHOTONS
    level = draws.log_uniform(B, 1, 1, 1, low=low, high=high) / mean.clamp(min=1e-6)
    shadow = _shadows(draws, y, x, B, P)
    return Background(
        photons_BPHW=photons * level * shadow,
        grain_BPHW=rings * level * spread * shadow,
        transmission_BPHW=shadow,
    )


def _weight(draws: Draws, batch_size: int, probability: float, low: float, high: float) -> Tensor:
    """Draw the strength of a component that not every event has, (B, 1, 1, 1)."""
    shape = (batch_size, 1, 1, 1)
    return draws.chance(*shape, probability=probability) * draws.log_uniform(
        *shape, low=low, high=high
    )


def _smooth(draws: Draws, cameras: Cameras, y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """Draw scattering without sharp features, in units of its flat part."""
    B = len(q)
    # Fluorescence and scatter of the surroundings are flat; always some.
    photons = torch.ones_like(q)
    # Air: falls steeply from the beam.
    steep = draws.log_uniform(B, 1, 1, 1, low=0.02, high=0.2)
    photons += _weight(draws, B, 0.6, 0.3, 30.0) * torch.exp(-q / steep)
    # Water: 3.1 Angstrom, a weaker second maximum at 2.1 (Clark et al., PNAS 107 (2010) 14003; the
    # shoulder of the same curves). Other solvents, oils and LCP: 3 to 6 Angstrom.
    water = _weight(draws, B, 0.7, 0.2, 20.0)
    width = draws.uniform(B, 1, 1, 1, low=0.035, high=0.06)
    ring = torch.exp(-0.5 * ((q - 0.32) / width).square())
    ring += 0.4 * torch.exp(-0.5 * ((q - 0.46) / (1.3 * width)).square())
    photons += water * ring
    centre = draws.uniform(B, 1, 1, 1, low=0.15, high=0.33)
    width = draws.uniform(B, 1, 1, 1, low=0.012, high=0.05)
    photons += _weight(draws, B, 0.4, 0.2, 10.0) * torch.exp(-0.5 * ((q - centre) / width).square())
    # Polarisation, along x as at nearly every source: 1 - (x / r)^2.
    distance2 = cameras.distance_px_B[:, None, None, None].square()
    return photons * (1.0 - x.square() / (x.square() + y.square() + distance2))


def _rings(draws: Draws, q: Tensor, B: int) -> Tensor:
    """Draw sharp rings, in units of the flat background."""
    rings = torch.zeros_like(q)
    # Ice in a quarter of the events, each ring with its own strength; 0.3 to 2 % wide.
    ice = _weight(draws, B, 0.25, 0.1, 30.0)
    width = draws.log_uniform(B, 1, 1, 1, low=0.001, high=0.005)
    for ice_q in ICE_Q:
        strength = ice * draws.uniform(B, 1, 1, 1).square()
        rings += strength * torch.exp(-0.5 * ((q - ice_q) / width).square())
    for _ in range(_RINGS):
        strength = _weight(draws, B, 0.12, 0.1, 30.0)
        centre = draws.uniform(B, 1, 1, 1, low=0.02, high=0.5)
        width = draws.log_uniform(B, 1, 1, 1, low=0.0008, high=0.01)
        rings += strength * torch.exp(-0.5 * ((q - centre) / width).square())
    return rings


def _grain(draws: Draws, B: int, P: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw the grain of powder rings: a factor of mean 1 for each pixel, and its deviation.

    (B, P, H, W) and (B, 1, 1, 1). Grains are 2 to 3 pixels wide; a ring of few crystals has
    exponentially distributed ones.
    """
    coarse = draws.exponential(B * P, 1, -(-height // 2), -(-width // 2))
    grain = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    depth = draws.chance(B, 1, 1, 1, probability=0.4) * draws.uniform(B, 1, 1, 1)
    # Interpolation averages over neighbours: 0.625 of the deviation stays (each axis keeps
    # (3/4)^2 + (1/4)^2 of the variance).
    return 1.0 + depth * (grain.view(B, P, height, width) - 1.0), 0.625 * depth


def _streak(draws: Draws, y: Tensor, x: Tensor, B: int) -> Tensor:
    """Draw the narrow bright line through the beam that a jet or a nozzle's edge scatters."""
    strength = _weight(draws, B, 0.2, 1.0, 300.0)
    # Jets mostly fall or fly sideways: streaks lie near an axis as often as anywhere.
    angle = draws.uniform(B, 1, 1, 1, high=math.pi)
    near_axis = (0.5 * math.pi) * draws.among(B, 1, 1, 1, weights=(0.5, 0.5)) + 0.05 * angle
    angle = torch.where(draws.chance(B, 1, 1, 1, probability=0.5), near_axis, angle)
    along, across = y * angle.sin() + x * angle.cos(), y * angle.cos() - x * angle.sin()
    width = draws.log_uniform(B, 1, 1, 1, low=0.7, high=6.0)
    reach = draws.log_uniform(B, 1, 1, 1, low=40.0, high=800.0)
    # Fringes along it: the jet's thickness.
    period = draws.log_uniform(B, 1, 1, 1, low=6.0, high=60.0)
    depth = draws.chance(B, 1, 1, 1, probability=0.5) * draws.uniform(B, 1, 1, 1)
    fringes = 1.0 + depth * (2.0 * math.pi * along / period).cos()
    profile = torch.exp(-0.5 * (across / width).square() - along.abs() / reach)
    return strength * profile * fringes


def _shadows(draws: Draws, y: Tensor, x: Tensor, B: int, P: int) -> Tensor:
    """Draw the transmission of beam stop, its arm and edges of the sample holder, (B, P, H, W)."""
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
    # An edge somewhere across a panel, of anything.
    angle = draws.uniform(B, P, 1, 1, high=2.0 * math.pi)
    middle_y, middle_x = y.mean(dim=2, keepdim=True), x.mean(dim=3, keepdim=True)
    beyond = (y - middle_y) * angle.sin() + (x - middle_x) * angle.cos()
    size = 0.5 * min(y.shape[2], x.shape[3])
    edge = torch.sigmoid((beyond - size * draws.uniform(B, P, 1, 1)) / sharp)
    edge = edge * draws.chance(B, P, 1, 1, probability=0.1)
    return 1.0 - opaque * torch.maximum(stop, edge)
