"""The fast PeakNet against the plain one, on a CPU: every rewrite, exact in float32.

Both compute the same numbers in another order; roundings of 6e-8 over some 40 layers leave 1e-6 to
5e-6 of the largest value. A rewrite that is wrong somewhere is off by more than 1e-3, because every
parameter is perturbed: no norm, no GRN and no fusion weight is the identity.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from peaknet_predict.forward import ForwardPass
from peaknet_predict.models import PeakNet
from peaknet_predict.models.fast import FastPeakNet, ops, support, unsupported
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Preprocess
from peaknet_predict.types import EventBatch
from tests.helpers.examples import examples
from tests.helpers.networks import (
    ATTO,
    THREE_STAGES,
    TINY,
    TWO_STAGES,
    Plain,
    golden,
    perturbed,
    small_peaknet,
)
from tests.helpers.prediction import batch, chain, predict, shot


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (TINY, (2, 64, 64)),
        (TINY, (3, 96, 32)),
        (TINY | {"bifpn_blocks": 3, "bifpn_base_level": 2}, (1, 32, 160)),
        (THREE_STAGES, (2, 48, 80)),
        (TWO_STAGES, (2, 24, 40)),
        (ATTO, (1, 352, 384)),
    ],
    ids=["tiny", "tall", "wide-3-blocks", "three-stages", "two-stages", "atto-352x384"],
)
def test_the_whole_network_is_the_plain_one(
    sizes: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    net = perturbed(**sizes)
    fast = FastPeakNet(net, torch.float32)
    panels, height, width = shape
    images_N1HW = torch.randn(panels, 1, height, width)
    expected_NCHW = net.coarse_logits(images_N1HW)
    logits_NCHW = fast.coarse_logits(images_N1HW)
    assert logits_NCHW.shape == expected_NCHW.shape
    assert logits_NCHW.dtype == torch.float32
    assert fast.coarse_stride == net.coarse_stride == 4
    # The classes' difference decides, and it may be small beside their values.
    assert error(logits_NCHW.diff(dim=1), expected_NCHW.diff(dim=1)) < 1e-5
    assert error(logits_NCHW, expected_NCHW) < 1e-5
    assert error(fast(images_N1HW), net(images_N1HW)) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [(TINY, (2, 64, 96)), (THREE_STAGES, (1, 48, 16)), (ATTO, (1, 32, 32))],
    ids=["tiny", "narrow", "one-coarse-pixel-at-the-top"],
)
def test_a_learned_last_enlargement_is_the_plain_one(
    sizes: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    net = perturbed(**sizes, learned_upsample=True)
    panels, height, width = shape
    images_N1HW = torch.randn(panels, 1, height, width)
    expected_NCHW = net(images_N1HW)
    fast = FastPeakNet(net, torch.float32)
    logits_NCHW = fast(images_N1HW)
    assert fast.coarse_stride is net.coarse_stride is None
    assert logits_NCHW.shape == expected_NCHW.shape
    assert error(logits_NCHW.diff(dim=1), expected_NCHW.diff(dim=1)) < 1e-5
    assert not logits_NCHW[:, 0].any()
    # What the taps add is no small part of it.
    net.head_upsample_layer = None
    assert error(net(images_N1HW).diff(dim=1), expected_NCHW.diff(dim=1)) > 0.1


@torch.inference_mode()
def test_a_learned_enlargement_in_bfloat16_is_no_worse_than_the_plain_one() -> None:
    net = perturbed(**TINY, learned_upsample=True)
    images_N1HW = torch.randn(2, 1, 96, 128)
    expected_NHW = net(images_N1HW).diff(dim=1)
    fast_NHW = FastPeakNet(net)(images_N1HW.bfloat16()).float().diff(dim=1)
    plain_NHW = net.bfloat16()(images_N1HW.bfloat16()).float().diff(dim=1)
    ours, theirs = (
        (odds_NHW - expected_NHW).square().mean().sqrt() for odds_NHW in (fast_NHW, plain_NHW)
    )
    assert ours < theirs


@torch.inference_mode()
def test_golden_logits() -> None:
    images_N1HW, expected_NCHW = golden()
    fast = FastPeakNet(small_peaknet(), torch.float32)
    assert error(fast(images_N1HW), expected_NCHW) < 1e-5


@torch.inference_mode()
def test_bfloat16_is_no_worse_than_the_plain_network_in_bfloat16() -> None:
    net = perturbed(**TINY)
    images_N1HW = torch.randn(2, 1, 96, 128)
    expected_NCHW = net.coarse_logits(images_N1HW)
    fast_NCHW = FastPeakNet(net).coarse_logits(images_N1HW.bfloat16())
    plain_NCHW = net.bfloat16().coarse_logits(images_N1HW.bfloat16()).float()
    ours, theirs = (
        (logits_NCHW - expected_NCHW).square().mean().sqrt()
        for logits_NCHW in (fast_NCHW, plain_NCHW)
    )
    assert ours < 1.1 * theirs


@torch.inference_mode()
def test_panels_of_a_batch_do_not_see_each_other() -> None:
    fast = FastPeakNet(perturbed(**TINY), torch.float32)
    images_N1HW = torch.randn(3, 1, 64, 64)
    together, alone = fast.coarse_logits(images_N1HW), fast.coarse_logits(images_N1HW[1:2])
    assert error(together[1:2], alone) < 1e-5


@examples(8)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.sampled_from([8, 16, 24, 40]), min_size=2, max_size=4),
    blocks=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 8]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
)
@torch.inference_mode()
def test_networks_of_all_kinds(
    seed: int, sizes: list[int], blocks: int, groups: int, rows: int, columns: int
) -> None:
    net = perturbed(
        seed,
        hidden_sizes=sizes,
        depths=[1] * len(sizes),
        bifpn_features=16,
        bifpn_blocks=blocks,
        head_channels=16,
        head_groups=groups,
    )
    # A group of one pixel or so has almost no variance, which blows roundings up.
    height, width = 2 * rows * net.size_multiple, 2 * columns * net.size_multiple
    images_N1HW = torch.randn(1, 1, height, width)
    fast = FastPeakNet(net, torch.float32)
    assert error(fast.coarse_logits(images_N1HW), net.coarse_logits(images_N1HW)) < 3e-5


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_classes": 3}, "3 classes, and the kernels know two"),
        ({"hidden_sizes": (16, 28, 48, 64)}, "[16, 28, 48, 64], and the kernels take multiples"),
        ({"head_channels": 48}, "its head has 48 channels, and the kernels take powers of two"),
    ],
    ids=["classes", "hidden-sizes", "head"],
)
def test_networks_that_cannot_be_rewritten_are_refused_with_the_reason(
    sizes: dict[str, Any], reason: str
) -> None:
    net = PeakNet(**TINY | sizes)
    assert reason in (unsupported(net) or "")
    with pytest.raises(ValueError, match="cannot be rewritten: it"):
        FastPeakNet(net)


def test_published_sizes_can_be_rewritten() -> None:
    with torch.device("meta"):
        for sizes in ({}, ATTO, TINY, THREE_STAGES, TWO_STAGES):
            assert unsupported(PeakNet(**sizes)) is None


def test_shapes_are_refused_as_the_plain_network_does() -> None:
    fast = FastPeakNet(PeakNet(**TINY), torch.float32)
    with pytest.raises(ValueError, match="multiples of 32"):
        fast.check_shape(60, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        fast.coarse_logits(torch.zeros(1, 1, 60, 64))
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\)"):
        fast.coarse_logits(torch.zeros(1, 3, 64, 64))


def test_making_it_changes_nothing_and_copies_everything() -> None:
    net = perturbed(**TINY)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fast = FastPeakNet(net, torch.float32)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not list(fast.parameters())
    assert not fast.state_dict(), "what is derived is not saved"
    images_N1HW = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = fast.coarse_logits(images_N1HW)
        for parameter in net.parameters():
            parameter.zero_()
        assert torch.equal(fast.coarse_logits(images_N1HW), expected)


@pytest.mark.thorough
@torch.inference_mode()
def test_compiled_it_gives_the_same_in_one_graph() -> None:
    torch.compiler.reset()
    fast = FastPeakNet(perturbed(**TWO_STAGES), torch.float32)
    images_N1HW = torch.randn(2, 1, 32, 32)
    compiled = torch.compile(fast.coarse_logits, dynamic=False, fullgraph=True)
    torch.testing.assert_close(compiled(images_N1HW), fast.coarse_logits(images_N1HW))


# --- operators, each against the textbook ---


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def to_NCHW(x_NHWC: Tensor) -> Tensor:
    return x_NHWC.permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_stem() -> None:
    conv, norm = nn.Conv2d(1, 12, 4, stride=4), nn.LayerNorm(12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert conv.bias is not None
    images_N1HW = random(2, 1, 24, 40)
    with torch.no_grad():
        found = ops.stem(images_N1HW, conv.weight.flatten(1), conv.bias, norm.weight, norm.bias)
        expected = norm(conv(images_N1HW).permute(0, 2, 3, 1))
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("height", "width"), [(13, 17), (5, 3), (1, 1)])
def test_a_block_of_the_backbone_step_by_step(height: int, width: int) -> None:
    x_NHWC = random(2, height, width, 8)
    kernel_49C, factor_C, bias_C = random(49, 8), random(8), random(8)
    convolved_NHWC, moments_M2 = ops.depthwise(x_NHWC, kernel_49C, factor_C, bias_C)
    kernel_C177 = (kernel_49C * factor_C).t().reshape(8, 1, 7, 7)
    expected_NCHW = F.conv2d(to_NCHW(x_NHWC), kernel_C177, bias_C, padding=3, groups=8)
    torch.testing.assert_close(to_NCHW(convolved_NHWC), expected_NCHW)
    flat_MC = convolved_NHWC.view(-1, 8)
    factor_M1 = 1 / (flat_MC.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected_M2 = torch.cat([factor_M1, -flat_MC.mean(1, keepdim=True) * factor_M1], 1)
    torch.testing.assert_close(moments_M2, expected_M2)

    weight_KC, bias_K = random(32, 8), random(32)
    hidden_NHWK, energy_NTK = ops.expand(
        convolved_NHWC, moments_M2, weight_KC, weight_KC.sum(1), bias_K
    )
    normed_NHWC = F.layer_norm(convolved_NHWC, (8,), eps=1e-6)
    expected_NHWK = F.gelu(F.linear(normed_NHWC, weight_KC, bias_K))
    torch.testing.assert_close(hidden_NHWK, expected_NHWK, rtol=1e-4, atol=1e-5)
    energy_NK = expected_NHWK.square().sum((1, 2))
    torch.testing.assert_close(energy_NTK.sum(1), energy_NK, rtol=1e-4, atol=1e-5)

    gamma_K = random(32)
    scale_NK = ops.response(energy_NTK, gamma_K)
    norm_NK = expected_NHWK.flatten(1, 2).norm(dim=1)
    expected_NK = 1 + gamma_K * norm_NK / (norm_NK.mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(scale_NK, expected_NK, rtol=1e-4, atol=1e-5)

    weight_CK = random(8, 32)
    out_NHWC = ops.contract(hidden_NHWK, scale_NK, weight_CK, bias_C, x_NHWC)
    expected = F.linear(expected_NHWK * expected_NK[:, None, None], weight_CK, bias_C) + x_NHWC
    torch.testing.assert_close(out_NHWC, expected, rtol=1e-4, atol=1e-4)


def test_energy_comes_in_strips_of_one_panel() -> None:
    """Less, as many and more pixels than a strip, and two panels that must not mix."""
    few, many = 4, 400  # channels
    for channels, height, width, strips in (
        (few, 33, 31, 1),
        (few, 32, 32, 1),
        (few, 41, 25, 2),
        (many, 8, 16, 1),
        (many, 12, 12, 2),
    ):
        x_NHWC = random(2, height, width, channels)
        moments_M2 = torch.tensor([[1.0, 0.0]]).repeat(2 * height * width, 1)
        hidden_NHWK, energy_NTK = ops.expand(
            x_NHWC, moments_M2, random(8, channels), torch.zeros(8), torch.zeros(8)
        )
        assert energy_NTK.shape == (2, strips, 8)
        squares_NPK = hidden_NHWK.square().flatten(1, 2)
        first_NK = squares_NPK[:, : ops.strip(channels)].sum(1)
        torch.testing.assert_close(energy_NTK[:, 0], first_NK)


def test_standardise() -> None:
    x_NHWC = 3 + 2 * random(2, 3, 5, 16)
    found = ops.standardise(x_NHWC)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1, correction=0), torch.ones(2, 3, 5))
    centred = x_NHWC - x_NHWC.mean(-1, keepdim=True)
    torch.testing.assert_close(found, centred / x_NHWC.std(-1, correction=0, keepdim=True))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (6, 2), (2, 2)])
def test_patches_are_what_a_2x2_convolution_sees(height: int, width: int) -> None:
    x_NHWC, weight_OCHW = random(2, height, width, 8), random(4, 8, 2, 2)
    normed_NHWC, patches = ops.standardise_patches(x_NHWC)
    assert torch.equal(normed_NHWC, ops.standardise(x_NHWC))
    found = F.linear(patches, weight_OCHW.permute(0, 2, 3, 1).flatten(1))
    expected_NCHW = F.conv2d(to_NCHW(normed_NHWC), weight_OCHW, stride=2)
    torch.testing.assert_close(to_NCHW(found), expected_NCHW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_middle", [False, True])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_node(factor: float, has_middle: bool) -> None:
    same_NHWC = random(2, 6, 10, 8)
    other_NHWC = random(2, int(6 / factor), int(10 / factor), 8)
    middle_NHWC = random(2, 6, 10, 8) if has_middle else None
    weight_CC, scale_C, shift_C = random(8, 8), random(8), random(8)
    fusion = [0.5, 0.3, 0.2]
    found = ops.node(same_NHWC, middle_NHWC, other_NHWC, fusion, weight_CC, scale_C, shift_C)
    resized_NCHW = F.interpolate(to_NCHW(other_NHWC), scale_factor=factor, mode="bilinear")
    fused_NHWC = 0.5 * same_NHWC + 0.2 * resized_NCHW.permute(0, 2, 3, 1)
    if middle_NHWC is not None:
        fused_NHWC = fused_NHWC + 0.3 * middle_NHWC
    normed = F.layer_norm(F.linear(fused_NHWC, weight_CC), (8,), scale_C, shift_C, 1e-6)
    torch.testing.assert_close(found, F.gelu(normed) + same_NHWC)


def test_base_node_is_an_adapter_and_a_node() -> None:
    x_NHWC, above_NHWC = random(2, 6, 10, 8), random(2, 3, 5, 16)
    adapter_FC, bias_F, weight_FF = random(16, 8), random(16), random(16, 16)
    scale_F, shift_F = random(16), random(16)
    same_NHWC = F.linear(x_NHWC, adapter_FC, bias_F)
    fusion = [0.6, 0.0, 0.4]
    expected = ops.node(same_NHWC, None, above_NHWC, fusion, weight_FF, scale_F, shift_F)

    inner_FC, inner_F = 0.6 * weight_FF @ adapter_FC, 0.6 * weight_FF @ bias_F
    coarse_NHWF = F.linear(above_NHWC, 0.4 * weight_FF, inner_F)
    for mean in (0, 1):  # the normalisation takes it away
        found = ops.base_node(
            x_NHWC,
            coarse_NHWF - mean * coarse_NHWF.mean(-1, keepdim=True),
            inner_FC - mean * inner_FC.mean(0),
            adapter_FC,
            scale_F,
            shift_F,
            bias_F,
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_and_what_follows_it(groups: int) -> None:
    x_NHWC, added_C, weight_C, bias_C = random(2, 5, 7, 8), random(8), random(8), random(8)
    affine_N2C = ops.group_norm(x_NHWC, added_C, groups, weight_C, bias_C, 1e-5)
    shifted_NCHW = to_NCHW(x_NHWC + added_C)
    normed_NCHW = F.group_norm(shifted_NCHW, groups, weight_C, bias_C, 1e-5)
    factor_N11C, term_N11C = affine_N2C[:, 0, None, None], affine_N2C[:, 1, None, None]
    torch.testing.assert_close(
        to_NCHW(x_NHWC * factor_N11C + term_N11C), normed_NCHW, rtol=1e-4, atol=1e-5
    )

    doubled_NHWC = ops.activate_upsampled(x_NHWC, affine_N2C)
    activated_NCHW = F.gelu(normed_NCHW)
    expected_NCHW = F.interpolate(activated_NCHW, scale_factor=2, mode="bilinear")
    assert doubled_NHWC.is_contiguous()
    torch.testing.assert_close(to_NCHW(doubled_NHWC), expected_NCHW, rtol=1e-4, atol=1e-5)

    x_NHWC, activated_NCHW = x_NHWC[:, :4, :6], activated_NCHW[:, :, :4, :6]
    weight_2C, bias_2 = random(2, 8), random(2)
    expected_N2HW = F.conv2d(activated_NCHW, weight_2C[:, :, None, None], bias_2)
    same_NHW2, half_NHW2 = random(2, 4, 6, 2), random(2, 2, 3, 2)
    enlarged_N2HW = F.interpolate(to_NCHW(half_NHW2), scale_factor=2, mode="bilinear")
    for added, addend in ((None, 0), (same_NHW2, to_NCHW(same_NHW2)), (half_NHW2, enlarged_N2HW)):
        found_NHW2 = ops.classify(x_NHWC, affine_N2C, weight_2C, bias_2, added)
        torch.testing.assert_close(
            to_NCHW(found_NHW2), expected_N2HW + addend, rtol=1e-4, atol=1e-5
        )


def calls_of_operators(dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return each operator with arguments it may get: features of a dtype, the rest float32."""

    def features(*shape: int) -> Tensor:
        return random(*shape).to(dtype)

    x, k = features(2, 6, 10, 8), features(2, 6, 10, 32)
    affine = random(2, 2, 8)
    depthwise_kernel = random(49, 8).to(torch.float16 if dtype == torch.bfloat16 else dtype)
    return [
        (ops.stem, (features(2, 1, 8, 12), features(8, 16), random(8), random(8), random(8))),
        (ops.depthwise, (x, depthwise_kernel, random(8), random(8))),
        (ops.expand, (x, random(120, 2), features(32, 8), random(32), random(32))),
        (ops.response, (random(2, 3, 32).square(), random(32))),
        (ops.contract, (k, random(2, 32), features(8, 32), random(8), x)),
        (ops.standardise, (x,)),
        (ops.standardise_patches, (x,)),
        (
            ops.node,
            (x, x, features(2, 3, 5, 8), [0.5, 0.2, 0.3], features(8, 8), random(8), random(8)),
        ),
        (
            ops.base_node,
            (
                x,
                features(2, 3, 5, 16),
                features(16, 8),
                features(16, 8),
                random(16),
                random(16),
                random(16),
            ),
        ),
        (ops.group_norm, (x, random(8), 4, random(8), random(8), 1e-5)),
        (ops.activate_upsampled, (x, affine)),
        (ops.classify, (x, affine, random(2, 8), random(2), random(2, 3, 5, 2))),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", range(12))
def test_operators_tell_a_compiler_the_truth(index: int, dtype: torch.dtype) -> None:
    """Shape, dtype, strides and device as announced; inputs neither changed nor returned."""
    operator, arguments = calls_of_operators(dtype)[index]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# --- the module's choice ---


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fast PeakNet run on a CPU, where its operators are the plain ones."""
    monkeypatch.setattr(support, "_unfit", lambda device: None)
    monkeypatch.setattr(support, "load_kernels", lambda: None)


def images(num_batches: int = 1) -> list[EventBatch]:
    spots = [(0, 10, 12), (1, 40, 50)]
    return [batch([shot(i, spots, (2, 64, 64))], 1) for i in range(num_batches)]


def make(net: nn.Module | None = None, **arguments: Any) -> PeakNetModule:
    return PeakNetModule(net or perturbed(**TINY), chain(), random_weights=True, **arguments)


def peaks(module: PeakNetModule, precision: Any = "bf16-true") -> list[list[list[float]]]:
    batches = predict(module, images(), precision=precision)
    return [result.peaks.tolist() for found in batches for result in found.results]


class Changed(PeakNet):
    """A network of the same parameters that computes something else."""

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return -super().forward(images_N1HW)


@pytest.mark.parametrize(
    ("precision", "arguments", "net", "reason"),
    [
        ("32-true", {}, None, "precision is 32-true, the fast one computes in bfloat16"),
        ("bf16-true", {"fast": False}, None, "the fast one is switched off (fast: false)"),
        ("bf16-mixed", {}, Changed(**TINY), "Changed is a class of its own"),
        ("bf16-true", {}, PeakNet(**TINY, num_classes=3), "3 classes, and the kernels know two"),
    ],
    ids=["precision", "switched-off", "subclass", "classes"],
)
@pytest.mark.usefixtures("on_cpu")
def test_the_log_says_why_the_plain_network_runs(
    precision: Any, arguments: dict[str, Any], net: PeakNet | None, reason: str, said: Any
) -> None:
    module = make(net, **arguments)
    peaks(module, precision)
    (line,) = (r.getMessage() for r in said.records if "PeakNet runs" in r.getMessage())
    assert line.startswith("the plain PeakNet runs: ")
    assert reason in line
    assert module._forward_pass.mode == "eager"
    assert module._forward_pass.why() == (
        f"not fast: {line.removeprefix('the plain PeakNet runs: ')}; "
        "not compiled: it is switched off (compile: false)"
    )


def test_a_cpu_runs_the_plain_network_and_says_so(said: Any) -> None:
    peaks(make())
    assert "the plain PeakNet runs: the device is cpu, the fast one needs a CUDA GPU" in said.text


def test_other_networks_are_not_spoken_of(said: Any) -> None:
    predict(PeakNetModule(Plain(), chain()), images())
    assert "PeakNet" not in said.text


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.usefixtures("on_cpu")
def test_the_module_rewrites_the_float32_parameters(
    precision: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = perturbed(**TINY)
    names = list(net.state_dict())
    expected = FastPeakNet(net)
    given: list[tuple[Tensor, Tensor]] = []
    original = FastPeakNet.forward

    def forward(self: FastPeakNet, images_N1HW: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        given.append((images_N1HW, original(self, images_N1HW)))
        return given[-1][1]

    monkeypatch.setattr(FastPeakNet, "forward", forward)
    module = make(net)
    peaks(module, precision)
    assert "the fast PeakNet runs, in bfloat16 on cpu" in said.text
    ((images_N1HW, logits_NCHW),) = given
    assert images_N1HW.dtype == torch.bfloat16
    assert torch.equal(logits_NCHW, original(expected, images_N1HW)), (
        "the parameters were rounded before they were multiplied together"
    )
    assert list(net.state_dict()) == names
    assert list(module.state_dict()) == [f"net.{name}" for name in names]


@pytest.mark.usefixtures("on_cpu")
def test_it_is_made_again_only_when_the_parameters_have_changed() -> None:
    module = make()
    peaks(module)
    first = module._forward_pass.fast_net
    assert first is not None
    peaks(module)
    assert module._forward_pass.fast_net is first
    module.net.load_state_dict(perturbed(1, **TINY).state_dict())
    peaks(module)
    second = module._forward_pass.fast_net
    assert second is not None
    assert second is not first
    assert not torch.equal(second.stem.weight, first.stem.weight)


@pytest.mark.usefixtures("on_cpu")
def test_parameters_that_change_after_setup_count() -> None:
    net = perturbed(**TINY)
    forward = ForwardPass(net, Preprocess(chain()))
    device = torch.device("cpu")
    forward.prepare(device, "bf16-true")
    other = perturbed(1, **TINY)
    net.load_state_dict(other.state_dict())
    net.bfloat16()
    forward.start(device, "bf16-true")
    assert forward.fast_net is not None
    rounded = other.bfloat16().float()
    assert torch.equal(forward.fast_net.stem.weight, FastPeakNet(rounded).stem.weight)
    assert next(net.parameters()).dtype == torch.bfloat16


@pytest.mark.thorough
@pytest.mark.usefixtures("on_cpu")
def test_compiled_in_the_module_it_finds_the_same_peaks() -> None:
    torch.compiler.reset()
    net = perturbed(**TWO_STAGES)
    # At log odds of 0 this network calls nearly every pixel peak, which is refused.
    eager = peaks(make(net, threshold=0.5))
    torch._dynamo.utils.counters.clear()
    module = make(net, threshold=0.5, compile=True)
    compiled = peaks(module)
    assert module._forward_pass.fast_net is not None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, "preprocessing; the fast network is left as it is"
    assert len(eager) == 1
    # Compiled preprocessing rounds otherwise: a few pixels of large peaks change sides.
    np.testing.assert_allclose(compiled[0], eager[0], atol=0.1)
    assert len(eager[0]) > 0


@pytest.mark.thorough
@pytest.mark.usefixtures("on_cpu")
def test_if_it_does_not_compile_it_runs_eagerly(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    net = perturbed(**TINY)
    expected = peaks(make(net))
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch.compiler.reset()
    module = make(net, compile=True, warmup_shapes=[(1, 2, 64, 64)])
    assert peaks(module) == expected
    assert "does not compile and runs eagerly" in said.text
    assert module._forward_pass.mode == "fast", "it was the preprocessing"


@pytest.mark.parametrize(
    ("compile", "warm"), [(False, False), pytest.param(True, True, marks=pytest.mark.thorough)]
)
@pytest.mark.usefixtures("on_cpu")
def test_kernels_that_fail_leave_it_to_the_plain_network(
    compile: bool, warm: bool, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    # Traced but not compiled to machine code, which takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net = perturbed(**TWO_STAGES)
    expected = peaks(make(net, fast=False))
    said.clear()

    def broken(self: FastPeakNet, images_N1HW: Tensor) -> Tensor:
        raise RuntimeError("expand.cu(12): error: expected a ';'\nmore of it")

    monkeypatch.setattr(FastPeakNet, "forward", broken)
    shapes = [(1, 2, 64, 64)] if warm else []
    module = make(net, compile=compile, warmup_shapes=shapes)
    assert peaks(module) == expected
    (record,) = (r for r in said.records if r.levelno == logging.WARNING and "fast" in r.msg)
    assert "RuntimeError: expand.cu(12): error: expected a ';'; to do without" in record.message
    assert "fast: false" in record.message
    assert module._forward_pass.mode == ("compiled" if compile else "eager")
    assert "not fast: the fast one failed before (RuntimeError" in module._forward_pass.why()
    said.clear()
    assert peaks(module) == expected
    assert "the plain PeakNet runs: the fast one failed before (RuntimeError" in said.text


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("cupy", "pip install 'peaknet-predict[cuda13]'"), ("triton.language", "pip install triton")],
)
def test_missing_packages_are_named_with_the_remedy(
    missing: str, remedy: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(support, "_unfit", lambda device: None)
    monkeypatch.setattr(support, "load_kernels", load)
    net = perturbed(**TINY)
    module = make(net)
    assert peaks(module) == peaks(make(net, fast=False))
    assert f"ModuleNotFoundError: No module named '{missing}'; {remedy}" in said.text
    assert module._forward_pass.fast_net is None


@pytest.mark.usefixtures("on_cpu")
def test_failures_of_a_seen_shape_and_full_memory_are_not_blamed_on_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    original = FastPeakNet.forward

    def failing_later(self: FastPeakNet, images_N1HW: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("an unrelated misfortune")
        return original(self, images_N1HW)

    monkeypatch.setattr(FastPeakNet, "forward", failing_later)
    with pytest.raises(RuntimeError, match="unrelated"):
        predict(make(), images(2), precision="bf16-true")

    def full(self: FastPeakNet, images_N1HW: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("8 GiB wanted")

    monkeypatch.setattr(FastPeakNet, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        predict(make(), images(), precision="bf16-true")


def test_lightning_rounds_parameters_between_setup_and_start() -> None:
    """What `PeakNetModule.setup` relies on."""
    seen: dict[str, torch.dtype] = {}

    class Watch(L.Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            seen["setup"] = next(module.parameters()).dtype

        def on_predict_start(self, trainer: Any, module: Any) -> None:
            seen["start"] = next(module.parameters()).dtype

    predict(make(), images(), [Watch()], precision="bf16-true")
    assert seen == {"setup": torch.float32, "start": torch.bfloat16}
