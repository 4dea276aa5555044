"""Beam and geometry of simulated shots.

Lengths of reciprocal space are 1/d in inverse Angstrom. Detector coordinates are y (slow scan) and
x (fast scan) in pixels from the beam. Shape legend: B events, P panels of an event, H rows, W
columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.photon_energy import HC_EV_ANGSTROM
from peaknet_predict.simulation.draws import Band, Domain, Draws

PIXEL_UM = Band(50.0, 200.0, 72.0, 80.0)
"""Edge of a pixel, micrometres: from 50 (MPCCD) over 100 (ePix10k), 110 (CSPAD) and 172 (Pilatus)
to 200 (AGIPD). Held out: 75, of Jungfrau and Eiger."""

LONGEST_AXIS = Band(30.0, 350.0, 85.0, 105.0)
"""Longest cell edge, Angstrom: from small proteins to photosystems. Held out: cells such as
thermolysin's."""

MIN_SPACING_PX = (5.5, 14.0)
"""Least distance of neighbouring spots. Experimenters move the detector back until spots separate.
Much closer ones would escape the grid of `lattices.CELL`."""


@dataclass(slots=True)
class Cameras:
    """Beam, detector distance, and where the panels of each event are.

    Attributes
    ----------
    wavelength_B, distance_px_B, pixel_um_B
        (B,) Angstrom; pixels; micrometres.
    bandwidth_B
        (B,) relative rms of the photon energy within a pulse.
    top_BP, left_BP
        (B, P) detector coordinates of each panel's pixel (0, 0).
    longest_axis_B
        (B,) Angstrom; longest cell edge of the crystals for which the distance was chosen.
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


def draw_cameras(
    draws: Draws, batch_size: int, panels: int, height: int, width: int, domain: Domain
) -> Cameras:
    """Draw beam, detector distance and the places of the panels."""
    B = batch_size
    # 6 to 16 keV: MX beamlines and hard X-ray lasers.
    wavelength = HC_EV_ANGSTROM / draws.log_uniform(B, low=6000.0, high=16000.0)
    # SASE pulses have 0.1 to 0.3 %, seeded and monochromatic ones less. One event in 16 has a pink
    # beam.
    pink = draws.chance(B, probability=1 / 16)
    bandwidth = torch.where(
        pink,
        draws.log_uniform(B, low=3e-3, high=2e-2),
        draws.log_uniform(B, low=1e-4, high=3e-3),
    )
    # Detectors of 600 to 3200 pixels see 1.3 to 3.5 Angstrom at their edge ...
    half_width = draws.log_uniform(B, low=300.0, high=1600.0)
    edge = draws.log_uniform(B, low=1.3, high=3.5)
    sine = (wavelength / (2.0 * edge)).clamp(max=0.6)
    distance = half_width / (2.0 * torch.asin(sine)).tan()
    # ... unless the cell needs a larger distance.
    axis = draws.band(B, band=LONGEST_AXIS, domain=domain)
    low, high = MIN_SPACING_PX
    spacing = draws.log_uniform(B, low=low, high=high)
    distance = torch.maximum(distance, spacing * axis / wavelength)
    # Panels lie anywhere, near the beam more often than by its share of the area.
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
