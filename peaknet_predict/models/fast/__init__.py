"""PeakNet's forward pass close to the limit of the GPU; see docs/fast.md."""

from peaknet_predict.models.fast.form import FastForm
from peaknet_predict.models.fast.network import FastPeakNet, unsupported

__all__ = ["FastForm", "FastPeakNet", "unsupported"]
