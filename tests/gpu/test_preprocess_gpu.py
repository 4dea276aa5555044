"""The preprocessing's kernels on a GPU against the plain functions on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peaknet_predict.preprocess import LocalNorm, find_outliers
from peaknet_predict.preprocess.kernels import triton_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
SHAPES = [(2, 3, 185, 388), (1, 1, 512, 1024), (3, 4, 64, 64), (1, 2, 5, 9)]


def frames(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Return counts with a slope, spots, hot pixels and another noise a panel, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    events, panels, height, width = shape
    rate = 3 + 20 * torch.rand(events, panels, 1, 1, generator=generator)
    rate = rate * (1 + torch.arange(width) / width) * (1 + torch.arange(height)[:, None] / height)
    spots = torch.rand(shape, generator=generator) < 1e-3
    rate = rate + spots * 10 ** (1 + 3 * torch.rand(shape, generator=generator))
    counts_BPHW = torch.poisson(rate, generator=generator)
    counts_BPHW[torch.rand(shape, generator=generator) < 1e-5] = 3e8
    counts_BPHW[..., : height // 4, : width // 3] = torch.nan
    valid_BPHW = torch.isfinite(counts_BPHW)
    valid_BPHW &= torch.rand(shape, generator=generator) > 0.02
    valid_BPHW[0, 0, :, -(width // 4) :] = False
    return counts_BPHW, valid_BPHW


@pytest.fixture(autouse=True)
def _with_kernels() -> None:
    pytest.importorskip("triton")
    assert triton_steps(torch.empty(0, device=DEVICE)) is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_outliers(shape: tuple[int, ...], seed: int) -> None:
    counts_BPHW, valid_BPHW = frames(shape, seed)
    counts_BPHW[0, 0, 2:4, 4] = torch.tensor([5e6, -2e9])
    valid_BPHW[0, 0, 1:5, 3:6] = True
    counts_BPHW.nan_to_num_(7.0)
    expected_BPHW = find_outliers(counts_BPHW, valid_BPHW)
    found_BPHW = find_outliers(counts_BPHW.to(DEVICE), valid_BPHW.to(DEVICE))
    assert expected_BPHW.any()
    assert torch.equal(found_BPHW.cpu(), expected_BPHW)


@pytest.mark.parametrize("block", [2, 8, 12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_local_norm(shape: tuple[int, ...], block: int) -> None:
    counts_BPHW, valid_BPHW = frames(shape, 5)
    norm = LocalNorm(block)
    expected_BPHW, _ = norm(counts_BPHW, valid_BPHW)
    found_BPHW, mask_BPHW = norm(counts_BPHW.to(DEVICE), valid_BPHW.to(DEVICE))
    again_BPHW, _ = norm(counts_BPHW.to(DEVICE), valid_BPHW.to(DEVICE))
    assert torch.equal(found_BPHW, again_BPHW)
    assert torch.equal(mask_BPHW.cpu(), valid_BPHW)
    # Sums in another order; where a median falls on another of two equal blocks, no difference.
    torch.testing.assert_close(found_BPHW.cpu(), expected_BPHW, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, torch.nan])
def test_panels_without_noise_or_without_pixels(value: float) -> None:
    counts_BPHW = torch.full((1, 2, 40, 24), value)
    valid_BPHW = torch.isfinite(counts_BPHW)
    expected_BPHW, _ = LocalNorm()(counts_BPHW, valid_BPHW)
    found_BPHW, _ = LocalNorm()(counts_BPHW.to(DEVICE), valid_BPHW.to(DEVICE))
    assert not expected_BPHW.any()
    assert torch.equal(found_BPHW.cpu(), expected_BPHW)
    outlier_BPHW = find_outliers(counts_BPHW.to(DEVICE), valid_BPHW.to(DEVICE))
    assert not outlier_BPHW.any()
