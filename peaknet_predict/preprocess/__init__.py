"""From raw detector frames to the network's input, on the device, and the peaks' way back.

A chain of small modules, each of which maps ``(images, valid)`` to ``(images, valid)``:

- images are float32; a NaN or infinite pixel stays so up to a norm, which leaves it out of the
  statistics and puts the background in its place;
- ``valid`` is False for pixels that are no measurement: NaN, infinite or padding.

Nothing here waits for the device or depends on the data in its shapes, so the whole chain compiles
with the network.
"""

from peaknet_predict.preprocess.base import Shape, Transform
from peaknet_predict.preprocess.chain import Prepared, Preprocess
from peaknet_predict.preprocess.frames import (
    Crop,
    MergeBatchChannelDims,
    Pad,
    PadToMultiple,
    Patchify,
)
from peaknet_predict.preprocess.norms import InstanceNorm, LocalNorm

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
    "Transform",
]
