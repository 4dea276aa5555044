"""Which values mark bad pixels, and how a mask travels from a producer to a reader."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.pixels import find_bad_pixels, pack_mask, unpack_mask
from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.wire import event_to_item, item_to_event, item_to_results
from peaknet_predict.types import Event, EventId, Result


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "u4", "u8", "i1", "i2", ">i4", "i4", "i8"])
def test_the_ends_of_an_integer_dtype_mark_bad_pixels(dtype: str) -> None:
    limits = np.iinfo(dtype)
    image = np.array([[0, 5, limits.max], [limits.max - 1, limits.min, limits.min + 1]], dtype)
    signed = limits.min < 0
    expected = [[False, False, True], [False, signed, False]]
    np.testing.assert_array_equal(find_bad_pixels(image), expected)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
def test_nan_infinity_and_widened_integers_mark_bad_pixels(dtype: str) -> None:
    bad = [np.nan, np.inf, -np.inf, -32768.0]
    if dtype != "f2":
        bad += [65535.0, 2.0**32 - 1, 2.0**31 - 1, -(2.0**31), 1e38]
    if dtype == "f8":
        bad += [1e300]
    good = [0.0, -1.0, 255.0, 32767.0, 65504.0, -65504.0]
    assert find_bad_pixels(np.array(bad, dtype)).all()
    assert not find_bad_pixels(np.array(good, dtype)).any()


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_mask_comes_back_from_its_bits(panels: int, height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((panels, height, width)) < 0.5
    bits = pack_mask(mask)
    assert bits.size == -(-mask.size // 8)
    np.testing.assert_array_equal(unpack_mask(bits, mask.shape), mask)


def test_a_masked_array_keeps_its_mask_from_a_foreign_producer_to_a_foreign_reader() -> None:
    pixels = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    mask = pixels % 5 == 0
    item = sanitized([0, 7, np.ma.MaskedArray(pixels, mask), 9500.0])
    event = item_to_event(item, "s", 0)
    assert isinstance(event, Event)
    assert type(event.image) is np.ndarray
    np.testing.assert_array_equal(event.image, pixels)  # also under the mask
    assert event.bad_bits is not None
    np.testing.assert_array_equal(unpack_mask(event.bad_bits, pixels.shape), mask)
    again = event_to_item(event)[2]
    np.testing.assert_array_equal(again.data, pixels)
    np.testing.assert_array_equal(again.mask, mask)


def test_a_masked_array_without_masked_pixels_is_an_image_like_any_other() -> None:
    event = Event(EventId("s", 0, 0), np.ma.MaskedArray(np.ones((2, 3))), 9500.0)
    assert type(event.image) is np.ndarray
    assert event.bad_bits is None


def test_a_result_knows_its_bad_pixels_or_finds_them() -> None:
    image = np.full((1, 2, 3), 7, np.uint16)
    image[0, 0, 0] = 65535
    where = image == 65535
    empty = np.empty((0, 3))
    unknown = Result(EventId("s", 0, 0), image, empty, 9500.0)
    np.testing.assert_array_equal(unknown.bad_mask(), where)
    none = Result(EventId("s", 0, 0), image, empty, 9500.0, bad_bits=np.empty(0, np.uint8))
    assert none.bad_mask() is None
    (foreign,) = item_to_results([(np.ma.MaskedArray(image, ~where), [], 9500.0)], "s", 0)
    assert isinstance(foreign, Result)
    np.testing.assert_array_equal(foreign.bad_mask(), ~where)
