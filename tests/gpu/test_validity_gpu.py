"""Which pixels count as measurements: on a GPU as on a CPU, bit for bit, whatever the dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.pixels import find_bad_pixels, pack_mask
from peaknet_predict.preprocess import Preprocess, StaticMask, Validity, pack_masks
from peaknet_predict.preprocess.validity import unpack_masks
from peaknet_predict.types import Event, EventBatch, EventId
from tests.helpers.prediction import chain, predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
SHAPES = [(2, 3, 33, 47), (1, 1, 8, 8), (3, 1, 5, 7)]
_MARKS = (65535, -32768, 65534, 2.0**31, -(2.0**31), 2.0**32 - 1, -1, -2)


def counts(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return counts with every special value of their dtype in each event."""
    rng = np.random.default_rng(1)
    image = rng.poisson(5, shape).astype(dtype)
    if dtype[0] == "f":
        limits = np.finfo(dtype)
        with np.errstate(over="ignore"):
            special = np.array([np.nan, np.inf, -np.inf, limits.max, limits.min, *_MARKS], dtype)
    else:
        ends = np.iinfo(dtype)
        special = np.array([ends.max, ends.min, ends.max - 1, ends.min + 1, 0], dtype)
    flat = image.reshape(len(image), -1)
    for row in flat:
        row[rng.permutation(flat.shape[1])[: len(special)]] = special
    return image


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bad_values", ["auto", "none", [-1, -2, 3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: str, bad_values: Any, shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(counts(dtype, shape))
    rng = np.random.default_rng(2)
    mask = StaticMask(rng.random(shape[1:]) < 0.1, -5.0, 1e6, (4.0,))
    bits = torch.from_numpy(np.stack([pack_mask(rng.random(shape[1:]) < 0.1) for _ in image]))
    for static, declared in ((None, None), (mask, bits)):
        rule = Validity(bad_values, static)
        images, valid = rule(image, declared)
        on_gpu = None if declared is None else declared.to(DEVICE)
        found_images, found = rule.to(DEVICE)(image.to(DEVICE), on_gpu)
        assert torch.equal(found.cpu(), valid)
        torch.testing.assert_close(found_images.cpu(), images, rtol=0, atol=0, equal_nan=True)
        if bad_values == "auto" and declared is None:
            np.testing.assert_array_equal(~valid.numpy(), find_bad_pixels(image.numpy()))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 512, 512)], ids=str)
def test_masks_as_bits(shape: tuple[int, ...]) -> None:
    masks = np.random.default_rng(3).random(shape) < 0.5
    bits = pack_masks(torch.from_numpy(masks).to(DEVICE))
    np.testing.assert_array_equal(bits.cpu().numpy(), np.stack([pack_mask(m) for m in masks]))
    np.testing.assert_array_equal(unpack_masks(bits, torch.Size(shape)).cpu().numpy(), masks)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["u2", "u4", "i4", "f4"])
def test_the_whole_preprocessing(dtype: str, compiled: bool) -> None:
    image = np.random.default_rng(4).poisson(5, (2, 2, 96, 128)).astype(dtype)
    image[0, 0, 3, 4] = 60000 if dtype == "u2" else 10**9
    image[1, 1, 40:44] = 65535 if dtype == "f4" else np.iinfo(dtype).max
    preprocess = Preprocess(chain())
    expected = preprocess(torch.from_numpy(image))
    run = torch.compile(preprocess.transform, dynamic=False) if compiled else preprocess.transform
    prepared = run(*preprocess.widen(torch.from_numpy(image).to(DEVICE)))
    assert torch.equal(prepared.bad_BPHW.cpu(), expected.bad_BPHW)
    assert torch.equal(prepared.valid_N1HW.cpu(), expected.valid_N1HW)
    assert prepared.bad_pixels_B.tolist() == expected.bad_pixels_B.tolist()
    assert prepared.outliers_B.tolist() == expected.outliers_B.tolist()
    assert expected.outliers_B.tolist() == [1, 0]
    torch.testing.assert_close(prepared.images_N1HW.cpu(), expected.images_N1HW)


@pytest.mark.parametrize("dtype", ["u2", "u4", "i4", "f4"])
def test_results_say_the_same(dtype: str) -> None:
    rng = np.random.default_rng(5)
    batches = []
    for first in (0, 4):
        events = []
        for idx in range(first, first + 3):
            image = rng.poisson(5, (2, 96, 128)).astype(dtype)
            y, x = rng.integers(8, 80, 12), rng.integers(8, 110, 12)
            for place in zip(rng.integers(0, 2, 12), y, x, strict=True):
                image[place[0], place[1] - 1 : place[1] + 2, place[2] - 1 : place[2] + 2] += 90
            image[1, 50:56] = np.nan if dtype == "f4" else np.iinfo(dtype).max
            if idx % 2:
                image = np.ma.MaskedArray(image, rng.random(image.shape) < 0.01)
            events.append(Event(EventId("s", 0, idx), image, 9500.0))
        images = torch.from_numpy(np.stack([*(e.image for e in events), 0 * events[0].image]))
        batches.append(EventBatch(images.pin_memory(), events, []))
    here, there = (
        predict(PeakNetModule(LocalSnr(), chain(), saturation=95.0), batches, accelerator=device)
        for device in ("cpu", "gpu")
    )
    for ours, theirs in zip(here, there, strict=True):
        for a, b in zip(ours.results, theirs.results, strict=True):
            assert (a.id, a.bad_pixels, a.saturation) == (b.id, b.bad_pixels, b.saturation)
            assert a.bad_bits is not None
            np.testing.assert_array_equal(a.bad_bits, b.bad_bits)
            mask = a.bad_mask()
            assert mask is not None
            assert mask.sum() == a.bad_pixels > 0
            assert not any(mask[tuple(np.rint(peak).astype(int))] for peak in b.peaks)
            assert len(a.peaks) == len(b.peaks)
