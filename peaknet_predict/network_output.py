"""What a network returns: whether peaks can be found in it, and the operating point.

Shape legend: N panels of a batch, C classes, H rows, W columns.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.first_refusals import BlamelessError
from peaknet_predict.preprocess import Prepared

_FINDER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NetworkOutputError(BlamelessError):
    """A network returns something in which no peaks can be found."""


class NetworkOutput(NamedTuple):
    """What a forward pass gives.

    Attributes
    ----------
    logits_NCHW
        (N, C, H/stride, W/stride); class 0 is background.
    stride
        4 where the peak finder is to enlarge the logits, else 1.
    prepared
        What the network was given.
    """

    logits_NCHW: Tensor
    stride: Literal[1, 4]
    prepared: Prepared

    def at_threshold(self, threshold: float) -> NetworkOutput:
        """Return the output whose larger logit is peak where the log odds exceed a threshold.

        The log odds of a pixel are the largest logit of a peak class minus that of background. At 0
        nothing changes; otherwise the background's logit becomes larger by the threshold, in
        float32, so that no dtype rounds it away.
        """
        if threshold == 0:
            return self
        logits_NCHW = self.logits_NCHW.to(torch.float32, copy=True)
        logits_NCHW[:, 0] += threshold
        return self._replace(logits_NCHW=logits_NCHW)

    def readable(self) -> NetworkOutput:
        """Return the output in a dtype that every peak finder reads: float64 becomes float32."""
        if self.logits_NCHW.dtype in _FINDER_DTYPES:
            return self
        return self._replace(logits_NCHW=self.logits_NCHW.float())

    def is_peak(self) -> Tensor:
        """Return which pixels are peak, (N, H, W) bool: valid ones whose class is not 0."""
        logits_NCHW = self.logits_NCHW
        if self.stride != 1:
            logits_NCHW = F.interpolate(logits_NCHW, scale_factor=self.stride, mode="bilinear")
        class_map_NHW = logits_NCHW.softmax(1).argmax(1)
        return (class_map_NHW != 0) & self.prepared.valid_N1HW[:, 0]

    def overflowed(self) -> Tensor:
        """Return which events have logits that are NaN or +inf, (B,) bool, without waiting.

        Such pixels are called background, whatever they hold. A logit of -inf is a certainty.
        Panels without a valid pixel do not count: some networks divide by their deviation.
        """
        events = len(self.prepared.bad_pixels_B)
        # A sum needs one pass and no memory; NaN and +inf survive it, +inf beside -inf as NaN.
        sums_N = self.logits_NCHW.sum(dim=(1, 2, 3), dtype=torch.float32)
        is_alive_N = self.prepared.valid_N1HW.flatten(1).any(dim=1)
        return (~(sums_N < torch.inf) & is_alive_N).view(events, -1).any(dim=1)

    def check(self, network: str) -> None:
        """Raise a NetworkOutputError, which says what is expected, unless peaks can be found.

        Parameters
        ----------
        network
            Its name, for the message.
        """
        found: Any = self.logits_NCHW  # a network may return anything at all
        panels, _, height, width = self.prepared.images_N1HW.shape
        size = (height // self.stride, width // self.stride)
        shape = tuple(found.shape) if isinstance(found, Tensor) else ()
        if isinstance(found, dict):
            what = f"a {type(found).__name__} with the keys {', '.join(map(repr, found))}"
            remedy = "let its forward return the logits alone"
        elif not isinstance(found, Tensor):
            what = f"a {type(found).__name__}"
            remedy = "let its forward return the logits alone"
        elif not found.is_floating_point():
            what = f"a tensor of {found.dtype}"
            remedy = "let it return the logits, not their argmax"
        elif shape == (panels, 1, *size):
            what = f"a single channel: {shape}"
            remedy = (
                "if that is the logit of peak, return "
                "torch.cat([torch.zeros_like(logits), logits], 1)"
            )
        elif len(shape) != 4 or shape[0] != panels or shape[1] < 2 or shape[2:] != size:
            what = f"a tensor of shape {shape}"
            remedy = "let it return a logit for each pixel and class"
        else:
            return
        raise NetworkOutputError(
            f"{network} returned {what}. Expected are floating-point logits ({panels}, C, "
            f"{size[0]}, {size[1]}) of at least two classes, of which class 0 is background and "
            f"every other one is peak: {remedy}"
        )
