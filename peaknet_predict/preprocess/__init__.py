"""From raw detector frames to the network's input, on the device, and the peaks' way back.

First, `Validity` and `find_outliers` decide which pixels are measurements. Then comes a chain of
small modules, each of which maps ``(images, valid)`` to ``(images, valid)``:

- images are float32; a bad pixel is NaN up to a norm, which leaves it out of the statistics and
  puts the background in its place;
- ``valid`` is False for pixels that are no measurement: bad ones and padding.

Nothing here waits for the device or depends on the data in its shapes, so the whole chain compiles
with the network.
"""

from peaknet_predict.preprocess.base import Shape, Transform
from peaknet_predict.preprocess.chain import Prepared, Preprocess
from peaknet_predict.preprocess.mask_files import read_mask
from peaknet_predict.preprocess.norms import InstanceNorm, LocalNorm
from peaknet_predict.preprocess.outliers import find_outliers
from peaknet_predict.preprocess.panels import (
    Crop,
    MergeBatchChannelDims,
    Pad,
    PadToMultiple,
    Patchify,
)
from peaknet_predict.preprocess.validity import StaticMask, Validity, pack_masks

__all__ = [
    "Crop",
    "InstanceNorm",
    "LocalNorm",
    "MergeBatchChannelDims",
    "Pad",
    "PadToMultiple",
    "Patchify",
    "Prepared",
    "Preprocess",
    "Shape",
    "StaticMask",
    "Transform",
    "Validity",
    "find_outliers",
    "pack_masks",
    "read_mask",
]
