from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.spatial import KDTree

from peaknet_predict.models import LocalSnr
from peaknet_predict.peaks import PeakTable, find_peaks
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims, Preprocess
from tests.helpers.examples import thorough
from tests.helpers.paths import REAL_DATA

Floats = npt.NDArray[np.float64]

PREPROCESS = Preprocess([InstanceNorm(), MergeBatchChannelDims()])
SHOTS = sorted(REAL_DATA.glob("idx-*.npz"))


@torch.inference_mode()
def find(image_PHW: npt.NDArray[np.generic], net: LocalSnr | None = None) -> PeakTable:
    """The way of the program: InstanceNorm, network, argmax, peaks."""
    prepared = PREPROCESS(torch.from_numpy(image_PHW)[None])
    logits_NCHW = (net or LocalSnr())(prepared.images_N1HW, prepared.valid_N1HW)
    return find_peaks(logits_NCHW.argmax(dim=1))


def positions(table: PeakTable) -> Floats:
    # Panels far apart: a distance below 2 means the same panel.
    return np.stack([1e4 * table.panel, table.y, table.x], axis=1)


def plant(
    rng: np.random.Generator, panels: int, count: int, heights: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Gaussian spots at least 8 pixels apart, in sigmas, and their `positions`."""
    size = 256
    y_HW, x_HW = np.mgrid[:size, :size]
    image_PHW = np.zeros((panels, size, size))
    truth: list[tuple[float, float, float]] = []
    for panel in range(panels):
        spots: list[npt.NDArray[np.float64]] = []
        while len(spots) < count:
            spot = rng.uniform(2, size - 3, size=2)
            if all(np.hypot(*(spot - other)) > 8 for other in spots):
                spots.append(spot)
        for y, x in spots:
            shape_HW = np.exp(
                -((y_HW - y) ** 2 + (x_HW - x) ** 2) / (2 * rng.uniform(0.8, 1.5) ** 2)
            )
            height = np.exp(rng.uniform(*np.log(heights)))
            image_PHW[panel] += height * shape_HW / shape_HW.max()
            truth.append((1e4 * panel, y, x))
    return image_PHW, np.array(truth)


def recall_and_precision(table: PeakTable, truth_M3: Floats) -> tuple[float, float]:
    found_M3 = positions(table)
    recall = float((KDTree(found_M3).query(truth_M3)[0] <= 2).mean())
    precision = float((KDTree(truth_M3).query(found_M3)[0] <= 2).mean())
    return recall, precision


@pytest.mark.parametrize("photons", [0.3, *thorough(None, 0.02, 0.05, 0.1, 1.0, 10.0, 100.0)])
def test_noise_has_next_to_no_peaks(photons: float | None) -> None:
    """Two megapixels of white noise, normal or Poisson distributed; fewer than one each."""
    rng = np.random.default_rng(5)
    shape = (8, 512, 512)
    image_PHW = rng.normal(size=shape) if photons is None else rng.poisson(photons, size=shape)
    assert len(find(image_PHW)) < 2


@pytest.mark.parametrize("photons", [0.3, *thorough(None, 1.0, 10.0)])
@pytest.mark.parametrize(
    ("count", "heights"), [(15, (8, 9)), (15, (8, 60)), (40, (8, 300))], ids=str
)
def test_spots_are_found(photons: float | None, count: int, heights: tuple[float, float]) -> None:
    rng = np.random.default_rng(7)
    sigmas_PHW, truth_M3 = plant(rng, 8, count, heights)
    if photons is None:
        image_PHW = sigmas_PHW + rng.normal(size=sigmas_PHW.shape)
    else:
        image_PHW = rng.poisson(photons + np.sqrt(photons) * sigmas_PHW).astype(np.float64)
    recall, precision = recall_and_precision(find(image_PHW), truth_M3)
    # Photons of the spot itself fluctuate too: at 0.3 a pixel, 8 sigmas are 4.4 photons.
    assert recall > (0.93 if photons == 0.3 else 0.95)
    assert precision > 0.95


def test_scale_and_offset_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    sigmas_PHW, _ = plant(rng, 2, 20, (6, 60))
    image_PHW = torch.from_numpy(sigmas_PHW + rng.normal(size=sigmas_PHW.shape)).float()
    plain = LocalSnr()(image_PHW[:, None])
    moved = LocalSnr()(300.0 * image_PHW[:, None] + 5000.0)
    torch.testing.assert_close(plain, moved, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("height", [60, 300, 10_000])
@pytest.mark.parametrize("axis", [1, 2])
def test_two_equal_peaks_on_a_row_or_column_do_not_hide_each_other(
    height: float, axis: int
) -> None:
    """At distances at which each lies in the other's background, and their pixels do not touch."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[-5:6, -5:6]
    profile = height * np.exp(-(y**2 + x**2) / 2.4)
    distances = np.arange(8, 14)
    image_PHW = rng.poisson(5.0, (len(distances), 40, 48))
    for image_HW, distance in zip(image_PHW, distances, strict=True):
        for step in (0, distance):
            image_HW[10:21, 10 + step : 21 + step] += rng.poisson(profile)
    if axis == 1:
        image_PHW = np.ascontiguousarray(image_PHW.transpose(0, 2, 1))
    table = find(image_PHW)
    planted = np.stack([np.full(len(distances), 15), 15 + distances], 1)
    assert np.bincount(table.panel).tolist() == [2] * len(distances)
    along = table.y if axis == 1 else table.x
    np.testing.assert_allclose(np.sort(along.reshape(-1, 2)), planted, atol=0.7)


def test_hot_pixels_are_not_peaks() -> None:
    rng = np.random.default_rng(4)
    image_PHW = rng.normal(size=(4, 512, 512))
    hot_PHW = rng.random(image_PHW.shape) < 2e-4
    image_PHW[hot_PHW] += rng.uniform(10, 5000, size=int(hot_PHW.sum()))
    assert len(find(image_PHW)) == 0


def test_hot_pixels_that_bleed_are_not_peaks() -> None:
    image_PHW = np.random.default_rng(4).normal(size=(1, 128, 128))
    image_PHW[0, 60:63, 70:73] += [[0, 29, 2], [8, 960, 1], [5, 150, 0]]
    assert len(find(image_PHW)) == 0


def test_hot_pixels_do_not_hide_a_spot() -> None:
    image_PHW = np.random.default_rng(6).normal(size=(1, 128, 128))
    y_HW, x_HW = np.mgrid[:128, :128]
    image_PHW[0] += 12 * np.exp(-((y_HW - 64) ** 2 + (x_HW - 64) ** 2) / 2)
    image_PHW[0, [60, 69, 70], [70, 62, 58]] = 5000.0
    table = find(image_PHW)
    np.testing.assert_allclose(positions(table), [[0, 64, 64]], atol=0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_lines_and_edges_are_not_peaks(transposed: bool) -> None:
    """Double-width columns, a step, a bright border; but a spot on the columns is found."""
    rng = np.random.default_rng(8)
    photons_HW = np.full((185, 388), 10.0)
    photons_HW[:, 193:195] *= 2
    photons_HW[:, 300:] += 30
    photons_HW[:, -1] += 40
    photons_HW[0] += 20
    photons_HW = photons_HW.T if transposed else photons_HW
    image_PHW = rng.poisson(np.stack([photons_HW] * 16)).astype(np.float64)
    assert len(find(image_PHW)) < 2
    y, x = (193, 90) if transposed else (90, 193)
    image_PHW[0, y - 1 : y + 2, x - 1 : x + 2] += [[20, 40, 20], [40, 90, 40], [20, 40, 20]]
    np.testing.assert_allclose(positions(find(image_PHW[:1])), [[0, y, x]], atol=0.7)


def test_invalid_pixels_are_neither_background_nor_peak() -> None:
    image = torch.from_numpy(np.random.default_rng(9).normal(size=(1, 1, 96, 96))).float()
    image[0, 0, 40:43, 40:43] += 30
    image[0, 0, 70:73, 10:13] += 30
    valid = torch.ones_like(image, dtype=torch.bool)
    valid[..., 48:, :] = False
    corrupted = torch.where(valid, image, 1e4)
    corrupted[0, 0, 60:, 50] = torch.nan
    logits = LocalSnr()(corrupted, valid)
    assert logits.isfinite().all()
    assert not logits.argmax(1)[0, 48:].any()
    table = find_peaks(logits.argmax(1))
    np.testing.assert_allclose(positions(table), [[0, 41, 41]], atol=0.3)
    # What stands in the invalid pixels does not matter at all.
    torch.testing.assert_close(logits, LocalSnr()(image, valid), rtol=1e-4, atol=1e-4)
    # Without the mask both are found.
    assert len(find_peaks(LocalSnr()(image).argmax(1))) == 2


def test_too_little_background_is_never_a_peak() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 30:33, 30:33] = 100.0
    valid = torch.zeros_like(image, dtype=torch.bool)
    valid[..., 29:34, 29:34] = True
    assert not LocalSnr()(image, valid).argmax(1).any()
    assert not LocalSnr()(image, torch.zeros_like(valid)).argmax(1).any()
    assert not LocalSnr()(torch.full_like(image, torch.nan)).argmax(1).any()
    assert not LocalSnr()(torch.zeros_like(image)).argmax(1).any()
    assert LocalSnr()(image).argmax(1).sum() == 9


def test_small_panels_and_the_shape_of_the_output() -> None:
    logits = LocalSnr()(torch.randn(3, 1, 5, 7))
    assert logits.shape == (3, 2, 5, 7)
    assert logits.dtype == torch.float32
    assert not logits[:, 0].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guard_radius": 7}, "guard_radius"),
        ({"grow_threshold": 6.0}, "grow_threshold"),
        ({"noise_floor": 0.0}, "noise_floor"),
    ],
)
def test_impossible_parameters(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalSnr(**arguments)  # type: ignore[arg-type]


@torch.inference_mode()
def test_autocast_changes_nothing() -> None:
    image = torch.randn(1, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LocalSnr()(image)
    torch.testing.assert_close(inside, LocalSnr()(image), rtol=0, atol=0)


@pytest.mark.thorough
@torch.inference_mode()
def test_the_graph_is_whole() -> None:
    torch.compiler.reset()
    net = LocalSnr()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    image = torch.randn(2, 1, 40, 50)
    valid = torch.rand(2, 1, 40, 50) > 0.1
    torch.testing.assert_close(compiled(image, valid), net(image, valid))


@pytest.mark.thorough
@torch.inference_mode()
def test_it_is_fast_without_a_gpu() -> None:
    """About 0.15 s of one core a megapixel; the limit leaves room for slower machines.

    Processor time of one thread, which other programs on the machine hardly change.
    """
    image = torch.randn(4, 1, 512, 512)
    net = LocalSnr()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(4):
            begin = time.process_time()
            net(image)
            times.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.8


@pytest.mark.thorough
@pytest.mark.skipif(len(SHOTS) < 2, reason="the CSPAD shots are not beside the checkout")
def test_real_shots() -> None:
    """Thermolysin on a CSPAD, counts of raw ADU: spots, no clusters on artefacts."""
    found_M3 = []
    for path in SHOTS:
        with np.load(path) as arrays:
            image_PHW = arrays["data"]
        table = find(image_PHW)
        assert 40 <= len(table) <= 400
        x_M, y_M = np.rint(table.x), np.rint(table.y)
        assert np.isin(x_M, (193, 194)).sum() <= 3  # two of 388 columns, each of double width
        border_M = (x_M < 1) | (x_M > 386) | (y_M < 1) | (y_M > 183)
        assert border_M.mean() < 0.05
        found_M3.append(positions(table))
    # Crystals lie differently in every shot: what is found twice at one place is a bad pixel.
    distance_M, _ = KDTree(found_M3[0]).query(found_M3[1])
    assert (distance_M < 2).sum() <= 1
