"""Launches the Triton kernels of a learned last enlargement; imported where there is a GPU."""

from __future__ import annotations

import triton
from torch import Tensor

from peaknet_predict.models.fast import enlarge_ops
from peaknet_predict.models.fast.triton_common import on_its_device, power_of_two
from peaknet_predict.models.fast.triton_kernels import enlarge as kernels

_ROWS = 64
_PIXELS = 1024
_SMALLEST_PRODUCT = 16  # rows and columns that Triton's product takes at least


@enlarge_ops.project.register_kernel("cuda")
@on_its_device
def _project(
    x_NHWC: Tensor, affine_N2C: Tensor, weight_KC: Tensor, bias_K: Tensor, added: Tensor | None
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    outputs = len(weight_KC)
    dtype = enlarge_ops.projection_dtype(weight_KC)
    out = x_NHWC.new_empty(n, height, width, outputs, dtype=dtype)
    kernels.project_kernel[(n * triton.cdiv(height * width, _ROWS),)](
        x_NHWC,
        affine_N2C,
        weight_KC,
        bias_K,
        out if added is None else added,
        out,
        height,
        width,
        HAS_ADDED=added is not None,
        ENLARGE=added is not None and added.shape[1] != height,
        C=channels,
        C_P=max(_SMALLEST_PRODUCT, power_of_two(channels)),
        K=outputs,
        K_P=max(_SMALLEST_PRODUCT, power_of_two(outputs)),
        ROWS=_ROWS,
        num_warps=4,
    )
    return out


@enlarge_ops.enlarge.register_kernel("cuda")
@on_its_device
def _enlarge(odds_NHWK: Tensor) -> Tensor:
    n, height, width, channels = odds_NHWK.shape
    out = odds_NHWK.new_empty(n, 2, 4 * height, 4 * width)
    kernels.enlarge_kernel[(n * triton.cdiv(16 * height * width, _PIXELS),)](
        odds_NHWK, out, height, width, K=channels, PIXELS=_PIXELS, num_warps=4
    )
    return out
