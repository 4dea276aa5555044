"""Where the spots of simulated shots are: beam and geometry, lattices, and stray spots.

Lengths of reciprocal space are 1/d in inverse Angstrom. Detector coordinates are y (slow scan) and
x (fast scan) in pixels from the beam. Shape legend: B events, P panels of an event, N = B*P, C
crystals of an event, H rows, W columns, G cells of a panel's grid, M spots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.sources.diffraction import HC_EV_ANGSTROM
from peaknet_predict.training.draws import Band, Domain, Draws

PIXEL_UM = Band(50.0, 200.0, 72.0, 80.0)
"""Edge of a pixel, micrometres: 50 (MPCCD, ePix10k 100, CSPAD 110, Pilatus 172) to 200 (AGIPD).
Held out: those of Jungfrau and Eiger, 75."""

LONGEST_AXIS = Band(30.0, 350.0, 85.0, 105.0)
"""Longest cell edge, Angstrom: small proteins to photosystems. Held out: that of thermolysin and
its likes."""

MIN_SPACING_PX = (5.5, 14.0)
"""Least distance of neighbouring spots: experimenters move the detector back until they see them
apart. Much closer ones could not be found by `CELL`."""

CELL = 4
"""Edge of a grid cell, pixels. A cell finds the one lattice point that is nearest to it."""

MARGIN = 8
"""Pixels around a panel on which spots are placed too: their tails reach it. Whole cells."""

MAX_CRYSTALS = 3
"""In one shot."""

STRAY_SPOTS = 12
"""Most stray spots of one panel: salt, dust, other isolated crystals."""


@dataclass(slots=True)
class Cameras:
    """Where the panels of each event are.

    Attributes
    ----------
    wavelength_B, distance_px_B, pixel_um_B
        (B,) Angstrom; pixels; micrometres.
    bandwidth_B
        (B,) relative rms of the photon energy within a pulse.
    top_BP, left_BP
        (B, P) detector coordinates of each panel's pixel (0, 0).
    longest_axis_B
        (B,) Angstrom, of the crystals that the distance was chosen for.
    spacing_px_B
        (B,) distance of neighbouring spots along the longest axis, pixels.
    """

    wavelength_B: Tensor
    distance_px_B: Tensor
    pixel_um_B: Tensor
    bandwidth_B: Tensor
    top_BP: Tensor
    left_BP: Tensor
    longest_axis_B: Tensor
    spacing_px_B: Tensor

    def polar(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, x (B, P, H, 1) and (B, P, 1, W) of the pixels, and 1/d, (B, P, H, W)."""
        row_H = torch.arange(height, device=self.top_BP.device, dtype=torch.float32)
        column_W = torch.arange(width, device=self.top_BP.device, dtype=torch.float32)
        y_BPH1 = (self.top_BP[..., None] + row_H)[..., None]
        x_BP1W = (self.left_BP[..., None] + column_W)[..., None, :]
        rho2 = y_BPH1.square() + x_BP1W.square()
        distance = self.distance_px_B[:, None, None, None]
        r = (rho2 + distance.square()).sqrt()
        # 2 sin(theta) from 1 - cos(2 theta) = rho^2 / (r (r + D)), without cancellation.
        two_sine = (2.0 * rho2 / (r * (r + distance))).sqrt()
        return y_BPH1, x_BP1W, two_sine / self.wavelength_B[:, None, None, None]


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
        (M,) expected photons relative to those of a full reflection at zero angle.
    ice_M
        (M,) bool: a spot of ice, neither asked for nor an error.
    """

    image_M: Tensor
    y_M: Tensor
    x_M: Tensor
    strength_M: Tensor
    ice_M: Tensor


def draw_cameras(
    draws: Draws, batch_size: int, panels: int, height: int, width: int, domain: Domain
) -> Cameras:
    """Draw beam, detector distance and the places of the panels."""
    B = batch_size
    # 6-16 keV: MX beamlines and the hard X-ray lasers.
    wavelength = HC_EV_ANGSTROM / draws.log_uniform(B, low=6000.0, high=16000.0)
    # SASE 0.1-0.3 %, seeded and monochromatic less; 1 event in 16 has a pink beam.
    pink = draws.chance(B, probability=1 / 16)
    bandwidth = torch.where(
        pink,
        draws.log_uniform(B, low=3e-3, high=2e-2),
        draws.log_uniform(B, low=1e-4, high=3e-3),
    )
    # Detectors of 600 to 4000 pixels that see 1.3 to 5 Angstrom at their edge...
    half_width = draws.log_uniform(B, low=300.0, high=2000.0)
    edge = draws.log_uniform(B, low=1.3, high=5.0)
    sine = (wavelength / (2.0 * edge)).clamp(max=0.6)
    distance = half_width / (2.0 * torch.asin(sine)).tan()
    # ... unless the cell needs more distance.
    axis = draws.band(B, band=LONGEST_AXIS, domain=domain)
    low, high = MIN_SPACING_PX
    spacing = draws.log_uniform(B, low=low, high=high)
    distance = torch.maximum(distance, spacing * axis / wavelength)
    # Panels lie anywhere, and more often near the beam than its share of the area.
    reach = half_width[:, None] * draws.uniform(B, panels).sqrt()
    azimuth = draws.uniform(B, panels, high=2.0 * math.pi)
    offset_y, offset_x = draws.uniform(B, panels, low=-1.0), draws.uniform(B, panels, low=-1.0)
    at_beam = draws.chance(B, panels, probability=0.15)
    y = torch.where(at_beam, offset_y * height / 2, reach * azimuth.sin())
    x = torch.where(at_beam, offset_x * width / 2, reach * azimuth.cos())
    return Cameras(
        wavelength_B=wavelength,
        distance_px_B=distance,
        pixel_um_B=draws.band(B, band=PIXEL_UM, domain=domain),
        bandwidth_B=bandwidth,
        top_BP=y - height / 2,
        left_BP=x - width / 2,
        longest_axis_B=axis,
        spacing_px_B=wavelength * distance / axis,
    )


def draw_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor, faintest: float
) -> Spots:
    """Draw the spots of lattices, of ice crystals and of stray crystals.

    Parameters
    ----------
    draws, cameras
        Stream, and where the panels are.
    height, width
        Of a panel, pixels.
    hit_B
        (B,) bool, events that have spots at all.
    faintest
        Strength below which a spot is left out.
    """
    lattice = _lattice_spots(draws, cameras, height, width, hit_B)
    stray = _stray_spots(draws, cameras, height, width, hit_B)
    image, y, x, strength, ice = (
        torch.cat([a.flatten(), b.flatten()]) for a, b in zip(lattice, stray, strict=True)
    )
    inside = (y >= -MARGIN) & (y <= height - 1 + MARGIN)
    inside &= (x >= -MARGIN) & (x <= width - 1 + MARGIN)
    # The one place where the device is waited for: how many spots there are is random.
    kept = torch.nonzero(inside & (strength >= faintest)).squeeze(1)
    return Spots(image[kept], y[kept], x[kept], strength[kept], ice[kept])


def _rotations(draws: Draws, batch_size: int) -> Tensor:
    """Draw the orientations of each event's crystals, (B, C, 3, 3).

    Normalised quaternions of normal deviates are uniform rotations (Marsaglia, *Ann. Math. Stat.*
    43 (1972) 645). In a third of the events the second crystal is nearly parallel to the first
    (0.1 to 1.5 degrees): a split crystal, whose spots are doublets.
    """
    quaternion = draws.normal(batch_size, MAX_CRYSTALS, 4)
    rotation = _matrix(quaternion / quaternion.norm(dim=-1, keepdim=True))
    tilt = draws.normal(batch_size, 3)
    angle = draws.log_uniform(batch_size, 1, low=math.radians(0.1), high=math.radians(1.5))
    half = 0.5 * angle * tilt / tilt.norm(dim=-1, keepdim=True)
    small = _matrix(torch.cat([(0.5 * angle).cos(), half], dim=-1))
    split = draws.chance(batch_size, 1, 1, probability=1 / 3)
    second = torch.where(split, _product(small, rotation[:, 0]), rotation[:, 1])
    return torch.cat([rotation[:, :1], second[:, None], rotation[:, 2:]], dim=1)


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

    Axis ratios from 0.25 to 1, at least 25 Angstrom each; angles are right in half of the cells,
    otherwise 90 +- 30 degrees (120 of hexagonal cells among them).
    """
    B = len(longest_axis_B)
    ratio = draws.log_uniform(B, 2, low=0.25, high=1.0)
    ratio = torch.where(draws.chance(B, 2, probability=0.3), 1.0, ratio)
    a, b = (longest_axis_B[:, None] * ratio).clamp(min=25.0).unbind(1)
    oblique = draws.chance(B, 3, probability=0.3) * draws.uniform(B, 3, low=-0.5, high=0.5)
    cos_a, cos_b, cos_g = oblique.unbind(1)
    # a along x, b in the x-y plane, as in `sources.diffraction.reciprocal_basis`. Cosines of at
    # most a half leave a positive volume, but in a corner that the clamp takes care of.
    sin_g = (1.0 - cos_g.square()).sqrt()
    c_y = (cos_a - cos_b * cos_g) / sin_g
    c_z = (1.0 - cos_b.square() - c_y.square()).clamp(min=0.1).sqrt()
    zero = torch.zeros_like(a)
    c = longest_axis_B
    rows = [[a, zero, zero], [b * cos_g, b * sin_g, zero], [c * cos_b, c * c_y, c * c_z]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _absent(draws: Draws, h: Tensor, k: Tensor, ell: Tensor) -> Tensor:
    """Return which reflections the centring of the event's cell forbids: half are primitive."""
    h, k, ell = (index.remainder(2.0) == 1.0 for index in (h, k, ell))
    centring = draws.among(len(h), 1, 1, 1, weights=(0.55, 0.15, 0.2, 0.1))
    base, body = h ^ k, h ^ k ^ ell
    face = base | (k ^ ell)
    return ((centring == 1) & base) | ((centring == 2) & body) | ((centring == 3) & face)


def _grid(cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the centres of each panel's grid cells in pixel indices: y (G,) and x (G,)."""
    device = cameras.top_BP.device
    rows = torch.arange(-MARGIN, height + MARGIN, CELL, device=device) + (CELL - 1) / 2
    columns = torch.arange(-MARGIN, width + MARGIN, CELL, device=device) + (CELL - 1) / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y.flatten(), x.flatten()


def _lattice_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor
) -> tuple[Tensor, ...]:
    """Return image, y, x, strength and ice, (B, C, P, G) each, of candidates for spots.

    Not every reflection is tried, but every place: each cell of a grid over the panel asks which
    lattice point is nearest to the point of the Ewald sphere that its centre sees, and owns that
    point's spot if it falls into the cell. So the work does not depend on the size of the cell, and
    all events of a batch have as many candidates. Points whose spot lies in a cell but that are not
    the nearest to its centre are missed: none, where spots are 6 pixels apart.
    """
    B, P = cameras.top_BP.shape
    C = MAX_CRYSTALS
    grid_y, grid_x = _grid(cameras, height, width)
    G = len(grid_y)
    top, left = cameras.top_BP[:, None, :, None], cameras.left_BP[:, None, :, None]
    distance = cameras.distance_px_B[:, None, None, None]
    k = 1.0 / cameras.wavelength_B[:, None, None, None]
    # q of the cells' centres: k (unit vector - beam).
    y, x = grid_y + top, grid_x + left
    scale = k / (x.square() + y.square() + distance.square()).sqrt()
    q = (x * scale, y * scale, distance * scale - k)

    axes = _axes(draws, cameras.longest_axis_B)[:, None]
    rotation = _rotations(draws, B).transpose(-1, -2)
    # Rows a, b, c in the laboratory frame; a*, b*, c* are the inverse's transpose and turn alike.
    direct = _product(axes, rotation)
    reciprocal = _product(torch.linalg.inv_ex(axes).inverse.transpose(-1, -2), rotation)
    h, m, n = (_combine(q, direct[:, :, axis]).round() for axis in range(3))
    q_x, q_y, q_z = (_combine((h, m, n), reciprocal[..., axis]) for axis in range(3))

    k_z = q_z + k
    length = (q_x.square() + q_y.square() + k_z.square()).sqrt()
    forward = distance / k_z.clamp(min=1e-3)
    spot_y, spot_x = q_y * forward - top, q_x * forward - left
    own = ((spot_y - grid_y).abs() <= CELL / 2) & ((spot_x - grid_x).abs() <= CELL / 2)

    # Width of a lattice point: domain size (constant), mosaicity (times q), bandwidth (times the
    # depth of q along the beam, wavelength q^2 / 2). 5e-5 to 2e-3 from LCP jets to soaked needles;
    # beyond a sixth of the lattice's spacing no lattice would be left.
    q2 = q_x.square() + q_y.square() + q_z.square()
    size = draws.log_uniform(B, 1, 1, 1, low=5e-5, high=1.5e-3)
    mosaic = draws.log_uniform(B, 1, 1, 1, low=1e-4, high=8e-3)
    depth = 0.5 * q2 / k * cameras.bandwidth_B[:, None, None, None]
    width2 = size.square() + mosaic.square() * q2 + depth.square()
    axis = cameras.longest_axis_B[:, None, None, None]
    width2 = torch.minimum(width2, (1.0 / (6.0 * axis)).square())
    partiality = torch.exp(-0.5 * (length - k).square() / width2)

    # Acentric Wilson statistics, exponential |F|^2 (Wilson, Acta Cryst. 2 (1949) 318); B from 10
    # (well ordered) to 120 square Angstrom (membrane proteins).
    falloff = torch.exp(-0.5 * draws.log_uniform(B, 1, 1, 1, low=10.0, high=120.0) * q2)
    polarisation = 1.0 - (q_x / length).square()
    strength = draws.exponential(B, C, P, G) * falloff * partiality * polarisation
    # Second and third crystals diffract less often, and less.
    strength = strength * _crystal_share(draws, hit_B)
    allowed = own & ~_absent(draws, h, m, n) & (q2 > 1e-5) & (k_z > 0.0)
    strength = torch.where(allowed, strength, 0.0)

    # No lattice at all in some events: the network must not ask for one.
    scatter = draws.chance(B, 1, 1, 1, probability=0.12) * 24.0
    spot_y = spot_y + scatter * draws.uniform(B, C, P, G, low=-0.5, high=0.5)
    spot_x = spot_x + scatter * draws.uniform(B, C, P, G, low=-0.5, high=0.5)
    image = torch.arange(B * P, device=draws.device).view(B, 1, P, 1).expand(B, C, P, G)
    return image, spot_y, spot_x, strength, torch.zeros_like(allowed)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., 3, 3) matrices in full float32: a matmul may be set to use TF32."""
    return (left[..., :, :, None] * right[..., None, :, :]).sum(dim=-2)


def _combine(components: tuple[Tensor, Tensor, Tensor], weights_BC3: Tensor) -> Tensor:
    """Return the sum of three (B, 1 or C, P, G) components with a crystal's weights, likewise."""
    first, second, third = weights_BC3[..., None, None, :].unbind(-1)
    return components[0] * first + components[1] * second + components[2] * third


def _crystal_share(draws: Draws, hit_B: Tensor) -> Tensor:
    """Draw how strongly each crystal of an event diffracts, (B, C, 1, 1); 0 where there is none."""
    B = len(hit_B)
    # One crystal in 70 % of the hits, two in 20, three in 5; in 5 only stray spots.
    crystals = draws.among(B, 1, weights=(0.05, 0.70, 0.20, 0.05)) * hit_B[:, None]
    present = torch.arange(MAX_CRYSTALS, device=draws.device) < crystals
    share = draws.log_uniform(B, MAX_CRYSTALS, low=0.1, high=1.0)
    share[:, 0] = 1.0
    return (present * share)[:, :, None, None]


def _stray_spots(
    draws: Draws, cameras: Cameras, height: int, width: int, hit_B: Tensor
) -> tuple[Tensor, ...]:
    """Return image, y, x, strength and ice, (B, P, S) each, of spots that belong to no lattice.

    Salt and dust: in a quarter of the events with spots, anywhere; peaks like any other.
    """
    B, P = cameras.top_BP.shape
    S = STRAY_SPOTS
    y = draws.uniform(B, P, S, low=-1.0, high=height)
    x = draws.uniform(B, P, S, low=-1.0, high=width)
    share = draws.chance(B, 1, 1, probability=0.25) * draws.uniform(B, 1, 1)
    active = (draws.uniform(B, P, S) < share) & hit_B[:, None, None]
    strength = active * draws.log_uniform(B, P, S, low=0.03, high=3.0)
    image = torch.arange(B * P, device=draws.device).view(B, P, 1).expand(B, P, S)
    return image, y, x, strength, torch.zeros_like(active)
