"""Lattices, and where their reflections fall on a panel.

Lengths of reciprocal space are 1/d in inverse Angstrom; x runs along the rows of a panel, y along
its columns, z along the beam. Shape legend: B events, P panels of an event, C crystals of an event,
G cells of a panel's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.simulation.cameras import Cameras
from peaknet_predict.simulation.draws import Draws

CELL = 4
"""Edge of a grid cell, pixels. Each cell finds the one lattice point that is nearest to it."""

MARGIN = 8
"""Pixels around a panel on which spots are placed too, because their tails reach it. Whole
cells."""

MAX_CRYSTALS = 3
"""Most crystals in one shot."""


@dataclass(slots=True)
class Reflections:
    """The reflection that each cell of each panel's grid owns.

    Attributes
    ----------
    h_BCPG, k_BCPG, l_BCPG
        Miller indices, as float32.
    y_BCPG, x_BCPG
        Where the ray hits the panel, pixel indices.
    q2_BCPG
        Squared 1/d, inverse square Angstrom.
    excitation_BCPG
        Distance of the lattice point from the Ewald sphere, inverse Angstrom.
    polarisation_BCPG
        Share of the intensity that horizontal polarisation leaves.
    exists_BCPG
        bool; False where the ray of the nearest lattice point misses the cell.
    """

    h_BCPG: Tensor
    k_BCPG: Tensor
    l_BCPG: Tensor
    y_BCPG: Tensor
    x_BCPG: Tensor
    q2_BCPG: Tensor
    excitation_BCPG: Tensor
    polarisation_BCPG: Tensor
    exists_BCPG: Tensor


def find_reflections(cameras: Cameras, axes_BC33: Tensor, height: int, width: int) -> Reflections:
    """Find the reflections of crystals on panels.

    The search goes over places, not over reflections. A grid covers the panel. Each of its cells
    takes the point of the Ewald sphere that its centre sees, finds the nearest lattice point, and
    owns it if its ray hits the cell. So the work does not depend on the unit cell, and all events
    of a batch have equally many candidates. Reflections that hit a cell without being nearest to
    its centre are missed; near the sphere there are none, since spots are 6 pixels apart.

    Parameters
    ----------
    cameras
        Where the panels are.
    axes_BC33
        Rows a, b, c in the laboratory frame, Angstrom.
    height, width
        Pixels of a panel. The grid reaches `MARGIN` beyond it.
    """
    grid_y, grid_x = _grid(cameras, height, width)
    top, left = cameras.top_BP[:, None, :, None], cameras.left_BP[:, None, :, None]
    distance = cameras.distance_px_B[:, None, None, None]
    k_in = 1.0 / cameras.wavelength_B[:, None, None, None]
    # q of the cells' centres: k (unit vector - beam).
    y, x = grid_y + top, grid_x + left
    scale = k_in / (x.square() + y.square() + distance.square()).sqrt()
    q = (x * scale, y * scale, distance * scale - k_in)
    reciprocal = _reciprocal(axes_BC33)
    h, k, ell = (_combine(q, axes_BC33[:, :, axis]).round() for axis in range(3))
    q_x, q_y, q_z = (_combine((h, k, ell), reciprocal[..., axis]) for axis in range(3))

    k_z = q_z + k_in
    length = (q_x.square() + q_y.square() + k_z.square()).sqrt()
    forward = distance / k_z.clamp(min=1e-3)
    spot_y, spot_x = q_y * forward - top, q_x * forward - left
    own = ((spot_y - grid_y).abs() <= CELL / 2) & ((spot_x - grid_x).abs() <= CELL / 2)
    q2 = q_x.square() + q_y.square() + q_z.square()
    return Reflections(
        h_BCPG=h,
        k_BCPG=k,
        l_BCPG=ell,
        y_BCPG=spot_y,
        x_BCPG=spot_x,
        q2_BCPG=q2,
        excitation_BCPG=length - k_in,
        polarisation_BCPG=1.0 - (q_x / length).square(),
        # The direct beam is no reflection.
        exists_BCPG=own & (q2 > 1e-7) & (k_z > 0.0),
    )


def draw_axes(draws: Draws, longest_axis_B: Tensor) -> Tensor:
    """Draw cells and orientations: rows a, b, c in the laboratory frame, (B, C, 3, 3), Angstrom.

    All crystals of an event have the same cell.
    """
    rotations = _rotations(draws, len(longest_axis_B))
    return _product(_axes(draws, longest_axis_B)[:, None], rotations.transpose(-1, -2))


def absent(draws: Draws, reflections: Reflections) -> Tensor:
    """Return which reflections the centring of the event's cell forbids; half are primitive."""
    r = reflections
    h, k, ell = (index.remainder(2.0) == 1.0 for index in (r.h_BCPG, r.k_BCPG, r.l_BCPG))
    centring = draws.among(len(h), 1, 1, 1, weights=(0.55, 0.15, 0.2, 0.1))
    base, body = h ^ k, h ^ k ^ ell
    face = base | (k ^ ell)
    return ((centring == 1) & base) | ((centring == 2) & body) | ((centring == 3) & face)


def _rotations(draws: Draws, batch_size: int) -> Tensor:
    """Draw the orientations of each event's crystals, (B, C, 3, 3).

    Normalised quaternions of normal deviates are uniform rotations (Marsaglia, *Ann. Math. Stat.*
    43 (1972) 645). In a third of the events the second crystal is nearly parallel to the first
    (0.1 to 1.5 degrees): a split crystal, whose spots are doublets.
    """
    quaternion = draws.normal(batch_size, MAX_CRYSTALS, 4)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    tilt = draws.normal(batch_size, 3)
    angle = draws.log_uniform(batch_size, 1, low=math.radians(0.1), high=math.radians(1.5))
    half = 0.5 * angle * tilt / tilt.norm(dim=-1, keepdim=True)
    tilted = torch.cat([(0.5 * angle).cos(), half], dim=-1)[:, None]
    *rotation, small = _matrix(torch.cat([quaternion, tilted], dim=1)).unbind(1)
    split = draws.chance(batch_size, 1, 1, probability=1 / 3)
    rotation[1] = torch.where(split, _product(small, rotation[0]), rotation[1])
    return torch.stack(rotation, dim=1)


def _matrix(quaternion: Tensor) -> Tensor:
    """Return the (..., 3, 3) rotations of (..., 4) quaternions of (nearly) unit length."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _axes(draws: Draws, longest_axis_B: Tensor) -> Tensor:
    """Draw unit cells: (B, 3, 3), rows a, b, c in Angstrom, in a frame of the crystal.

    Axes are 0.25 to 1 times the longest one, at least 25 Angstrom. Each angle is right in seven of
    ten cases, otherwise 90 +- 30 degrees (among them the 120 of hexagonal cells).
    """
    B = len(longest_axis_B)
    ratio = draws.log_uniform(B, 2, low=0.25, high=1.0)
    ratio = torch.where(draws.chance(B, 2, probability=0.3), 1.0, ratio)
    a, b = (longest_axis_B[:, None] * ratio).clamp(min=25.0).unbind(1)
    oblique = draws.chance(B, 3, probability=0.3) * draws.uniform(B, 3, low=-0.5, high=0.5)
    cos_a, cos_b, cos_g = oblique.unbind(1)
    # a along x, b in the x-y plane, as in `sources.diffraction.reciprocal_basis`. Cosines of at
    # most a half leave a positive volume, except in a corner that the clamp removes.
    sin_g = (1.0 - cos_g.square()).sqrt()
    c_y = (cos_a - cos_b * cos_g) / sin_g
    c_z = (1.0 - cos_b.square() - c_y.square()).clamp(min=0.1).sqrt()
    zero = torch.zeros_like(a)
    c = longest_axis_B
    rows = [[a, zero, zero], [b * cos_g, b * sin_g, zero], [c * cos_b, c * c_y, c * c_z]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _grid(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the centres of each panel's grid cells in pixel indices: y (G,) and x (G,)."""
    device = cameras.top_BP.device
    rows = torch.arange(-MARGIN, height + MARGIN, CELL, device=device) + (CELL - 1) / 2
    columns = torch.arange(-MARGIN, width + MARGIN, CELL, device=device) + (CELL - 1) / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y.flatten(), x.flatten()


def _reciprocal(axes: Tensor) -> Tensor:
    """Return a*, b*, c* of cells, (..., 3, 3) rows each: b x c over the volume, and so on."""
    a, b, c = axes.unbind(-2)
    crossed: list[Tensor] = [
        torch.linalg.cross(b, c),
        torch.linalg.cross(c, a),
        torch.linalg.cross(a, b),
    ]
    volume: Tensor = (a * crossed[0]).sum(dim=-1)[..., None, None]
    return torch.stack(crossed, dim=-2) / volume


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., 3, 3) matrices in full float32: a matmul may be set to use TF32."""
    return (left[..., :, :, None] * right[..., None, :, :]).sum(dim=-2)


def _combine(components: tuple[Tensor, Tensor, Tensor], weights_BC3: Tensor) -> Tensor:
    """Return the sum of three (B, 1 or C, P, G) components with a crystal's weights, likewise."""
    first, second, third = weights_BC3[..., None, None, :].unbind(-1)
    return components[0] * first + components[1] * second + components[2] * third
