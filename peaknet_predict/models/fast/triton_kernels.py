# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the fast PeakNet; `triton_ops` launches them.

A program works on a tile of pixels of one panel, so that sums over a panel need no atomics and are
the same in every run. Pointers to a panel are 64 bits wide, offsets within it 32.

Shape legend: rows are pixels of the tile, K is what a product sums over, L is what it gives.
``*_P`` arguments are powers of two not below the size that they name.
"""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, D103

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # The hardware's: its error of 5e-4 is below what bfloat16 keeps of the result.
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _gelu_of_double(x):
    # GELU of 2x. tanh of a cubic takes the place of erf; its coefficients minimise the largest
    # error, 2.7e-4, which is below what bfloat16 keeps of values beyond 0.1.
    return x * _tanh(x * (0.2776892 * x * x + 1.60026914)) + x


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
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + 1e-6)
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
        activated = tl.where(is_row[:, None], _gelu_of_double(half), 0.0)
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
    relative = norm / (tl.sum(norm, axis=0) / L + 1e-6)
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
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + 1e-6)
    normed = (centred * inverse_std[:, None]).to(out.dtype.element_ty)
    tl.store(out + at, normed, mask=mask)
    if PATCHES:
        # Heights are even: a row of a panel has the parity of the same row counted over all panels.
        y, column = row // width, row % width
        patch = (y // 2) * (width // 2) + column // 2
        place = patch * 4 + (y % 2) * 2 + column % 2
        tl.store(patches + place[:, None] * C + channel[None, :], normed, mask=mask)


@triton.jit
def _load_resized(other, y, x, height, width, channel, mask, C: tl.constexpr, UP: tl.constexpr):
    # Bilinear with aligned pixel areas: by 2, the nearest pixel counts three quarters; by 1/2, each
    # of the four counts the same. `height` and `width` are those of `other`.
    if UP:
        y_near, x_near = y // 2, x // 2
        y_far = tl.minimum(tl.maximum(y_near + (y % 2) * 2 - 1, 0), height - 1)
        x_far = tl.minimum(tl.maximum(x_near + (x % 2) * 2 - 1, 0), width - 1)
        near: tl.constexpr = 0.75
    else:
        y_near, x_near = 2 * y, 2 * x
        y_far, x_far = y_near + 1, x_near + 1
        near: tl.constexpr = 0.5
    far: tl.constexpr = 1.0 - near
    c = channel[None, :]
    a = tl.load(other + (y_near * width + x_near)[:, None] * C + c, mask=mask, other=0.0)
    b = tl.load(other + (y_near * width + x_far)[:, None] * C + c, mask=mask, other=0.0)
    upper = near * a.to(tl.float32) + far * b.to(tl.float32)
    a = tl.load(other + (y_far * width + x_near)[:, None] * C + c, mask=mask, other=0.0)
    b = tl.load(other + (y_far * width + x_far)[:, None] * C + c, mask=mask, other=0.0)
    return near * upper + far * (near * a.to(tl.float32) + far * b.to(tl.float32))


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
        fused += other_factor * _load_resized(
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
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + 1e-6)
    normed = centred * inverse_std[:, None]
    normed = normed * tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    normed += tl.load(shift + channel, mask=is_channel, other=0.0)[None, :]
    mask = is_row[:, None] & is_channel[None, :]
    at = start + row[:, None] * C + channel[None, :]
    result = _gelu_of_double(0.5 * normed) + tl.load(same + at, mask=mask, other=0.0).to(tl.float32)
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
    product = _load_resized(
        coarse_panel, row // width, row % width, half_height, half_width, feature, mask, F, True
    )
    at = panel * pixels * C + row[:, None] * C
    product = _add_product(product, x + at, inner, is_row, feature, is_feature, C, BLOCK_K)
    mean = tl.sum(product, axis=1) / F
    centred = tl.where(is_feature[None, :], product - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, axis=1) / F + 1e-6)
    normed = centred * inverse_std[:, None]
    normed = normed * tl.load(scale + feature, mask=is_feature, other=0.0)[None, :]
    normed += tl.load(shift + feature, mask=is_feature, other=0.0)[None, :]
    result = _gelu_of_double(0.5 * normed)
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
    activated = _gelu_of_double(features * (0.5 * factor)[None, :] + (0.5 * term)[None, :])
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
    resized = _load_resized(
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
    activated = _gelu_of_double(features * (0.5 * factor)[None, :] + (0.5 * term)[None, :])
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
    # One of two classes, enlarged by 2 as `_load_resized` does it.
    upper = 2 * width * (y // 2)
    lower = 2 * width * tl.minimum(tl.maximum(y // 2 + (y % 2) * 2 - 1, 0), height - 1)
    near = 2 * (x // 2)
    far = 2 * tl.minimum(tl.maximum(x // 2 + (x % 2) * 2 - 1, 0), width - 1)
    sum_near = 0.75 * tl.load(logits + upper + near, mask=mask, other=0.0)
    sum_near += 0.25 * tl.load(logits + lower + near, mask=mask, other=0.0)
    sum_far = 0.75 * tl.load(logits + upper + far, mask=mask, other=0.0)
    sum_far += 0.25 * tl.load(logits + lower + far, mask=mask, other=0.0)
    return 0.75 * sum_near + 0.25 * sum_far
