"""Peak intensities against peaks of known strength."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.cxi.integrate import integrate_peaks
from tests.helpers.examples import examples


def gaussian(
    shape_HW: tuple[int, int], y: float, x: float, total: float, sigma: float = 1.2
) -> npt.NDArray[np.float64]:
    rows, columns = np.mgrid[: shape_HW[0], : shape_HW[1]]
    r2 = (rows - y) ** 2 + (columns - x) ** 2
    spot: npt.NDArray[np.float64] = total * np.exp(-r2 / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    return spot


@examples(60)
@given(
    y=st.floats(10, 50),
    x=st.floats(10, 60),
    sigma=st.floats(0.6, 1.5),
    total=st.floats(1e3, 1e6),
    background=st.floats(-50, 1e4),
)
def test_total_of_a_gaussian(
    y: float, x: float, sigma: float, total: float, background: float
) -> None:
    image = background + gaussian((64, 72), y, x, total, sigma)
    found = integrate_peaks(image, np.array([[0.0, y, x]]))
    assert found.total[0] == pytest.approx(total, rel=0.05)
    assert found.background[0] == pytest.approx(background, abs=0.01 * total)
    assert found.maximum[0] == image.max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16, np.int32, ">u2"])
def test_noise_neighbours_and_dtypes(dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(0)
    image = rng.poisson(20, (2, 64, 64)).astype(np.float64)
    image[1] += gaussian((64, 64), 30.2, 30.7, 4000)
    image[1] += gaussian((64, 64), 30.2, 38.7, 20_000)  # reaches into the ring
    found = integrate_peaks(image.round().astype(dtype), np.array([[1, 30.2, 30.7], [0, 30, 30]]))
    assert found.total[0] == pytest.approx(4000, rel=0.1)
    assert found.background == pytest.approx([20, 20], abs=4)
    # 49 pixels with a noise of sqrt(20) each.
    assert found.snr[0] == pytest.approx(4000 / (7 * np.sqrt(20)), rel=0.6)
    assert abs(found.snr[1]) < 4


def test_sparse_photons_have_a_noise() -> None:
    image = (np.random.default_rng(1).random((40, 40)) < 0.1).astype(np.uint16)
    image[18:23, 18:23] += 4
    found = integrate_peaks(image, np.array([[0.0, 20, 20]]))
    assert found.background[0] == 0
    assert 20 < found.snr[0] < 100


def test_never_reads_across_the_panel_border() -> None:
    image = np.zeros((3, 20, 20))
    image[1] = 7.0
    image[1, [0, 0, 19, 19], [0, 19, 0, 19]] = 107.0
    image[[0, 2]] = 1e9
    corners = np.array([[1, y, x] for y in (0, 19) for x in (0, 19)], dtype=np.float64)
    found = integrate_peaks(image, corners)
    assert found.total.tolist() == [100.0] * 4
    assert found.maximum.tolist() == [107.0] * 4
    assert found.background.tolist() == [7.0] * 4


def test_bad_pixels_are_left_out() -> None:
    image = 10 + gaussian((40, 40), 20, 20, 1000)
    clean = integrate_peaks(image, np.array([[0.0, 20, 20]]))
    image[20, 23] = np.nan
    image[13:16, :] = np.inf
    image[25, 20] = -np.inf
    found = integrate_peaks(image, np.array([[0.0, 20, 20]]))
    assert found.total[0] == pytest.approx(clean.total[0], rel=0.05)
    assert found.maximum[0] == clean.maximum[0]


def test_unknown_intensity_is_zero() -> None:
    image = np.full((20, 20), np.nan)
    nothing = integrate_peaks(image, np.array([[0.0, 10, 10]]))
    image[10, 10] = 50.0
    no_ring = integrate_peaks(image, np.array([[0.0, 10, 10]]))
    for found in (nothing, no_ring):
        assert (found.total[0], found.maximum[0], found.background[0], found.snr[0]) == (0, 0, 0, 0)


def test_no_peaks() -> None:
    assert integrate_peaks(np.zeros((2, 8, 8)), np.zeros((0, 3))).total.shape == (0,)


@pytest.mark.parametrize("peak", [(2, 0, 0), (-1, 0, 0), (0, 8, 0), (0, 0, np.nan), (0, -1, 0)])
def test_peaks_outside_are_refused(peak: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="outside"):
        integrate_peaks(np.zeros((2, 8, 8)), np.array([peak], dtype=np.float64))


def test_a_hundred_peaks_take_less_than_3_ms() -> None:
    rng = np.random.default_rng(2)
    image = rng.normal(10, 1, (4, 512, 512)).astype(np.float32)
    peaks = np.stack([rng.integers(0, 4, 100), *rng.uniform(0, 511, (2, 100))], axis=1)
    elapsed = []
    for _ in range(10):
        start = time.perf_counter()
        integrate_peaks(image, peaks)
        elapsed.append(time.perf_counter() - start)
    assert min(elapsed) < 3e-3
