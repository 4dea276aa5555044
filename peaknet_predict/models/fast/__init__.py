"""The fast PeakNet: same weights, same peaks, few passes over a GPU's memory (docs/fast.md)."""

from peaknet_predict.models.fast.network import FastPeakNet, unsupported

__all__ = ["FastPeakNet", "unsupported"]
