"""Peak finding on a CUDA device with CuPy: the only module that imports CuPy.

The host waits twice: inside `label`, for the number of components, and for the finished sums.

Shape legend: N panels of a batch, H rows and W columns of a panel, M peaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peaknet_predict.peaks.table import STRUCTURE_333, PeakTable

try:
    import cupy
    from cupyx.scipy import ndimage
except ImportError as error:
    raise ImportError(
        "finding peaks on a GPU needs CuPy: install the extra for the CUDA version of your torch "
        "(see torch.version.cuda), pip install 'peaknet-predict[cuda12]' or "
        "pip install 'peaknet-predict[cuda13]'"
    ) from error

MAX_PIXELS = 2**31 - 1
"""Largest N*H*W of one call: `cupyx.scipy.ndimage.label` counts pixels in int32 (CuPy 14)."""

# One pass over the labels for all sums. Integer atomics give the same sums in any order, so the
# result does not depend on the scheduling of threads; and the sizes are known beforehand, whereas
# flatnonzero and bincount would make the host wait for theirs.
_add_up = cupy.ElementwiseKernel(
    in_params="int32 label, int64 height, int64 width, int64 num_peaks",
    out_params="raw uint64 sums",
    operation="""
        if (label > 0) {
            const long long pixel = i;
            const long long row = pixel / width;
            const long long peak = label - 1;
            sums[peak] = row / height;  // all pixels of a component write the same value
            atomicAdd(&sums[num_peaks + peak], (unsigned long long)(row % height));
            atomicAdd(&sums[2 * num_peaks + peak], (unsigned long long)(pixel % width));
            atomicAdd(&sums[3 * num_peaks + peak], 1ULL);
        }
    """,
    name="peaknet_predict_add_up",
)


def find_peaks_cupy(class_map_NHW: torch.Tensor) -> PeakTable:
    """Find the peaks of a batch of panels on a CUDA device.

    Runs on torch's current stream of the map's device and reads the tensor's memory in place.

    Parameters
    ----------
    class_map_NHW
        (N, H, W) tensor of integers or booleans on a CUDA device, any strides; not zero = peak.

    Returns
    -------
    PeakTable
        See `peaknet_predict.peaks.find_peaks`; the arrays are in host memory.

    Raises
    ------
    ValueError
        If the batch has more than `MAX_PIXELS` pixels.
    """
    if class_map_NHW.numel() > MAX_PIXELS:
        raise ValueError(
            f"a class map of shape {tuple(class_map_NHW.shape)} has more than {MAX_PIXELS} pixels, "
            "which CuPy's labels cannot count: use a smaller batch"
        )
    if class_map_NHW.numel() == 0:
        none = np.zeros(0, dtype=np.int64)
        return PeakTable.from_sums(none, none, none, none)
    _, height, width = class_map_NHW.shape
    device = class_map_NHW.device
    # CuPy has its own current stream. On any other than torch's it would read the map before the
    # kernels that write it have run.
    torch_stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(torch_stream):
        labels_NHW, num_peaks = ndimage.label(_share(class_map_NHW), structure=STRUCTURE_333)
        sums_4M = cupy.zeros((4, num_peaks), dtype=cupy.uint64)
        if num_peaks:
            _add_up(labels_NHW, height, width, num_peaks, sums_4M)
        panel, sum_y, sum_x, num_pixels = sums_4M.get().astype(np.int64)
    return PeakTable.from_sums(panel, sum_y, sum_x, num_pixels)


def _share(tensor: torch.Tensor) -> Any:
    """Show a tensor to CuPy without a copy."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bool:
        # The same bytes under a type that every version of DLPack knows.
        tensor = tensor.view(torch.uint8)
    return cupy.from_dlpack(tensor)
