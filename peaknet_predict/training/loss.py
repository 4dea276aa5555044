"""The loss that a segmentation network is trained with.

Shape legend: N panels of a batch, C classes, H rows, W columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.simulation.labels import IGNORED, PEAK

PEAK_WEIGHT = 0.75
"""Weight of a peak pixel; a background pixel has the rest."""

FOCUS = 2.0
"""Exponent gamma: how strongly well-classified pixels are discounted."""


def peak_log_odds(logits_NCHW: Tensor) -> Tensor:
    """Return ln(p / (1 - p)) of each pixel, (N, H, W) float32; p is that it belongs to a peak.

    Class 0 is background, all others are peak.
    """
    logits_NCHW = logits_NCHW.float()
    return torch.logsumexp(logits_NCHW[:, 1:], dim=1) - logits_NCHW[:, 0]


def focal_loss(logits_NCHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Return the focal loss of a batch: its sum over all pixels per peak pixel.

    Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002, equation 5 and, for the
    divisor, section 3.3: the background is a thousand times larger than the peaks and nearly all of
    it easy, so a mean over pixels would change with the number of peaks and be tiny.

    Parameters
    ----------
    logits_NCHW
        (N, C, H, W) floats of any precision; computed in float32.
    labels_NHW
        (N, H, W) uint8, see `peaknet_predict.simulation.labels`.

    Returns
    -------
    Tensor
        float32 scalar; for a batch without peaks, the sum.
    """
    odds_NHW = peak_log_odds(logits_NCHW)
    is_peak_NHW = labels_NHW == PEAK
    # The log odds of the labelled class; the loss is a function of their negative.
    right_NHW = torch.where(is_peak_NHW, odds_NHW, -odds_NHW)
    cross_entropy_NHW = F.softplus(-right_NHW)
    weight_NHW = torch.where(is_peak_NHW, PEAK_WEIGHT, 1 - PEAK_WEIGHT)
    loss_NHW = weight_NHW * torch.sigmoid(-right_NHW) ** FOCUS * cross_entropy_NHW
    total = torch.where(labels_NHW == IGNORED, 0.0, loss_NHW).sum()
    return total / is_peak_NHW.sum().clamp(min=1)
