"""The peak table stated in the plainest way: what the tests hold the fast finders to.

Shape legend: N panels of a batch, H rows and W columns of a panel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from peaknet_predict.peaks.table import PeakTable


def find_peaks_reference(class_map_NHW: npt.NDArray[Any]) -> PeakTable:
    """Find peaks panel by panel with `scipy.ndimage.label` and `center_of_mass`.

    Parameters
    ----------
    class_map_NHW
        (N, H, W) integers or booleans; not zero = peak.

    Returns
    -------
    PeakTable
        Rows by panel, then in raster order of the component's first pixel.
    """
    rows: list[tuple[int, float, float, int]] = []
    for panel, class_map_HW in enumerate(class_map_NHW):
        mask_HW = class_map_HW != 0
        labels_HW, num_peaks = ndimage.label(mask_HW, structure=np.ones((3, 3)))
        if num_peaks == 0:
            continue
        index = np.arange(1, num_peaks + 1)
        centers = ndimage.center_of_mass(mask_HW, labels_HW, index)
        sizes = np.bincount(labels_HW.ravel())[1:]
        found, first_pixel = np.unique(labels_HW.ravel(), return_index=True)
        # Stated here rather than left to the numbering of the library.
        order = np.argsort(first_pixel[found > 0])
        rows += [(panel, *centers[k], int(sizes[k])) for k in order]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return PeakTable(
        panel=table[:, 0].astype(np.int64),
        y=table[:, 1].copy(),
        x=table[:, 2].copy(),
        num_pixels=table[:, 3].astype(np.int64),
    )
