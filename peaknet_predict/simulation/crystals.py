"""The spots of simulated shots: from crystals, from ice, and strays.

Shape legend: B events, P panels of an event, C crystals of an event, G cells of a panel's grid, S
most stray spots of a panel, M spots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.simulation.cameras import Cameras
from peaknet_predict.simulation.draws import Draws
from peaknet_predict.simulation.lattices import (
    MARGIN,
    MAX_CRYSTALS,
    absent,
    draw_axes,
    find_reflections,
)
from peaknet_predict.simulation.scattering import ice_rings

STRAY_SPOTS = 12
"""Most stray spots of a panel: salt, dust, other isolated crystals."""


@dataclass(slots=True)
class Spots:
    """M spots before the detector sees them.

    Attributes
    ----------
    image_M
        (M,) int64, panel of the batch: event * P + panel.
    y_M, x_M
        (M,) centres in pixel indices of the panel; up to `MARGIN` outside.
    strength_M
        (M,) expected photons, relative to a full reflection at zero angle.
    ice_M
        (M,) bool: whether ice made the spot. It looks like any other, and only its ring may tell.
        Finding it is neither demanded nor wrong.
    """

    image_M: Tensor
    y_M: Tensor
    x_M: Tensor
    strength_M: Tensor
    ice_M: Tensor


def draw_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor, faintest_B: Tensor
) -> Spots:
    """Draw the spots of lattices, of ice crystals and of stray crystals.

    Parameters
    ----------
    draws, cameras
        Stream of random numbers, and where the panels are.
    height, width
        Pixels of a panel.
    hit_B
        (B,) bool: whether an event has spots at all.
    faintest_B
        (B,) strength below which a spot is left out.
    """
    lattice = _lattice_spots(draws, cameras, height, width, hit_B)
    stray = _stray_spots(draws, cameras, height, width, hit_B)
    image, y, x, strength, ice = (
        torch.cat([a.flatten(), b.flatten()]) for a, b in zip(lattice, stray, strict=True)
    )
    inside = (y >= -MARGIN) & (y <= height - 1 + MARGIN)
    inside &= (x >= -MARGIN) & (x <= width - 1 + MARGIN)
    visible = strength >= faintest_B.repeat_interleave(cameras.top_BP.shape[1])[image]
    # The host waits for the device here, because the number of spots is random.
    kept = torch.nonzero(inside & visible).squeeze(1)
    return Spots(image[kept], y[kept], x[kept], strength[kept], ice[kept])


def _lattice_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor
) -> tuple[Tensor, ...]:
    """Return image, y, x, strength and ice, (B, C, P, G) each, of candidates for spots."""
    found = find_reflections(cameras, draw_axes(draws, cameras.longest_axis_B), height, width)
    B, C, P, G = found.q2_BCPG.shape
    # Width of a lattice point: domain size (constant), mosaicity (times q), and bandwidth (times
    # the depth of q along the beam, wavelength q^2 / 2); from 1e-4 for LCP jets to 2e-3 for soaked
    # needles. Beyond a sixth of the lattice's spacing no lattice would be left.
    size = draws.log_uniform(B, 1, 1, 1, low=1e-4, high=1.5e-3)
    mosaic = draws.log_uniform(B, 1, 1, 1, low=1e-4, high=8e-3)
    spectral = (0.5 * cameras.wavelength_B * cameras.bandwidth_B)[:, None, None, None]
    width2 = size.square() + (mosaic.square() + spectral.square() * found.q2_BCPG) * found.q2_BCPG
    widest = 1.0 / (6.0 * cameras.longest_axis_B[:, None, None, None])
    width2 = torch.minimum(width2, widest.square())
    partiality = torch.exp(-0.5 * found.excitation_BCPG.square() / width2)

    # Acentric Wilson statistics: |F|^2 is exponentially distributed (Wilson, Acta Cryst. 2 (1949)
    # 318). B is 10 (well ordered) to 120 square Angstrom (membrane proteins).
    b_factor = draws.log_uniform(B, 1, 1, 1, low=10.0, high=120.0)
    falloff = torch.exp(-0.5 * b_factor * found.q2_BCPG)
    strength = draws.exponential(B, C, P, G) * falloff * partiality * found.polarisation_BCPG
    strength = strength * _crystal_share(draws, hit_B)
    strength = torch.where(found.exists_BCPG & ~absent(draws, found), strength, 0.0)

    # Some events have no lattice at all, so that the network does not expect one.
    scatter = draws.chance(B, 1, 1, 1, probability=0.12) * 24.0
    y = found.y_BCPG + scatter * draws.uniform(B, C, P, G, low=-0.5, high=0.5)
    x = found.x_BCPG + scatter * draws.uniform(B, C, P, G, low=-0.5, high=0.5)
    image = torch.arange(B * P, device=draws.device).view(B, 1, P, 1).expand(B, C, P, G)
    return image, y, x, strength, torch.zeros_like(found.exists_BCPG)


def _crystal_share(draws: Draws, hit_B: Tensor) -> Tensor:
    """Draw how strongly each crystal of an event diffracts, (B, C, 1, 1); 0 where there is none."""
    B = len(hit_B)
    # One crystal in 70 % of the hits, two in 20 %, three in 5 %; only stray spots in 5 %.
    crystals = draws.among(B, 1, weights=(0.05, 0.70, 0.20, 0.05)) * hit_B[:, None]
    present = torch.arange(MAX_CRYSTALS, device=draws.device) < crystals
    share = draws.log_uniform(B, MAX_CRYSTALS, low=0.1, high=1.0)
    share[:, 0] = 1.0
    return (present * share)[:, :, None, None]


def _stray_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor
) -> tuple[Tensor, ...]:
    """Return image, y, x, strength and ice, (B, P, S) each, of spots that belong to no lattice.

    A quarter of the events with spots has salt or dust, anywhere: peaks like any other. A tenth has
    ice, on its rings.
    """
    B, P = cameras.top_BP.shape
    S = STRAY_SPOTS
    y = draws.uniform(B, P, S, low=-1.0, high=height)
    x = draws.uniform(B, P, S, low=-1.0, high=width)
    # Ice moves a spot, along its direction, to the radius of one of the rings.
    ice = draws.chance(B, 1, 1, probability=0.1)
    top, left = cameras.top_BP[..., None], cameras.left_BP[..., None]
    rho = ((y + top).square() + (x + left).square()).sqrt().clamp(min=1.0)
    rings = ice_rings(y.device)
    # Rounding may lift the product to the number of rings.
    ring = (draws.uniform(B, P, S) * len(rings)).long().clamp(max=len(rings) - 1)
    ice_q = rings[ring]
    theta = torch.asin((0.5 * cameras.wavelength_B[:, None, None] * ice_q).clamp(max=0.6))
    scale = cameras.distance_px_B[:, None, None] * (2.0 * theta).tan() / rho
    y = torch.where(ice, (y + top) * scale - top, y)
    x = torch.where(ice, (x + left) * scale - left, x)
    share = draws.uniform(B, 1, 1) * (draws.chance(B, 1, 1, probability=0.25) | ice)
    active = (draws.uniform(B, P, S) < share) & hit_B[:, None, None]
    strength = active * draws.log_uniform(B, P, S, low=0.03, high=3.0)
    image = torch.arange(B * P, device=draws.device).view(B, P, 1).expand(B, P, S)
    return image, y, x, strength, ice.expand(B, P, S)
