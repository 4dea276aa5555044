"""Bad pixels on the whole way from an event to its result: no peak on one, none lost for one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.batching import Batcher, check_event
from peaknet_predict.first_refusals import UnfitStreamError
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.pixels import find_bad_pixels, pack_mask, sentinels
from peaknet_predict.preprocess import Crop, Patchify, Transform
from peaknet_predict.types import Event, EventBatch, EventId, Result
from tests.helpers.examples import examples
from tests.helpers.prediction import chain

Image = np.ndarray[Any, Any]


def planted(
    dtype: str,
    seed: int = 1,
    shape: tuple[int, int, int] = (1, 192, 256),
    spots: int = 20,
    height: float = 200.0,
) -> tuple[Image, np.ndarray[Any, Any]]:
    """Return an image with peaks, and where they are, (M, 3).

    They are far enough apart not to be each other's background.
    """
    rng = np.random.default_rng(seed)
    image = rng.poisson(5.0, shape)
    panels, rows, columns = shape
    ny, nx = (rows - 10) // 26, (columns - 10) // 26
    cells = rng.permutation(panels * ny * nx)[:spots]
    places = np.stack([cells // (ny * nx), cells // nx % ny * 26 + 16, cells % nx * 26 + 16], 1)
    places[:, 1:] += rng.integers(-2, 3, (len(places), 2))
    y, x = np.mgrid[-5:6, -5:6]
    profile = height * np.exp(-(y**2 + x**2) / 2.4)
    for panel, py, px in places:
        image[panel, py - 5 : py + 6, px - 5 : px + 6] += rng.poisson(profile)
    # As many as a u1 holds without its mark.
    return image.clip(max=250).astype(dtype), places


def batch_of(*images: Image) -> EventBatch:
    events = [Event(EventId("s", 0, k), image, 9500.0) for k, image in enumerate(images)]
    batcher = Batcher(len(events))
    assert not list(batcher.add(events))
    return batcher.take()


def listed(*images: Image, first: tuple[Transform, ...] = (), **options: Any) -> list[Result]:
    """Return the results of events that go through `LocalSnr`."""
    module = PeakNetModule(LocalSnr(), chain(*first), **options).eval()
    with torch.inference_mode():
        answer = module.predict_step(batch_of(*images), 0).result()
    assert not answer.refused, answer.refused[0]
    return answer.results


def found(result: Result, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return which of the places have a peak within a pixel and a half."""
    peaks = np.concatenate([result.peaks, np.full((1, 3), 1e9)])
    away = np.abs(peaks[None] - places[:, None])
    return np.asarray(((away[..., 0] == 0) & (away[..., 1:].max(-1) <= 1.5)).any(1))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("u4", 2**32 - 1),
        ("u4", 10**6),
        ("u2", 2**16 - 1),
        ("u1", 2**8 - 1),
        ("i4", 2**31 - 1),
        ("i4", -(2**31)),
        ("i4", 2**31 - 2),
        ("i2", -(2**15)),
        ("u8", 2**64 - 1),
        ("f4", 2.0**32 - 1),
        ("f4", 1e9),
        ("f8", 1e300),
        ("f4", np.inf),
    ],
)
def test_one_dead_pixel_costs_no_peak(dtype: str, value: float) -> None:
    image, places = planted(dtype)
    spoiled = image.copy()
    spoiled[0, 5, 5] = value
    clean, dead = listed(image, spoiled)
    assert found(clean, places).all()
    np.testing.assert_allclose(dead.peaks, clean.peaks)
    assert dead.bad_pixels == 1
    mask = dead.bad_mask()
    assert mask is not None
    assert np.argwhere(mask).tolist() == [[0, 5, 5]]
    assert clean.bad_pixels == 0
    assert clean.bad_mask() is None


def test_bright_pixels_side_by_side_cost_no_peak() -> None:
    image, places = planted("u4")
    image[0, 4:6, 4:6] = 2 * 10**6
    image[0, :, 250] = 10**6
    (result,) = listed(image)
    assert found(result, places).all()


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
def test_gaps_cost_no_peak_and_make_none(dtype: str) -> None:
    image, places = planted(dtype, shape=(2, 192, 256), spots=60)
    gaps = np.zeros(image.shape, np.bool_)
    gaps[:, :, 94:104] = gaps[:, 60:67] = gaps[1, 120:160, 200:] = True
    rng = np.random.default_rng(3)
    gaps |= rng.random(image.shape) < 0.002
    marks = (np.nan, np.inf) if dtype == "f4" else sentinels(np.dtype(dtype))
    gapped = np.where(gaps, rng.choice(np.array(marks, dtype), image.shape), image)
    clean, result = listed(image, gapped.astype(dtype))
    assert result.bad_pixels == gaps.sum()
    y, x = np.mgrid[-3:4, -3:4].reshape(2, -1)
    clear = np.array([not gaps[p, py + y, px + x].any() for p, py, px in places])
    assert found(result, places)[clear].all()
    # None on a bad pixel, and none where there is nothing; of a peak that a gap cuts, a wing may
    # be left.
    assert not any(gaps[tuple(np.rint(peak).astype(int))] for peak in result.peaks)
    real = np.concatenate([places, clean.peaks])
    away = np.abs(result.peaks[:, None] - real[None]).max(-1).min(1)
    assert (away < 4).all(), result.peaks[away >= 4]


def test_a_peak_beside_bad_pixels_has_the_centroid_of_its_good_ones() -> None:
    image, places = planted("u2")
    (clean,) = listed(image)
    panel, y, x = places[0]
    image[panel, y - 5 : y + 6, x + 1] = 65535
    (result,) = listed(image)
    (peak,) = result.peaks[np.abs(result.peaks - places[0]).max(1) < 3]
    assert peak[2] < x + 0.5
    assert len(result.peaks) == len(clean.peaks)


def test_wings_around_a_masked_core_are_no_peak() -> None:
    image, places = planted("u4")
    for panel, y, x in places[:6]:
        image[panel, y - 1 : y + 2, x - 1 : x + 2] = 2**32 - 1
    for panel, y, x in places[6:9]:
        image[panel, y, x] = 2**32 - 1
    (result,) = listed(image)
    bad = find_bad_pixels(image)
    assert not any(bad[tuple(np.rint(peak).astype(int))] for peak in result.peaks)
    assert found(result, places)[9:].all()


def test_a_masked_array_keeps_its_mask() -> None:
    image, places = planted("i4")
    mask = np.zeros(image.shape, np.bool_)
    for panel, y, x in places[:8]:
        mask[panel, y - 4 : y + 5, x - 4 : x + 5] = True
    masked, plain = listed(np.ma.MaskedArray(image, mask), image)
    assert found(plain, places).all()
    assert found(masked, places).tolist() == [False] * 8 + [True] * 12
    assert type(masked.image) is np.ndarray
    np.testing.assert_array_equal(masked.image, image)
    np.testing.assert_array_equal(masked.bad_mask(), mask)
    assert plain.bad_mask() is None
    # Also where no value marks bad pixels.
    assert len(listed(np.ma.MaskedArray(image, mask), bad_values="none")[0].peaks) == 12


def test_a_mask_of_another_size_is_refused() -> None:
    event = Event(EventId("s", 0, 0), np.zeros((2, 3, 4), np.uint16), 9500.0)
    event.bad_bits = pack_mask(np.zeros((2, 3, 5), np.bool_))
    assert check_event(event) == "its mask has 4 bytes; an image of 24 pixels needs 3"
    for strange in (np.zeros(3, np.float32), np.zeros((3, 1), np.uint8), "mask"):
        event.bad_bits = strange  # type: ignore[assignment]
        assert check_event(event) == "its mask is not an array of bytes, with a bit for each pixel"


def test_the_mask_is_a_setting(tmp_path: Path) -> None:
    image, places = planted("f4")
    mask = np.zeros((192, 256), np.uint8)
    for _, y, x in places[:5]:
        mask[y - 4 : y + 5, x - 4 : x + 5] = 2
    np.save(tmp_path / "mask.npy", mask)
    (result,) = listed(image, mask=str(tmp_path / "mask.npy"))
    assert found(result, places).tolist() == [False] * 5 + [True] * 15
    np.testing.assert_array_equal(result.bad_mask(), mask[None] != 0)
    (result,) = listed(image, mask=str(tmp_path / "mask.npy"), mask_bad=1)
    assert found(result, places).all()
    with pytest.raises(ValueError, match="bits of a mask: give the mask"):
        PeakNetModule(LocalSnr(), chain(), mask_bad=1)


def test_a_mask_of_another_detector_ends_the_run_with_its_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.zeros((10, 10), np.uint8))
    module = PeakNetModule(LocalSnr(), chain(), mask=str(tmp_path / "mask.npy"))
    pending = module.predict_step(batch_of(planted("u2")[0]), 0)
    assert not pending.done()
    with pytest.raises(UnfitStreamError, match=r"does not fit: the mask has the shape \(10, 10\)"):
        pending.result()


@pytest.mark.parametrize(
    "first", [(Crop(96, 128, allow_crop=True),), (Patchify(48, 64),)], ids=["crop", "patchify"]
)
def test_masks_are_those_of_the_original_frame(first: tuple[Transform, ...]) -> None:
    image, _ = planted("u2")
    image[0, 10:20, 130:140] = 65535
    (result,) = listed(image, first=first)
    np.testing.assert_array_equal(result.bad_mask(), image == 65535)


def test_equal_masks_of_a_batch_are_one_object() -> None:
    image, _ = planted("u2")
    image[0, 10:20] = 65535
    other = image.copy()
    other[0, 0, 0] = 65535
    one, two, three = listed(image, image.copy(), other)
    assert one.bad_bits is two.bad_bits
    assert three.bad_bits is not two.bad_bits
    assert three.bad_pixels == two.bad_pixels + 1


def test_a_result_carries_the_saturation_level(caplog: pytest.LogCaptureFixture) -> None:
    image, places = planted("u2")
    panel, y, x = places[0]
    image[panel, y - 1 : y + 2, x - 1 : x + 2] = 14000
    (result,) = listed(image, saturation=14000)
    assert result.saturation == 14000
    assert found(result, places).all()
    with pytest.raises(ValueError, match="saturation is -1"):
        PeakNetModule(LocalSnr(), chain(), saturation=-1)


def test_saturated_pixels_that_read_as_bad_ones_are_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    image, places = planted("u2")
    panel, y, x = places[0]
    image[panel, y - 1 : y + 2, x - 1 : x + 2] = 65535
    (result,) = listed(image, saturation=65535)
    assert "65535 is what saturated pixels read" in caplog.text
    assert result.bad_pixels == 9
    caplog.clear()
    (result,) = listed(image, saturation=65535, bad_values="none")
    assert found(result, places).all()
    assert result.bad_pixels == 0
    assert not caplog.text


@pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "f4", "f2"])
def test_saturated_cores_left_out_as_bad_are_a_warning_without_being_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    image, places = planted(dtype)
    of_floats = {"f4": 65535, "f2": np.inf}
    mark = of_floats[dtype] if dtype in of_floats else sentinels(np.dtype(dtype))[-1]
    dead = image.copy()
    dead[0, 100:104] = dead[0, :, 40] = dead[0, 3, 3] = mark  # gaps cut some peaks, too
    saturated = dead.copy()
    for panel, y, x in places[:3]:
        saturated[panel, y - 1 : y + 2, x - 1 : x + 2] = mark
    by_hand = np.zeros(image.shape, np.bool_)
    for panel, y, x in places[3:6]:
        by_hand[panel, y - 1 : y + 2, x - 1 : x + 2] = True
    masked = np.ma.MaskedArray(image, by_hand)
    module = PeakNetModule(LocalSnr(), chain()).eval()
    module.predict_step(batch_of(dead, masked), 0).result()
    assert not caplog.text
    module.predict_step(batch_of(saturated, saturated, image), 0).result()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert re.match(rf"event s:0:0: 27 pixels that read {mark:.12g} are left out as bad", warning)
    assert "set bad_values: none, and give a mask" in warning


def test_outliers_are_a_warning_that_names_the_event(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    image, _ = planted("i4", shape=(1, 40, 40), spots=0)
    stuck = image.copy()
    stuck[0, 9, 9] = 10**9
    module = PeakNetModule(LocalSnr(), chain()).eval()
    for _ in range(5):
        module.predict_step(batch_of(image, stuck, stuck), 0).result()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert warnings[0].startswith("event s:0:1: 1 pixels are so far from all others")
    assert "(event number 10 with such pixels)" in warnings[1]


@examples(24)
@given(data=st.data())
def test_strong_peaks_are_found_and_none_on_bad_pixels(data: st.DataObject) -> None:
    """Whatever layout, dtype, marks and masks: every strong peak, and none on a bad pixel."""
    dtype = np.dtype(
        data.draw(st.sampled_from(["u1", "u2", ">u2", "u4", "u8", "i2", "i4", "i8", "f4", "f8"]))
    )
    panels = data.draw(st.integers(1, 2))
    rows, columns = data.draw(st.integers(48, 96)), data.draw(st.integers(48, 96))
    shape = (panels, rows, columns)
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    height = data.draw(st.sampled_from([25.0, 60.0, 200.0]))
    image, places = planted(dtype.str, seed, shape, data.draw(st.integers(0, 15)), height)
    excess = (image[tuple(places.T)].astype(np.float64) - 5) / np.sqrt(5)

    bad = np.zeros(shape, np.bool_)
    for _ in range(data.draw(st.integers(0, 3))):
        top, left = rng.integers(0, rows), rng.integers(0, columns)
        bad[rng.integers(panels), top : top + rng.integers(1, 20), left : left + 8] = True
    if data.draw(st.booleans()):
        bad |= rng.random(shape) < 0.003
    if data.draw(st.booleans()):
        bad[:, :, columns // 2 : columns // 2 + 5] = True
    how = data.draw(st.sampled_from(["marked", "masked array", "listed", "stuck"]))
    if how == "stuck" and dtype.itemsize > 2:
        # One pixel, and nothing but the others says that it is none.
        bad[:] = False
        bad[0, 2, 2] = True
        image[bad] = data.draw(st.sampled_from([10**9, 10**7, 10**6]))
    elif how == "masked array":
        image = np.ma.MaskedArray(image, bad)
    elif how == "listed":
        image[(image == 101) & ~bad] = 102
        image[bad] = 101
    else:
        marks = (np.nan, 65535, 2**32 - 1) if dtype.kind == "f" else sentinels(dtype)
        image[bad] = rng.choice(np.array(marks, dtype), int(bad.sum()))

    (result,) = listed(image, bad_values=[101] if how == "listed" else "auto")
    y, x = np.mgrid[-3:4, -3:4].reshape(2, -1)
    clear = np.array([not bad[p, py + y, px + x].any() for p, py, px in places], np.bool_)
    missed = ~found(result, places) & clear & (excess > 8)
    assert not missed.any(), (places[missed], result.peaks)
    assert not any(bad[tuple(np.rint(peak).astype(np.int64))] for peak in result.peaks)
    mask = result.bad_mask()
    np.testing.assert_array_equal(np.zeros(shape, np.bool_) if mask is None else mask, bad)
