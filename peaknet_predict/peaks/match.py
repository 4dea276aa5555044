"""Which of the peaks found are which of those known to be there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from peaknet_predict.types import Peaks

_PANELS_APART = 1e6
"""Pixels between panels, for the search: a distance that no radius reaches."""


def match_peaks(
    known_M3: Peaks, found_K3: Peaks, radius_px: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Pair peaks of two lists: each must be the other's nearest, on the same panel and near enough.

    Parameters
    ----------
    known_M3, found_K3
        (M, 3) and (K, 3) float64: panel, y, x.
    radius_px
        Greatest distance of a pair, pixels.

    Returns
    -------
    index_M, distance_M
        For each known peak its row in `found_K3`, -1 where it has none, int64; and how far away
        that is, pixels, float64, infinite where there is none. No row occurs twice.
    """
    index_M = np.full(len(known_M3), -1, dtype=np.int64)
    distance_M = np.full(len(known_M3), np.inf)
    if not len(known_M3) or not len(found_K3):
        return index_M, distance_M
    apart = np.array([_PANELS_APART, 1.0, 1.0])
    known_M3, found_K3 = known_M3 * apart, found_K3 * apart
    nearest_distance_M, nearest_found_M = cKDTree(found_K3).query(known_M3)
    _, nearest_known_K = cKDTree(known_M3).query(found_K3)
    mutual_M = nearest_known_K[nearest_found_M] == np.arange(len(known_M3))
    paired_M = mutual_M & (nearest_distance_M <= radius_px)
    index_M[paired_M] = nearest_found_M[paired_M]
    distance_M[paired_M] = nearest_distance_M[paired_M]
    return index_M, distance_M
