"""Peak intensities: background-subtracted sums of original pixels.

CrystFEL ranks the peaks of a CXI file by their intensity and ignores lists that have none.

Shape legend: P panels, H rows (y), W columns (x), M peaks, D pixels of a disc, R pixels of a ring,
K = D + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peaknet_predict.types import Image, Peaks

# Pixels. The defaults of CrystFEL's `indexamajig --int-radius`, so that intensities are comparable.
DISC_RADIUS = 4
RING_INNER_RADIUS = 5
RING_OUTER_RADIUS = 7

# The standard deviation of a normal distribution over its median absolute deviation.
_SIGMA_PER_MAD = 1.4826

_dy, _dx = np.mgrid[
    -RING_OUTER_RADIUS : RING_OUTER_RADIUS + 1, -RING_OUTER_RADIUS : RING_OUTER_RADIUS + 1
]
_r2 = _dy**2 + _dx**2
_disc = _r2 <= DISC_RADIUS**2
_ring = (_r2 > RING_INNER_RADIUS**2) & (_r2 <= RING_OUTER_RADIUS**2)
_NUM_DISC = int(_disc.sum())
# Offsets of the disc's pixels, then of the ring's: one gather reads both.
_DY_K = np.concatenate([_dy[_disc], _dy[_ring]])
_DX_K = np.concatenate([_dx[_disc], _dx[_ring]])


@dataclass(frozen=True, slots=True, eq=False)
class PeakIntensities:
    """Intensities of the peaks of one event, each (M,) float64, in detector counts.

    Attributes
    ----------
    total
        Sum over the disc minus `background` times the number of pixels summed.
    maximum
        Largest pixel of the disc, background included.
    background
        Median of the ring: the background a pixel.
    snr
        `total` over its noise, which is the ring's standard deviation times the square root of the
        number of pixels summed; 0 where the ring shows no noise.
    saturated
        Whether the largest pixel is saturated; False where that is not known.
    """

    total: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    background: npt.NDArray[np.float64]
    snr: npt.NDArray[np.float64]
    saturated: npt.NDArray[np.bool_]


def integrate_peaks(
    image_PHW: Image,
    peaks_M3: Peaks,
    bad_PHW: npt.NDArray[np.bool_] | None = None,
    saturation: float | None = None,
) -> PeakIntensities:
    """Integrate every peak of one event over a disc, with the background from a ring around it.

    Disc (radius 4 pixels) and ring (radii above 5, up to 7) are centred on the pixel that holds the
    centroid. Pixels beyond the panel's border, bad pixels, and pixels that are NaN or infinite are
    left out. A peak without a usable pixel in the disc or in the ring gets zeros: it ranks last.

    Parameters
    ----------
    image_PHW
        (P, H, W) or (H, W), any real dtype: original detector counts.
    peaks_M3
        (M, 3) float64: panel, y, x.
    bad_PHW
        The image's shape, True where a pixel is bad; None if there are no such pixels.
    saturation
        Counts from which on a pixel is saturated; None if that is not known.

    Returns
    -------
    PeakIntensities
        In the order of the peaks.

    Raises
    ------
    ValueError
        If a peak lies outside of the image or the shapes are not as above.
    """
    if image_PHW.ndim == 2:
        image_PHW = image_PHW[np.newaxis]
        bad_PHW = None if bad_PHW is None else bad_PHW[np.newaxis]
    if image_PHW.ndim != 3 or peaks_M3.ndim != 2 or peaks_M3.shape[1] != 3:
        raise ValueError(
            f"expected an image (P, H, W) and peaks (M, 3), not {image_PHW.shape} and "
            f"{peaks_M3.shape}"
        )
    nearest_M3 = np.rint(peaks_M3)
    # Stated positively, because comparisons with NaN are false.
    inside_M = ((nearest_M3 >= 0) & (nearest_M3 < image_PHW.shape)).all(axis=1)
    if not inside_M.all():
        row = int(np.argmin(inside_M))
        raise ValueError(
            f"peak {row} (panel, y, x) = {peaks_M3[row].tolist()} is outside of an image of shape "
            f"{image_PHW.shape}"
        )
    values_MK, usable_MK = _gather(image_PHW, nearest_M3.astype(np.int64), bad_PHW)
    disc_MD, disc_usable_MD = values_MK[:, :_NUM_DISC], usable_MK[:, :_NUM_DISC]
    ring_MR, ring_usable_MR = values_MK[:, _NUM_DISC:], usable_MK[:, _NUM_DISC:]

    num_disc = disc_usable_MD.sum(axis=1)
    known = (num_disc > 0) & ring_usable_MR.any(axis=1)
    # The median, because a neighbouring peak in the ring must not count as background.
    background = _median(ring_MR, ring_usable_MR)
    total = np.where(known, disc_MD.sum(axis=1) - background * num_disc, 0.0)
    maximum = np.where(disc_usable_MD, disc_MD, -np.inf).max(axis=1)
    noise = _spread(ring_MR, ring_usable_MR, background) * np.sqrt(num_disc)
    snr = np.divide(total, noise, out=np.zeros_like(total), where=known & (noise > 0))
    return PeakIntensities(
        total=total,
        maximum=np.where(known, maximum, 0.0),
        background=np.where(known, background, 0.0),
        snr=snr,
        saturated=known & (maximum >= (np.inf if saturation is None else saturation)),
    )


def _gather(
    image_PHW: Image,
    nearest_M3: npt.NDArray[np.int64],
    bad_PHW: npt.NDArray[np.bool_] | None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Read the pixels of disc and ring of every peak; unusable ones are 0 and marked."""
    _, height, width = image_PHW.shape
    panel_M1, y_M1, x_M1 = nearest_M3[:, 0:1], nearest_M3[:, 1:2], nearest_M3[:, 2:3]
    y_MK, x_MK = y_M1 + _DY_K, x_M1 + _DX_K
    usable_MK = (y_MK >= 0) & (y_MK < height) & (x_MK >= 0) & (x_MK < width)
    # Clipped indices read some pixel of the same panel, which is then left out.
    pixel_MK = panel_M1, y_MK.clip(0, height - 1), x_MK.clip(0, width - 1)
    values_MK = image_PHW[pixel_MK].astype(np.float64)
    usable_MK &= np.isfinite(values_MK)
    if bad_PHW is not None:
        usable_MK &= ~bad_PHW[pixel_MK]
    values_MK[~usable_MK] = 0.0
    return values_MK, usable_MK


def _median(
    values_MR: npt.NDArray[np.float64], usable_MR: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Return the median of the usable values of each row, 0 where there are none."""
    count = usable_MR.sum(axis=1)
    sorted_MR = np.sort(np.where(usable_MR, values_MR, np.inf), axis=1)
    row = np.arange(len(count))
    lower = sorted_MR[row, np.maximum(count - 1, 0) // 2]
    upper = sorted_MR[row, count // 2]
    return np.where(count > 0, 0.5 * (lower + upper), 0.0)


def _spread(
    values_MR: npt.NDArray[np.float64],
    usable_MR: npt.NDArray[np.bool_],
    center_M: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the standard deviation of each row, robust against neighbouring peaks."""
    away_MR = np.abs(values_MR - center_M[:, np.newaxis])
    robust = _SIGMA_PER_MAD * _median(away_MR, usable_MR)
    # Photon counts of which more than half are equal have a median deviation of zero.
    count = np.maximum(usable_MR.sum(axis=1), 1)
    plain = np.sqrt(np.square(np.where(usable_MR, away_MR, 0.0)).sum(axis=1) / count)
    return np.where(robust > 0, robust, plain)
