# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""Kernels of a learned last enlargement's operators."""

# Triton reads the annotations of arguments and wants none but tl.constexpr.
# ruff: noqa: ANN001, ANN201, D103

import triton
import triton.language as tl

from peaknet_predict.models.fast.triton_kernels.shared import gelu_of_double, load_resized


@triton.jit
def project_kernel(
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
    K: tl.constexpr,
    K_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, ROWS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    is_row = row < pixels
    channel = tl.arange(0, C_P)
    is_channel = channel < C
    factor = tl.load(affine + panel * 2 * C + channel, mask=is_channel, other=0.0)
    term = tl.load(affine + panel * 2 * C + C + channel, mask=is_channel, other=0.0)
    features = tl.load(
        x + panel * pixels * C + row[:, None] * C + channel[None, :],
        mask=is_row[:, None] & is_channel[None, :],
        other=0.0,
    ).to(tl.float32)
    activated = gelu_of_double(features * (0.5 * factor)[None, :] + (0.5 * term)[None, :])
    output = tl.arange(0, K_P)
    is_output = output < K
    matrix = tl.load(
        weight + output[None, :] * C + channel[:, None],
        mask=is_output[None, :] & is_channel[:, None],
        other=0.0,
    )
    product = tl.dot(activated.to(matrix.dtype), matrix)
    product += tl.load(bias + output, mask=is_output, other=0.0)[None, :]
    mask = is_row[:, None] & is_output[None, :]
    at = panel * pixels * K + row[:, None] * K + output[None, :]
    if HAS_ADDED and ENLARGE:
        product += load_resized(
            added + panel * (pixels // 4) * K,
            row // width,
            row % width,
            height // 2,
            width // 2,
            output,
            mask,
            K,
            True,
        )
    if HAS_ADDED and not ENLARGE:
        product += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def enlarge_kernel(
    odds,
    out,
    height,  # of the coarse panel, as `width`
    width,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
):
    tiles = tl.cdiv(16 * height * width, PIXELS)
    panel = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    is_pixel = pixel < 16 * height * width
    y, x = pixel // (4 * width), pixel % (4 * width)
    y_near, x_near = y // 4, x // 4
    y_part, x_part = y % 4, x % 4
    panel_odds = odds + panel * height * width * K

    # Bilinear, with aligned pixel areas: the pixel's centre lies 3/8 or 1/8 of a coarse pixel
    # beside the centre of the nearest one.
    y_step = tl.where(y_part < 2, -1, 1)
    x_step = tl.where(x_part < 2, -1, 1)
    y_far = tl.minimum(tl.maximum(y_near + y_step, 0), height - 1)
    x_far = tl.minimum(tl.maximum(x_near + x_step, 0), width - 1)
    is_outer_y = (y_part == 0) | (y_part == 3)
    is_outer_x = (x_part == 0) | (x_part == 3)
    y_weight = tl.where(is_outer_y, 0.375, 0.125)
    x_weight = tl.where(is_outer_x, 0.375, 0.125)
    near_row, far_row = y_near * width, y_far * width
    a = tl.load(panel_odds + (near_row + x_near) * K, mask=is_pixel, other=0.0).to(tl.float32)
    b = tl.load(panel_odds + (near_row + x_far) * K, mask=is_pixel, other=0.0).to(tl.float32)
    upper = (1.0 - x_weight) * a + x_weight * b
    a = tl.load(panel_odds + (far_row + x_near) * K, mask=is_pixel, other=0.0).to(tl.float32)
    b = tl.load(panel_odds + (far_row + x_far) * K, mask=is_pixel, other=0.0).to(tl.float32)
    lower = (1.0 - x_weight) * a + x_weight * b
    total = (1.0 - y_weight) * upper + y_weight * lower

    # A kernel of 6 with stride 4 and padding 1 reaches one pixel beyond its own four on each side.
    y_tap, x_tap = y_part + 1, x_part + 1
    y_other, x_other = y_near + y_step, x_near + x_step
    y_other_tap = tl.where(y_part == 0, 5, 0)
    x_other_tap = tl.where(x_part == 0, 5, 0)
    has_y = is_pixel & is_outer_y & (y_other >= 0) & (y_other < height)
    has_x = is_pixel & is_outer_x & (x_other >= 0) & (x_other < width)
    near = near_row + x_near
    taps = panel_odds + 1
    total += tl.load(taps + near * K + y_tap * 6 + x_tap, mask=is_pixel, other=0.0).to(tl.float32)
    beside = near_row + x_other
    total += tl.load(taps + beside * K + y_tap * 6 + x_other_tap, mask=has_x, other=0.0).to(
        tl.float32
    )
    above = y_other * width + x_near
    total += tl.load(taps + above * K + y_other_tap * 6 + x_tap, mask=has_y, other=0.0).to(
        tl.float32
    )
    across = y_other * width + x_other
    total += tl.load(
        taps + across * K + y_other_tap * 6 + x_other_tap, mask=has_y & has_x, other=0.0
    ).to(tl.float32)
    at = out + panel * 32 * height * width + pixel
    tl.store(at, tl.zeros_like(total).to(out.dtype.element_ty), mask=is_pixel)
    tl.store(at + 16 * height * width, total.to(out.dtype.element_ty), mask=is_pixel)
