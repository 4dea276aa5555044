# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Kernels of the pyramid's operators."""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, D103

import triton
import triton.language as tl

from peaknet_predict.models.fast.triton_kernels.shared import gelu_of_double, load_resized


@triton.jit
def node_kernel(
    same,
    middle,
    other,
    weight,
    scale,
    shift,
    out,
    same_factor,
    middle_factor,
    other_factor,
    height,
    width,
    other_height,
    other_width,
    EPS: tl.constexpr,
    HAS_MIDDLE: tl.constexpr,
    UP: tl.constexpr,
    C: tl.constexpr,
    C_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    y, x = row // width, row % width
    is_row = row < pixels
    start = panel * pixels * C
    other_panel = other + panel * other_height * other_width * C
    channel = tl.arange(0, C_P)
    product = tl.zeros((ROWS, C_P), dtype=tl.float32)
    for k in range(0, C, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        mask = is_row[:, None] & (inner < C)[None, :]
        at = start + row[:, None] * C + inner[None, :]
        fused = same_factor * tl.load(same + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_MIDDLE:
            fused += middle_factor * tl.load(middle + at, mask=mask, other=0.0).to(tl.float32)
        fused += other_factor * load_resized(
            other_panel, y, x, other_height, other_width, inner, mask, C, UP
        )
        matrix = tl.load(
            weight + channel[None, :] * C + inner[:, None],
            mask=(channel < C)[None, :] & (inner < C)[:, None],
            other=0.0,
        )
        product = tl.dot(fused.to(matrix.dtype), matrix, product)
    is_channel = channel < C
    mean = tl.sum(product, axis=1) / C
    centred = tl.where(is_channel[None, :], product - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + EPS)
    normed = centred * inverse_std[:, None]
    normed = normed * tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    normed += tl.load(shift + channel, mask=is_channel, other=0.0)[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    at = start + row[:, None] * C + channel[None, :]
    result = gelu_of_double(0.5 * normed) + tl.load(same + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def base_node_kernel(
    x,
    coarse,
    inner,
    outer,
    scale,
    shift,
    added,
    out,
    height,
    width,
    EPS: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    F_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    is_row = row < pixels
    feature = tl.arange(0, F_P)
    is_feature = feature < F
    mask = is_row[:, None] & is_feature[None, :]
    half_height, half_width = height // 2, width // 2
    coarse_panel = coarse + panel * half_height * half_width * F
    product = load_resized(
        coarse_panel, row // width, row % width, half_height, half_width, feature, mask, F, True
    )
    at = panel * pixels * C + row[:, None] * C
    product = _add_product(product, x + at, inner, is_row, feature, is_feature, C, BLOCK_K)
    mean = tl.sum(product, axis=1) / F
    centred = tl.where(is_feature[None, :], product - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / F + EPS)
    normed = centred * inverse_std[:, None]
    normed = normed * tl.load(scale + feature, mask=is_feature, other=0.0)[None, :]
    normed += tl.load(shift + feature, mask=is_feature, other=0.0)[None, :]
    result = gelu_of_double(0.5 * normed)
    result += tl.load(added + feature, mask=is_feature, other=0.0)[None, :]
    result = _add_product(result, x + at, outer, is_row, feature, is_feature, C, BLOCK_K)
    to = out + panel * pixels * F + row[:, None] * F + feature[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_product(
    total, rows, weight, is_row, feature, is_feature, C: tl.constexpr, BLOCK_K: tl.constexpr
):
    for k in range(0, C, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        is_channel = channel < C
        left = tl.load(
            rows + channel[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0
        )
        matrix = tl.load(
            weight + feature[None, :] * C + channel[:, None],
            mask=is_feature[None, :] & is_channel[:, None],
            other=0.0,
        )
        total = tl.dot(left, matrix, total)
    return total
