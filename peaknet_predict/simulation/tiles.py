"""How detectors are tiled: small panels, gaps, ASICs, and larger pixels at their borders.

Shape legend: B events, P panels of an event, H rows, W columns, A ASICs along one axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.simulation.draws import Band, Domain, Draws

TILE_PX = Band(60.0, 600.0, 179.51, 200.49)
"""Edge of a sensor, pixels, before rounding: 128 for AGIPD, 256 for the chips of Jungfrau and
Eiger, 487 for Pilatus. Held out: 185 and 194, of CSPAD."""

GAP_PX = Band(1.0, 40.0, 2.51, 5.49)
"""Insensitive pixels between sensors, before rounding. Held out: 3 to 5, of CSPAD and ePix10k."""

ASICS = 8
"""Different ASICs along an axis; beyond, they repeat."""


@dataclass(slots=True)
class Tiling:
    """Which pixels are sensitive, and to which ASIC they belong.

    Attributes
    ----------
    on_panel_BPHW
        bool; False where a panel is smaller than the frame.
    gap_BPHW
        bool; insensitive pixels between sensors.
    area_BPH1, area_BP1W
        Size of a pixel along y and x, relative to the usual one.
    asic_BPHW
        int64, 0 ... `ASICS`^2 - 1.
    border_BPHW
        bool; the outermost pixels of sensors.
    """

    on_panel_BPHW: Tensor
    gap_BPHW: Tensor
    area_BPH1: Tensor
    area_BP1W: Tensor
    asic_BPHW: Tensor
    border_BPHW: Tensor


def draw_tiling(
    draws: Draws, batch_size: int, panels: int, height: int, width: int, domain: Domain
) -> Tiling:
    """Draw the tilings of a batch: one kind of sensor per event, at any place in its frames."""
    B = batch_size
    # Along each axis, half of the events have sensors larger than the frame, without seams.
    tiled_y, tiled_x = draws.chance(B, probability=0.5), draws.chance(B, probability=0.5)
    # Half of the events have wider pixels (1.5, 2 or 3 times) where two ASICs of a sensor meet.
    seam = draws.among(B, weights=(0.5, 0.1, 0.3, 0.1))
    extra = torch.where(seam == 1, 0.5, torch.where(seam == 2, 1.0, 2.0)) * (seam > 0)
    y = _draw_axis(draws, tiled_y, extra, panels, height, domain)
    x = _draw_axis(draws, tiled_x, extra, panels, width, domain)
    on_panel = y[0][..., :, None] & x[0][..., None, :]
    gap = y[1][..., :, None] | x[1][..., None, :]
    asic = y[2][..., :, None] * ASICS + x[2][..., None, :]
    border = y[4][..., :, None] | x[4][..., None, :]
    return Tiling(on_panel, gap & on_panel, y[3][..., :, None], x[3][..., None, :], asic, border)


def _draw_axis(
    draws: Draws, tiled_B: Tensor, extra_B: Tensor, panels: int, size: int, domain: Domain
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw one axis, (B, P, size) each: on the panel, in a gap, ASIC, pixel size, at a border."""
    B, P = len(tiled_B), panels
    position = torch.arange(size, device=draws.device)
    # A fifth of the panels is smaller than the frame, and lies in its middle or at its start.
    length = (size * draws.uniform(B, P, 1, low=0.4, high=1.0)).round()
    length = torch.where(draws.chance(B, P, 1, probability=0.2), length, float(size))
    slack = size - length
    start = torch.where(draws.chance(B, P, 1, probability=0.5), (0.5 * slack).floor(), 0.0)
    on_panel = (position >= start) & (position < start + length)

    tile = draws.band(B, band=TILE_PX, domain=domain).round()[:, None, None]
    gap = draws.band(B, band=GAP_PX, domain=domain).round()[:, None, None]
    # A sensor has one, two or four ASICs along this axis.
    asics = 2.0 ** draws.among(B, weights=(0.4, 0.4, 0.2))[:, None, None]
    far = draws.uniform(B, P, 1) * (tile + gap)
    place = (position - start) + far.floor()
    number = (place / (tile + gap)).floor()
    within = place - number * (tile + gap)
    tiled = tiled_B[:, None, None]
    in_gap = (within >= tile) & tiled
    chip = (tile / asics).ceil()
    of_chip = within.remainder(chip)
    at_seam = ((of_chip < 1.0) & (within >= 1.0)) | (
        (of_chip >= chip - 1.0) & (within < tile - 1.0)
    )
    area = 1.0 + extra_B[:, None, None] * (at_seam & tiled)
    asic = (number * asics + (within / chip).floor()).long()
    outermost = ((within < 1.0) | ((within >= tile - 1.0) & ~in_gap)) & tiled
    # Without tiling there is one ASIC.
    return on_panel, in_gap, (asic * tiled).remainder(ASICS), area, outermost & on_panel
