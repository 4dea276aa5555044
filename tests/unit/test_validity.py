"""Which pixels the preprocessing counts as measurements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peaknet_predict.pixels import find_bad_pixels, pack_mask
from peaknet_predict.preprocess import (
    Crop,
    InstanceNorm,
    MergeBatchChannelDims,
    Preprocess,
    StaticMask,
    Validity,
    find_outliers,
    pack_masks,
)
from peaknet_predict.preprocess.validity import unpack_masks

DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def counts(dtype: str, shape: tuple[int, ...] = (2, 2, 40, 50), seed: int = 0) -> np.ndarray[Any]:
    return np.random.default_rng(seed).poisson(5, shape).astype(dtype)


def prepare(image: np.ndarray[Any], **options: Any) -> Any:
    bits = options.pop("bits", None)
    chain = Preprocess([InstanceNorm(), MergeBatchChannelDims()], Validity(**options))
    return chain(torch.from_numpy(image), bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_and_the_host_agree_about_values(dtype: str) -> None:
    image = counts(dtype)
    ends = np.iinfo(dtype) if dtype[0] != "f" else np.finfo(dtype)
    with np.errstate(over="ignore"):
        special = np.array([ends.max, ends.min, ends.max - 1, ends.min + 1, 0], dtype)
        if dtype[0] == "f":
            more = [
                np.nan,
                np.inf,
                -np.inf,
                65535,
                -32768,
                65534,
                32768,
                2**31,
                2**32 - 1,
                -(2**31),
            ]
            special = np.concatenate([special, np.array(more, dtype)])
    image[1, 0, 3, : len(special)] = special
    images, valid = Validity()(torch.from_numpy(image))
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(~valid.numpy(), find_bad_pixels(image))


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "i4", "f4"])
def test_bad_values_can_be_given_and_switched_off(dtype: str) -> None:
    image = counts(dtype)
    highest = 65535.0 if dtype == "f4" else np.iinfo(dtype).max
    image[0, 0, 0, :3] = 100, highest, 101
    for bad_values, bad in {
        "auto": [False, True, False],
        "none": [False, False, False],
        (100, -1, 2.5): [True, True, False],
    }.items():
        rule = bad_values if isinstance(bad_values, str) else list(bad_values)
        _, valid = Validity(rule)(torch.from_numpy(image))  # type: ignore[arg-type]
        assert (~valid[0, 0, 0, :3]).tolist() == bad
        assert valid.sum() == valid.numel() - sum(bad)
    with pytest.raises(ValueError, match="auto, none or a list"):
        Validity("automatic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN and infinity are always bad"):
        Validity([float("nan")])


def test_nan_and_infinity_are_bad_whatever_is_set() -> None:
    image = counts("f4")
    image[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    _, valid = Validity("none")(torch.from_numpy(image))
    assert int((~valid).sum()) == 3


def test_declared_pixels_and_the_static_mask_are_bad() -> None:
    image = counts("u2", (2, 3, 5, 7))
    declared = np.zeros((2, 3, 5, 7), np.bool_)
    declared[0, 1, 2, 3] = declared[1, 2, 4, 6] = True
    bits = torch.from_numpy(np.stack([pack_mask(mask) for mask in declared]))
    static = np.zeros((3, 5, 7), np.bool_)
    static[0, 0, 0] = True
    for mask in (static, static.reshape(15, 7)):
        prepared = prepare(image, mask=StaticMask(mask), bits=bits)
        np.testing.assert_array_equal(prepared.bad_BPHW.numpy(), declared | static)
        assert prepared.bad_pixels_B.tolist() == [2, 2]
    assert not prepared.valid_N1HW[1, 0, 2, 3]
    assert prepared.images_N1HW[1, 0, 2, 3] == 0


def test_a_mask_of_another_detector_is_refused() -> None:
    chain = Preprocess(
        [MergeBatchChannelDims()], Validity(mask=StaticMask(np.zeros((6, 7), np.bool_)))
    )
    assert chain.output_shape((2, 3, 7)) == (2, 3, 7)
    with pytest.raises(ValueError, match=r"mask has the shape \(6, 7\).*\(2, 6, 7\)"):
        chain.output_shape((2, 6, 7))
    assert not chain.state_dict()  # it belongs to a detector, not to a network's weights


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)
)
def test_masks_are_packed_as_on_the_host(
    events: int, panels: int, height: int, width: int, seed: int
) -> None:
    masks = np.random.default_rng(seed).random((events, panels, height, width)) < 0.5
    bits = pack_masks(torch.from_numpy(masks))
    np.testing.assert_array_equal(bits.numpy(), np.stack([pack_mask(mask) for mask in masks]))
    np.testing.assert_array_equal(unpack_masks(bits, torch.Size(masks.shape)).numpy(), masks)


def planted(dtype: str = "f4", seed: int = 1, mean: float = 5.0) -> np.ndarray[Any]:
    """Return one event with 20 strong peaks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:192, :256]
    image = rng.poisson(mean, (1, 1, 192, 256)).astype(dtype)
    for py, px in zip(rng.integers(12, 180, 20), rng.integers(12, 240, 20), strict=True):
        spot = 2000 * np.exp(-((y - py) ** 2 + (x - px) ** 2) / 2.4)
        image[0, 0] += rng.poisson(spot).astype(dtype)
    return image


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("u4", 2**32 - 1),
        ("u4", 2**32 - 2),
        ("u2", 65535),
        ("u2", 65534),
        ("i4", 2**31 - 1),
        ("i4", 2**31 - 2),
        ("i4", -(2**31)),
        ("i4", -(10**9)),
        ("i8", 2**63 - 1),
        ("i8", 10**6),
        ("f4", 1e30),
        ("f4", 1e9),
        ("f4", -1e9),
        ("f4", 1e6),
        ("f4", 2.0**32),
    ],
)
def test_no_single_pixel_rules_the_normalisation(dtype: str, value: float) -> None:
    image = planted(dtype)
    clean = prepare(image)
    spoiled = image.copy()
    spoiled[0, 0, 5, 5] = value
    prepared = prepare(spoiled)
    assert prepared.bad_pixels_B.tolist() == [1]
    assert prepared.bad_BPHW[0, 0, 5, 5]
    difference = (prepared.images_N1HW - clean.images_N1HW).flatten()
    difference[5 * 256 + 5] = 0
    assert float(difference.abs().max()) < 1e-2


@pytest.mark.parametrize("dtype", ["u2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("mean", [0.0, 0.01, 0.3, 5.0, 1000.0])
def test_measurements_are_no_outliers(dtype: str, mean: float) -> None:
    image = planted(dtype, mean=mean)
    # Overloaded to the last count below a PILATUS' limit, and a strong spot of few pixels.
    image[0, 0, 100:103, 50:53] = 60000 if dtype == "u2" else 2**20
    image[0, 0, 30, 30:32] = 60000, 2000
    prepared = prepare(image)
    assert prepared.bad_pixels_B.tolist() == [0]
    expected = torch.from_numpy(image.astype(np.float32))
    mean_, variance = expected.mean(), expected.var(correction=0)
    # Bit for bit what the norm alone makes of it.
    alone = InstanceNorm()(expected, torch.ones_like(expected, dtype=torch.bool))[0]
    assert torch.equal(prepared.images_N1HW, alone)
    torch.testing.assert_close(alone, (expected - mean_) / (variance + 1e-6).sqrt())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 9500.0])
def test_sparse_photons_and_panels_offsets_are_no_outliers(scale: float) -> None:
    rng = np.random.default_rng(0)
    image = rng.poisson(0.002, (1, 3, 128, 128)) + np.array([0, 0, 0.002])[:, None, None]
    image[0, 0, 20, 20] = 7
    prepared = prepare((image * scale).astype(np.float32))
    assert prepared.bad_pixels_B.tolist() == [0]


def test_an_unknown_mark_of_whole_regions_is_found() -> None:
    image = planted("i4")
    image[0, 0, :, 100:110] = 2**31 - 2
    image[0, 0, 50:60] = -(10**9)
    prepared = prepare(image)
    marked = (image == 2**31 - 2) | (image == -(10**9))
    np.testing.assert_array_equal(prepared.bad_BPHW.numpy(), marked)
    assert prepared.outliers_B.tolist() == [int(marked.sum())]


@pytest.mark.parametrize("fill", [np.nan, 0.0, 7.0])
def test_events_without_anything_in_them_have_no_outliers(fill: float) -> None:
    images = torch.full((2, 1, 33, 31), fill)
    valid = ~images.isnan()
    assert not find_outliers(images, valid).any()
    images[0, 0, 0, 0], valid[0, 0, 0, 0] = 1e6, True
    assert not find_outliers(images, valid).any()


def test_every_event_is_judged_by_itself() -> None:
    quiet, loud = counts("f4", (1, 1, 64, 64)), counts("f4", (1, 1, 64, 64)) * 1e5
    both = np.concatenate([quiet, loud])
    both[:, 0, 9, 9] = 3e5
    assert prepare(both).outliers_B.tolist() == [1, 0]


def test_what_is_cropped_away_counts_as_well() -> None:
    image = torch.from_numpy(planted("u4"))
    image[0, 0, -1, -1] = 2**32 - 1
    chain = Preprocess([Crop(64, 64, allow_crop=True), InstanceNorm(), MergeBatchChannelDims()])
    prepared = chain(image)
    assert prepared.bad_pixels_B.tolist() == [1]
    assert prepared.bad_BPHW.shape == image.shape
    assert bool(prepared.valid_N1HW.all())


@pytest.mark.thorough
def test_validity_compiles_as_one_graph() -> None:
    chain = Preprocess([InstanceNorm(), MergeBatchChannelDims()], Validity([-1]))
    image: Tensor = torch.from_numpy(planted("i4"))
    image[0, 0, 5, 5], image[0, 0, 7, 7] = 10**9, -1
    compiled = torch.compile(chain, fullgraph=True, dynamic=False, backend="eager")
    for ours, theirs in zip(compiled(image), chain(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
