from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peaknet_predict.preprocess import (
    Crop,
    InstanceNorm,
    LocalNorm,
    MergeBatchChannelDims,
    Pad,
    PadToMultiple,
    Prepared,
    Preprocess,
    Transform,
)
from tests.helpers.examples import examples


def normed(images_BPHW: Tensor, *transforms: Transform) -> Tensor:
    """Return prepared panels (N, H, W)."""
    chain = [*(transforms or (LocalNorm(),)), MergeBatchChannelDims()]
    prepared: Prepared = Preprocess(chain)(images_BPHW)
    return prepared.images_N1HW[:, 0]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photons(mean: float, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full(shape, mean), generator=generator)


def test_noise_is_in_sigmas_whatever_its_size() -> None:
    scale = torch.tensor([0.01, 5.0, 300.0]).reshape(1, 3, 1, 1)
    z = normed(noise(1, 3, 128, 120) * scale + 100 * scale)
    for panel in z:
        assert abs(float(panel.mean())) < 0.02
        assert abs(float(panel.std()) - 1) < 0.05


def test_a_peak_has_the_height_of_its_excess() -> None:
    images = noise(1, 1, 96, 96) * 7 + 1000
    images[0, 0, 40, 41] = 1000 + 7 * 3.5
    images[0, 0, 60, 61] = 1000 + 7 * 400
    (z,) = normed(images)
    assert float(z[40, 41]) == pytest.approx(3.5, rel=0.15)
    assert float(z[60, 61]) == pytest.approx(4 * (1 + math.log(100)), rel=0.03)
    deep = images.clone()
    deep[0, 0, 60, 61] = 1000 - 7 * 400
    assert float(normed(deep)[0, 60, 61]) == pytest.approx(-float(z[60, 61]), rel=0.01)


@examples(60)
@given(
    scale=st.floats(1e-3, 1e3),
    offsets=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["noise", "photons", "few photons"]),
)
def test_neither_unit_nor_a_panels_offset_matter(
    scale: float, offsets: list[float], seed: int, kind: str
) -> None:
    images = {
        "noise": noise(1, 3, 40, 50, seed=seed),
        "photons": photons(3.0, 1, 3, 40, 50, seed=seed),
        "few photons": photons(0.02, 1, 3, 40, 50, seed=seed),
    }[kind]
    images[0, 1, 20:23, 30:33] += 30
    images[0, 2, ::9, 7] = torch.nan
    moved = (images + torch.tensor(offsets).reshape(1, 3, 1, 1)) * scale
    # An offset of 1000 costs float32 three of its seven digits.
    torch.testing.assert_close(normed(moved), normed(images), atol=2e-3, rtol=2e-3)


def test_hot_pixels_and_bad_columns_stay_where_they_are() -> None:
    images = noise(1, 1, 96, 96) * 3 + 50
    spoiled = images.clone()
    spoiled[0, 0, 13, 17] = 1e30
    spoiled[0, 0, 50, 50] = -1e9
    spoiled[0, 0, :, 70] = 6e4
    # Without `find_outliers`, which would leave out two of them.
    everything = torch.ones_like(images, dtype=torch.bool)
    clean, z = (LocalNorm()(frames, everything)[0][0, 0] for frames in (images, spoiled))
    changed = torch.zeros(96, 96, dtype=torch.bool)
    changed[13, 17] = changed[50, 50] = True
    changed[:, 70] = True
    assert torch.isfinite(z).all()
    assert (z[changed].abs() > 20).all()
    # Elsewhere little changes: medians of nine blocks move by a place or two.
    assert float((z - clean)[~changed].abs().max()) < 0.6
    assert abs(float(z[~changed].std()) - 1) < 0.05


def test_another_panel_and_a_far_region_have_no_say() -> None:
    images = noise(1, 2, 96, 96)
    changed = images.clone()
    changed[0, 1] *= 1e4
    changed[0, 0, :, 64:] += 1e3
    assert torch.equal(normed(images)[0, :, :40], normed(changed)[0, :, :40])


def test_bad_pixels_become_the_background_and_do_not_spread() -> None:
    images = noise(1, 1, 64, 64) + 1000
    holed = images.clone()
    holed[0, 0, 5, 5], holed[0, 0, 5, 6] = torch.nan, torch.inf
    holed[0, 0, 30:33, :] = torch.nan
    prepared = Preprocess([LocalNorm(), MergeBatchChannelDims()])(holed)
    z = prepared.images_N1HW[0, 0]
    bad = ~torch.isfinite(holed[0, 0])
    assert (z[bad] == 0).all()
    assert torch.equal(prepared.valid_N1HW[0, 0], ~bad)
    torch.testing.assert_close(z[~bad], normed(images)[0][~bad], atol=0.5, rtol=0.1)


def test_a_panel_without_noise_or_without_pixels_is_background() -> None:
    images = torch.zeros(1, 4, 40, 40)
    images[0, 1] = 12345.678
    images[0, 2] = torch.nan
    images[0, 3, :, :20] = 1e6
    z = normed(images)
    assert (z[0] == 0).all()
    assert float(z[1].abs().max()) < 0.5  # rounding
    assert (z[2] == 0).all()
    assert (z[3, :, :8] == 0).all()


def test_single_photons_in_the_dark_are_no_peaks() -> None:
    for mean in (1e-4, 1e-3, 1e-2, 0.05):
        z = normed(photons(mean, 1, 2, 256, 256))
        assert float(z.max()) < 12
        one = z[photons(mean, 1, 2, 256, 256)[0] == 1]
        assert float(one.max()) < 3.5, (
            f"a photon counts {float(one.max())} sigmas at {mean} a pixel"
        )


def test_a_shadow_does_not_blow_up() -> None:
    images = photons(40.0, 1, 1, 128, 128)
    images[0, 0, 40:80, 40:80] = photons(0.001, 40, 40)
    (z,) = normed(images)
    assert float(z[56:64, 56:64].abs().max()) < 2
    # Nor does its border look like a row of peaks.
    border = torch.cat([z[36:44, 44:76].flatten(), z[76:84, 44:76].flatten()])
    assert float(border.abs().max()) < 8


def test_a_slope_is_background() -> None:
    y = torch.arange(256.0)
    rings = 30 * torch.exp(-(((y - 120) / 25) ** 2)) + 0.02 * y
    mean = (5 + rings[:, None] + 0.5 * rings[None, :]).reshape(1, 1, 256, 256)
    images = torch.poisson(mean, generator=torch.Generator().manual_seed(3))
    (z,) = normed(images)
    assert abs(float(z.std()) - 1) < 0.06
    blocks = torch.nn.functional.avg_pool2d(z[None, None], 16)
    assert float(blocks.abs().max()) < 0.5


def test_padding_and_cropping_around_it_change_nothing() -> None:
    images = noise(1, 2, 45, 70) + 7
    alone = normed(images)
    padded = normed(images, LocalNorm(), PadToMultiple(32))
    assert padded.shape == (2, 64, 96)
    assert torch.equal(padded[:, :45, :70], alone)
    assert (padded[:, 45:] == 0).all()
    assert (padded[:, :, 70:] == 0).all()
    before = normed(images, PadToMultiple(32), LocalNorm())
    # Beyond the border lie blocks whose background is guessed from their neighbours.
    torch.testing.assert_close(before, padded, atol=0.2, rtol=0)
    assert normed(images, LocalNorm(), Crop(32, 32, allow_crop=True)).shape == (2, 32, 32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (8, 8), (9, 17)])
def test_panels_of_any_size(shape: tuple[int, int]) -> None:
    images = noise(2, 3, *shape)
    z = normed(images)
    assert z.shape == (6, *shape)
    assert torch.isfinite(z).all()


def test_pad_to_multiple_keeps_coordinates_and_marks_padding() -> None:
    preprocess = Preprocess([PadToMultiple(16), MergeBatchChannelDims()])
    prepared = preprocess(torch.ones(1, 1, 17, 32))
    assert preprocess.output_shape((1, 17, 32)) == (1, 32, 32)
    assert prepared.valid_N1HW.sum() == 17 * 32
    assert prepared.valid_N1HW[0, 0, :17].all()
    with pytest.raises(ValueError, match="must be positive"):
        PadToMultiple(0)


def test_labels_go_where_the_pixels_go() -> None:
    labels = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4)
    preprocess = Preprocess([LocalNorm(), Pad(5, 6, "center"), MergeBatchChannelDims()])
    moved = preprocess.move(labels, fill=255)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[:, 0, 1:4, 1:5], labels[0])
    assert (moved == 255).sum() == 2 * (30 - 12)
    with_norm = Preprocess([InstanceNorm(), MergeBatchChannelDims()])
    assert torch.equal(with_norm.move(labels, fill=255)[:, 0], labels[0])


def test_wrong_orders_and_arguments_name_the_remedy() -> None:
    for transforms, message in (
        ([LocalNorm(), InstanceNorm()], "one LocalNorm is enough: remove InstanceNorm"),
        ([LocalNorm(), LocalNorm()], "one LocalNorm is enough"),
        ([InstanceNorm(), PadToMultiple()], "move PadToMultiple before"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess([*transforms, MergeBatchChannelDims()])
    with pytest.raises(ValueError, match="at least 2x2"):
        LocalNorm(block=1)


@pytest.mark.thorough
def test_the_graph_is_whole() -> None:
    torch.compiler.reset()
    preprocess = Preprocess([LocalNorm(), PadToMultiple(32), MergeBatchChannelDims()])
    compiled = torch.compile(preprocess, fullgraph=True, dynamic=False, backend="eager")
    images = noise(2, 3, 45, 70)
    images[0, 0, 3, 3] = torch.nan
    for ours, theirs in zip(compiled(images), preprocess(images), strict=True):
        torch.testing.assert_close(ours, theirs)
