"""Peak finding in host memory with SciPy.

Shape legend: N panels of a batch, H rows and W columns of a panel, M peaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from peaknet_predict.peaks.table import STRUCTURE_333, PeakTable


def find_peaks_scipy(class_map_NHW: npt.NDArray[Any]) -> PeakTable:
    """Find the peaks of a batch of panels in host memory.

    Parameters
    ----------
    class_map_NHW
        (N, H, W) integers or booleans, any strides; not zero = peak.

    Returns
    -------
    PeakTable
        See `peaknet_predict.peaks.find_peaks`.
    """
    _, height, width = class_map_NHW.shape
    # SciPy numbers components in the order in which a raster scan meets them, which is the order
    # of the table; the tests hold it to that.
    labels_NHW, num_peaks = ndimage.label(class_map_NHW, structure=STRUCTURE_333)
    # Peaks cover a small share of the pixels: from here on only those are touched. (NumPy finds
    # the True of a boolean array five times faster than the nonzero of an integer one.)
    flat = np.flatnonzero(labels_NHW != 0)
    peak = labels_NHW.reshape(-1)[flat] - 1
    row, x = np.divmod(flat, width)
    panel, y = np.divmod(row, height)

    def total(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        # bincount adds in float64: exact for integer sums below 2**53.
        return np.bincount(peak, weights=values, minlength=num_peaks).astype(np.int64)

    panel_of_peak = np.zeros(num_peaks, dtype=np.int64)
    panel_of_peak[peak] = panel  # all pixels of a component write the same value
    return PeakTable.from_sums(
        panel=panel_of_peak,
        sum_y=total(y),
        sum_x=total(x),
        num_pixels=np.bincount(peak, minlength=num_peaks).astype(np.int64),
    )
