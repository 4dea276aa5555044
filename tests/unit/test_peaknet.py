"""PeakNet against the reference implementation's numbers.

The golden logits were computed in float32 by the reference. Ours differ in nothing but the order of
some sums; a few roundings of 1e-7 in about 20 layers allow 1e-5 of the largest logit.
"""

from __future__ import annotations

import json

import pytest
import torch

from peaknet_predict.models import PeakNet
from tests.helpers.networks import GOLDEN, golden, small_peaknet


def tiny_peaknet(learned_upsample: bool = False) -> PeakNet:
    return PeakNet(
        (8, 8, 8, 8),
        (1, 1, 1, 1),
        bifpn_features=8,
        head_channels=8,
        head_groups=2,
        learned_upsample=learned_upsample,
    ).eval()


def test_the_default_state_dict_has_the_published_names_and_shapes() -> None:
    expected = json.loads((GOLDEN / "peaknet_default_state_dict.json").read_text())
    with torch.device("meta"):
        state = PeakNet().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected


@torch.inference_mode()
@pytest.mark.parametrize("name", ["peaknet_small", "peaknet_learned"])
def test_logits_equal_the_reference(name: str) -> None:
    images_N1HW, expected_NCHW = golden(name)
    logits_NCHW = small_peaknet(name)(images_N1HW)
    assert logits_NCHW.dtype == torch.float32
    tolerance = 1e-5 * float(expected_NCHW.abs().max())
    torch.testing.assert_close(logits_NCHW, expected_NCHW, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_autocast_stays_close_to_the_reference() -> None:
    images_N1HW, expected_NCHW = golden()
    with torch.autocast("cpu", torch.bfloat16):
        logits_NCHW = small_peaknet()(images_N1HW)
    assert logits_NCHW.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 2**-8 a rounding.
    assert float((logits_NCHW - expected_NCHW).abs().max() / expected_NCHW.abs().max()) < 0.03


@torch.inference_mode()
def test_bfloat16_parameters_stay_close_to_the_reference() -> None:
    images_N1HW, expected_NCHW = golden()
    logits_NCHW = small_peaknet().bfloat16()(images_N1HW.bfloat16())
    assert float((logits_NCHW - expected_NCHW).abs().max() / expected_NCHW.abs().max()) < 0.06


def test_the_caller_can_tell_random_parameters_from_loaded_ones() -> None:
    assert tiny_peaknet().weights_sha256 is None
    sha256 = small_peaknet().weights_sha256
    assert sha256 is not None
    assert len(sha256) == 64


@torch.inference_mode()
def test_a_fresh_network_gives_finite_logits_and_its_seed_decides_them() -> None:
    logits = []
    for _ in range(2):
        torch.manual_seed(3)
        logits.append(tiny_peaknet()(torch.ones(1, 1, 32, 64)))
    assert logits[0].isfinite().all()
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


@torch.inference_mode()
def test_panels_of_a_batch_do_not_see_each_other() -> None:
    images_N1HW, _ = golden()
    net = small_peaknet()
    torch.testing.assert_close(net(images_N1HW)[1:2], net(images_N1HW[1:2]), rtol=0, atol=2e-6)


@torch.inference_mode()
def test_learned_upsample_adds_a_transposed_convolution() -> None:
    net = tiny_peaknet(learned_upsample=True)
    assert net.head_upsample_layer is not None
    assert net.head_upsample_layer.weight.shape == (8, 2, 6, 6)
    images_N1HW = torch.randn(1, 1, 64, 96)
    with_it = net(images_N1HW)
    net.head_upsample_layer = None
    without_it = net(images_N1HW)
    assert with_it.shape == without_it.shape == (1, 2, 64, 96)
    assert not torch.equal(with_it, without_it)


def test_sizes_that_the_pyramid_cannot_halve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32, not 185x388: put Pad\(height=192, wi"):
        tiny_peaknet()(torch.zeros(1, 1, 185, 388))
    with pytest.raises(ValueError, match="MergeBatchChannelDims"):
        tiny_peaknet()(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(("sizes", "depths"), [((8, 8, 8), (1, 1)), ((8,), (1,))])
def test_stages_must_match(sizes: tuple[int, ...], depths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="same stages"):
        PeakNet(sizes, depths)


@pytest.mark.thorough
@torch.inference_mode()
def test_the_graph_is_whole() -> None:
    """One graph without a break; the eager backend, because compiling takes a minute here."""
    torch.compiler.reset()
    net = tiny_peaknet()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    images_N1HW = torch.randn(2, 1, 32, 64)
    torch.testing.assert_close(compiled(images_N1HW), net(images_N1HW))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_logits_enlarged_are_the_logits(dtype: torch.dtype) -> None:
    net = small_peaknet().to(dtype)
    images_N1HW = golden()[0].to(dtype)
    coarse_NCHW = net.coarse_logits(images_N1HW)
    assert net.coarse_stride == 4
    enlarged_NCHW = torch.nn.functional.interpolate(
        coarse_NCHW.float(), scale_factor=4, mode="bilinear"
    ).to(dtype)
    assert torch.equal(enlarged_NCHW, net(images_N1HW))
    assert tiny_peaknet(learned_upsample=True).coarse_stride is None
