"""Peak finding with CuPy, held bit for bit to the per-panel SciPy loop on fresh random input."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import torch

from peaknet_predict.peaks import PeakTable, find_peaks
from tests.helpers.oracle import find_peaks_reference

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("cupy", reason="CuPy is not installed")

pytestmark = pytest.mark.gpu


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def assert_same(found: PeakTable, expected: PeakTable) -> None:
    for name in ("panel", "y", "x", "num_pixels"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert ours.tobytes() == theirs.tobytes(), name


def check(mask_NHW: torch.Tensor) -> PeakTable:
    found = find_peaks(mask_NHW.cuda())
    assert_same(found, find_peaks_reference(mask_NHW.numpy()))
    return found


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.1, 0.3, 0.4, 0.5, 0.6, 0.9, 0.99, 1.0])
def test_any_density(density: float, rng: np.random.Generator) -> None:
    check(torch.from_numpy(rng.random((5, 171, 203)) < density))


def test_many_small_masks(rng: np.random.Generator) -> None:
    for _ in range(200):
        shape = rng.integers(0, [5, 18, 18])
        check(torch.from_numpy(rng.random(shape) < rng.random()))


def test_a_full_batch_of_peaks(rng: np.random.Generator) -> None:
    mask_NHW = np.zeros((128, 512, 512), dtype=np.bool_)
    for panel_HW in mask_NHW:
        for y, x in rng.integers(0, 512, (rng.integers(0, 200), 2)):
            panel_HW[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    check(torch.from_numpy(mask_NHW))


def test_thousands_of_components_at_the_same_places_in_every_panel() -> None:
    mask_NHW = torch.zeros((4, 110, 110), dtype=torch.bool)
    mask_NHW[:, ::2, ::2] = True
    assert np.bincount(check(mask_NHW).panel).tolist() == [3025] * 4


def test_components_in_neighbouring_panels_never_join() -> None:
    mask_NHW = torch.zeros((3, 8, 8), dtype=torch.bool)
    mask_NHW[0, 3:5, 3:5] = True
    mask_NHW[1, 4:6, 4:6] = True
    mask_NHW[1, 7, 7] = mask_NHW[2, 0, 0] = True
    assert check(mask_NHW).panel.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
    ids=str,
)
def test_dtypes(dtype: torch.dtype, rng: np.random.Generator) -> None:
    classes = rng.integers(0, 3, (3, 40, 41))
    found = find_peaks(torch.from_numpy(classes).cuda().to(dtype))
    assert_same(found, find_peaks_reference(classes))


def test_strides(rng: np.random.Generator) -> None:
    base = torch.from_numpy(rng.random((6, 44, 52)) < 0.2).cuda()
    for view in (base[::2], base[:, 3:, 5:-1], base.permute(2, 0, 1), base[0].expand(4, 44, 52)):
        assert_same(find_peaks(view), find_peaks_reference(view.cpu().numpy()))


def test_waits_for_the_stream_that_writes_the_map(rng: np.random.Generator) -> None:
    expected = torch.from_numpy(rng.random((8, 256, 256)) < 0.05)
    on_device = expected.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        class_map = torch.zeros_like(on_device)
        # About 0.1 s, in which another stream would see zeros.
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        class_map.copy_(on_device)
        found = find_peaks(class_map)
    assert_same(found, find_peaks_reference(expected.numpy()))
