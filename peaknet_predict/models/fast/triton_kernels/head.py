# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Kernels of the head's operators."""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, D103

import triton
import triton.language as tl

from peaknet_predict.models.fast.triton_kernels.shared import gelu_of_double, load_resized


@triton.jit
def channel_sums_kernel(
    x,
    sums,
    pixels,
    C: tl.constexpr,
    C_P: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(pixels, TILE)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TILE
    channel = tl.arange(0, C_P)
    is_channel = channel < C
    # Added up over the rows only at the end: that takes a barrier.
    total = tl.zeros((ROWS, C_P), dtype=tl.float32)
    squares = tl.zeros((ROWS, C_P), dtype=tl.float32)
    for step in range(0, TILE, 4 * ROWS):
        # Four loads are under way at once.
        for part in tl.static_range(4):
            row = first + step + part * ROWS + tl.arange(0, ROWS)
            features = tl.load(
                x + panel * pixels * C + row[:, None] * C + channel[None, :],
                mask=(row < pixels)[:, None] & is_channel[None, :],
                other=0.0,
            ).to(tl.float32)
            total += features
            squares += features * features
    at = sums + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(at, tl.sum(total, axis=0), mask=is_channel)
    tl.store(at + C, tl.sum(squares, axis=0), mask=is_channel)


@triton.jit
def group_norm_kernel(
    sums,
    added,
    weight,
    bias,
    affine,
    tiles,
    pixels,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    panel = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, C)
    total = tl.zeros((C,), dtype=tl.float32)
    squares = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, tiles, ROWS):
        row = first + tl.arange(0, ROWS)
        at = sums + panel * tiles * 2 * C + row[:, None] * 2 * C + channel[None, :]
        mask = (row < tiles)[:, None] & (channel < C)[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        squares += tl.sum(tl.load(at + C, mask=mask, other=0.0), axis=0)
    added_here = tl.load(added + channel)
    squares += added_here * (2.0 * total + pixels * added_here)
    total += pixels * added_here
    members: tl.constexpr = C // GROUPS
    count = pixels * members
    mean = tl.sum(tl.reshape(total, (GROUPS, members)), axis=1) / count
    square = tl.sum(tl.reshape(squares, (GROUPS, members)), axis=1) / count
    inverse_std = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, members)), (C,))
    inverse_std = tl.reshape(tl.broadcast_to(inverse_std[:, None], (GROUPS, members)), (C,))
    factor = inverse_std * tl.load(weight + channel)
    tl.store(affine + panel * 2 * C + channel, factor)
    term = tl.load(bias + channel) + (added_here - mean) * factor
    tl.store(affine + panel * 2 * C + C + channel, term)


@triton.jit
def activate_kernel(x, affine, out, pixels, C: tl.constexpr, C_P: tl.constexpr, ROWS: tl.constexpr):
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C_P)
    mask = (row < pixels)[:, None] & (channel < C)[None, :]
    at = panel * pixels * C + row[:, None] * C + channel[None, :]
    factor = tl.load(affine + panel * 2 * C + channel, mask=channel < C, other=0.0)
    term = tl.load(affine + panel * 2 * C + C + channel, mask=channel < C, other=0.0)
    features = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    activated = gelu_of_double(features * (0.5 * factor)[None, :] + (0.5 * term)[None, :])
    tl.store(out + at, activated.to(out.dtype.element_ty), mask=mask)


@triton.jit
def upsample_kernel(x, out, height, width, C: tl.constexpr, C_P: tl.constexpr, ROWS: tl.constexpr):
    # `height` and `width` are those of the output.
    pixels = height * width
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C_P)
    mask = (row < pixels)[:, None] & (channel < C)[None, :]
    resized = load_resized(
        x + panel * (pixels // 4) * C,
        row // width,
        row % width,
        height // 2,
        width // 2,
        channel,
        mask,
        C,
        True,
    )
    at = panel * pixels * C + row[:, None] * C + channel[None, :]
    tl.store(out + at, resized.to(out.dtype.element_ty), mask=mask)


@triton.jit
def classify_kernel(
    x,
    affine,
    weight,
    bias,
    added,
    out,
    height,
    width,
    HAS_ADDED: tl.constexpr,
    ENLARGE: tl.constexpr,
    C: tl.constexpr,
    C_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    is_row = row < pixels
    channel = tl.arange(0, C_P)
    is_channel = channel < C
    mask = is_row[:, None] & is_channel[None, :]
    at = panel * pixels * C + row[:, None] * C + channel[None, :]
    factor = tl.load(affine + panel * 2 * C + channel, mask=is_channel, other=0.0)
    term = tl.load(affine + panel * 2 * C + C + channel, mask=is_channel, other=0.0)
    features = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    activated = gelu_of_double(features * (0.5 * factor)[None, :] + (0.5 * term)[None, :])
    background = tl.load(weight + channel, mask=is_channel, other=0.0)
    peak = tl.load(weight + C + channel, mask=is_channel, other=0.0)
    first = tl.sum(activated * background[None, :], axis=1) + tl.load(bias)
    second = tl.sum(activated * peak[None, :], axis=1) + tl.load(bias + 1)
    at = (panel * pixels + row) * 2
    if HAS_ADDED and ENLARGE:
        half_height, half_width = height // 2, width // 2
        added += panel * half_height * half_width * 2
        y, x = row // width, row % width
        first += _load_enlarged(added, y, x, half_height, half_width, is_row)
        second += _load_enlarged(added + 1, y, x, half_height, half_width, is_row)
    if HAS_ADDED and not ENLARGE:
        first += tl.load(added + at, mask=is_row, other=0.0)
        second += tl.load(added + at + 1, mask=is_row, other=0.0)
    tl.store(out + at, first, mask=is_row)
    tl.store(out + at + 1, second, mask=is_row)


@triton.jit
def _load_enlarged(logits, y, x, height, width, mask):
    # One of two classes, enlarged by 2 as `load_resized` does it.
    upper = 2 * width * (y // 2)
    lower = 2 * width * tl.minimum(tl.maximum(y // 2 + (y % 2) * 2 - 1, 0), height - 1)
    near = 2 * (x // 2)
    far = 2 * tl.minimum(tl.maximum(x // 2 + (x % 2) * 2 - 1, 0), width - 1)
    sum_near = 0.75 * tl.load(logits + upper + near, mask=mask, other=0.0)
    sum_near += 0.25 * tl.load(logits + lower + near, mask=mask, other=0.0)
    sum_far = 0.75 * tl.load(logits + upper + far, mask=mask, other=0.0)
    sum_far += 0.25 * tl.load(logits + lower + far, mask=mask, other=0.0)
    return 0.75 * sum_near + 0.25 * sum_far
