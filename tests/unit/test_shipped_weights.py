"""The weights that ship with the package: the file is the one described, and it finds peaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from peaknet_predict.models import PeakNet
from peaknet_predict.module import PeakNetModule
from peaknet_predict.peaks import find_peaks
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.sources import Simulator

ROOT = Path(__file__).parents[2]
REAL_SHOTS = sorted((ROOT.parent / "shared" / "realdata").glob("idx-*.npz"))


@pytest.fixture(scope="module")
def module() -> PeakNetModule:
    """Return the module of the configuration that ships, weights included."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(PeakNetModule, "model")
    config = yaml.safe_load((ROOT / "configs" / "models" / "peaknet_small.yaml").read_text())
    made: PeakNetModule = parser.instantiate_classes(parser.parse_object(config)).model
    return made.eval()


@torch.inference_mode()
def peaks_of(module: PeakNetModule, image_PHW: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    prepared = module.preprocess(torch.from_numpy(image_PHW.astype(np.float32))[None])
    logits_NCHW = module.net(prepared.images_N1HW)
    is_peak_NHW = (logits_NCHW.argmax(1) != 0) & prepared.valid_N1HW[:, 0]
    found = find_peaks(is_peak_NHW).split(len(image_PHW), 1)[0]
    original, _ = module.preprocess.to_original(found, image_PHW.shape)
    return original


def test_the_file_is_the_one_that_the_model_card_describes(module: PeakNetModule) -> None:
    assert isinstance(module.net, PeakNet)
    assert module.net.weights_sha256 is not None
    assert module.net.weights_sha256 in (ROOT / "docs" / "model-card.md").read_text()
    file = ROOT / "peaknet_predict" / "weights" / "peaknet_small.safetensors"
    assert file.stat().st_size < 10e6


def test_planted_peaks_are_found_and_little_else(module: PeakNetModule) -> None:
    """A detector of odd size, with an offset and a unit that training never had."""
    source = Simulator(num_events=3, panels=4, height=185, width=388, seed=11, hit_fraction=1.0)
    wanted = found = true = listed = 0
    for idx in range(3):
        image_PHW, _ = source.event(idx)
        planted = source.planted_peaks(idx)
        peaks_K3 = peaks_of(module, 0.37 * image_PHW + 1200)
        index_M, _ = match_peaks(planted.peaks, peaks_K3, 2.0)
        strong_M = planted.snr >= 5
        wanted += int(strong_M.sum())
        found += int((index_M[strong_M] >= 0).sum())
        true += int((index_M >= 0).sum())
        listed += len(peaks_K3)
    assert wanted > 50
    assert found > 0.9 * wanted
    assert true > 0.9 * listed


def test_a_shot_of_nothing_stays_empty(module: PeakNetModule) -> None:
    source = Simulator(num_events=2, panels=4, height=256, width=256, seed=5, hit_fraction=0.0)
    assert sum(len(peaks_of(module, source.event(idx)[0])) for idx in range(2)) <= 2


@pytest.mark.thorough
@pytest.mark.skipif(not REAL_SHOTS, reason="no measured shots beside the repository")
def test_measured_shots(module: PeakNetModule) -> None:
    counts = [len(peaks_of(module, np.load(path)["data"])) for path in REAL_SHOTS]
    assert min(counts) >= 40
    assert max(counts) <= 300
