# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the preprocessing: outliers and `LocalNorm` in few passes over the pixels.

They compute what `outliers.py` and `norms.py` define. A program works on pixels or blocks of one
panel; no sum uses atomics, so a repeated run gives the same bits.
"""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, ANN202, D103

import triton
import triton.language as tl


@triton.jit
def _is_usable(value, valid):
    # NaN fails the comparison, too.
    return (valid != 0) & (tl.abs(value) < float("inf"))


@triton.jit
def outlier_kernel(
    images,
    valid,
    median,
    typical,
    flags,
    sums,
    height,
    width,
    panels,  # of an event
    tiles,  # of a panel
    widest,
    alone_from,
    of_neighbours,
    PIXELS: tl.constexpr,
):
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    event = panel // panels
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    is_pixel = pixel < height * width
    start = panel * height * width
    middle, spread = tl.load(median + event), tl.load(typical + event)
    counts = tl.load(images + start + pixel, mask=is_pixel, other=0.0)
    good = tl.load(valid + start + pixel, mask=is_pixel, other=0) != 0
    away = tl.where(good, tl.abs(counts - middle), 0.0)
    outlier = away > widest * tl.maximum(spread, 1.0)
    # Few pixels get here; only their neighbours are read.
    alone = away > alone_from * spread
    y, x = pixel // width, pixel % width
    total = away
    for step in tl.static_range(9):
        if step != 4:
            row, column = y + step // 3 - 1, x + step % 3 - 1
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            near = start + row * width + column
            mask = alone & inside & is_pixel
            beside = tl.load(images + near, mask=mask, other=0.0)
            known = tl.load(valid + near, mask=mask, other=0) != 0
            total += tl.where(known, tl.abs(beside - middle), 0.0)
    alone = alone & (total / 9 < away * of_neighbours)
    tl.store(flags + start + pixel, outlier.to(tl.uint8) + 2 * alone.to(tl.uint8), mask=is_pixel)
    squares = tl.where(outlier | alone, 0.0, away * away)
    tl.store(sums + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def judge_kernel(images, median, others, flags, out, pixels_of_event, tiles, PIXELS: tl.constexpr):
    event = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    is_pixel = pixel < pixels_of_event
    at = event * pixels_of_event + pixel
    flag = tl.load(flags + at, mask=is_pixel, other=0)
    alone = flag >= 2
    away = tl.load(images + at, mask=alone & is_pixel, other=0.0) - tl.load(median + event)
    outlier = (flag % 2 == 1) | (alone & (away * away > tl.load(others + event)))
    tl.store(out + at, outlier.to(tl.uint8), mask=is_pixel)


@triton.jit
def block_kernel(
    images,
    valid,
    mean,
    variance,
    step,
    known,
    height,
    width,
    rows,  # of blocks in a panel, as `columns`
    columns,
    least,
    BLOCK: tl.constexpr,
    AREA_P: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    tiles = tl.cdiv(rows * columns, BLOCKS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    part = tl.arange(0, AREA_P)
    y = (block // columns * BLOCK)[:, None] + (part // BLOCK)[None, :]
    x = (block % columns * BLOCK)[:, None] + (part % BLOCK)[None, :]
    inside = (part < BLOCK * BLOCK)[None, :] & (y < height) & (x < width)
    at = panel * height * width + y * width + x
    counts = tl.load(images + at, mask=inside, other=0.0)
    usable = _is_usable(counts, tl.load(valid + at, mask=inside, other=0))
    weight = usable.to(tl.float32)
    counts = tl.where(usable, counts, 0.0)
    count = tl.sum(weight, axis=1)
    average = tl.sum(counts, axis=1) / tl.maximum(count, 1.0)
    # Deviations before powers: squares of a detector's offset would leave no digits.
    deviation = (counts - average[:, None]) * weight
    squares = tl.sum(deviation * deviation, axis=1)
    cubes = tl.sum(deviation * deviation * deviation, axis=1)
    at = panel * rows * columns + block
    is_block = block < rows * columns
    tl.store(mean + at, average, mask=is_block)
    tl.store(variance + at, squares / tl.maximum(count - 1.0, 1.0), mask=is_block)
    tl.store(step + at, cubes / squares, mask=is_block)
    tl.store(known + at, (count >= least).to(tl.uint8), mask=is_block)


@triton.jit
def _median(values, usable, count):
    # The lower one of two; 0 where none is usable. The value with half of the others below it.
    one, other = values[:, :, None], values[:, None, :]
    index = tl.arange(0, 16)
    before = (other < one) | ((other == one) & (index[None, None, :] < index[None, :, None]))
    rank = tl.sum((before & usable[:, None, :]).to(tl.int32), axis=2)
    chosen = usable & (rank == ((count - 1) // 2)[:, None])
    return tl.sum(tl.where(chosen, values, 0.0), axis=1)


@triton.jit
def background_kernel(
    mean,
    variance,
    known,
    panel_mean,
    panel_sigma,
    floor,
    background,
    rows,
    columns,
    step_share,
    BLOCKS: tl.constexpr,
):
    tiles = tl.cdiv(rows * columns, BLOCKS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < rows * columns
    near = tl.arange(0, 16)
    y = (block // columns)[:, None] + (near // 3)[None, :] - 1
    x = (block % columns)[:, None] + (near % 3)[None, :] - 1
    inside = (near < 9)[None, :] & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    inside = inside & is_block[:, None]
    at = panel * rows * columns + y * columns + x
    usable = tl.load(known + at, mask=inside, other=0) != 0
    count = tl.sum(usable.to(tl.int32), axis=1)
    anything = count > 0
    means = tl.load(mean + at, mask=inside, other=0.0)
    sigmas = tl.sqrt_rn(tl.load(variance + at, mask=inside, other=0.0))
    near_mean = tl.where(anything, _median(means, usable, count), tl.load(panel_mean + panel))
    spread = _median(tl.abs(means - near_mean[:, None]), usable, count)
    sigma = tl.where(anything, _median(sigmas, usable, count), tl.load(panel_sigma + panel))
    extra = step_share * spread
    sigma = tl.maximum(tl.sqrt_rn(sigma * sigma + extra * extra), tl.load(floor + panel))
    at = panel * 2 * rows * columns + block
    tl.store(background + at, near_mean, mask=is_block)
    tl.store(background + at + rows * columns, sigma, mask=is_block)


@triton.jit
def normalise_kernel(
    images,
    valid,
    background,
    out,
    height,
    width,
    rows,
    columns,
    linear_sigmas,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
):
    tiles = tl.cdiv(height * width, PIXELS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    is_pixel = pixel < height * width
    at = panel * height * width + pixel
    counts = tl.load(images + at, mask=is_pixel, other=0.0)
    usable = _is_usable(counts, tl.load(valid + at, mask=is_pixel, other=0))
    # Bilinear between the blocks' centres, as interpolate with align_corners=False.
    y = tl.maximum(((pixel // width).to(tl.float32) + 0.5) / BLOCK - 0.5, 0.0)
    x = tl.maximum(((pixel % width).to(tl.float32) + 0.5) / BLOCK - 0.5, 0.0)
    top, left = y.to(tl.int32), x.to(tl.int32)
    bottom, right = tl.minimum(top + 1, rows - 1), tl.minimum(left + 1, columns - 1)
    down, across = y - top.to(tl.float32), x - left.to(tl.float32)
    blocks = background + panel * 2 * rows * columns
    mean = _between(blocks, top, bottom, left, right, down, across, columns, is_pixel)
    blocks += rows * columns
    sigma = _between(blocks, top, bottom, left, right, down, across, columns, is_pixel)
    z = tl.where(sigma > 0, (counts - mean) / sigma, 0.0)
    size = tl.abs(z)
    logarithm = linear_sigmas * (1.0 + tl.log(tl.maximum(size, linear_sigmas) / linear_sigmas))
    z = tl.where(size <= linear_sigmas, z, tl.where(z < 0, -logarithm, logarithm))
    tl.store(out + at, tl.where(usable, z, 0.0), mask=is_pixel)


@triton.jit
def _between(blocks, top, bottom, left, right, down, across, columns, mask):
    a = tl.load(blocks + top * columns + left, mask=mask, other=0.0)
    b = tl.load(blocks + top * columns + right, mask=mask, other=0.0)
    upper = (1.0 - across) * a + across * b
    a = tl.load(blocks + bottom * columns + left, mask=mask, other=0.0)
    b = tl.load(blocks + bottom * columns + right, mask=mask, other=0.0)
    return (1.0 - down) * upper + down * ((1.0 - across) * a + across * b)
