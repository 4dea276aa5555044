"""How well peaks could be found at all: a filter that is told what no finder knows.

It knows the expected background of every pixel, the gain, the readout noise, the bad pixels and the
average shape of a spot, and asks everywhere how much likelier what was counted is with a spot there
than without. For one known spot no other test finds more (Neyman, Pearson, Phil. Trans. R. Soc. A
231 (1933) 289); for spots of other widths and strengths than the template's it is a little less
than the best. What it misses at a given precision, a network can hardly be asked for.

Shape legend: P panels, H rows, W columns, M peaks, K rows and columns of the template, L levels of
background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import maximum_filter
from torch.nn import functional as F

from peaknet_predict.types import Image, Peaks

Floats = npt.NDArray[np.float64]

SPOT_SIGMA_PX = 1.1
"""Width of the template: the middle of the simulator's."""

_REACH = 4
"""Pixels of the template to each side of its middle."""

_LEVEL_STEP = 0.3
"""Between two levels of background, in the logarithm."""

_BORDER_SIGMAS = 6.0
"""Strength of the spot that is asked for."""

_APART = 5
"""Edge of the square in which a peak is the highest place, pixels."""

_HOT_PHOTONS, _DEAD_PHOTONS, _MIN_SHOTS = 30.0, 20.0, 4
"""A pixel is hot with so many photons too many in every shot, and dead if it shows nothing where
all shots together expect so many; fewer shots do not tell a spot from a hot pixel."""

THRESHOLDS = tuple(np.linspace(4.0, 9.0, 51).round(1).tolist())
"""Of significance, to choose from."""


@dataclass(frozen=True, slots=True)
class Ideal:
    """What the matched filter is told.

    Attributes
    ----------
    background_PHW
        Expected photons without a crystal.
    noise_photons
        Rms of the readout noise, photons, rounding of integers included.
    gain_adu_per_photon
        ADU.
    good_PHW
        bool, neither hot nor dead.
    """

    background_PHW: Floats
    noise_photons: float
    gain_adu_per_photon: float
    good_PHW: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        images: Sequence[Image],
        background_PHW: Floats,
        noise_photons: float,
        gain_adu_per_photon: float,
    ) -> Ideal:
        """Make one for shots, of which it takes the pixels that are hot or dead in all of them."""
        excess = [image / gain_adu_per_photon - background_PHW for image in images]
        hot_PHW = np.min(excess, axis=0) > _HOT_PHOTONS
        # Where hardly a photon is expected, a dead pixel does not show, and matters little.
        dead_PHW = np.all([image == 0 for image in images], axis=0)
        dead_PHW &= len(images) * background_PHW > _DEAD_PHOTONS
        few = len(images) < _MIN_SHOTS
        good_PHW = np.ones_like(hot_PHW) if few else ~(hot_PHW | dead_PHW)
        return cls(background_PHW, noise_photons, gain_adu_per_photon, good_PHW)

    def significance(self, image_PHW: Image) -> Floats:
        """Return by how many sigmas a spot centred on each pixel is likelier than none, (P, H, W).

        For counts n of expectation v, and v + a t with a spot of a photons and profile t, the log
        likelihood ratio is the sum of n log(1 + a t / v) less a constant (Poisson). Readout noise
        of variance r is added to both n and v as if it were counts. Of that sum, its expectation
        without a spot is taken off, and it is divided by its standard deviation.
        """
        variance_PHW = self.background_PHW + self.noise_photons**2
        excess_PHW = image_PHW / self.gain_adu_per_photon - self.background_PHW
        low, high = float(variance_PHW.min()), float(variance_PHW.max())
        levels_L = np.geomspace(low, high, 1 + math.ceil(math.log(high / low) / _LEVEL_STEP))
        offset_K = np.arange(-_REACH, _REACH + 1)
        profile_KK = np.exp(-0.5 * np.add.outer(offset_K**2, offset_K**2) / SPOT_SIGMA_PX**2)
        profile_KK /= profile_KK.sum()
        # The spot that is asked for is one at the border of being significant.
        photons_L = _BORDER_SIGMAS * np.sqrt(levels_L / np.square(profile_KK).sum())
        weights_LKK = np.log1p((photons_L / levels_L)[:, None, None] * profile_KK)
        shift = _filtered(self.good_PHW * excess_PHW, weights_LKK)
        variance = _filtered(self.good_PHW * variance_PHW, weights_LKK**2)
        # The background hardly changes over a spot: its level at the middle decides.
        nearest_PHW = np.abs(np.log(variance_PHW)[:, None] - np.log(levels_L)[:, None, None])
        level_P1HW = nearest_PHW.argmin(axis=1)[:, None]
        z_PLHW = shift / np.sqrt(np.maximum(variance, 1e-12))
        return np.asarray(np.take_along_axis(z_PLHW, level_P1HW, axis=1)[:, 0])

    def find(self, image_PHW: Image) -> tuple[Peaks, Floats]:
        """Return all places that are a peak at the lowest of `THRESHOLDS`, and how significant.

        Returns
        -------
        peaks_M3, significance_M
            Sub-pixel positions from parabolas through the significance around its maximum.
        """
        z_PHW = self.significance(image_PHW)
        is_peak_PHW = z_PHW == maximum_filter(z_PHW, size=(1, _APART, _APART))
        is_peak_PHW &= z_PHW >= THRESHOLDS[0]
        panel_M, y_M, x_M = np.nonzero(is_peak_PHW)
        padded = np.pad(z_PHW, ((0, 0), (1, 1), (1, 1)), mode="edge")
        # Indices of the padded image.
        here = padded[panel_M, y_M + 1, x_M + 1]
        up, down = padded[panel_M, y_M, x_M + 1], padded[panel_M, y_M + 2, x_M + 1]
        left, right = padded[panel_M, y_M + 1, x_M], padded[panel_M, y_M + 1, x_M + 2]
        peaks_M3 = np.stack(
            [panel_M, y_M + _vertex(up, here, down), x_M + _vertex(left, here, right)], axis=1
        )
        return np.asarray(peaks_M3, dtype=np.float64), np.asarray(here)


def _filtered(values_PHW: Floats, weights_LKK: Floats) -> Floats:
    """Return the sums over the template at every pixel, (P, L, H, W)."""
    values = torch.from_numpy(values_PHW).to(torch.float32)[:, None]
    weights = torch.from_numpy(weights_LKK).to(torch.float32)[:, None]
    return np.asarray(F.conv2d(values, weights, padding=_REACH).numpy(), dtype=np.float64)


def _vertex(before: Floats, here: Floats, after: Floats) -> Floats:
    """Return where a parabola through three neighbours is highest, within half a pixel."""
    curvature = np.minimum(before - 2.0 * here + after, -1e-9)
    return np.asarray(np.clip(0.5 * (before - after) / curvature, -0.5, 0.5))
