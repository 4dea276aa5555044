"""Gaussian spots on the panels of a detector.

Shape legend, in addition to that of `peaknet_predict.types`: K rows and
columns of the window of pixels around a spot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SPOT_SIGMA_PX = (0.8, 1.5)
"""Range of the spots' widths (standard deviations) as the pixels see them, in pixels. From 0.8 on,
samples at the pixel centres add up to the integral of a Gaussian within 1e-5."""

SPOT_RADIUS_PX = 7
"""Spots are drawn out to this distance from their brightest pixel. It cuts off less than 3e-5 of
the widest."""


@dataclass(slots=True)
class GaussianSpots:
    """M Gaussian spots on panels, or close enough to a panel for their tails to reach it.

    A spot between panels is listed once for each panel that it touches.

    Attributes
    ----------
    panel_M
        (M,) | int64, panel.
    y_M, x_M
        (M,) | float64, centres in the panel's pixel indices; may lie outside the panel.
    sigma_M
        (M,) | float64, widths, pixels.
    photons_M
        (M,) | float64, photons expected in the whole spot.
    """

    panel_M: Ints
    y_M: Floats
    x_M: Floats
    sigma_M: Floats
    photons_M: Floats

    @classmethod
    def none(cls) -> GaussianSpots:
        """Return an empty list: a shot without a crystal has no spots."""
        empty = np.empty(0)
        return cls(empty.astype(np.int64), empty, empty, empty, empty)

    def brightest_pixels(self) -> tuple[Ints, Ints]:
        """Return the rows and columns, (M,) int64 each, of the pixels that hold the centres."""
        return np.rint(self.y_M).astype(np.int64), np.rint(self.x_M).astype(np.int64)

    def heights(self) -> Floats:
        """Return the photons expected in each spot's brightest pixel, (M,) float64."""
        y_M, x_M = self.brightest_pixels()
        distance2_M = (y_M - self.y_M) ** 2 + (x_M - self.x_M) ** 2
        variance_M = self.sigma_M**2
        profile_M = np.exp(-0.5 * distance2_M / variance_M) / (2.0 * np.pi * variance_M)
        return np.asarray(self.photons_M * profile_M)

    def add_to(self, photons_PHW: Floats) -> None:
        """Add the photons expected from the spots to an image, in place.

        Parameters
        ----------
        photons_PHW
            (P, H, W) | float64, C-contiguous.
        """
        _, height, width = photons_PHW.shape
        offset_K = np.arange(-SPOT_RADIUS_PX, SPOT_RADIUS_PX + 1)
        y_M, x_M = self.brightest_pixels()
        y_MK, x_MK = y_M[:, None] + offset_K, x_M[:, None] + offset_K
        # A Gaussian is the product of its profiles along y and x: 2K exponentials, not K x K.
        variance_M1 = self.sigma_M[:, None] ** 2
        profile_y_MK = np.exp(-0.5 * (y_MK - self.y_M[:, None]) ** 2 / variance_M1)
        profile_x_MK = np.exp(-0.5 * (x_MK - self.x_M[:, None]) ** 2 / variance_M1)
        profile_y_MK *= self.photons_M[:, None] / (2.0 * np.pi * variance_M1)
        # Nothing is added beyond the edge, so the clipped index may be that of any pixel.
        profile_y_MK[(y_MK < 0) | (y_MK >= height)] = 0.0
        profile_x_MK[(x_MK < 0) | (x_MK >= width)] = 0.0
        row_MK = self.panel_M[:, None] * height + np.clip(y_MK, 0, height - 1)
        pixel_MKK = row_MK[:, :, None] * width + np.clip(x_MK, 0, width - 1)[:, None, :]
        window_MKK = profile_y_MK[:, :, None] * profile_x_MK[:, None, :]
        # Windows of neighbouring spots overlap; only `add.at` adds both.
        np.add.at(photons_PHW.reshape(-1), pixel_MKK, window_MKK)
