"""Peak finding on the CPU, held bit for bit to the per-panel SciPy loop."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peaknet_predict.peaks import PeakTable, find_peaks
from tests.helpers.examples import examples
from tests.helpers.oracle import find_peaks_reference

INTEGER_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
]


def assert_same(found: PeakTable, expected: PeakTable) -> None:
    for name in ("panel", "y", "x", "num_pixels"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert ours.tobytes() == theirs.tobytes(), name


def check(mask_NHW: npt.NDArray[Any]) -> PeakTable:
    found = find_peaks(torch.from_numpy(mask_NHW))
    assert_same(found, find_peaks_reference(mask_NHW))
    return found


@examples(150)
@given(
    mask_NHW=hnp.arrays(
        np.bool_,
        st.tuples(st.integers(0, 4), st.integers(0, 17), st.integers(0, 17)),
        elements=st.booleans(),
        fill=st.just(False),
    )
)
def test_any_mask(mask_NHW: npt.NDArray[np.bool_]) -> None:
    check(mask_NHW)


@examples(60)
@given(density=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_any_density(density: float, seed: int) -> None:
    check(np.random.default_rng(seed).random((3, 61, 47)) < density)


@pytest.mark.parametrize("density", [0.001, 0.02, 0.1, 0.3, 0.4, 0.5, 0.6, 0.9, 0.99])
def test_panels_of_real_size(density: float) -> None:
    check(np.random.default_rng(1).random((2, 352, 384)) < density)


@pytest.mark.parametrize("value", [False, True])
def test_empty_and_full(value: bool) -> None:
    found = check(np.full((3, 20, 30), value))
    assert len(found) == (3 if value else 0)


def test_thousands_of_components_at_the_same_places_in_every_panel() -> None:
    mask_NHW = np.zeros((4, 110, 110), dtype=np.bool_)
    mask_NHW[:, ::2, ::2] = True
    found = check(mask_NHW)
    assert np.bincount(found.panel).tolist() == [3025] * 4
    assert (found.num_pixels == 1).all()


def test_diagonal_neighbours_are_one_peak() -> None:
    mask_NHW = np.eye(9, dtype=np.bool_)[np.newaxis]
    found = check(mask_NHW)
    assert (len(found), found.y[0], found.x[0], found.num_pixels[0]) == (1, 4.0, 4.0, 9)


def test_one_pixel_on_each_border_and_corner() -> None:
    mask_NHW = np.zeros((2, 9, 11), dtype=np.bool_)
    mask_NHW[:, [0, 0, 0, 4, 4, 8, 8, 8], [0, 5, 10, 0, 10, 0, 5, 10]] = True
    assert len(check(mask_NHW)) == 16


def test_components_in_neighbouring_panels_never_join() -> None:
    mask_NHW = np.zeros((3, 8, 8), dtype=np.bool_)
    mask_NHW[0, 3:5, 3:5] = True
    mask_NHW[1, 4:6, 4:6] = True
    # The end of one panel and the start of the next are neighbours in memory.
    mask_NHW[1, 7, 7] = mask_NHW[2, 0, 0] = True
    assert check(mask_NHW).panel.tolist() == [0, 1, 1, 2]


def test_order_is_that_of_the_first_pixel() -> None:
    # The comb's first tooth begins before the dot, its other parts join it only below the dot.
    mask_HW = np.array(
        [
            [0, 0, 0, 0, 0, 0, 1],
            [1, 0, 0, 0, 0, 0, 1],
            [1, 0, 1, 0, 1, 0, 1],
            [1, 0, 0, 0, 0, 0, 1],
            [1, 1, 1, 1, 1, 1, 1],
        ],
        dtype=np.bool_,
    )
    found = check(mask_HW[np.newaxis])
    assert found.num_pixels.tolist() == [14, 1, 1]
    assert found.x[1:].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    classes = np.random.default_rng(2).integers(0, 3, (3, 40, 41))
    found = find_peaks(torch.from_numpy(classes).to(dtype))
    assert_same(found, find_peaks_reference(classes))


def test_strides() -> None:
    base = torch.from_numpy(np.random.default_rng(3).random((6, 44, 52)) < 0.2)
    views = [base[::2], base[:, 3:, 5:-1], base.permute(2, 0, 1), base[0].expand(4, 44, 52)]
    for view in views:
        assert_same(find_peaks(view), find_peaks_reference(view.numpy().copy()))


def test_input_is_not_changed() -> None:
    mask = torch.ones((2, 5, 5), dtype=torch.uint8)
    find_peaks(mask)
    assert bool((mask == 1).all())


def test_rejects_what_is_no_class_map() -> None:
    with pytest.raises(TypeError, match="argmax"):
        find_peaks(torch.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        find_peaks(torch.zeros((4, 4), dtype=torch.bool))
    with pytest.raises(ValueError, match="meta"):
        find_peaks(torch.zeros((1, 4, 4), dtype=torch.bool, device="meta"))


def test_missing_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "peaknet_predict.cuda", raising=False)
    with pytest.raises(ImportError, match=r"cuda12.*cuda13"):
        import peaknet_predict.cuda  # noqa: F401


@examples(60)
@given(
    panels=st.integers(1, 4),
    events=st.integers(0, 3),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_gives_each_event_its_own(panels: int, events: int, padding: int, seed: int) -> None:
    num_panels = panels * events + padding
    mask_NHW = np.random.default_rng(seed).random((num_panels, 12, 13)) < 0.1
    split = find_peaks(torch.from_numpy(mask_NHW)).split(panels, events)
    assert len(split) == events
    for event, peaks_M3 in enumerate(split):
        expected = find_peaks_reference(mask_NHW[event * panels : (event + 1) * panels])
        assert peaks_M3.dtype == np.float64
        assert peaks_M3.shape == (len(expected), 3)
        assert np.array_equal(peaks_M3, np.stack([expected.panel, expected.y, expected.x], axis=1))


def test_split_results_do_not_share_memory() -> None:
    split = find_peaks(torch.ones((2, 3, 3), dtype=torch.bool)).split(1, 2)
    assert all(peaks_M3.base is None for peaks_M3 in split)


def test_split_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="0 panels"):
        find_peaks(torch.ones((2, 3, 3), dtype=torch.bool)).split(0, 2)
