"""A flat detector of equal panels: pixel positions, smooth scattering and readout.

Detector coordinates are y (slow scan, downwards) and x (fast scan) in pixels from the beam.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HOT_PHOTONS = (100.0, 1000.0)
"""Range of the constant signal of hot pixels, in photons."""

PANEL_GAP_PX = 8
"""Insensitive pixels between neighbouring panels; the beam passes the middle of the grid."""

WATER_RING_Q = 2.0 / (2.0 * math.pi)
"""1/d of the first maximum of the structure factor of liquid water: 2.0 inverse Angstrom in 4 pi
sin(theta) / wavelength at room temperature (Clark et al., PNAS 107 (2010) 14003)."""

WATER_RING_WIDTH = 0.045
"""Standard deviation of that maximum in 1/d, inverse Angstrom; read off the same curves."""


class TiledDetector:
    """Equal panels on a near-square grid, filled row by row, centred on the beam.

    Parameters
    ----------
    panels, height, width
        Number of panels, rows and columns of each.
    pixel_size_m
        Edge of a square pixel, metres.
    distance_m
        Sample to detector, metres.
    """

    def __init__(
        self, panels: int, height: int, width: int, pixel_size_m: float, distance_m: float
    ) -> None:
        self.shape = (panels, height, width)
        self.distance_px = distance_m / pixel_size_m
        columns = math.ceil(math.sqrt(panels))
        rows = math.ceil(panels / columns)
        row_P, column_P = np.divmod(np.arange(panels), columns)
        pitch_y, pitch_x = height + PANEL_GAP_PX, width + PANEL_GAP_PX
        # Detector coordinates of each panel's pixel (0, 0).
        self.origin_y_P = row_P * pitch_y - (rows * pitch_y - PANEL_GAP_PX - 1) / 2
        self.origin_x_P = column_P * pitch_x - (columns * pitch_x - PANEL_GAP_PX - 1) / 2

    def unit_vectors(self) -> tuple[Floats, Floats, Floats]:
        """Return the directions from the sample to the pixel centres.

        Returns
        -------
        x_PHW, y_PHW, z_PHW
            (P, H, W) | float64 each, components of unit vectors in the laboratory frame.
        """
        _, height, width = self.shape
        y_PH1 = self.origin_y_P[:, None, None] + np.arange(height)[None, :, None]
        x_P1W = self.origin_x_P[:, None, None] + np.arange(width)[None, None, :]
        r_PHW = np.sqrt(y_PH1**2 + x_P1W**2 + self.distance_px**2)
        return x_P1W / r_PHW, y_PH1 / r_PHW, self.distance_px / r_PHW

    def max_two_theta(self) -> float:
        """Return the largest scattering angle of a pixel, radians."""
        _, height, width = self.shape
        y = max(-self.origin_y_P.min(), self.origin_y_P.max() + height - 1)
        x = max(-self.origin_x_P.min(), self.origin_x_P.max() + width - 1)
        return math.atan(math.hypot(y, x) / self.distance_px)

    def project(self, k_M3: Floats) -> tuple[Floats, Floats]:
        """Find where rays from the sample cross the plane of the detector.

        Parameters
        ----------
        k_M3
            (M, 3) | directions in the laboratory frame, of any length.

        Returns
        -------
        y_M, x_M
            (M,) | float64, detector coordinates; NaN for a ray that does not travel forwards.
        """
        z_M = np.where(k_M3[:, 2] > 0.0, k_M3[:, 2], np.nan)
        scale_M = self.distance_px / z_M
        return k_M3[:, 1] * scale_M, k_M3[:, 0] * scale_M

    def to_panels(
        self, y_M: Floats, x_M: Floats, margin: float
    ) -> tuple[Ints, Ints, Floats, Floats]:
        """Convert detector coordinates to pixel indices of the nearby panels.

        Parameters
        ----------
        y_M, x_M
            (M,) | detector coordinates.
        margin
            Pixels. A point belongs to a panel if it lies at most this far outside the centres of
            the panel's outermost pixels (inside, if negative). It can belong to several panels.

        Returns
        -------
        point, panel, y, x
            Which point, which panel, and the position in that panel's pixel indices.
        """
        _, height, width = self.shape
        y_PM = y_M[None, :] - self.origin_y_P[:, None]
        x_PM = x_M[None, :] - self.origin_x_P[:, None]
        # Comparisons with NaN are false, which drops rays that miss the plane.
        near_PM = (y_PM >= -margin) & (y_PM <= height - 1 + margin)
        near_PM &= (x_PM >= -margin) & (x_PM <= width - 1 + margin)
        panel, point = np.nonzero(near_PM)
        return point, panel, y_PM[near_PM], x_PM[near_PM]


def polarisation(x: Floats) -> Floats:
    """Return the polarisation factor of scattered light.

    The beam is linearly polarised along x, as from an undulator. The factor is 1 minus the square
    of the component of the outgoing direction along the polarisation (Kahn et al., J. Appl.
    Cryst. 15 (1982) 330, for a fully polarised beam).

    Parameters
    ----------
    x
        Component of the unit vector of the outgoing direction along x, any shape.
    """
    return np.asarray(1.0 - x**2)


def smooth_scattering(
    detector: TiledDetector, wavelength: float, background: float, water_ring: float
) -> Floats:
    """Return the photons that each pixel expects from everything except the crystal.

    Parameters
    ----------
    detector
        Positions of the pixels.
    wavelength
        Angstrom.
    background
        Photons per pixel, at the beam, from a scatterer without structure (air, solvent).
    water_ring
        Additional photons per pixel at the crest of the water ring, before the corrections.

    Returns
    -------
    ndarray
        (P, H, W) | float64, photons. Includes the polarisation and the solid angle of a pixel of a
        flat detector, which falls with the cube of the cosine of the scattering angle.
    """
    x_PHW, _, z_PHW = detector.unit_vectors()
    # q = 2 sin(theta) / wavelength, and 2 sin^2(theta) = 1 - cos(2 theta).
    q_PHW = np.sqrt(2.0 * (1.0 - z_PHW)) / wavelength
    ring_PHW = np.exp(-0.5 * ((q_PHW - WATER_RING_Q) / WATER_RING_WIDTH) ** 2)
    return np.asarray((background + water_ring * ring_PHW) * z_PHW**3 * polarisation(x_PHW))


class DetectorReadout:
    """Turns expected photons into detector counts: noise, gain, bad pixels, number format.

    Parameters
    ----------
    shape
        P, H, W.
    gain_adu_per_photon, readout_noise_adu
        ADU; the noise is the rms of a normal distribution.
    hot_pixels, dead_pixels
        Fractions of all pixels; no pixel is both.
    dtype
        'float32', 'uint16' or 'int32'.
    rng
        Draws the bad pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        gain_adu_per_photon: float,
        readout_noise_adu: float,
        hot_pixels: float,
        dead_pixels: float,
        dtype: str,
        rng: np.random.Generator,
    ) -> None:
        self.noise_photons = readout_noise_adu / gain_adu_per_photon
        self._gain = np.float32(gain_adu_per_photon)
        self._noise = np.float32(readout_noise_adu)
        self._dtype = np.dtype(dtype)
        pixels = math.prod(shape)
        num_hot, num_dead = round(hot_pixels * pixels), round(dead_pixels * pixels)
        # One draw without replacement, so that no pixel is both.
        bad = rng.permutation(pixels)[: num_hot + num_dead]
        self._hot, self._dead = bad[:num_hot], bad[num_hot:]
        self._hot_adu = self._gain * rng.uniform(*HOT_PHOTONS, len(self._hot)).astype(np.float32)

    def read(self, expected_PHW: Floats, rng: np.random.Generator) -> npt.NDArray[Any]:
        """Read out one exposure.

        Parameters
        ----------
        expected_PHW
            (P, H, W) | float64, expected photons.
        rng
            Draws the noise.

        Returns
        -------
        ndarray
            (P, H, W) in the detector's dtype, ADU.
        """
        photons_PHW = rng.poisson(expected_PHW)
        image_PHW = rng.standard_normal(expected_PHW.shape, dtype=np.float32)
        image_PHW *= self._noise
        image_PHW += photons_PHW * self._gain
        pixels = image_PHW.reshape(-1)
        pixels[self._hot] += self._hot_adu
        pixels[self._dead] = 0.0
        if self._dtype.kind == "f":
            return image_PHW
        limits = np.iinfo(self._dtype)
        # The largest float32 in range. The largest int32, rounded to float32, would overflow.
        highest = np.float32(limits.max)
        if int(highest) > limits.max:
            highest = np.nextafter(highest, np.float32(0.0))
        return np.clip(np.rint(image_PHW), limits.min, highest).astype(self._dtype)
