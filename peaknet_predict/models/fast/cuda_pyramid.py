"""Launches the CUDA kernels of the pyramid's operators; imported where there is a GPU.

`node.cu` and `base_node.cu` use the matrix units of Hopper (compute capability 9.0) and take only
some sizes; the kernels of `triton_pyramid` do the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from peaknet_predict import cuda
from peaknet_predict.models.convnextv2 import LAYER_NORM_EPS
from peaknet_predict.models.fast import ops, triton_pyramid
from peaknet_predict.models.fast.cuda_common import (
    ALIGNMENT,
    GROUP,
    ROWS,
    hopper_kernel,
    is_hopper,
    launch,
    multiprocessors,
)

_NODE_FEATURES = 256
_NODE_GROUPS = 3
_NODE_BYTES = (
    2 * _NODE_FEATURES * (_NODE_FEATURES + _NODE_GROUPS * ROWS) + 8 * _NODE_FEATURES + ALIGNMENT
)  # all that a block can have


@ops.node.register_kernel("cuda")
def _node(
    same_NHWC: Tensor,
    middle_NHWC: Tensor | None,
    other_NHWC: Tensor,
    fusion: list[float],
    weight_CC: Tensor,
    scale_C: Tensor,
    shift_C: Tensor,
) -> Tensor:
    n, height, width, features = same_NHWC.shape
    # The kernel divides by the width through a reciprocal, which does not work for 1.
    if features != _NODE_FEATURES or width == 1 or not is_hopper(same_NHWC):
        return triton_pyramid.node(
            same_NHWC, middle_NHWC, other_NHWC, fusion, weight_CC, scale_C, shift_C
        )
    _, other_height, other_width, _ = other_NHWC.shape
    out = torch.empty_like(same_NHWC)
    device = same_NHWC.get_device()
    defines = (f"HAS_MIDDLE={int(middle_NHWC is not None)}", f"EPS={LAYER_NORM_EPS}f")
    launch(
        hopper_kernel("node", defines, _NODE_BYTES, device),
        (multiprocessors(same_NHWC),),
        GROUP * _NODE_GROUPS,
        (
            *cuda.pointers(same_NHWC, middle_NHWC, other_NHWC, weight_CC, scale_C, shift_C, out),
            *(np.float32(factor) for factor in fusion),
            np.int32(n),
            np.int32(height),
            np.int32(width),
            np.int32(other_height),
            np.int32(other_width),
            np.uint32(-(-(2**32) // width)),
        ),
        same_NHWC,
        _NODE_BYTES,
    )
    return out


_BASE_NODE_MOST_CHANNELS = 96  # whose two matrices fit into shared memory beside the tiles
_BASE_NODE_PIXELS = 16  # of a row, which a warp takes together


def _base_node_bytes(channels: int) -> int:
    weights, tiles = 2 * 2 * _NODE_FEATURES * channels, 2 * _NODE_GROUPS * 2 * ROWS * channels
    staging, terms = _NODE_GROUPS * ROWS * _NODE_FEATURES, 12 * _NODE_FEATURES
    return weights + tiles + staging + terms + ALIGNMENT


@ops.base_node.register_kernel("cuda")
def _base_node(
    x_NHWC: Tensor,
    coarse_NHWF: Tensor,
    inner_FC: Tensor,
    outer_FC: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
    added_F: Tensor,
) -> Tensor:
    n, height, width, channels = x_NHWC.shape
    if (
        len(scale_F) != _NODE_FEATURES
        or channels % 32
        or channels > _BASE_NODE_MOST_CHANNELS
        or width % _BASE_NODE_PIXELS
        or height * width % ROWS
        or not is_hopper(x_NHWC)
    ):
        return triton_pyramid.base_node(
            x_NHWC, coarse_NHWF, inner_FC, outer_FC, scale_F, shift_F, added_F
        )
    out = coarse_NHWF.new_empty(n, height, width, _NODE_FEATURES)
    device = x_NHWC.get_device()
    defines = (f"CHANNELS={channels}", f"EPS={LAYER_NORM_EPS}f")
    shared_bytes = _base_node_bytes(channels)
    launch(
        hopper_kernel("base_node", defines, shared_bytes, device),
        (multiprocessors(x_NHWC),),
        GROUP * _NODE_GROUPS,
        (
            *cuda.pointers(x_NHWC, coarse_NHWF, inner_FC, outer_FC, scale_F, shift_F, added_F, out),
            np.int32(n),
            np.int32(height),
            np.int32(width),
        ),
        x_NHWC,
        shared_bytes,
    )
    return out
