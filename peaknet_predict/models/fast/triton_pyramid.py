"""Launches the Triton kernels of the pyramid's operators; imported where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peaknet_predict.models.convnextv2 import LAYER_NORM_EPS
from peaknet_predict.models.fast.triton_common import on_its_device, power_of_two
from peaknet_predict.models.fast.triton_kernels import pyramid as kernels


@on_its_device
def node(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    """Do `ops.node` for any number of features; `cuda_ops` has a faster kernel for some."""
    n, height, width, channels = same_NHWC.shape
    _, other_height, other_width, _ = other_NHWC.shape
    out = torch.empty_like(same_NHWC)
    power = power_of_two(channels)
    config = node_config(power)
    kernels.node_kernel[(n * triton.cdiv(height * width, config["ROWS"]),)](
        same_NHWC,
        same_NHWC if middle_NHWC is None else middle_NHWC,
        other_NHWC,
        weight_CC,
        scale_C,
        shift_C,
        out,
        *fusion,
        height,
        width,
        other_height,
        other_width,
        EPS=LAYER_NORM_EPS,
        HAS_MIDDLE=middle_NHWC is not None,
        UP=other_height < height,
        C=channels,
        C_P=power,
        **config,
    )
    return out


def node_config(channels: int) -> dict[str, Any]:
    """Return tile sizes, warps and stages of `node` for so many channels."""
    return {
        "ROWS": 64,
        "BLOCK_K": min(64, max(16, channels)),
        "num_warps": 4,
        "num_stages": 2,
    }


@on_its_device
def base_node(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    """Do `ops.base_node` for any sizes; `cuda_ops` has a faster kernel for some."""
    n, height, width, channels = x_NHWC.shape
    features = len(scale_F)
    out = coarse_NHWF.new_empty(n, height, width, features)
    rows = 64
    kernels.base_node_kernel[(n * triton.cdiv(height * width, rows),)](
        x_NHWC,
        coarse_NHWF,
        inner_FC,
        outer_FC,
        scale_F,
        shift_F,
        added_F,
        out,
        height,
        width,
        EPS=LAYER_NORM_EPS,
        C=channels,
        F=features,
        F_P=max(16, power_of_two(features)),
        ROWS=rows,
        BLOCK_K=32,
        num_warps=8 if features > 128 else 4,
        num_stages=2,
    )
    return out
