# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Kernels of the backbone's operators."""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, D103

import triton
import triton.language as tl

from peaknet_predict.models.fast.triton_kernels.shared import gelu_of_double


@triton.jit
def stem_kernel(
    images,
    weight,
    bias,
    scale,
    shift,
    out,
    columns,  # of the output, W / 4
    pixels,  # of the output in a panel
    EPS: tl.constexpr,
    C: tl.constexpr,
    C_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C_P)
    tap = tl.arange(0, 16)
    y, x = row // columns, row % columns
    offset = (4 * y[:, None] + tap[None, :] // 4) * (4 * columns) + 4 * x[:, None] + tap % 4
    patch = tl.load(images + panel * pixels * 16 + offset, mask=(row < pixels)[:, None], other=0.0)
    is_channel = channel < C
    kernel = tl.load(
        weight + channel[None, :] * 16 + tap[:, None], mask=is_channel[None, :], other=0.0
    )
    product = tl.dot(patch.to(kernel.dtype), kernel)
    product += tl.load(bias + channel, mask=is_channel, other=0.0)[None, :]
    mean = tl.sum(product, axis=1) / C
    centred = tl.where(is_channel[None, :], product - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + EPS)
    normed = centred * inverse_std[:, None]
    normed = normed * tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    normed += tl.load(shift + channel, mask=is_channel, other=0.0)[None, :]
    tl.store(
        out + panel * pixels * C + row[:, None] * C + channel[None, :],
        normed.to(out.dtype.element_ty),
        mask=(row < pixels)[:, None] & is_channel[None, :],
    )


@triton.jit
def expand_kernel(
    x,
    moments,
    weight,
    column_sums,
    bias,
    hidden,
    energy,
    pixels,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    # Programs of the same rows follow each other: these are read from memory once.
    block = tl.program_id(0) % blocks
    strip = tl.program_id(0) // blocks
    strips = tl.cdiv(pixels, STRIP)
    panel = (strip // strips).to(tl.int64)
    first = strip % strips * STRIP
    column = block * BLOCK_L + tl.arange(0, BLOCK_L)
    inner = tl.arange(0, BLOCK_K)
    is_column = column < L
    weight_at = weight + column[None, :] * C + inner[:, None]
    sum_of_column = tl.load(column_sums + column, mask=is_column, other=0.0)
    term = 0.5 * tl.load(bias + column, mask=is_column, other=0.0)
    squares = tl.zeros((BLOCK_L,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + STRIP, pixels), ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < pixels
        moments_at = moments + 2 * (panel * pixels + row)
        factor = 0.5 * tl.load(moments_at, mask=is_row, other=0.0)
        offset = 0.5 * tl.load(moments_at + 1, mask=is_row, other=0.0)
        x_at = x + panel * pixels * C + row[:, None] * C + inner[None, :]
        product = tl.zeros((ROWS, BLOCK_L), dtype=tl.float32)
        for k in range(0, C, BLOCK_K):
            is_inner = inner + k < C
            features = tl.load(x_at + k, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            matrix = tl.load(weight_at + k, mask=is_column[None, :] & is_inner[:, None], other=0.0)
            product = tl.dot(features, matrix, product)
        half = product * factor[:, None] + (
            offset[:, None] * sum_of_column[None, :] + term[None, :]
        )
        activated = tl.where(is_row[:, None], gelu_of_double(half), 0.0)
        squares += tl.sum(activated * activated, axis=0)
        tl.store(
            hidden + panel * pixels * L + row[:, None] * L + column[None, :],
            activated.to(hidden.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )
    tl.store(energy + strip.to(tl.int64) * L + column, squares, mask=is_column)


@triton.jit
def response_kernel(
    energy,
    weight,
    scale,
    tiles,
    EPS: tl.constexpr,
    L: tl.constexpr,
    L_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    panel = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, L_P)
    is_column = column < L
    total = tl.zeros((L_P,), dtype=tl.float32)
    for first in range(0, tiles, ROWS):
        row = first + tl.arange(0, ROWS)
        total += tl.sum(
            tl.load(
                energy + panel * tiles * L + row[:, None] * L + column[None, :],
                mask=(row < tiles)[:, None] & is_column[None, :],
                other=0.0,
            ),
            axis=0,
        )
    norm = tl.sqrt(total)
    relative = norm / (tl.sum(norm, axis=0) / L + EPS)
    factor = 1.0 + tl.load(weight + column, mask=is_column, other=0.0) * relative
    tl.store(scale + panel * L + column, factor, mask=is_column)


@triton.jit
def contract_kernel(
    hidden,
    scale,
    weight,
    bias,
    residual,
    out,
    pixels,
    K: tl.constexpr,
    C: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    # Columns beyond BLOCK_C, or 0: 96 and 192 channels are no powers of two.
    REST_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C + REST_C - 1) // (BLOCK_C + REST_C)
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tile // tiles).to(tl.int64)
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK_K)
    is_row = row < pixels
    column = block * (BLOCK_C + REST_C) + tl.arange(0, BLOCK_C)
    hidden_at = hidden + panel * pixels * K + row[:, None] * K + inner[None, :]
    weight_at = weight + column[None, :] * K + inner[:, None]
    scale_at = scale + panel * K + inner
    product = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    if REST_C > 0:
        rest_column = block * (BLOCK_C + REST_C) + BLOCK_C + tl.arange(0, REST_C)
        rest_at = weight + rest_column[None, :] * K + inner[:, None]
        rest = tl.zeros((ROWS, REST_C), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_ROWS and K % BLOCK_K == 0:
            features = tl.load(hidden_at + k)
        else:
            features = tl.load(
                hidden_at + k, mask=is_row[:, None] & (inner + k < K)[None, :], other=0.0
            )
        if K % BLOCK_K == 0:
            factor = tl.load(scale_at + k)
        else:
            factor = tl.load(scale_at + k, mask=inner + k < K, other=0.0)
        features = (features.to(tl.float32) * factor[None, :]).to(features.dtype)
        if K % BLOCK_K == 0 and C % (BLOCK_C + REST_C) == 0:
            matrix = tl.load(weight_at + k)
        else:
            matrix = tl.load(
                weight_at + k, mask=(column < C)[None, :] & (inner + k < K)[:, None], other=0.0
            )
        product = tl.dot(features, matrix, product)
        if REST_C > 0:
            if K % BLOCK_K == 0 and C % (BLOCK_C + REST_C) == 0:
                matrix = tl.load(rest_at + k)
            else:
                matrix = tl.load(
                    rest_at + k,
                    mask=(rest_column < C)[None, :] & (inner + k < K)[:, None],
                    other=0.0,
                )
            rest = tl.dot(features, matrix, rest)
    _add_and_store(product, bias, residual, out, panel * pixels * C, row, column, pixels, C)
    if REST_C > 0:
        _add_and_store(rest, bias, residual, out, panel * pixels * C, row, rest_column, pixels, C)


@triton.jit
def _add_and_store(product, bias, residual, out, start, row, column, pixels, C: tl.constexpr):
    mask = (row < pixels)[:, None] & (column < C)[None, :]
    at = start + row[:, None] * C + column[None, :]
    product += tl.load(bias + column, mask=column < C, other=0.0)[None, :]
    product += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def standardise_kernel(
    x,
    out,
    patches,
    pixels,  # of all panels
    width,
    EPS: tl.constexpr,
    C: tl.constexpr,
    C_P: tl.constexpr,
    ROWS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C_P)
    is_channel = channel < C
    mask = (row < pixels)[:, None] & is_channel[None, :]
    at = row[:, None] * C + channel[None, :]
    features = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(features, axis=1) / C
    centred = tl.where(is_channel[None, :], features - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + EPS)
    normed = (centred * inverse_std[:, None]).to(out.dtype.element_ty)
    tl.store(out + at, normed, mask=mask)
    if PATCHES:
        # Heights are even: a row of a panel has the parity of the same row counted over all panels.
        y, column = row // width, row % width
        patch = (y // 2) * (width // 2) + column // 2
        place = patch * 4 + (y % 2) * 2 + column % 2
        tl.store(patches + place[:, None] * C + channel[None, :], normed, mask=mask)
