"""The operators of a learned last enlargement, for CPU and GPU; see `ops`.

The plain network enlarges its features bilinearly, classifies them, and adds the output of a
transposed convolution. Here the features become one number and 36 taps at low resolution, and each
pixel of the panel gathers the taps that reach it, at most four.

Shape legend: as in `ops`; K is `ODDS_CHANNELS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.models.bifpn import resize_bilinear
from peaknet_predict.models.fast.ops import activate

TAPS = 6
"""Rows and columns that a pixel reaches in PeakNet's learned enlargement by 4: a transposed
convolution with this kernel, stride 4 and padding 1."""

ODDS_CHANNELS = 40
"""Channels that `project` passes to `enlarge`: log odds, taps, and zeros up to a multiple of 8."""


@torch.library.custom_op("peaknet::project", mutates_args=())
def project(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_KC: Tensor, bias_K: Tensor, added: Tensor | None
) -> Tensor:
    """Apply factor and term, GELU and a matrix: (N, H, W, K), float16 for a bfloat16 matrix.

    ``added`` as for `classify`. float16, because the results are sums that bfloat16 would round
    eight times as coarsely, and small numbers.
    """
    product_NHWK = activate(x_NHWC, affine_N2C) @ weight_KC.float().t() + bias_K
    if added is not None:
        added = added.float()
        if added.shape[1] != x_NHWC.shape[1]:
            added = resize_bilinear(added.permute(0, 3, 1, 2), 2.0).permute(0, 2, 3, 1)
        product_NHWK = product_NHWK + added
    return product_NHWK.to(projection_dtype(weight_KC)).contiguous()


@project.register_fake
def _(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_KC: Tensor, bias_K: Tensor, added: Tensor | None
) -> Tensor:
    size = (*x_NHWC.shape[:3], len(weight_KC))
    return x_NHWC.new_empty(size, dtype=projection_dtype(weight_KC))


def projection_dtype(weight_KC: Tensor) -> torch.dtype:
    """Return the dtype of the output of `project` with a matrix."""
    return torch.float16 if weight_KC.dtype == torch.bfloat16 else weight_KC.dtype


@torch.library.custom_op("peaknet::enlarge", mutates_args=())
def enlarge(odds_NHWK: Tensor) -> Tensor:
    """Enlarge log odds by 4, and add what their taps give the pixels around.

    Channel 0 is the log odds of peak against background, to be enlarged bilinearly; the `TAPS` by
    `TAPS` channels after it are what a transposed convolution would add to the pixels that it
    reaches.

    Returns
    -------
    Tensor
        (N, 2, 4H, 4W) logits of the dtype given: 0 for background, and the log odds for peak.
    """
    odds_NKHW = odds_NHWK.float().permute(0, 3, 1, 2)
    size = (4 * odds_NKHW.shape[2], 4 * odds_NKHW.shape[3])
    taps = odds_NKHW[:, 1 : 1 + TAPS * TAPS].flatten(2)
    enlarged_N1HW = resize_bilinear(odds_NKHW[:, :1], 4.0)
    enlarged_N1HW = enlarged_N1HW + F.fold(taps, size, TAPS, stride=4, padding=1)
    logits_N2HW = torch.cat([torch.zeros_like(enlarged_N1HW), enlarged_N1HW], 1)
    return logits_N2HW.to(odds_NHWK.dtype)


@enlarge.register_fake
def _(odds_NHWK: Tensor) -> Tensor:
    n, height, width, _ = odds_NHWK.shape
    return odds_NHWK.new_empty(n, 2, 4 * height, 4 * width)
