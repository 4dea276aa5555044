"""What your network must keep to, whatever you change: run `pytest` in this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from my_network import SmallUNet, SquareRoot

from peaknet_predict import find_peaks, load_model

CONFIG = str(Path(__file__).with_name("my_network.yaml"))


def test_logits_have_the_size_of_the_panels() -> None:
    logits_N2HW = SmallUNet()(torch.randn(3, 1, 32, 48))
    assert logits_N2HW.shape == (3, 2, 32, 48)
    assert logits_N2HW.isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="even height and width, not 33 x 48"):
        SmallUNet().check_shape(33, 48)


def test_the_square_root_keeps_bad_pixels_bad() -> None:
    images_BPHW = torch.tensor([[[[16.0, -4.0], [0.0, torch.nan]]]])
    rooted, _ = SquareRoot()(images_BPHW, ~images_BPHW.isnan())
    assert rooted.flatten()[:3].tolist() == [4.0, -2.0, 0.0]
    assert rooted.flatten()[3].isnan()


def test_nothing_is_predicted_without_weights() -> None:
    with pytest.raises(ValueError, match="SmallUNet has no weights: its parameters are random"):
        find_peaks(np.zeros((33, 48)), load_model(CONFIG))


def test_it_runs_from_image_to_peaks() -> None:
    """With random parameters: panels of odd sizes, bad pixels, any number of them."""
    images = np.random.default_rng(0).poisson(10.0, (2, 3, 33, 47)).astype(np.float32)
    images[0, 0, 5] = np.nan
    torch.manual_seed(0)  # of some others, nearly all pixels are peak, which is refused
    tables = find_peaks(images, load_model(CONFIG, random_weights=True))
    assert len(tables) == 2
    for table in tables:
        assert ((table["y"] >= 0) & (table["y"] < 33) & (table["x"] < 47)).all()
