"""Networks that map panels to logits, (N, 1, H, W) -> (N, C, H, W), and their weight files."""

from peaknet_predict.models.peaknet import PeakNet
from peaknet_predict.models.snr import LocalSnr
from peaknet_predict.models.weights import load_weights

__all__ = ["LocalSnr", "PeakNet", "load_weights"]
