from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.accuracy import simulated_shots as accuracy
from benchmarks.accuracy.data_sets import DATA_SETS, SETTINGS, DataSet, Shot, simulated
from benchmarks.accuracy.finders import find, local_snr, make_module
from benchmarks.accuracy.matching import Score, crowded, share
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.sources import Simulator
from peaknet_predict.types import Image, Peaks
from tests.helpers.paths import REPOSITORY

MODELS = REPOSITORY / "configs" / "models"


def counted(
    planted: Sequence[Sequence[float]], snr: list[float], found: Sequence[Sequence[float]]
) -> Score:
    score = Score()
    score.add_hit(np.array(planted), np.array(snr), np.array(found).reshape(-1, 3), 10_000)
    return score


def test_recall_is_counted_by_band_and_precision_against_all_that_is_planted() -> None:
    planted = [[0, 10, 10], [0, 30, 30], [1, 10, 10], [1, 50, 50]]
    # The weak peak on panel 1 makes its found one true; nothing of it is missed.
    found = [[0, 10.3, 10.4], [1, 10, 11.9], [1, 70.0, 70.0]]
    score = counted(planted, [12.0, 6.0, 1.5, 4.0], found)
    assert score.recall(10.0).value == 1.0
    assert score.recall(5.0, 10.0).value == 0.0
    assert (score.recall(5.0).part, score.recall(5.0).whole) == (1, 2)
    assert score.recall(3.0, 5.0).whole == 1
    assert score.recall(2.0, 3.0).whole == 0
    assert score.precision.value == pytest.approx(2 / 3)
    assert score.error_px(0.5) == pytest.approx(0.5)
    assert score.chance == [pytest.approx(4 * np.pi * 4 / 10_000)]


def test_a_peak_found_twice_is_false_once() -> None:
    score = counted([[0, 10, 10]], [9.0], [[0, 10, 9.5], [0, 10, 11]])
    assert score.recall(5.0).value == 1.0
    assert score.precision.value == 0.5


def test_a_peak_on_another_panel_is_another_peak() -> None:
    assert counted([[0, 10, 10]], [9.0], [[1, 10, 10]]).precision.value == 0.0


def test_no_peaks_at_all_are_no_error() -> None:
    score = counted([], [], [])
    assert score.recall(5.0).whole == 0
    assert np.isnan(score.precision.value)
    assert score.f1 == 0.0


def test_of_peaks_close_together_the_weaker_is_crowded() -> None:
    peaks_M3 = np.array([[0.0, 10, 10], [0, 12, 12], [0, 40, 40], [1, 10, 10]])
    weaker_M = crowded(peaks_M3, np.array([9.0, 6.0, 5.0, 1.0]))
    assert weaker_M.tolist() == [False, True, False, False]


def test_what_is_ignored_is_neither_missed_nor_false() -> None:
    ignored_PHW = np.zeros((2, 60, 60), dtype=np.bool_)
    ignored_PHW[0, 20:24, 20:24] = ignored_PHW[1, 5, 5] = True
    planted_M3 = np.array([[0.0, 22, 22], [0, 40, 40], [1, 30, 30]])
    # Beside the first ignored region; on the second; matched; false.
    found_F3 = np.array([[0.0, 22, 25.4], [1, 5, 5], [0, 40, 41], [1, 50, 50]])
    score = Score()
    score.add_hit(planted_M3, np.array([9.0, 9.0, 9.0]), found_F3, 7200, ignored_PHW)
    score.add_blank(found_F3, 2, ignored_PHW)
    assert (score.true, score.listed) == ([1], [2])
    assert (score.recall(5.0).part, score.recall(5.0).whole) == (1, 2)
    assert score.not_asked == 1
    assert score.blank_peaks == [2]


def test_a_found_peak_leaves_with_the_ignored_one_that_it_belongs_to() -> None:
    ignored_PHW = np.zeros((1, 60, 60), dtype=np.bool_)
    ignored_PHW[0, 20, 20] = True
    score = Score()
    found_F3 = np.array([[0.0, 20, 21.9]])
    score.add_hit(np.array([[0.0, 20, 20]]), np.array([9.0]), found_F3, 3600, ignored_PHW)
    assert (score.true, score.listed, score.recall(5.0).whole) == ([0], [0], 0)


def test_places_are_compared_where_both_finders_found_the_peak() -> None:
    planted, snr = [[0, 10, 10], [0, 30, 30], [0, 50, 50]], [20.0, 8.0, 5.0]
    finds_all = counted(planted, snr, [[0, 10, 10.1], [0, 30, 30.2], [0, 50, 51.5]])
    misses_the_faint = counted(planted, snr, [[0, 10, 10.3], [0, 30, 30.4]])
    assert finds_all.errors_beside(misses_the_faint) == pytest.approx((0.15, 0.35))
    assert finds_all.error_px(1.0) == pytest.approx(1.5)
    assert misses_the_faint.error_px(1.0) == pytest.approx(0.4)


def test_the_ideal_finder_finds_more_than_local_snr_and_no_more_false_ones() -> None:
    settings = {"default": {**SETTINGS["default"], "panels": 2, "height": 256, "width": 256}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "default", settings["default"])
        data_set = simulated("default", 6, seed=21)
    pair = accuracy.ideal_score(data_set)
    assert pair is not None
    score, _ = accuracy.score(data_set, accuracy.Candidate("LocalSnr", local_snr(), False), find)
    ideal = pair[1]
    assert ideal.recall(5.0).value > 0.98
    assert ideal.recall(3.0, 5.0).value > score.recall(3.0, 5.0).value + 0.2
    assert ideal.precision.value >= accuracy.MIN_PRECISION
    assert ideal.error_px(0.5) < score.error_px(0.5)


def test_what_is_not_possible_is_not_asked_for() -> None:
    candidate = accuracy.Candidate("network", local_snr(), True)
    planted = [[0, 10 * k, 10.0] for k in range(1, 11)]
    its, ideal = (
        counted(planted, [4.0] * 10, planted[:6]),
        counted(planted, [4.0] * 10, planted[:6]),
    )
    sweep = [(accuracy.Candidate("LocalSnr", local_snr(), False), counted(planted, [4.0] * 10, []))]
    asked = {
        told is None: next(
            check
            for check in accuracy.checks("set", candidate, its, sweep, told)
            if "at 3 to 5" in check.asked
        )
        for told in (None, ideal)
    }
    assert not asked[True].holds
    assert asked[False].holds
    assert "0.8 is not possible, 0.600 is" in asked[False].asked


def test_the_error_of_a_share_is_that_of_events_that_differ() -> None:
    assert share([5, 5], [10, 10]).error == 0.0
    assert share([10, 0], [10, 10]).error == pytest.approx(0.5)
    # Many events alike tell more than few.
    assert share([10, 0] * 50, [10, 10] * 50).error < 0.06


def test_a_configuration_is_run_as_predict_runs_it() -> None:
    shot = simulated("default", 1, seed=3).hits[0]
    found = find(make_module(str(MODELS / "snr.yaml")), [shot.image_PHW[:2]] * 3, batch_size=2)
    assert [len(peaks) for peaks in found if peaks is not None] == [len(found[0])] * 3  # type: ignore[arg-type]
    score = Score()
    on_M = shot.peaks_M3[:, 0] < 2
    score.add_hit(shot.peaks_M3[on_M], shot.snr_M[on_M], found[0], 2 * 512 * 512)  # type: ignore[arg-type]
    assert score.recall(10.0).value > 0.9
    assert score.precision.value > 0.9


def test_weights_of_the_command_line_go_over_those_of_the_file() -> None:
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        make_module(f"{MODELS / 'peaknet_small.yaml'}@gone.safetensors")
    assert isinstance(make_module(str(MODELS / "snr.yaml")).net, LocalSnr)


def test_an_event_that_a_network_cannot_take_counts_as_empty_and_refused(tmp_path: Path) -> None:
    config = tmp_path / "cropped.yaml"
    content = yaml.safe_load((MODELS / "snr.yaml").read_text())
    crop = {"class_path": "peaknet_predict.preprocess.Crop"}
    crop["init_args"] = {"height": 96, "width": 96}  # type: ignore[assignment]
    content["model"]["init_args"]["preprocess"].insert(0, crop)
    config.write_text(yaml.safe_dump(content))
    image_PHW = np.zeros((1, 64, 64), dtype=np.float32)
    shot = Shot(image_PHW, np.array([[0.0, 20, 20]]), np.array([9.0]), 9500.0)
    data_set = DataSet("small", [shot], [shot])
    candidate = accuracy.Candidate("cropped", make_module(str(config)), True)
    score, peaks = accuracy.score(data_set, candidate, find)
    assert score.refused == 2
    assert score.recall(5.0).value == 0.0
    assert len(peaks[0]) == 0


class Oracle:
    """A finder that knows the truth: all peaks from a strength on, a little off."""

    def __init__(self, data_set: DataSet) -> None:
        self._data_set = data_set

    def __call__(self, module: PeakNetModule, images: Sequence[Image]) -> list[Peaks | None]:
        shots = {id(shot.image_PHW): shot for shot in self._data_set.hits + self._data_set.blanks}
        net = module.net
        lowest = net.threshold if isinstance(net, LocalSnr) else 2.0
        found: list[Peaks | None] = []
        for image in images:
            shot = shots[id(image)]
            error = 0.2 if isinstance(net, LocalSnr) else 0.1
            found.append(shot.peaks_M3[shot.snr_M >= lowest] + np.array([0, error, 0]))
        return found


def planted_set() -> DataSet:
    rng = np.random.default_rng(2)
    shots = []
    for hit in (True, True, False):
        peaks_M3 = np.concatenate(
            [np.zeros((90, 1)), rng.permutation(90)[:, None] * 10.0 + 5], axis=1
        )
        peaks_M3 = np.concatenate([peaks_M3, np.full((90, 1), 30.0)], axis=1)
        keep = slice(None) if hit else slice(0, 0)
        snr_M = np.geomspace(2.0, 50.0, 90)
        shots.append(Shot(np.zeros((1, 900, 60)), peaks_M3[keep], snr_M[keep], 9500.0))
    return DataSet("planted", shots[:2], shots[2:])


def test_thresholds_of_acceptance_hold_for_a_finder_that_finds_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data_set = planted_set()
    network = accuracy.Candidate("network", make_module(str(MODELS / "peaknet_small.yaml")), True)
    sweep = accuracy.swept([6.0, 8.0])
    found = accuracy.evaluate(data_set, [network], sweep, Oracle(data_set))
    assert len(found) == 11
    assert [check.asked for check in found if not check.holds] == []
    said = capsys.readouterr().out
    assert "| network | 1.000 +- 0.000 |" in said
    assert "best F1: LocalSnr, threshold 6" in said


def test_thresholds_of_acceptance_fail_for_a_finder_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set = planted_set()
    monkeypatch.setitem(DATA_SETS, "default", lambda *_: data_set)
    oracle = Oracle(data_set)
    # The network sees nothing below 2 sigmas; asked of a weaker LocalSnr it wins, and loses else.
    monkeypatch.setattr(accuracy, "find", lambda module, images, *_: oracle(module, images))
    words = ["--config", str(MODELS / "peaknet_small.yaml"), "--data-sets", "default", "--check"]
    assert accuracy.main([*words, "--sweep", "6"]) == 0
    assert accuracy.main([*words, "--sweep", "2"]) == 1
    assert "**no**" in capsys.readouterr().out


def test_no_network_is_nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    data_set = planted_set()
    monkeypatch.setitem(DATA_SETS, "default", lambda *_: data_set)
    oracle = Oracle(data_set)
    monkeypatch.setattr(accuracy, "find", lambda module, images, *_: oracle(module, images))
    words = ["--data-sets", "default", "--sweep", "6"]
    assert accuracy.main(words) == 0
    assert accuracy.main([*words, "--check"]) == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_plants_peaks_of_all_strengths(name: str) -> None:
    simulator = Simulator(2, seed=11, hit_fraction=1.0, **SETTINGS[name])
    snr_M = np.concatenate([simulator.planted_peaks(idx).snr for idx in range(2)])
    assert ((snr_M >= 3) & (snr_M < 5)).sum() >= 10
    assert (snr_M >= 5).sum() >= 20


def test_blanks_are_blank_and_hits_lie_on_the_detector() -> None:
    data_set = simulated("low_counts", 1, seed=4)
    assert len(data_set.blanks[0].peaks_M3) == 0
    assert data_set.geometry is not None
    shot = data_set.hits[0]
    q_M3 = data_set.geometry.scattering_vectors(shot.peaks_M3, shot.photon_energy_ev)
    assert np.isfinite(q_M3).all()


def test_the_sweep_starts_at_the_defaults_ratio() -> None:
    names = [candidate.name for candidate in accuracy.swept([5.0, 10.0])]
    assert names == ["LocalSnr, threshold 5", "LocalSnr, threshold 10", "LocalSnr, all x 2"]
    assert local_snr().net.threshold == 5.0


def test_held_out_shots_ask_for_what_their_labels_call_a_peak() -> None:
    from peaknet_predict.simulation.labels import PEAK
    from peaknet_predict.simulation.shots import ShotSimulator

    shots = DATA_SETS["held_out"](3, 0, "cpu").hits
    asked = others = 0
    for k, shot in enumerate(shots):
        simulator = ShotSimulator(4, 512, 512, 1.0, 0, "held_out")
        labels_PHW = simulator.shots(k, 1, torch.device("cpu")).labels_BPHW[0].numpy()
        panel_M, y_M, x_M = np.rint(shot.peaks_M3).astype(int).T
        is_peak_M = labels_PHW[panel_M, y_M, x_M] == PEAK
        score = Score()
        score.add_hit(shot.peaks_M3, shot.snr_M, shot.peaks_M3, labels_PHW.size, shot.ignored_PHW)
        strong = int((is_peak_M & (shot.snr_M >= 5)).sum())
        assert (score.recall(5.0).part, score.recall(5.0).whole) == (strong, strong)
        assert score.true == score.listed
        asked += int(is_peak_M.sum())
        others += int((~is_peak_M).sum())
    assert asked > 20
    assert others > 20
