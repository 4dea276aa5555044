"""The fast PeakNet on a GPU: each kernel against the plain operator, and the network as a whole.

Tolerances. Features are bfloat16, which has 8 significant bits: two results of one formula differ
by at most one unit in the last place, 2**-8 of the value, where a sum lies between two bfloat16
numbers; over all values, far less (3e-3 of the root mean square). Intermediate roundings that fall
out differently let single values differ more: 2**-6 of value and root mean square together. float32
results differ in the order of their sums and in the GELU only, but for moments of a rounded result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from peaknet_predict.models import PeakNet
from peaknet_predict.models.fast import FastPeakNet, enlarge_ops, ops, support
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims, Pad
from tests.helpers.networks import ATTO, THREE_STAGES, TINY, perturbed
from tests.helpers.prediction import noisy_batches, predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
CHANNELS = [40, 80, 96, 160, 192, 320, 384, 768]
SIZES = [(13, 17), (11, 12), (88, 96)]
PANELS = [1, 3]


@pytest.fixture(autouse=True)
def _kernels_and_full_float32() -> Iterator[None]:
    pytest.importorskip("cupy")
    pytest.importorskip("triton")
    support.load_kernels()
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def features(*shape: int) -> Tensor:
    """Return bfloat16 values with a mean, as features have."""
    return torch.randn(shape).mul(1.5).add(0.5).bfloat16().to(DEVICE)


def vector(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).div(columns**0.5).bfloat16().to(DEVICE)


def compare(operator: Any, *arguments: Any, float32_error: float = 3e-4) -> None:
    """Run on the GPU twice and on the CPU; bit-equal among themselves, close to the CPU."""
    on_cpu = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    found, again, expected = operator(*arguments), operator(*arguments), operator(*on_cpu)
    if isinstance(found, Tensor):
        found, again, expected = (found,), (again,), (expected,)
    for this, repeated, that in zip(found, again, expected, strict=True):
        assert this.shape == that.shape
        assert this.dtype == that.dtype
        assert this.stride() == that.stride()
        assert torch.equal(this, repeated), "another run gives another result"
        difference = this.cpu().double() - that.double()
        rms = that.double().square().mean().sqrt()
        error = float(difference.square().mean().sqrt() / rms)
        assert error < (3e-3 if this.dtype == torch.bfloat16 else float32_error)
        allowed = (that.double().abs() + rms) * 2**-6
        worst = int((difference.abs() / allowed).argmax())
        assert bool((difference.abs() <= allowed).all()), (
            f"{this.flatten()[worst]} instead of {that.flatten()[worst]} at {worst}"
        )


def moments(x_NHWC: Tensor) -> Tensor:
    flat_MC = x_NHWC.flatten(0, 2).float()
    factor_M = torch.rsqrt(flat_MC.var(1, correction=0) + 1e-6)
    return torch.stack([factor_M, -flat_MC.mean(1) * factor_M], 1)


@pytest.mark.parametrize("images_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [16, 40, 96])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (352, 384), (4, 12)])
def test_stem(height: int, width: int, channels: int, images_dtype: torch.dtype) -> None:
    images_N1HW = vector(3, 1, height, width).to(images_dtype)
    weights = vector(channels), vector(channels), vector(channels)
    compare(ops.stem, images_N1HW, matrix(channels, 16), *weights)


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (19, 45), (18, 81)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_depthwise(channels: int, height: int, width: int, panels: int) -> None:
    x_NHWC = features(panels, height, width, channels)
    kernel_49C = vector(49, channels)
    # As the network prepares it: float16, scaled so that none is too large.
    scale_C = kernel_49C.abs().sum(0).log2().ceil().exp2()
    kernel_49C = (kernel_49C / scale_C).half()
    # Its float32 results are of the rounded output.
    arguments = x_NHWC, kernel_49C, scale_C / 7, vector(channels)
    compare(ops.depthwise, *arguments, float32_error=3e-3)


@pytest.mark.parametrize(("height", "width"), [(13, 17), (40, 40)])
def test_depthwise_takes_what_float16_cannot_hold_for_the_largest_that_it_can(
    height: int, width: int
) -> None:
    x_NHWC = torch.zeros(1, height, width, 8, dtype=torch.bfloat16, device=DEVICE)
    x_NHWC[0, 6, 6, :3] = torch.tensor([1e9, -torch.inf, torch.nan])
    kernel_49C = torch.full((49, 8), 1 / 64, dtype=torch.float16, device=DEVICE)
    ones_C = torch.ones(8, device=DEVICE)
    convolved_NHWC, _ = ops.depthwise(x_NHWC, kernel_49C, ones_C, 0 * ones_C)
    large, small, unknown = convolved_NHWC[0, ..., :3].float().unbind(-1)
    assert large.max() == -small.min() == torch.tensor(65504 / 64).bfloat16().float()
    assert int((large > 0).sum()) == int((small < 0).sum()) == 49
    assert bool(unknown[3:10, 3:10].isnan().all())
    assert not convolved_NHWC[..., 3:].any()


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_expand(channels: int, height: int, width: int, panels: int) -> None:
    x_NHWC = features(panels, height, width, channels)
    weight_KC = matrix(4 * channels, channels)
    sums_K = weight_KC.float().sum(1)
    compare(ops.expand, x_NHWC, moments(x_NHWC), weight_KC, sums_K, vector(4 * channels))


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize("strips", [1, 3, 16, 225])
@pytest.mark.parametrize("channels", CHANNELS)
def test_response(channels: int, strips: int, panels: int) -> None:
    compare(ops.response, vector(panels, strips, 4 * channels).square(), vector(4 * channels))


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (16, 24)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_contract(channels: int, height: int, width: int, panels: int) -> None:
    hidden_NHWK = features(panels, height, width, 4 * channels)
    weight_CK, residual_NHWC = (
        matrix(channels, 4 * channels),
        features(panels, height, width, channels),
    )
    scale_NK = vector(panels, 4 * channels)
    compare(ops.contract, hidden_NHWK, scale_NK, weight_CK, vector(channels), residual_NHWC)


@pytest.mark.parametrize(("panels", "height", "width"), [(13, 88, 96), (300, 16, 24)])
def test_contract_takes_tile_after_tile(panels: int, height: int, width: int) -> None:
    """More tiles than a GPU works on at a time, and tiles of several panels."""
    test_contract(96, height, width, panels)


@pytest.mark.parametrize(("height", "width"), [(14, 18), (2, 2), (88, 96)])
@pytest.mark.parametrize("channels", CHANNELS)
def test_standardise(channels: int, height: int, width: int) -> None:
    x_NHWC = features(3, height, width, channels)
    compare(ops.standardise, x_NHWC)
    compare(ops.standardise_patches, x_NHWC)


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize("has_middle", [False, True])
@pytest.mark.parametrize("factor", [2, -2], ids=["up", "down"])
@pytest.mark.parametrize(("height", "width"), [(14, 18), (12, 22), (2, 2), (88, 96)])
@pytest.mark.parametrize("channels", [64, 256])
def test_node(
    channels: int, height: int, width: int, factor: int, has_middle: bool, panels: int
) -> None:
    same_NHWC = features(panels, height, width, channels)
    middle_NHWC = features(panels, height, width, channels) if has_middle else None
    other = (height // 2, width // 2) if factor > 0 else (2 * height, 2 * width)
    compare(
        ops.node,
        same_NHWC,
        middle_NHWC,
        features(panels, *other, channels),
        [0.4, 0.25 if has_middle else 0.0, 0.35],
        matrix(channels, channels),
        vector(channels),
        vector(channels),
    )


@pytest.mark.parametrize("panels", [1, 7])
@pytest.mark.parametrize(("height", "width"), [(14, 18), (8, 16), (2, 2), (88, 96), (88, 88)])
@pytest.mark.parametrize(("channels", "size"), [(96, 256), (64, 256), (40, 64), (128, 256)])
def test_base_node(channels: int, size: int, height: int, width: int, panels: int) -> None:
    inner_FC = matrix(size, channels).float()
    coarse_NHWF = vector(panels, height // 2, width // 2, size)
    compare(
        ops.base_node,
        features(panels, height, width, channels),
        (coarse_NHWF - coarse_NHWF.mean(-1, keepdim=True)).bfloat16(),
        (inner_FC - inner_FC.mean(0)).bfloat16(),
        matrix(size, channels),
        vector(size),
        vector(size),
        vector(size),
    )


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (64, 8), (256, 32), (256, 1)])
def test_group_norm_and_what_follows_it(
    channels: int, groups: int, height: int, width: int, panels: int
) -> None:
    x_NHWC = features(panels, height, width, channels)
    added_C, weight_C, bias_C = vector(channels), vector(channels), vector(channels)
    arguments = x_NHWC, added_C, groups, weight_C, bias_C, 1e-5
    compare(ops.group_norm, *arguments)
    affine_N2C = ops.group_norm(*arguments)
    compare(ops.activate_upsampled, x_NHWC, affine_N2C)
    # float32, but of values whose GELU is approximate.
    weight_2C, bias_2 = vector(2, channels) / channels**0.5, vector(2)
    added = [None, vector(panels, height, width, 2)]
    if height % 2 == width % 2 == 0:
        added.append(vector(panels, height // 2, width // 2, 2))
    for addend in added:
        compare(ops.classify, x_NHWC, affine_N2C, weight_2C, bias_2, addend, float32_error=1e-3)


@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (2, 2)])
@pytest.mark.parametrize("channels", [32, 64, 256])
def test_log_odds_and_taps(channels: int, height: int, width: int, panels: int) -> None:
    x_NHWC = features(panels, height, width, channels)
    affine_N2C = vector(panels, 2, channels)
    weight_KC = matrix(enlarge_ops.ODDS_CHANNELS, channels)
    bias_K = vector(enlarge_ops.ODDS_CHANNELS)
    added = [None, vector(panels, height, width, len(bias_K)).half()]
    if height % 2 == width % 2 == 0:
        added.append(vector(panels, height // 2, width // 2, len(bias_K)).half())
    for addend in added:
        arguments = x_NHWC, affine_N2C, weight_KC, bias_K, addend
        # The factors are rounded to bfloat16, as the plain operator's are not.
        compare(enlarge_ops.project, *arguments, float32_error=4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("panels", PANELS)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1), (1, 7)])
def test_enlarge(height: int, width: int, panels: int, dtype: torch.dtype) -> None:
    odds_NHWK = vector(panels, height, width, enlarge_ops.ODDS_CHANNELS).to(dtype)
    compare(enlarge_ops.enlarge, odds_NHWK, float32_error=5e-4)


# --- the network ---

DEFAULT: dict[str, Any] = {}
ATTO_2 = ATTO | {"bifpn_blocks": 2}


def error(found: Tensor, expected: Tensor) -> float:
    """Return the difference's root mean square, relative to that of the values themselves."""
    difference = found.double() - expected.double()
    return float((difference.square().mean() / expected.double().square().mean()).sqrt())


@torch.inference_mode()
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (DEFAULT, (1, 512, 512)),
        (DEFAULT, (5, 512, 512)),
        (DEFAULT, (1, 512, 1024)),
        (DEFAULT, (1, 1920, 1920)),
        (DEFAULT, (2, 352, 384)),
        (ATTO_2, (1, 352, 384)),
        (ATTO_2, (5, 352, 384)),
        (ATTO_2, (2, 512, 1024)),
        (ATTO_2, (1, 1920, 1920)),
        (TINY, (256, 128, 128)),
        (TINY, (5, 32, 96)),
        (THREE_STAGES, (3, 48, 80)),
    ],
    ids=str,
)
def test_the_network_is_as_exact_as_the_plain_one_in_bfloat16(
    sizes: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    net = perturbed(**sizes)
    fast = FastPeakNet(net).to(DEVICE)
    net = net.to(DEVICE)
    panels, height, width = shape
    images_N1HW = torch.randn(panels, 1, height, width, device=DEVICE)
    expected_NCHW = in_parts(net, images_N1HW)
    logits_NCHW = fast.coarse_logits(images_N1HW.bfloat16())
    assert torch.equal(fast.coarse_logits(images_N1HW.bfloat16()), logits_NCHW)
    plain_NCHW = in_parts(net.bfloat16(), images_N1HW.bfloat16())
    ours, theirs = error(logits_NCHW, expected_NCHW), error(plain_NCHW, expected_NCHW)
    assert ours < 1.2 * theirs
    # The same for the worst panel, in which a mistake at a batch's end would show.
    worst = max(error(a, b) for a, b in zip(logits_NCHW, expected_NCHW, strict=True))
    assert worst < 1.2 * max(error(a, b) for a, b in zip(plain_NCHW, expected_NCHW, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (ATTO, (128, 512, 512)),
        (ATTO, (5, 192, 416)),
        (ATTO, (1, 1920, 1920)),
        (TINY, (3, 32, 96)),
    ],
    ids=str,
)
def test_a_learned_enlargement_is_as_exact_as_the_plain_one_in_bfloat16(
    sizes: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    net = perturbed(**sizes, learned_upsample=True)
    fast = FastPeakNet(net).to(DEVICE)
    net = net.to(DEVICE)
    panels, height, width = shape
    images_N1HW = torch.randn(panels, 1, height, width, device=DEVICE)
    logits_NCHW = fast(images_N1HW.bfloat16())
    assert torch.equal(fast(images_N1HW.bfloat16()), logits_NCHW)
    expected = in_parts(net, images_N1HW, "forward").diff(dim=1)
    plain = in_parts(net.bfloat16(), images_N1HW.bfloat16(), "forward").diff(dim=1)
    found = logits_NCHW.float().diff(dim=1)
    assert error(found, expected) < 1.2 * error(plain, expected)
    worst = max(error(a, b) for a, b in zip(found, expected, strict=True))
    assert worst < 1.2 * max(error(a, b) for a, b in zip(plain, expected, strict=True))


def in_parts(net: PeakNet, images_N1HW: Tensor, method: str = "coarse_logits") -> Tensor:
    parts = torch.split(images_N1HW, 32)
    return torch.cat([getattr(net, method)(part_N1HW) for part_N1HW in parts])


# --- the module ---


def make(**arguments: Any) -> PeakNetModule:
    transforms = [Pad(192, 256, "center"), InstanceNorm(), MergeBatchChannelDims()]
    return PeakNetModule(perturbed(**TINY), transforms, random_weights=True, **arguments)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_module_finds_the_peaks_of_the_fast_logits(precision: str, said: Any) -> None:
    from peaknet_predict.peaks.finder import PeakFinder

    (batch,) = noisy_batches([4], 4, (3, 192, 256))
    module = make()
    (found,) = predict(module, [batch], accelerator="gpu", precision=precision)
    assert "the fast PeakNet runs, in bfloat16 on NVIDIA" in said.text
    with torch.inference_mode():
        fast = FastPeakNet(perturbed(**TINY)).to(DEVICE)
        prepared = module.preprocess(batch.images_BPHW.to(DEVICE))
        logits_NCHW = fast.coarse_logits(prepared.images_N1HW.bfloat16())
        finder = PeakFinder(12, 192, 256, device=DEVICE)
        valid_NHW = prepared.valid_N1HW[:, 0]
        table = finder.enqueue(logits=logits_NCHW, upsampling=4, valid=valid_NHW).table()
    assert sum(len(result.peaks) for result in found.results) > 10
    for result, peaks in zip(found.results, table.split(3, 4), strict=True):
        np.testing.assert_array_equal(result.peaks, peaks)


def test_with_float32_the_plain_network_runs_and_the_log_says_why(said: Any) -> None:
    batches = noisy_batches([2], 2, (3, 185, 250))
    predict(make(), batches, accelerator="gpu", precision="32-true")
    assert "the plain PeakNet runs: precision is 32-true" in said.text


def test_kernels_that_do_not_compile_leave_it_to_the_plain_network(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peaknet_predict.models.fast import cuda_backbone

    def broken(*args: Any) -> Any:
        raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture")

    monkeypatch.setattr(cuda_backbone, "_depthwise_kernels", broken)
    batches = noisy_batches([2, 2], 2, (3, 185, 250))
    settings: dict[str, Any] = {"accelerator": "gpu", "precision": "bf16-true"}
    found = predict(make(), batches, **settings)
    assert "the plain one takes its place, which is slower: RuntimeError: nvrtc" in said.text
    plain = predict(make(fast=False), batches, **settings)
    for these, those in zip(found, plain, strict=True):
        for this, that in zip(these.results, those.results, strict=True):
            np.testing.assert_array_equal(this.peaks, that.peaks)


@pytest.mark.parametrize("compile", [False, True])
def test_a_steady_state_step_never_waits(compile: bool, said: Any) -> None:
    batches = noisy_batches([4] * 12, 4, (3, 185, 250))

    class Strict(L.Callback):
        """From the fourth batch on, anything that waits for the device is an error."""

        def on_predict_batch_start(self, *args: Any) -> None:
            if args[3] >= 4:
                torch.cuda.set_sync_debug_mode("error")

        def on_predict_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        found = predict(
            make(compile=compile), batches, [Strict()], accelerator="gpu", precision="bf16-true"
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "the fast PeakNet runs" in said.text
    assert [r.id.idx for b in found for r in b.results] == list(range(48))
