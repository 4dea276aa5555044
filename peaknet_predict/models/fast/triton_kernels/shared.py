# mypy: disable-error-code="no-redef, no-untyped-def, untyped-decorator, no-untyped-call"
"""What the kernels of several operators use."""

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
def gelu_of_double(x):
    # GELU of 2x. tanh of a cubic takes the place of erf; its coefficients minimise the largest
    # error, 2.7e-4, which is below what bfloat16 keeps of values beyond 0.1.
    return x * _tanh(x * (0.2776892 * x * x + 1.60026914)) + x


@triton.jit
def load_resized(other, y, x, height, width, channel, mask, C: tl.constexpr, UP: tl.constexpr):
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
