"""Scattering that depends on the angle alone: air, solvent, powder rings and their grain.

Shape legend: B events, P panels of an event, H rows, W columns, Q places of a radial profile, R
rings. Parameters of an event are (B, 1, 1, 1), or (B, 1) for profiles.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.simulation.draws import Draws

ICE_Q = tuple(1.0 / d for d in (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92, 1.88))
"""1/d of the first reflections of hexagonal ice, inverse Angstrom: the d spacings that programs
mask (Thorn et al., Acta Cryst. D73 (2017) 729)."""

_OTHER_RINGS = 4
"""Most sharp rings of an event besides those of ice: lipidic phases, grease, powders."""

_PLACES = 4096
"""Places of a radial profile. They are at most 2e-4 inverse Angstrom apart, a quarter of the width
of the sharpest ring."""


def draw_scattering(draws: Draws, q_BPHW: Tensor) -> tuple[Tensor, Tensor]:
    """Draw radial scattering, smooth and in sharp rings, in units of the flat background.

    Profiles are computed once per event; pixels look their values up.

    Parameters
    ----------
    draws
        Stream.
    q_BPHW
        1/d of the pixels, inverse Angstrom.

    Returns
    -------
    smooth_BPHW, rings_BPHW
        float32.
    """
    B, P, H, W = q_BPHW.shape
    farthest = q_BPHW.amax(dim=(1, 2, 3)).clamp(min=1e-3)
    q_BQ = farthest[:, None] * torch.linspace(0.0, 1.0, _PLACES, device=q_BPHW.device)
    profiles = torch.stack([_smooth(draws, q_BQ), _rings(draws, q_BQ)], dim=1)
    # From -1 at the first place to 1 at the last, in the only row.
    along = 2.0 * q_BPHW / farthest[:, None, None, None] - 1.0
    places = torch.stack([along, torch.zeros_like(along)], dim=-1).view(B, P * H, W, 2)
    found = F.grid_sample(profiles[:, :, None], places, padding_mode="border", align_corners=True)
    smooth, rings = found.view(B, 2, P, H, W).unbind(1)
    return smooth, rings


@functools.cache
def ice_rings(device: torch.device) -> Tensor:
    """Return `ICE_Q` on a device; a copy in every batch would wait for the device."""
    return torch.tensor(ICE_Q, device=device)


def weight(draws: Draws, *shape: int, probability: float, low: float, high: float) -> Tensor:
    """Draw the strength of a component that not every event has."""
    return draws.chance(*shape, probability=probability) * draws.log_uniform(
        *shape, low=low, high=high
    )


def _bell(q_BQ: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((q_BQ - centre) / width).square())


def _smooth(draws: Draws, q: Tensor) -> Tensor:
    """Draw profiles without sharp features, (B, Q)."""
    B = len(q)
    # Air: falls steeply from the beam.
    steep = draws.log_uniform(B, 1, low=0.02, high=0.2)
    air = weight(draws, B, 1, probability=0.6, low=0.3, high=30.0) * torch.exp(-q / steep)
    # Water: 3.1 Angstrom, a weaker second maximum at 2.1 (Clark et al., PNAS 107 (2010) 14003; the
    # shoulder of the same curves).
    water = weight(draws, B, 1, probability=0.7, low=0.2, high=20.0)
    width = draws.uniform(B, 1, low=0.035, high=0.06)
    water = water * (_bell(q, 0.32, width) + 0.4 * _bell(q, 0.46, 1.3 * width))
    # Other solvents, oils and LCP: 3 to 7 Angstrom.
    other = weight(draws, B, 1, probability=0.4, low=0.2, high=10.0)
    centre = draws.uniform(B, 1, low=0.15, high=0.33)
    other = other * _bell(q, centre, draws.uniform(B, 1, low=0.012, high=0.05))
    # Fluorescence and scatter of the surroundings are flat. There is always some.
    return 1.0 + air + water + other


def _rings(draws: Draws, q: Tensor) -> Tensor:
    """Draw profiles of sharp rings, (B, Q)."""
    B, R = len(q), _OTHER_RINGS
    # Ice in a quarter of the events, each ring with its own strength; 0.3 to 2 % wide.
    ice = weight(draws, B, 1, 1, probability=0.25, low=0.1, high=30.0)
    width = draws.log_uniform(B, 1, 1, low=0.001, high=0.005)
    each = draws.uniform(B, len(ICE_Q), 1).square()
    of_ice = (each * _bell(q[:, None], ice_rings(q.device)[:, None], width)).sum(dim=1)
    strength = weight(draws, B, R, 1, probability=0.12, low=0.1, high=30.0)
    centres = draws.uniform(B, R, 1, low=0.02, high=0.5)
    width = draws.log_uniform(B, R, 1, low=0.0008, high=0.01)
    return ice[:, 0] * of_ice + (strength * _bell(q[:, None], centres, width)).sum(dim=1)


def draw_grain(draws: Draws, B: int, P: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw the grain of powder rings: a factor of mean 1, and its standard deviation.

    (B, P, H, W) and (B, 1, 1, 1). Grains are 2 to 3 pixels wide. With few crystals in a ring they
    are exponentially distributed.
    """
    coarse = draws.exponential(B * P, 1, -(-height // 2), -(-width // 2))
    grain = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    depth = draws.chance(B, 1, 1, 1, probability=0.4) * draws.uniform(B, 1, 1, 1)
    # Interpolation averages over neighbours, and 0.625 of the deviation is left: each axis keeps
    # (3/4)^2 + (1/4)^2 of the variance.
    return 1.0 + depth * (grain.view(B, P, height, width) - 1.0), 0.625 * depth


def draw_unevenness(draws: Draws, y: Tensor, x: Tensor) -> Tensor:
    """Draw how rings vary around the beam: preferred orientations, with one to four maxima."""
    B = len(y)
    uneven = draws.chance(B, 1, 1, 1, probability=0.5) * draws.uniform(B, 1, 1, 1)
    waves = draws.among(B, 1, 1, 1, weights=(0.4, 0.3, 0.2, 0.1)) + 1.0
    phase = draws.uniform(B, 1, 1, 1, high=2.0 * math.pi)
    return 1.0 + uneven * (waves * torch.atan2(y, x) + phase).cos()
