"""Matching of peaks that were found with known peaks."""

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
    """Give each known peak at most one found peak, and each found peak at most one known.

    The nearest pair within the radius on one panel is taken first, then the nearest of those that
    are left, and so on.

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
        that is, pixels, float64, infinite where there is none.
    """
    index_M = np.full(len(known_M3), -1, dtype=np.int64)
    distance_M = np.full(len(known_M3), np.inf)
    if not len(known_M3) or not len(found_K3):
        return index_M, distance_M
    apart = np.array([_PANELS_APART, 1.0, 1.0])
    pairs = cKDTree(known_M3 * apart).sparse_distance_matrix(
        cKDTree(found_K3 * apart), radius_px, output_type="ndarray"
    )
    # Ties are broken by position in the lists, so that a result repeats.
    pairs = np.sort(pairs, order=["v", "i", "j"])
    while len(pairs):
        # A pair that comes first for both of its peaks is taken before any other of theirs.
        rows = np.arange(len(pairs))
        _, first_i, where_i = np.unique(pairs["i"], return_index=True, return_inverse=True)
        _, first_j, where_j = np.unique(pairs["j"], return_index=True, return_inverse=True)
        taken = pairs[(first_i[where_i] == rows) & (first_j[where_j] == rows)]
        index_M[taken["i"]], distance_M[taken["i"]] = taken["j"], taken["v"]
        pairs = pairs[~np.isin(pairs["i"], taken["i"]) & ~np.isin(pairs["j"], taken["j"])]
    return index_M, distance_M
