"""Simulated shots with labels, batch after batch, made where the network trains.

Every event of a batch has its own detector, beam, crystals, background and defects: a network that
sees none of them twice cannot learn any of them by heart. Nothing is read from files.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns, M spots, K pixels of the
window around a spot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.training.backgrounds import Background, draw_background
from peaknet_predict.training.crystals import draw_cameras, draw_spots
from peaknet_predict.training.draws import Domain, Draws
from peaknet_predict.training.electronics import Electronics, Readout, draw_electronics, read_out
from peaknet_predict.training.labels import (
    IGNORED,
    PEAK,
    Merged,
    disc_radius,
    merge_spots,
    paint,
)
from peaknet_predict.training.spots import draw_shapes, pixel_share, render
from peaknet_predict.training.tiles import Tiling, draw_tiling

BRIGHTNESS_SIGMAS = (0.5, 5000.0)
"""Height of an event's average full reflection at zero angle, in standard deviations of its
background: four decades, as hits in one run have."""

FAINTEST_SIGMAS = 0.25
"""Height of the faintest spots that are drawn at all."""

PEAK_SIGNIFICANCE, FAINT_SIGNIFICANCE = 5.0, 3.0
"""Signal-to-noise ratio, as a matched filter has it, from which on a spot is a peak, and from which
on it is ignored; below it is background. At 5, one spot of 65536 places is due to chance in 50
panels; at 3, nobody could tell."""

PEAK_PHOTONS, FAINT_PHOTONS = 4.0, 2.0
"""Photons that a peak, and an ignored one, has at least: on an empty background a photon, or two in
neighbouring pixels, would have any significance."""

EMPTY_VARIANCE = 0.1
"""Variance (square photons) that a pixel has at least, when significance is judged. Normal
statistics are off where almost no photons are expected."""

_REACH = 6
"""Pixels on each side of a spot over which its significance is judged."""

_MAX_BAD_SHARE = 0.35
"""Of a spot's photons, on pixels that say nothing; beyond it is ignored."""

_MAX_SATURATED_PIXELS = 45
"""Of a spot at the plateau; beyond it is a blob, and ignored."""


@dataclass(slots=True)
class LabelledShots:
    """Shots of one batch, and the truth.

    Attributes
    ----------
    images_BPHW
        (B, P, H, W) float32, detector counts as they are delivered: with offsets, gains, defects,
        and NaN where there is no pixel.
    labels_BPHW
        (B, P, H, W) uint8, `labels.BACKGROUND` (0), `labels.PEAK` (1) or `labels.IGNORED` (255),
        which is to be left out of the loss.
    peaks_M4
        (M, 4) float32: event, panel, y, x of spots whose `snr` is at least 1 and whose centre is
        on a pixel of the panel. Spots that cannot be told apart are listed as one.
    snr_M
        (M,) float32: expected height of a spot's brightest pixel in standard deviations of a pixel
        with the same background and readout noise but no spot, as in
        `peaknet_predict.sources.simulator.PlantedPeaks`.
    """

    images_BPHW: Tensor
    labels_BPHW: Tensor
    peaks_M4: Tensor
    snr_M: Tensor


class ShotSimulator:
    """An endless series of batches of simulated shots.

    Parameters
    ----------
    panels, height, width
        Shape of an event: crops of one detector at random places, rows and columns of each.
    hit_fraction
        Probability that an event has spots.
    seed
        Seed of the series.
    domain
        'held_out' draws from detectors and cells that 'training' never has: pixels of 72 to 80
        micrometres, sensors of 180 to 200 pixels with gaps of 3 to 5, 24 to 36 ADU per photon,
        readout noise of 0.15 to 0.25 photons, steps of 4, 0.5 or 0.01 ADU, and cells whose longest
        edge is 85 to 105 Angstrom.

    Raises
    ------
    ValueError
        If a number lies outside of its range.
    """

    def __init__(
        self,
        panels: int = 2,
        height: int = 256,
        width: int = 256,
        hit_fraction: float = 0.85,
        seed: int = 0,
        domain: Domain = "training",
    ) -> None:
        if min(panels, height, width) < 1:
            raise ValueError(
                f"panels, height and width must be at least 1; got {panels}, {height}, {width}"
            )
        if not 0.0 <= hit_fraction <= 1.0:
            raise ValueError(f"hit_fraction must be between 0 and 1; got {hit_fraction}")
        if domain not in ("training", "held_out"):
            raise ValueError(f"domain must be 'training' or 'held_out'; got {domain!r}")
        self._shape = (panels, height, width)
        self._hit_fraction = hit_fraction
        self._seed = seed
        self._domain: Domain = domain

    def shots(self, index: int, batch_size: int, device: torch.device) -> LabelledShots:
        """Make a batch.

        The same arguments give the same batch, up to the rounding of sums on a GPU, whichever
        batches were made before.

        Parameters
        ----------
        index
            Number of the batch in the series, from 0.
        batch_size
            Events.
        device
            Where everything is made.
        """
        P, H, W = self._shape
        B, domain = batch_size, self._domain
        draws = Draws(device, self._seed, index, int(domain == "held_out"))
        hit_B = draws.chance(B, probability=self._hit_fraction)
        cameras = draw_cameras(draws, B, P, H, W, domain)
        background = draw_background(draws, cameras, H, W)
        tiling = draw_tiling(draws, B, P, H, W, domain)
        electronics = draw_electronics(draws, B, domain)

        # The brightness of a hit is drawn in terms of what can be seen on its background.
        typical_B = background.photons_BPHW.mean(dim=(1, 2, 3)) + EMPTY_VARIANCE
        noise_B = (typical_B + electronics.noise_B.square().flatten()).sqrt()
        low, high = BRIGHTNESS_SIGMAS
        height_B = draws.log_uniform(B, low=low, high=high)
        spots = draw_spots(draws, cameras, H, W, hit_B, FAINTEST_SIGMAS / high)
        shapes = draw_shapes(draws, cameras, spots)
        y_M, x_M, sigma_M = shapes.moments()
        event_M = torch.div(spots.image_M, P, rounding_mode="floor")
        # A spot's photons are its height times 2 pi sigma^2.
        photons_M = (height_B * noise_B)[event_M] * spots.strength_M * 6.2832 * sigma_M.square()
        planted_NHW = render(spots.image_M, shapes, photons_M, B * P, H, W)
        planted = planted_NHW.view(B, P, H, W) * background.transmission_BPHW
        readout = read_out(draws, background.photons_BPHW + planted, tiling, electronics)

        merged = merge_spots(
            Merged(spots.image_M, y_M, x_M, photons_M, sigma_M, spots.ice_M), B * P, H, W
        )
        scene = _Scene(background, planted, tiling, electronics, readout)
        return _label(merged, scene)


@dataclass(slots=True)
class _Scene:
    """Everything that decides about labels."""

    background: Background
    planted_BPHW: Tensor
    tiling: Tiling
    electronics: Electronics
    readout: Readout


def _label(spots: Merged, scene: _Scene) -> LabelledShots:
    """Judge each spot by what was measured, and draw its label."""
    readout, tiling, background = scene.readout, scene.tiling, scene.background
    B, P, H, W = readout.images_BPHW.shape
    area = tiling.area_BPH1 * tiling.area_BP1W
    expected = background.photons_BPHW * area
    variance = expected + readout.sigma_BPHW.square()
    # Grains of rings hide spots like noise does, but for `snr`, whose definition has only noise.
    grained = variance + (background.grain_BPHW * area).square() + EMPTY_VARIANCE
    usable = (~readout.bad_BPHW).float()
    images = torch.stack(
        [
            (readout.excess_BPHW - expected) * usable,
            grained,
            usable,
            readout.saturated_BPHW.float(),
            tiling.on_panel_BPHW & ~tiling.gap_BPHW,
        ],
        dim=2,
    ).flatten(0, 1)
    windows, weight = _windows(images, spots)
    excess, grained, usable, saturated, real = windows.unbind(1)
    # Outside of the frame is nothing, not even variance.
    grained = grained.clamp(min=EMPTY_VARIANCE)
    weight = weight * usable
    good_share = weight.sum(dim=1)
    # Matched filter: weights are the profile over the variance.
    significance = (weight * excess / grained).sum(dim=1)
    significance = significance / (weight.square() / grained).sum(dim=1).clamp(min=1e-9).sqrt()
    # The profile's photons by its share that was seen; never more than was measured.
    photons = (weight * excess).sum(dim=1) / weight.square().sum(dim=1).clamp(min=1e-9)
    photons = torch.minimum(photons, spots.photons_M.clamp(min=1.0) * 10.0)

    seen = (significance >= FAINT_SIGNIFICANCE) & (photons >= FAINT_PHOTONS)
    clear = (significance >= PEAK_SIGNIFICANCE) & (photons >= PEAK_PHOTONS)
    clear &= (good_share >= 1.0 - _MAX_BAD_SHARE) & ~spots.ignored_M
    clear &= saturated.sum(dim=1) <= _MAX_SATURATED_PIXELS
    # Where a spot is almost all on bad pixels, expectation decides that it may be seen.
    seen |= (good_share < 1.0 - _MAX_BAD_SHARE) & (real.sum(dim=1) > 0)
    y, x = spots.y_M, spots.x_M
    radius = disc_radius(spots.sigma_M)

    def drawn(labels: Tensor, chosen: Tensor, value: int) -> Tensor:
        index = torch.nonzero(chosen).squeeze(1)
        return paint(labels, spots.image_M[index], y[index], x[index], radius[index], value)

    labels = torch.zeros(B * P, H, W, dtype=torch.uint8, device=y.device)
    labels = drawn(labels, seen & ~clear, IGNORED)
    labels = drawn(labels, clear, PEAK)

    heights = scene.planted_BPHW * area
    snr_M, on_pixel_M = _snr(spots, heights, variance, tiling)
    listed = torch.nonzero((snr_M >= 1.0) & on_pixel_M).squeeze(1)
    image = spots.image_M[listed]
    event = torch.div(image, P, rounding_mode="floor")
    peaks = torch.stack([event, image - event * P, y[listed], x[listed]], dim=1)
    return LabelledShots(readout.images_BPHW, labels.view(B, P, H, W), peaks, snr_M[listed])


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


def _snr(
    spots: Merged, heights_BPHW: Tensor, variance_BPHW: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """Return each spot's height over the noise, and whether its centre is on a pixel."""
    H, W = heights_BPHW.shape[2:]
    y, x = spots.y_M.round().long(), spots.x_M.round().long()
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    y, x = y.clamp(0, H - 1), x.clamp(0, W - 1)
    # The brightest pixel need not be the one that holds the centre of gravity.
    heights = F.max_pool2d(heights_BPHW.flatten(0, 1)[:, None], 3, stride=1, padding=1)[:, 0]
    variance = variance_BPHW.flatten(0, 1)[spots.image_M, y, x]
    tiny = torch.finfo(torch.float32).tiny
    snr = heights[spots.image_M, y, x] * variance.clamp(min=tiny).rsqrt()
    real = (tiling.on_panel_BPHW & ~tiling.gap_BPHW).flatten(0, 1)
    return snr, inside & real[spots.image_M, y, x]
