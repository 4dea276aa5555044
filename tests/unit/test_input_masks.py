"""Bad pixels that files know of reach the event, and a mask that is not used is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.batching import Batcher
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.pixels import unpack_mask
from peaknet_predict.sources import Hdf5Source, NpzSource
from peaknet_predict.sources.base import EventSource
from peaknet_predict.types import Event, EventId
from tests.helpers.examples import examples
from tests.helpers.prediction import chain

CXI = "entry_1/data_1"
Array = npt.NDArray[Any]
BAD = np.zeros((4, 8), bool)
BAD[1, 2] = BAD[3, 4:7] = True


def frames(*shape: int, dtype: Any = np.uint16) -> Array:
    return np.random.default_rng(3).integers(0, 100, shape).astype(dtype)


def write(folder: Path, items: dict[str, Any]) -> str:
    with h5py.File(folder / "run.h5", "w") as h5:
        for name, value in items.items():
            h5[name] = value
    return str(folder / "run.h5")


def check(source: EventSource, images: Array, bad: Array | None) -> None:
    """Assert that every event has its pixels as they are, and declares the bad ones."""
    for idx, image, energy in source.events():
        assert image.ndim > 1, str(image)
        event = Event(EventId("s", 0, idx), image, energy)
        assert type(event.image) is np.ndarray
        np.testing.assert_array_equal(event.image, images[idx])
        if bad is None:
            assert event.bad_bits is None
            continue
        assert event.bad_bits is not None
        expected = np.broadcast_to(bad, images.shape)[idx]
        np.testing.assert_array_equal(unpack_mask(event.bad_bits, image.shape), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "f4", "f8"])
@pytest.mark.parametrize("mask_dtype", [bool, "u1", "u2", "u4", "i8"])
def test_a_mask_beside_the_frames(tmp_path: Path, dtype: str, mask_dtype: Any) -> None:
    images = frames(3, 4, 8, dtype=dtype)
    mask = BAD.astype(mask_dtype)
    path = write(tmp_path, {f"{CXI}/data": images, f"{CXI}/mask": mask})
    check(Hdf5Source(path, photon_energy_ev=9e3), images, BAD)


@pytest.mark.parametrize(
    "place",
    [
        f"{CXI}/mask",
        "entry_1/instrument_1/detector_1/mask",
        "entry_1/instrument/detector/pixel_mask",
        "entry_1/instrument/detector/detectorSpecific/pixel_mask",
    ],
)
def test_the_places_where_masks_are(tmp_path: Path, place: str) -> None:
    images = frames(3, 4, 8)
    path = write(tmp_path, {f"{CXI}/data": images, place: BAD.astype("u4")})
    check(Hdf5Source(path, photon_energy_ev=9e3), images, BAD)


PANELS = np.stack([BAD, np.roll(BAD, 2, 1)])


@pytest.mark.parametrize(
    ("shape", "mask", "options", "bad"),
    [
        ((3, 4, 8), BAD[None], {}, BAD),
        ((3, 4, 8), np.stack([np.roll(BAD, k, 1) for k in range(3)]), {}, "mask"),
        ((3, 2, 4, 8), PANELS, {}, PANELS),
        ((3, 2, 4, 8), PANELS[None], {}, PANELS),
        ((3, 2, 4, 8), PANELS.reshape(8, 8), {}, PANELS),
        ((3, 2, 4, 8), np.stack([np.roll(PANELS, k, 2) for k in range(3)]), {}, "mask"),
        ((3, 8, 8), PANELS, {"panel_height": 4}, PANELS),
        ((3, 8, 8), PANELS.reshape(8, 8), {"panel_height": 4}, PANELS),
        ((3, 8, 8), PANELS.reshape(1, 8, 8), {"panel_height": 4}, PANELS),
        ((4, 8), BAD, {}, BAD),
        ((8, 8), PANELS, {"panel_height": 4}, PANELS),
        ((3, 2, 4, 8), BAD, {"threshold": 2}, BAD),
    ],
)
def test_the_shapes_that_masks_have(
    tmp_path: Path, shape: tuple[int, ...], mask: Array, options: dict[str, Any], bad: Any
) -> None:
    data = frames(*shape)
    path = write(tmp_path, {f"{CXI}/data": data, f"{CXI}/mask": mask.astype("u1")})
    images = data[:, 1] if "threshold" in options else data
    if "panel_height" in options:
        images = images.reshape(-1, 2, 4, 8)
    if images.ndim == 2:
        images = images[None]
    check(
        Hdf5Source(path, photon_energy_ev=9e3, **options),
        images,
        mask if isinstance(bad, str) else bad,
    )


def test_masks_of_panels_in_their_own_datasets(tmp_path: Path) -> None:
    images = frames(3, 2, 4, 8)
    items = {f"m{k}/data": images[:, k] for k in range(2)}
    items |= {f"m{k}/mask": PANELS[k].astype("u1") for k in range(2)}
    path = write(tmp_path, items)
    options: dict[str, Any] = {"data": ["m0/data", "m1/data"], "photon_energy_ev": 9e3}
    check(Hdf5Source(path, join="panels", **options), images, PANELS)
    both = np.concatenate([images[:, 0], images[:, 1]])
    check(Hdf5Source(path, join="events", **options), both, PANELS.repeat(3, axis=0))


@examples(50)
@given(
    values=st.lists(st.integers(0, 2**16 - 1), min_size=32, max_size=32),
    good=st.integers(0, 2**16 - 1),
    bad=st.integers(0, 2**16 - 1),
)
def test_bits_mean_what_they_mean_to_crystfel(values: list[int], good: int, bad: int) -> None:
    import tempfile

    mask = np.array(values, "u2").reshape(4, 8)
    expected = ((mask & bad) != 0) | ((mask & good) != good)
    images = frames(1, 4, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), {f"{CXI}/data": images, f"{CXI}/mask": mask})
        options: dict[str, Any] = {"photon_energy_ev": 9e3, "mask_good": good, "mask_bad": bad}
        if expected.all() or not (good or bad):
            with pytest.raises(ValueError, match="leaves no pixel|no bit of the mask"):
                Hdf5Source(path, **options)
            return
        check(Hdf5Source(path, **options), images, expected if expected.any() else None)


def test_a_mask_with_1_for_good_pixels_is_not_taken_the_wrong_way_round(tmp_path: Path) -> None:
    images = frames(3, 4, 8)
    path = write(tmp_path, {f"{CXI}/data": images, f"{CXI}/mask": (~BAD).astype("u1")})
    with pytest.raises(ValueError, match="28 of 32 pixels.*mask_good: 1 and mask_bad: 0"):
        Hdf5Source(path, photon_energy_ev=9e3)
    source = Hdf5Source(path, photon_energy_ev=9e3, mask_good=1, mask_bad=0)
    check(source, images, BAD)
    inverted = Hdf5Source(path, photon_energy_ev=9e3, mask_bad=0xFFFFFFFF)
    check(inverted, images, ~BAD)
    np.savez(tmp_path / "a.npz", data=images[0], mask=(~BAD).astype("u1"))
    with pytest.raises(ValueError, match="28 of 32 pixels.*mask_good: 1 and mask_bad: 0"):
        NpzSource(str(tmp_path / "a.npz"), photon_energy_ev=9e3).check()


def test_bits_that_mean_nothing_or_leave_next_to_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = frames(3, 4, 8)
    path = write(tmp_path, {f"{CXI}/data": images, f"{CXI}/mask": BAD.astype("u1")})
    np.savez(tmp_path / "a.npz", data=images[0], mask=BAD.astype("u1"))
    given: list[dict[str, Any]] = [{"mask_good": 0, "mask_bad": 0}, {"mask_bad": 0}]
    for bits in given:
        with pytest.raises(ValueError, match="no bit of the mask means anything"):
            Hdf5Source(path, photon_energy_ev=9e3, **bits)
        with pytest.raises(ValueError, match="no bit of the mask means anything"):
            NpzSource(str(tmp_path / "a.npz"), photon_energy_ev=9e3, **bits).check()
    assert not caplog.text
    check(Hdf5Source(path, photon_energy_ev=9e3, mask_good=1), images, ~BAD)
    assert "leaves out 28 of 32 pixels: are mask_good and mask_bad its bits?" in caplog.text


def test_a_mask_that_is_none_is_refused(tmp_path: Path) -> None:
    for dtype in ("S1", [("bad", "u1")]):
        path = write(tmp_path, {f"{CXI}/data": frames(3, 4, 8), f"{CXI}/mask": BAD.astype(dtype)})
        with pytest.raises(ValueError, match="the mask /entry_1/data_1/mask has dtype"):
            Hdf5Source(path, photon_energy_ev=9e3)


def test_a_stack_whose_last_axis_counts_panels_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "a.npz", data=np.zeros((512, 40, 8), "u2"))
    NpzSource(str(tmp_path / "a.npz"), photon_energy_ev=9e3).check()
    assert "taken for 512 panels of 40x8. If its last axis counts the panels" in caplog.text


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{CXI}/data": frames(3, 4, 8), f"{CXI}/mask": np.ones((5, 8), "u1")})
    with pytest.raises(ValueError, match=r"has shape \(5, 8\), which does not fit.*mask: none"):
        Hdf5Source(path, photon_energy_ev=9e3)


def test_masks_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = frames(3, 4, 8)
    other = "entry_1/instrument_1/detector_1"
    mask = BAD.astype("u1")
    path = write(tmp_path, {f"{CXI}/data": images, f"{CXI}/mask": mask, f"{other}/mask": 1 - mask})
    check(Hdf5Source(path, photon_energy_ev=9e3), images, BAD)
    assert f"the mask /{other}/mask is not used" in caplog.text
    assert f"the mask /{CXI}/mask is not used" not in caplog.text
    caplog.clear()
    check(Hdf5Source(path, photon_energy_ev=9e3, mask="none"), images, None)
    assert f"the mask /{CXI}/mask is not used" in caplog.text
    caplog.clear()
    named = Hdf5Source(path, photon_energy_ev=9e3, mask=f"{other}/mask", mask_good=1, mask_bad=0)
    check(named, images, BAD)
    # The same mask twice, as in DECTRIS's masters, is nothing to warn of.
    caplog.clear()
    path = write(tmp_path, {f"{CXI}/data": images, f"{CXI}/mask": mask, f"{other}/mask": mask})
    check(Hdf5Source(path, photon_energy_ev=9e3), images, BAD)
    assert "not used" not in caplog.text


def test_a_mask_that_was_never_written_is_no_mask_of_good_pixels(tmp_path: Path) -> None:
    path = write(tmp_path, {f"{CXI}/data": frames(3, 4, 8)})
    with h5py.File(path, "r+") as h5:
        h5.create_dataset(f"{CXI}/mask", (3, 4, 8), "u1", chunks=(1, 4, 8))
    with pytest.raises(ValueError, match="mask: nothing was ever written"):
        Hdf5Source(path, photon_energy_ev=9e3)


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_of_npz_files(tmp_path: Path, stacked: bool) -> None:
    images = frames(3, 2, 4, 8)
    if not stacked:
        np.savez(tmp_path / "a.npz", data=images[0], mask=PANELS, photon_energy=9.5)
        path = str(tmp_path / "a.npz")
        check(NpzSource(path, photon_energy_unit="keV"), images[:1], PANELS)
        check(NpzSource(path, photon_energy_unit="keV", mask="none"), images[:1], None)
        with pytest.raises(ValueError, match="likely keV"):
            NpzSource(path).check()
        return
    each = np.stack([np.roll(PANELS, k, 2) for k in range(3)])
    np.savez(tmp_path / "a.npz", data=images, mask=PANELS, each=each, slab=PANELS.reshape(8, 8))
    path = str(tmp_path / "a.npz")
    options: dict[str, Any] = {"stacked": True, "photon_energy_ev": 9e3}
    check(NpzSource(path, **options), images, PANELS)
    check(NpzSource(path, mask="each", **options), images, each)
    for name in ("slab", "none at all"):
        with pytest.raises(ValueError, match="does not fit|no array 'none at all'"):
            NpzSource(path, mask=name, **options)


def test_unreadable_npz_files_are_left_out_only_on_request(tmp_path: Path) -> None:
    images = frames(2, 4, 8)
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", data=images[k])
    (tmp_path / "1a.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"1a\.npz cannot be opened"):
        NpzSource(str(tmp_path / "*.npz"), photon_energy_ev=9e3)
    source = NpzSource(str(tmp_path / "*.npz"), photon_energy_ev=9e3, skip_unreadable=True)
    check(source, images, None)
    assert [lost.path.name for lost in source.skipped] == ["1a.npz"]
    (tmp_path / "0.npz").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files are not there on .*0\.npz"):
        source.check()


@pytest.mark.parametrize("dtype", ["f4", "uint16", "int32"])
@pytest.mark.parametrize("place", [f"{CXI}/mask", "entry_1/instrument/detector/pixel_mask"])
def test_no_peak_lies_on_masked_pixels_and_none_is_lost(
    tmp_path: Path, dtype: str, place: str
) -> None:
    """From the file to the list of peaks, without any option."""
    rng = np.random.default_rng(1)
    image = rng.poisson(5, (192, 256)).astype(dtype)
    mask = np.zeros(image.shape, np.uint16)
    spots = [(y, x) for y in range(12, 180, 24) for x in range(12, 244, 24)]
    good, bad = spots[::2], spots[1::2]
    for y, x in spots:
        image[y - 1 : y + 2, x - 1 : x + 2] += 300
    for y, x in bad:
        mask[y - 1 : y + 2, x - 1 : x + 2] = 1
    path = write(tmp_path, {f"{CXI}/data": image[None], place: mask})
    ((_, read, energy),) = Hdf5Source(path, photon_energy_ev=9500.0).events()
    module = PeakNetModule(LocalSnr(), chain()).eval()
    batcher = Batcher(1)
    assert not list(batcher.add([Event(EventId("s", 0, 0), read, energy)]))
    with torch.inference_mode():
        (result,) = module.predict_step(batcher.take(), 0).result().results
    found = {(round(y), round(x)) for _, y, x in result.peaks}
    assert found == set(good)
    np.testing.assert_array_equal(result.image, image)
