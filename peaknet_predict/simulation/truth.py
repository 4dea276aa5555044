"""Labels of simulated shots: which spots are peaks, and which are too faint to demand.

A spot is judged by what was measured, as an observer who knows where to look would judge it: a
matched filter over its pixels weighs it against the noise of background, readout and other spots.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns, M spots, K pixels of the
window around a spot, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.simulation.backgrounds import Background
from peaknet_predict.simulation.electronics import MeasuredFrames
from peaknet_predict.simulation.labels import (
    IGNORED,
    PEAK,
    Merged,
    disc_radius,
    paint,
    window_pixels,
)
from peaknet_predict.simulation.spot_shapes import pixel_share
from peaknet_predict.simulation.tiles import Tiling

PEAK_SIGNIFICANCE, FAINT_SIGNIFICANCE = 4.5, 3.0
"""Signal-to-noise ratios of the matched filter. A spot above the first is a peak, between the two
it is ignored, and below the second it is background. In a panel of 65536 places, noise alone
reaches 4.5 once in five panels: there the network has to weigh noise against spots. At 3, nobody
could tell them apart."""

PEAK_PHOTONS, FAINT_PHOTONS = 4.0, 2.0
"""Fewest photons of a peak, and of an ignored spot. On an empty background one photon, or two in
neighbouring pixels, would otherwise reach any significance."""

MAX_ON_ONE_PIXEL = 0.85
"""Largest share of a peak's photons in its brightest pixel. A spot with more cannot be told from a
hot pixel and is ignored. A spot in two pixels is a peak: hot pixels rarely come in pairs."""

EMPTY_VARIANCE = 0.1
"""Least variance of a pixel when significance is judged, square photons. Normal statistics fail
where almost no photons are expected."""

LEAST_VARIANCE = 1e-4
"""Least variance of a pixel in `LabelledShots.snr_M`, square photons. Behind a beam stop, a counter
has no noise at all."""

_STRUCTURE = 0.5
"""Share of a background's difference from its surroundings that counts as noise."""

_REACH = 6
"""Pixels on each side of a spot over which its significance is judged."""

_VISIBLE_REACH = 9
"""Pixels on each side of an ignored spot within which what is visible of it is ignored."""

_MAX_BAD_SHARE = 0.35
"""Largest share of a spot's photons on bad pixels. A spot with more is ignored."""

_MAX_SATURATED_PIXELS = 45
"""Most saturated pixels of a spot. A spot with more is a blob, and ignored."""


@dataclass(slots=True)
class Scene:
    """Everything that decides about a batch's labels.

    Attributes
    ----------
    background, tiling, readout
        What the detector sees besides spots, its pixels, and what it recorded.
    planted_BPHW
        Photons from spots that pixels of the usual size expect, behind shadows.
    """

    background: Background
    tiling: Tiling
    readout: MeasuredFrames
    planted_BPHW: Tensor

    @property
    def area_BPHW(self) -> Tensor:
        """Area of each pixel, in usual pixels."""
        return self.tiling.area_BPH1 * self.tiling.area_BP1W

    @property
    def noise2_BPHW(self) -> Tensor:
        """Variance of each pixel without spots, square photons."""
        expected = self.background.photons_BPHW * self.area_BPHW
        return expected + self.readout.sigma_BPHW.square()


def judge(spots: Merged, scene: Scene) -> tuple[Tensor, Tensor]:
    """Decide which spots are peaks.

    Returns
    -------
    peak_M, ignored_M
        (M,) bool each. A peak must be found. An ignored spot may be found or not. All others are
        background.
    """
    readout, tiling, background = scene.readout, scene.tiling, scene.background
    area = scene.area_BPHW
    expected = background.photons_BPHW * area
    # Grainy rings hide spots as noise does, and so do crests and edges: an observer knows the
    # background only from the pixels around. A slope does not differ from their mean.
    around = F.avg_pool2d(expected, 7, stride=1, padding=3, count_include_pad=False)
    variance = scene.noise2_BPHW + (background.grain_BPHW * area).square()
    variance = variance + (_STRUCTURE * (expected - around)).square()
    images = [
        readout.excess_BPHW - expected,
        variance + EMPTY_VARIANCE,
        scene.planted_BPHW * area,
        background.transmission_BPHW * area,
        (~readout.bad_BPHW).float(),
        readout.saturated_BPHW.float(),
        (tiling.on_panel_BPHW & ~tiling.gap_BPHW).float(),
    ]
    windows, share = _windows(torch.stack(images, dim=2).flatten(0, 1), spots)
    excess, variance, planted, seen_share, usable, saturated, real = windows.unbind(1)
    # What each pixel sees of the spot, and of others, whose noise is in the way too.
    profile = share * seen_share * usable
    others = planted - spots.photons_M[:, None] * share * seen_share
    # Outside of the frame there is nothing, not even variance.
    variance = variance.clamp(min=EMPTY_VARIANCE) + others.clamp(min=0.0)
    excess = (excess - others) * usable
    weight = profile / variance
    information = (weight * profile).sum(dim=1).clamp(min=1e-9)
    significance = (weight * excess).sum(dim=1) * information.rsqrt()
    # Least squares: the photons on the pixels that make the profile fit best.
    square = profile.square().sum(dim=1).clamp(min=1e-9)
    photons = (profile * excess).sum(dim=1) / square * profile.sum(dim=1)

    clear = (significance >= PEAK_SIGNIFICANCE) & (photons >= PEAK_PHOTONS)
    clear &= share.amax(dim=1) <= MAX_ON_ONE_PIXEL
    clear &= ~spots.ignored_M & (saturated.sum(dim=1) <= _MAX_SATURATED_PIXELS)
    faint = (significance >= FAINT_SIGNIFICANCE) & (photons >= FAINT_PHOTONS)
    # Nobody can say what is visible of spots that lie mostly on bad pixels.
    hidden = (share * usable).sum(dim=1) < 1.0 - _MAX_BAD_SHARE
    on_panel = (share * real).sum(dim=1) > 0.05
    peak = clear & ~hidden
    return peak, (faint | (hidden & on_panel)) & ~peak


def label(spots: Merged, peak_M: Tensor, ignored_M: Tensor, scene: Scene) -> Tensor:
    """Draw the labels of judged spots, (B, P, H, W) uint8.

    Beyond the discs, pixels that spots have saturated are ignored: nothing tells the middle of a
    plateau from its rim. What is visible of ignored spots is ignored as well: the halves beside a
    gap are no background.
    """
    B, P, H, W = scene.planted_BPHW.shape
    radius = disc_radius(spots.sigma_M)
    visible = (scene.planted_BPHW * scene.area_BPHW).square() > scene.noise2_BPHW + EMPTY_VARIANCE
    visible = visible & _around(spots, ignored_M, B * P, H, W).view(B, P, H, W)
    full = scene.readout.saturated_BPHW & (scene.planted_BPHW > scene.background.photons_BPHW)
    labels = ((full | visible) * IGNORED).to(torch.uint8).flatten(0, 1)
    for chosen, value in ((ignored_M, IGNORED), (peak_M, PEAK)):
        index = torch.nonzero(chosen).squeeze(1)
        labels = paint(
            labels,
            spots.image_M[index],
            spots.y_M[index],
            spots.x_M[index],
            radius[index],
            value,
        )
    return labels.view(B, P, H, W)


def local_snr(spots: Merged, scene: Scene) -> tuple[Tensor, Tensor]:
    """Return each spot's height over the noise, and whether its centre is on a pixel; (M,) each.

    The height is that of the brightest among the nine pixels around the centre.
    """
    tiling = scene.tiling
    H, W = tiling.gap_BPHW.shape[2:]
    heights = F.max_pool2d(
        (scene.planted_BPHW * scene.area_BPHW).flatten(0, 1), 3, stride=1, padding=1
    )
    y, x = spots.y_M.round().long(), spots.x_M.round().long()
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    pixel = spots.image_M, y.clamp(0, H - 1), x.clamp(0, W - 1)
    noise = scene.noise2_BPHW.flatten(0, 1)[pixel].clamp(min=LEAST_VARIANCE).sqrt()
    real = (tiling.on_panel_BPHW & ~tiling.gap_BPHW).flatten(0, 1)
    return heights[pixel] / noise, inside & real[pixel]


def _around(spots: Merged, chosen_M: Tensor, N: int, H: int, W: int) -> Tensor:
    """Return the pixels near chosen spots, (N, H, W) bool."""
    index = torch.nonzero(chosen_M).squeeze(1)
    offset_K = torch.arange(-_VISIBLE_REACH, _VISIBLE_REACH + 1, device=index.device)
    pixel_MKK = window_pixels(
        spots.image_M[index], spots.y_M[index], spots.x_M[index], offset_K, (N, H, W)
    )
    near = torch.zeros(N * H * W + 1, dtype=torch.bool, device=index.device)
    near[pixel_MKK.flatten()] = True
    return near[:-1].view(N, H, W)


def _windows(images_NCHW: Tensor, spots: Merged) -> tuple[Tensor, Tensor]:
    """Return the pixels around spots, (M, C, K), and the spots' shares of them, (M, K)."""
    H, W = images_NCHW.shape[2:]
    padded = F.pad(images_NCHW, (_REACH,) * 4)
    offset = torch.arange(-_REACH, _REACH + 1, device=images_NCHW.device)
    y, x = spots.y_M.round(), spots.x_M.round()
    rows = y.long().clamp(0, H - 1)[:, None] + offset + _REACH
    columns = x.long().clamp(0, W - 1)[:, None] + offset + _REACH
    windows = padded[spots.image_M[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    off_y = rows - _REACH - spots.y_M[:, None]
    off_x = columns - _REACH - spots.x_M[:, None]
    # `sigma_M` contains the pixel's own width.
    sigma = (spots.sigma_M.square() - 1.0 / 12.0).clamp(min=0.04).sqrt()[:, None]
    weight = pixel_share(off_y, sigma)[:, :, None] * pixel_share(off_x, sigma)[:, None, :]
    return windows.flatten(1, 2).transpose(1, 2), weight.flatten(1)
