"""Simulated shots with labels, batch after batch, made on the device that trains.

Every event has its own detector, beam, crystals, background and defects. The network never sees one
twice, so it cannot learn any by heart. Nothing is read from files.

Shape legend: B events, P panels of an event, N = B*P, H rows, W columns, M spots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peaknet_predict.simulation.backgrounds import draw_background
from peaknet_predict.simulation.cameras import draw_cameras
from peaknet_predict.simulation.crystals import draw_spots
from peaknet_predict.simulation.draws import Domain, Draws
from peaknet_predict.simulation.electronics import draw_electronics, read_out
from peaknet_predict.simulation.labels import Merged, merge_spots
from peaknet_predict.simulation.spot_shapes import draw_shapes, render
from peaknet_predict.simulation.tiles import draw_tiling
from peaknet_predict.simulation.truth import EMPTY_VARIANCE, Scene, judge, label, local_snr

ANY_SIGMAS, USUAL_SIGMAS = (0.5, 5000.0), (5.0, 150.0)
"""Height of an event's average full reflection at zero angle, in standard deviations of its
background. The first range spans four decades, as the hits of one run do. Most hits lie in the
second, and there peak finders differ."""

FAINTEST_SIGMAS = 0.25
"""Height of the faintest spots that are simulated, in the same unit."""


@dataclass(slots=True)
class LabelledShots:
    """The shots of one batch, and what is true of them.

    Attributes
    ----------
    images_BPHW
        (B, P, H, W) float32, detector counts as a detector delivers them: with offsets, gains and
        defects, and NaN where there is no pixel.
    labels_BPHW
        (B, P, H, W) uint8: `labels.BACKGROUND` (0), `labels.PEAK` (1) or `labels.IGNORED` (255).
        The loss leaves ignored pixels out.
    peaks_M4
        (M, 4) float32: event, panel, y, x of the spots whose `snr` is at least 1 and whose centre
        lies on a pixel of the panel. Spots that cannot be told apart are listed as one.
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
        Shape of an event: panels cut from one detector at random places, and rows and columns of
        each.
    hit_fraction
        Probability that an event has spots.
    seed
        Seed of the series.
    domain
        'held_out' draws detectors and cells that 'training' never contains: pixels of 72 to 80
        micrometres, sensors of 180 to 200 pixels with gaps of 3 to 5, 24 to 36 ADU per photon,
        readout noise of 0.15 to 0.25 photons, steps of 4, 0.5 or 0.01 ADU, and cells whose longest
        edge is 85 to 105 Angstrom.

    Raises
    ------
    ValueError
        If a parameter lies outside of its range.
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

        The same arguments give the same batch whichever batches were made before, up to the
        rounding of sums on a GPU.

        Parameters
        ----------
        index
            Number of the batch in the series, from 0.
        batch_size
            Events.
        device
            Where all tensors are made.
        """
        P, H, W = self._shape
        B, domain = batch_size, self._domain
        draws = Draws(device, self._seed, index, int(domain == "held_out"))
        hit_B = draws.chance(B, probability=self._hit_fraction)
        cameras = draw_cameras(draws, B, P, H, W, domain)
        background = draw_background(draws, cameras, H, W)
        tiling = draw_tiling(draws, B, P, H, W, domain)
        mean_B = background.photons_BPHW.mean(dim=(1, 2, 3), keepdim=True)
        electronics = draw_electronics(draws, mean_B, domain)

        # The brightness of a hit is relative to the noise of its background.
        noise_B = (mean_B + EMPTY_VARIANCE + electronics.noise_B.square()).sqrt().flatten()
        any_B, usual_B = (
            draws.log_uniform(B, low=low, high=high) for low, high in (ANY_SIGMAS, USUAL_SIGMAS)
        )
        height_B = torch.where(draws.chance(B, probability=0.5), any_B, usual_B)
        spots = draw_spots(draws, cameras, H, W, hit_B, FAINTEST_SIGMAS / height_B)
        shapes = draw_shapes(draws, cameras, spots)
        y_M, x_M, sigma_M = shapes.moments()
        event_M = torch.div(spots.image_M, P, rounding_mode="floor")
        # A Gaussian spot's photons are its height times 2 pi sigma^2.
        photons_M = (height_B * noise_B)[event_M] * spots.strength_M * 6.2832 * sigma_M.square()
        planted_NHW = render(spots.image_M, shapes, photons_M, B * P, H, W)
        planted = planted_NHW.view(B, P, H, W) * background.transmission_BPHW
        readout = read_out(draws, background.photons_BPHW + planted, tiling, electronics)

        merged = merge_spots(
            Merged(spots.image_M, y_M, x_M, photons_M, sigma_M, spots.ice_M), B * P, H, W
        )
        scene = Scene(background, tiling, readout, planted)
        peak_M, ignored_M = judge(merged, scene)
        snr_M, on_pixel_M = local_snr(merged, scene)
        # Wide and faint spots: no single pixel stands out, only all of them together.
        blurred_M = peak_M & (snr_M < 1.0)
        listed = torch.nonzero((snr_M >= 1.0) & on_pixel_M).squeeze(1)
        image = merged.image_M[listed]
        event = torch.div(image, P, rounding_mode="floor")
        place = [event, image - event * P, merged.y_M[listed], merged.x_M[listed]]
        return LabelledShots(
            images_BPHW=readout.images_BPHW,
            labels_BPHW=label(merged, peak_M & ~blurred_M, ignored_M | blurred_M, scene),
            peaks_M4=torch.stack(place, dim=1),
            snr_M=snr_M[listed],
        )
