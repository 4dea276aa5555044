from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.preprocess import (
    Crop,
    InstanceNorm,
    MergeBatchChannelDims,
    Pad,
    Patchify,
    Preprocess,
    Shape,
    Transform,
)
from tests.helpers.examples import examples


def chain(*transforms: Transform) -> Preprocess:
    return Preprocess([*transforms, MergeBatchChannelDims()])


def ramp(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + int(np.prod(shape))).reshape(shape)


def normalised(images_BPHW: npt.NDArray[Any], eps: float = 1e-6) -> npt.NDArray[np.float64]:
    """The facts in NumPy: float64, biased variance over (P, H, W), NaN left out and set to 0."""
    out = []
    for image_PHW in images_BPHW.astype(np.float64):
        good = np.isfinite(image_PHW)
        mean, var = (image_PHW[good].mean(), image_PHW[good].var()) if good.any() else (0.0, 0.0)
        out.append(np.where(good, (image_PHW - mean) / np.sqrt(var + eps), 0.0))
    return np.stack(out)


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "uint16", "int16", "uint32", "int32", "int64", "float16", "float32", "float64"],
)
def test_instance_norm_equals_numpy(dtype: str) -> None:
    rng = np.random.default_rng(0)
    low, high = (0, 250) if dtype == "uint8" else (1000, 1100)
    images_BPHW = rng.integers(low, high, size=(3, 2, 37, 41)).astype(dtype)
    prepared = chain(InstanceNorm())(torch.from_numpy(images_BPHW))
    expected_N1HW = normalised(images_BPHW).reshape(6, 1, 37, 41)
    assert prepared.images_N1HW.dtype == torch.float32
    np.testing.assert_allclose(prepared.images_N1HW.numpy(), expected_N1HW, atol=2e-5)
    assert prepared.valid_N1HW.all()
    assert prepared.bad_pixels_B.tolist() == [0, 0, 0]


def test_a_large_offset_costs_no_precision() -> None:
    images_BPHW = 60000 + np.random.default_rng(1).normal(0, 5, size=(1, 4, 256, 256))
    prepared = chain(InstanceNorm())(torch.from_numpy(images_BPHW))
    np.testing.assert_allclose(
        prepared.images_N1HW.numpy()[:, 0], normalised(images_BPHW)[0], atol=2e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bad_pixels_are_left_out_and_counted(dtype: str) -> None:
    normal_BPHW = np.random.default_rng(2).normal(50, 7, size=(3, 2, 16, 16))
    images_BPHW: npt.NDArray[Any] = normal_BPHW.astype(dtype)
    images_BPHW[0, 0, 3, 4], images_BPHW[0, 1, 0, 0] = np.nan, np.inf
    images_BPHW[2] = -np.inf
    prepared = chain(InstanceNorm())(torch.from_numpy(images_BPHW))
    expected_N1HW = normalised(images_BPHW).reshape(6, 1, 16, 16)
    np.testing.assert_allclose(prepared.images_N1HW.numpy(), expected_N1HW, atol=2e-5)
    assert prepared.bad_pixels_B.dtype == torch.int64
    assert prepared.bad_pixels_B.tolist() == [2, 0, 512]
    bad_N1HW = ~np.isfinite(images_BPHW).reshape(6, 1, 16, 16)
    np.testing.assert_array_equal(prepared.valid_N1HW.numpy(), ~bad_N1HW)


def test_bad_pixels_that_are_cropped_away_count_too() -> None:
    images_BPHW = torch.zeros(1, 1, 8, 8)
    images_BPHW[0, 0, 7, 7] = torch.nan
    prepared = chain(Crop(4, 4, allow_crop=True))(images_BPHW)
    assert prepared.bad_pixels_B.tolist() == [1]
    assert prepared.valid_N1HW.all()


def test_without_a_norm_bad_pixels_become_zero() -> None:
    images_BPHW = torch.full((1, 1, 2, 2), torch.nan)
    prepared = chain()(images_BPHW)
    assert prepared.images_N1HW.eq(0).all()
    assert not prepared.valid_N1HW.any()


def test_padding_takes_part_in_the_statistics_but_is_invalid() -> None:
    images_BPHW = ramp((2, 2, 5, 6))
    padded_BPHW = np.pad(images_BPHW.numpy(), ((0, 0), (0, 0), (1, 2), (1, 1)))
    prepared = chain(Pad(8, 8), InstanceNorm())(images_BPHW)
    expected_N1HW = normalised(padded_BPHW).reshape(4, 1, 8, 8)
    np.testing.assert_allclose(prepared.images_N1HW.numpy(), expected_N1HW, atol=1e-5)
    np.testing.assert_array_equal(
        prepared.valid_N1HW.numpy(), (padded_BPHW != 0).reshape(4, 1, 8, 8)
    )


def test_crop_and_pad_and_patchify_put_pixels_where_they_say() -> None:
    images_BPHW = ramp((1, 1, 5, 6))
    image_HW = images_BPHW[0, 0].numpy()

    def images(*transforms: Transform) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = chain(*transforms)(images_BPHW).images_N1HW[:, 0].numpy()
        return array

    np.testing.assert_array_equal(images(Crop(3, 2, allow_crop=True))[0], image_HW[:3, :2])
    np.testing.assert_array_equal(
        images(Crop(3, 3, "center", allow_crop=True))[0], image_HW[1:4, 1:4]
    )
    np.testing.assert_array_equal(
        images(Pad(6, 9, "bottom-right"))[0], np.pad(image_HW, ((0, 1), (0, 3)))
    )
    np.testing.assert_array_equal(images(Pad(6, 9))[0], np.pad(image_HW, ((0, 1), (1, 2))))
    patches = images(Patchify(3, 4))
    filled_HW = np.pad(image_HW, ((0, 1), (0, 2)))
    corners = [(0, 0), (0, 4), (3, 0), (3, 4)]
    for patch, (y, x) in zip(patches, corners, strict=True):
        np.testing.assert_array_equal(patch, filled_HW[y : y + 3, x : x + 4])


def test_merge_keeps_the_order_of_events_and_panels() -> None:
    images_BPHW = ramp((3, 2, 4, 4))
    prepared = chain()(images_BPHW)
    for n in range(6):
        assert torch.equal(prepared.images_N1HW[n, 0], images_BPHW[n // 2, n % 2])


@st.composite
def shapes_and_chains(draw: st.DrawFn) -> tuple[Shape, list[Transform]]:
    """An event's shape and any legal chain for it."""
    shape: Shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(4, 23)),
        draw(st.integers(4, 23)),
    )
    transforms: list[Transform] = []
    now = shape
    for kind in draw(st.lists(st.sampled_from(["crop", "pad", "patch"]), max_size=3)):
        transform: Transform
        if kind == "crop":
            size = draw(st.integers(1, now[1])), draw(st.integers(1, now[2]))
            transform = Crop(*size, draw(st.sampled_from(["top-left", "center"])), allow_crop=True)
        elif kind == "pad":
            size = draw(st.integers(now[1], now[1] + 9)), draw(st.integers(now[2], now[2] + 9))
            transform = Pad(*size, draw(st.sampled_from(["center", "bottom-right"])))
        else:
            transform = Patchify(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
        transforms.append(transform)
        now = transform.output_shape(now)
    if draw(st.booleans()):
        transforms.append(InstanceNorm())
    return shape, transforms


@examples(150)
@given(shapes_and_chains(), st.data())
def test_a_pixel_finds_its_way_back(
    case: tuple[Shape, list[Transform]], data: st.DataObject
) -> None:
    shape, transforms = case
    where = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    images_BPHW = torch.zeros(1, *shape)
    images_BPHW[(0, *where)] = 1000.0
    preprocess = chain(*transforms)
    prepared = preprocess(images_BPHW)
    expected_shape = preprocess.output_shape(shape)
    assert prepared.images_N1HW.shape == (expected_shape[0], 1, *expected_shape[1:])
    assert prepared.valid_N1HW.shape == prepared.images_N1HW.shape

    found_M3 = np.argwhere(prepared.images_N1HW[:, 0].numpy() > 0.5).astype(np.float64)
    back_M3, keep_M = preprocess.to_original(found_M3, shape)
    # A crop may have cut the pixel off; one alone on a single pixel has no variance.
    assert len(back_M3) <= 1
    assert keep_M.all()
    for peak in back_M3:
        assert tuple(peak) == where
    # Every valid pixel comes from inside the original frame, every other one from outside.
    valid_M3 = np.argwhere(prepared.valid_N1HW[:, 0].numpy()).astype(np.float64)
    padding_M3 = np.argwhere(~prepared.valid_N1HW[:, 0].numpy()).astype(np.float64)
    assert preprocess.to_original(valid_M3, shape)[1].all()
    assert not preprocess.to_original(padding_M3, shape)[1].any()


def test_peaks_in_padding_are_dropped_and_reported() -> None:
    preprocess = chain(Pad(16, 16))
    peaks, keep_M = preprocess.to_original(
        np.array([[0, 5.25, 6.5], [1, 0.0, 8.0], [1, 11.0, 4.0]]), (2, 8, 8)
    )
    np.testing.assert_array_equal(keep_M, [True, False, True])
    np.testing.assert_array_equal(peaks, [[0, 1.25, 2.5], [1, 7.0, 0.0]])
    none, keep_M = preprocess.to_original(np.empty((0, 3)), (2, 8, 8))
    assert none.shape == (0, 3)
    assert keep_M.shape == (0,)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([], "end with MergeBatchChannelDims.*got nothing"),
        ([InstanceNorm()], "end with MergeBatchChannelDims.*got InstanceNorm"),
        ([MergeBatchChannelDims(), InstanceNorm()], "end with MergeBatchChannelDims"),
        ([MergeBatchChannelDims(), MergeBatchChannelDims()], "have no other"),
        ([InstanceNorm(), Pad(8, 8), MergeBatchChannelDims()], "Pad stands after.*move Pad before"),
        ([InstanceNorm(), Crop(8, 8), MergeBatchChannelDims()], "move Crop before"),
        ([InstanceNorm(), InstanceNorm(), MergeBatchChannelDims()], "one InstanceNorm"),
        ([torch.nn.Identity(), MergeBatchChannelDims()], "Identity is not a Transform"),
    ],
)
def test_wrong_orders_name_the_remedy(transforms: list[Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(transforms)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Crop(512, 512), r"185x388 are smaller .* put Pad\(height=512, width=512\)"),
        (Crop(100, 512), r"put Pad\(height=185, width=512\)"),
        (
            Crop(185, 194),
            r"leaves out 50% of a panel of 185x388, and the peaks there: .* allow_crop",
        ),
        (Crop(100, 388), r"take PadToMultiple or Patchify\(height=100, width=388\) instead"),
        (Pad(100, 512), r"185x388 are larger .* enlarge it to Pad\(height=185, width=512\)"),
    ],
)
def test_sizes_that_do_not_fit_name_the_remedy(transform: Transform, message: str) -> None:
    preprocess = chain(transform)
    with pytest.raises(ValueError, match=message):
        preprocess.output_shape((4, 185, 388))
    with pytest.raises(ValueError, match=message):
        preprocess(torch.zeros(1, 4, 185, 388))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="style of Crop"):
        Crop(8, 8, "bottom")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="style of Pad"):
        Pad(8, 8, "top-left")  # type: ignore[arg-type]
    for transform in (Crop, Pad, Patchify):
        with pytest.raises(ValueError, match="must be positive"):
            transform(0, 8)
    with pytest.raises(ValueError, match=r"shape \(B, P, H, W\), not \(4, 8, 8\)"):
        chain()(torch.zeros(4, 8, 8))


@pytest.mark.thorough
def test_the_graph_is_whole() -> None:
    torch.compiler.reset()
    preprocess = chain(
        Pad(20, 24), Crop(18, 18, "center", allow_crop=True), InstanceNorm(), Patchify(8, 8)
    )
    compiled = torch.compile(preprocess, fullgraph=True, backend="eager")
    images_BPHW = torch.randn(2, 3, 19, 17, dtype=torch.float64)
    images_BPHW[0, 0, 3, 3] = torch.nan
    for ours, theirs in zip(compiled(images_BPHW), preprocess(images_BPHW), strict=True):
        torch.testing.assert_close(ours, theirs)
