"""The shapes of spots, and how their photons fall on pixels.

Shape legend: B events, N panels of the batch, H rows, W columns, M spots, J components of a spot, K
rows and columns of the window around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.simulation.cameras import Cameras
from peaknet_predict.simulation.crystals import Spots
from peaknet_predict.simulation.draws import Draws
from peaknet_predict.simulation.lattices import MARGIN

RADIUS = 11
"""Pixels of a spot's window on each side of the central one."""

_STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Places of the components along a spot's streak, in units of `_STEP`."""

_STEP = 0.5**0.5
"""With it the components have a standard deviation of 1 along the streak."""

_CHUNK = 32768
"""Spots that are drawn at once, which bounds the memory for shots with very many."""


@dataclass(slots=True)
class Shapes:
    """M spots as the detector spreads them: Gaussians in a row, and a wide one as tail.

    Attributes
    ----------
    y_MJ, x_MJ, sigma_MJ, weight_MJ
        (M, J) centres and widths in pixels, and shares of the photons, which sum to 1.
    """

    y_MJ: Tensor
    x_MJ: Tensor
    sigma_MJ: Tensor
    weight_MJ: Tensor

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return centre of gravity y and x, and the rms width along one axis (mean of both).

        (M,) each, pixels; the width contains that of a pixel, 1/12 square pixel.
        """
        y_M1 = (self.weight_MJ * self.y_MJ).sum(dim=1, keepdim=True)
        x_M1 = (self.weight_MJ * self.x_MJ).sum(dim=1, keepdim=True)
        offset2 = (self.y_MJ - y_M1).square() + (self.x_MJ - x_M1).square()
        variance = (self.weight_MJ * (self.sigma_MJ.square() + 0.5 * offset2)).sum(dim=1)
        return y_M1[:, 0], x_M1[:, 0], (variance + 1.0 / 12.0).sqrt()


def draw_shapes(draws: Draws, cameras: Cameras, spots: Spots) -> Shapes:
    """Draw the shapes of spots: similar within an event, different from spot to spot."""
    B, P = cameras.top_BP.shape
    event = torch.div(spots.image_M, P, rounding_mode="floor")
    M = len(event)
    # Beam and crystal are 10 to 300 micrometres wide at the detector. Charge sharing and point
    # spread add 0.15 to 0.55 pixels, so that many spots fill only two or three pixels, as on a
    # CSPAD. Experimenters keep spots apart, so they are at most a fifth of their distance wide.
    physical = draws.log_uniform(B, low=10.0, high=300.0) / cameras.pixel_um_B
    spread = draws.uniform(B, low=0.15, high=0.55)
    sigma_B = (physical.square() + spread.square()).sqrt()
    sigma_B = torch.minimum(sigma_B.clamp(0.2, 3.0), 0.2 * cameras.spacing_px_B)
    sigma = (sigma_B[event] * torch.exp(0.12 * draws.normal(M))).clamp(0.2, 3.0)

    # Streaks are radial (bandwidth), tangential (mosaic spread), or all in one direction.
    kind = draws.among(B, weights=(0.45, 0.22, 0.18, 0.15))[event]
    slope = draws.normal(B, 2)
    slope = (slope / slope.norm(dim=1, keepdim=True))[event]
    top, left = cameras.top_BP.flatten()[spots.image_M], cameras.left_BP.flatten()[spots.image_M]
    y, x = spots.y_M + top, spots.x_M + left
    rho = (y.square() + x.square()).sqrt().clamp(min=1.0)
    along_y = torch.where(kind == 1, y, torch.where(kind == 2, x, slope[:, 0] * rho)) / rho
    along_x = torch.where(kind == 1, x, torch.where(kind == 2, -y, slope[:, 1] * rho)) / rho
    # Radial and tangential ones grow with the angle.
    growth = torch.where(kind == 3, 1.0, (rho / cameras.distance_px_B[event] * 3.0).clamp(max=1.5))
    length = draws.log_uniform(B, low=0.4, high=4.0)[event] * growth * (kind > 0)
    length = length + draws.chance(M, probability=0.06) * draws.uniform(M, low=0.5, high=2.5)
    length = torch.minimum(length, 2.5 * sigma + 0.5).clamp(max=4.0)

    steps = torch.stack([torch.full_like(sigma, step * _STEP) for step in _STEPS], dim=1)
    # Shares are as uneven as the crystal's blocks. A sixth of the events also has tails.
    uneven = torch.exp(draws.log_uniform(B, low=0.05, high=0.8)[event, None] * draws.normal(M, 5))
    uneven = uneven / uneven.sum(dim=1, keepdim=True)
    tail = draws.chance(B, probability=1 / 6) * draws.uniform(B, low=0.05, high=0.35)
    tail = tail[event, None]
    reach = (2.5 * sigma).clamp(max=4.0)[:, None]
    zero = torch.zeros_like(tail)
    offset = torch.cat([steps * length[:, None], zero], dim=1)
    return Shapes(
        y_MJ=spots.y_M[:, None] + offset * along_y[:, None],
        x_MJ=spots.x_M[:, None] + offset * along_x[:, None],
        sigma_MJ=torch.cat([sigma[:, None].expand(-1, 5), reach], dim=1),
        weight_MJ=torch.cat([uneven * (1.0 - tail), tail], dim=1),
    )


def render(
    image_M: Tensor, shapes: Shapes, photons_M: Tensor, num_images: int, height: int, width: int
) -> Tensor:
    """Add up the photons that pixels expect from spots.

    A pixel's share of a Gaussian is the product of its integrals along y and x (error functions). A
    spot's window sums these products over its components: one small matrix product per spot.

    Parameters
    ----------
    image_M
        (M,) int64, panel of the batch, below `num_images`.
    shapes
        Their shapes; centres lie at most `MARGIN` outside of the panel.
    photons_M
        (M,) expected photons of each spot.
    num_images, height, width
        Shape of the result.

    Returns
    -------
    Tensor
        (N, H, W) float32, photons.
    """
    border = RADIUS + MARGIN
    rows, columns = height + 2 * border, width + 2 * border
    photons = torch.zeros(num_images * rows * columns, device=image_M.device)
    offset_K = torch.arange(-RADIUS, RADIUS + 1, device=image_M.device)
    # It falls to 0 at the edge of the window, so that the brightest spots show no edge.
    taper_K = (1.0 - (offset_K / (RADIUS + 1)) ** 6)[None, :, None]
    for start in range(0, len(image_M), _CHUNK):
        part = slice(start, start + _CHUNK)
        weight_MJ = shapes.weight_MJ[part]
        y_M = (weight_MJ * shapes.y_MJ[part]).sum(dim=1).round().long()
        x_M = (weight_MJ * shapes.x_MJ[part]).sum(dim=1).round().long()
        y_M = y_M.clamp(-MARGIN, height - 1 + MARGIN)
        x_M = x_M.clamp(-MARGIN, width - 1 + MARGIN)
        y_MK, x_MK = y_M[:, None] + offset_K, x_M[:, None] + offset_K
        sigma_M1J = shapes.sigma_MJ[part, None]
        along_y = pixel_share(y_MK[..., None] - shapes.y_MJ[part, None], sigma_M1J) * taper_K
        along_x = pixel_share(x_MK[..., None] - shapes.x_MJ[part, None], sigma_M1J) * taper_K
        along_y = along_y * (weight_MJ * photons_M[part, None])[:, None]
        window_MKK = along_y @ along_x.transpose(1, 2)
        row_MK = (image_M[part, None] * rows + y_MK + border) * columns
        pixel_MKK = row_MK[:, :, None] + (x_MK + border)[:, None, :]
        photons.index_add_(0, pixel_MKK.flatten(), window_MKK.flatten())
    inner = slice(border, border + height), slice(border, border + width)
    return photons.view(num_images, rows, columns)[:, inner[0], inner[1]]


def pixel_share(offset: Tensor, sigma: Tensor) -> Tensor:
    """Return a Gaussian's integral over pixels (along one axis) at offsets from its centre."""
    scale = 0.5**0.5 / sigma
    upper, lower = torch.erf((offset + 0.5) * scale), torch.erf((offset - 0.5) * scale)
    return 0.5 * (upper - lower)
