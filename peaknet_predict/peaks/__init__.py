"""From a class map to a table of peaks: 8-connected components and their centroids.

Two implementations give the same table bit for bit, because both add up integers, which is exact,
and leave one float64 division per coordinate: `labels_scipy` for maps in host memory,
`finder` on a CUDA device. `oracle` states the same result in the plainest way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from peaknet_predict.peaks.table import PeakTable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PeakTable", "find_peaks"]


def find_peaks(class_map_NHW: Tensor) -> PeakTable:
    """Find the peaks of a batch of panels and return them in host memory.

    Waits for the result: the number of peaks decides the size of the table.

    Parameters
    ----------
    class_map_NHW
        (N, H, W) tensor of any integer or boolean dtype, any strides, on the CPU or a CUDA device;
        a pixel that is not zero belongs to a peak.

    Returns
    -------
    PeakTable
        One row for each 8-connected component within a panel, by panel and then in raster order of
        the component's first pixel.

    Raises
    ------
    TypeError
        If the map is not of integer or boolean dtype (network outputs need their argmax first).
    ValueError
        If the map is not three-dimensional, or lies on a device other than a CPU or CUDA one.
    ImportError
        If the map is on a CUDA device and CuPy is not installed.
    """
    if class_map_NHW.is_floating_point() or class_map_NHW.is_complex():
        raise TypeError(
            f"a class map holds integers or booleans, not {class_map_NHW.dtype}: "
            "take the argmax over the classes first"
        )
    if class_map_NHW.ndim != 3:
        raise ValueError(
            f"a class map has the shape (N, H, W), not {tuple(class_map_NHW.shape)}: "
            "merge events and panels into one dimension first"
        )
    # Each is imported where it is used: SciPy takes time to load, and CuPy may not be installed.
    if class_map_NHW.device.type == "cuda":
        from peaknet_predict.peaks.finder import PeakFinder

        if class_map_NHW.numel() == 0:
            none = np.zeros(0, dtype=np.int64)
            return PeakTable.from_sums(none, none, none, none)
        # Made for a single map; for many batches, keep a finder.
        panels, height, width = class_map_NHW.shape
        finder = PeakFinder(panels, height, width, device=class_map_NHW.device)
        return finder.enqueue(class_map=class_map_NHW.detach()).table()
    if class_map_NHW.device.type == "cpu":
        from peaknet_predict.peaks import labels_scipy

        return labels_scipy.find_peaks_scipy(class_map_NHW.detach().numpy())
    raise ValueError(
        f"peaks are found on a CPU or a CUDA device, not on {class_map_NHW.device}: "
        "move the class map to the CPU"
    )
