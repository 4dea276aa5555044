from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Timer
from safetensors import safe_open
from torch import Tensor, nn

from peaknet_predict.callbacks.averaged_weights import AveragedWeights, weight_of_new
from peaknet_predict.models import PeakNet
from peaknet_predict.models.weights import METADATA
from peaknet_predict.module import PeakNetModule
from peaknet_predict.peaks import find_peaks
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.preprocess import (
    LocalNorm,
    MergeBatchChannelDims,
    PadToMultiple,
    Patchify,
    Preprocess,
)
from peaknet_predict.simulation.labels import IGNORED, PEAK
from peaknet_predict.simulation.shots import LabelledShots
from peaknet_predict.training.augment import turned
from peaknet_predict.training.export import export_weights
from peaknet_predict.training.loss import focal_loss, peak_log_odds
from peaknet_predict.training.metrics import (
    OPERATING_POINT,
    THRESHOLDS,
    Figures,
    Scores,
    operating_point,
)
from peaknet_predict.training.optim import Progress, parameter_groups, rate_factor
from peaknet_predict.types import Event, EventBatch, EventId
from tests.helpers.examples import examples

SMALL: dict[str, Any] = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "bifpn_features": 8,
    "head_channels": 8,
    "head_groups": 2,
    "learned_upsample": True,
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_loss_equals_its_formula(classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 7, 9, generator=generator).mul(4).to(dtype)
    labels = torch.randint(0, 2, (2, 7, 9), generator=generator, dtype=torch.uint8)
    labels[0, :2] = IGNORED
    probability = logits.double().softmax(1)
    total, num_peaks = 0.0, 0
    for n, y, x in np.ndindex(2, 7, 9):
        label = int(labels[n, y, x])
        if label == IGNORED:
            continue
        background = float(probability[n, 0, y, x])
        right, weight = (1 - background, 0.75) if label else (background, 0.25)
        total += -weight * (1 - right) ** 2 * math.log(right)
        num_peaks += label
    assert float(focal_loss(logits, labels)) == pytest.approx(total / num_peaks, rel=1e-4)


def test_focal_loss_without_peaks_or_without_anything_is_finite() -> None:
    logits = torch.tensor([-80.0, 80.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    for label in (0, 1, IGNORED):
        labels = torch.full((1, 4, 4), label, dtype=torch.uint8)
        leaf = logits.clone().requires_grad_()
        loss = focal_loss(leaf, labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    assert loss.item() == 0


def test_ignored_pixels_have_no_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[0, 1, 1], labels[0, 2, 2] = 1, IGNORED
    focal_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad[0, :, 2, 2] == 0).all()
    assert (logits.grad[0, :, 0, 0] != 0).all()


def test_only_kernels_decay() -> None:
    net = PeakNet(**SMALL)
    decayed, free = parameter_groups(net, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    of_kernels = {names[id(p)] for p in decayed["params"]}
    others = {names[id(p)] for p in free["params"]}
    assert of_kernels | others == set(names.values())
    assert len(of_kernels) + len(others) == len(names)
    assert {"head_upsample_layer.weight", "head_segmask.weight"} <= of_kernels
    assert all(name.endswith(".weight") for name in of_kernels)
    assert not any("norm" in name or "grn" in name for name in of_kernels)
    assert {"bifpn.blocks.0.w_m", "head_segmask.bias"} <= others


def test_the_rate_rises_in_steps_and_falls_by_progress() -> None:
    assert rate_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert rate_factor(9, 0.0, 10) == pytest.approx(1.0)
    assert rate_factor(100, 0.5, 10) == pytest.approx(0.505)
    assert rate_factor(100, 1.0, 10) == rate_factor(100, 1.7, 10) == pytest.approx(0.01)
    factors = [rate_factor(step, step / 200, 20) for step in range(200)]
    assert factors.index(max(factors)) in (18, 19, 20)


class FakeTrainer:
    """What `Progress` asks of a Trainer."""

    def __init__(self, steps: float, timer: Timer | None = None) -> None:
        self.estimated_stepping_batches = steps
        self.callbacks = [] if timer is None else [timer]
        self.world_size = 1


def progress(trainer: FakeTrainer) -> Progress:
    any_trainer: Any = trainer
    return Progress(any_trainer)


def test_progress_is_that_of_the_limit_that_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(duration={"seconds": 100})
    monkeypatch.setattr(timer, "time_elapsed", lambda *_: 40.0)
    assert progress(FakeTrainer(1000))(250) == 0.25
    assert progress(FakeTrainer(math.inf, timer))(250) == pytest.approx(0.4)
    assert progress(FakeTrainer(1000, timer))(250) == pytest.approx(0.4)
    assert progress(FakeTrainer(500, timer))(250) == 0.5
    with pytest.raises(ValueError, match="set trainer.max_steps or trainer.max_time"):
        progress(FakeTrainer(math.inf))


def brute_force_pairs(known: Any, found: Any, radius: float) -> tuple[list[int], list[float]]:
    pairs = sorted(
        (math.dist(k[1:], f[1:]), i, j)
        for i, k in enumerate(known)
        for j, f in enumerate(found)
        if k[0] == f[0] and math.dist(k[1:], f[1:]) <= radius
    )
    index, distance = [-1] * len(known), [math.inf] * len(known)
    for d, i, j in pairs:
        if index[i] < 0 and j not in index:
            index[i], distance[i] = j, d
    return index, distance


peaks = st.lists(
    st.tuples(st.integers(0, 1), st.floats(0, 6, width=16), st.floats(0, 6, width=16)), max_size=12
)


@examples(200)
@given(peaks, peaks)
def test_pairs_equal_brute_force(known: list[Any], found: list[Any]) -> None:
    arrays = [np.array(p, dtype=np.float64).reshape(-1, 3) for p in (known, found)]
    index, distance = match_peaks(arrays[0], arrays[1], 2.0)
    expected_index, expected_distance = brute_force_pairs(known, found, 2.0)
    assert index.tolist() == expected_index
    assert distance.tolist() == pytest.approx(expected_distance)


def dots(peaks: list[tuple[int, int, int, int]], odds: list[float]) -> Tensor:
    """Log odds of panels (N=4, 40, 40): single pixels above -9."""
    image = torch.full((2, 2, 40, 40), -9.0)
    for peak, value in zip(peaks, odds, strict=True):
        image[peak] = value
    return image.flatten(0, 1)


def test_scores_equal_what_is_counted_by_hand() -> None:
    # Two events of two panels; the last panel is blank. The last two are no peaks by their labels.
    known = torch.tensor(
        [
            [0, 0, 5, 5],
            [0, 0, 20, 20],
            [0, 1, 8, 8.6],
            [1, 0, 30, 30],
            [1, 0, 9, 9],
            [0, 0, 35, 39.6],
        ]
    )
    snr = torch.tensor([4.0, 9.0, 6.0, 2.0, 9.0, 4.0])
    labels = torch.zeros(2, 2, 40, 40, dtype=torch.uint8)
    labels[0, 0, 33:, 33:] = IGNORED
    labels[0, 0, 5, 5] = labels[0, 0, 20, 20] = labels[0, 1, 8, 9] = labels[1, 0, 30, 30] = PEAK
    shots = LabelledShots(torch.zeros(2, 2, 40, 40), labels, known, snr)
    # Found: weak, strong one pixel off, off by 0.4, the very faint one, false, ignored, on blank.
    found = [
        (0, 0, 5, 5),
        (0, 0, 20, 21),
        (0, 1, 8, 9),
        (1, 0, 30, 30),
        (0, 0, 20, 35),
        (0, 0, 35, 35),
        (1, 1, 3, 3),
    ]
    odds = dots(found, [1.1, 3.1, 3.1, 3.1, 2.1, 3.1, 0.1])
    preprocess = Preprocess([LocalNorm(), PadToMultiple(32), MergeBatchChannelDims()])
    odds = nn.functional.pad(odds, (0, 24, 0, 24), value=9.0)  # padding is never a peak
    valid = preprocess(shots.images_BPHW).valid_N1HW[:, 0]
    scores = Scores()
    scores.add(odds, valid, shots, preprocess)
    by_threshold = {f.threshold: f for f in scores.figures()}
    assert list(by_threshold) == list(THRESHOLDS)

    low = by_threshold[0.0]
    assert (low.recall_weak, low.recall_strong, low.recall) == (1.0, 1.0, 1.0)
    assert low.precision == pytest.approx(4 / 6)
    assert low.false_per_blank == 1.0
    assert low.f1 == pytest.approx(2 * (4 / 6) / (1 + 4 / 6))
    assert low.centroid_px == pytest.approx(0.2, abs=0.21)
    high = by_threshold[3.0]
    assert (high.recall_weak, high.recall_strong) == (0.0, 1.0)
    assert (high.precision, high.false_per_blank) == (1.0, 0.0)
    nothing = by_threshold[5.0]
    assert (nothing.precision, nothing.recall, nothing.f1) == (1.0, 0.0, 0.0)
    assert math.isnan(nothing.centroid_px)

    both = Scores()
    both.counts_TK = scores.counts_TK * 2
    assert both.figures()[0] == scores.figures()[0]


def test_scores_are_those_of_the_original_frame() -> None:
    """Peaks found in patches are compared where they are in the event."""
    known = torch.tensor([[0.0, 1, 25, 7]])
    labels = torch.zeros(1, 2, 32, 32, dtype=torch.uint8)
    labels[0, 1, 25, 7] = PEAK
    shots = LabelledShots(torch.zeros(1, 2, 32, 32), labels, known, torch.tensor([9.0]))
    preprocess = Preprocess([LocalNorm(), Patchify(16, 16), MergeBatchChannelDims()])
    odds = torch.full((8, 16, 16), -9.0)
    odds[6, 9, 7] = 9.0
    scores = Scores()
    scores.add(odds, torch.ones(8, 16, 16, dtype=torch.bool), shots, preprocess)
    assert scores.figures()[0].recall == scores.figures()[0].precision == 1.0


def figures(threshold: float, precision: float, recall: float, blank: float = 0.0) -> Figures:
    f1 = 2 * precision * recall / (precision + recall) if recall else 0.0
    return Figures(threshold, precision, recall, recall, recall, f1, blank, 0.5)


def test_the_operating_point_balances_and_leaves_blanks_blank() -> None:
    rows = [
        figures(0, 0.6, 0.95),
        figures(1, 0.9, 0.9, blank=0.2),
        figures(2, 0.95, 0.8, blank=0.1),
        figures(3, 1, 0.2),
    ]
    assert operating_point(rows).threshold == 2
    easy = [figures(t, 1.0, 1.0 if 0 < t < 4 else 0.9) for t in range(6)]
    assert operating_point(easy).threshold == 2
    hopeless = [figures(0, 0.1, 0.9, 5), figures(1, 0.5, 0.5, 5), figures(2, 1.0, 0.0)]
    assert operating_point(hopeless).threshold == 1


@pytest.mark.parametrize("shape", [(6, 6), (6, 8)])
def test_turns_are_the_same_for_pixels_and_labels(shape: tuple[int, int]) -> None:
    image = torch.arange(2 * shape[0] * shape[1]).reshape(1, 2, *shape)
    seen = set()
    for seed in range(64):
        pixels, labels = turned([image, image * 2], seed)
        assert torch.equal(pixels * 2, labels)
        assert pixels.shape == image.shape
        assert sorted(pixels.flatten().tolist()) == image.flatten().tolist()
        seen.add(tuple(pixels.flatten().tolist()))
    assert len(seen) == (8 if shape[0] == shape[1] else 4)


def save_checkpoint(path: Path, net: nn.Module, threshold: float | None) -> None:
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    content: dict[str, Any] = {"state_dict": state, "global_step": 7}
    if threshold is not None:
        content[OPERATING_POINT] = figures(threshold, 0.99, 0.9).as_dict()
    torch.save(content, path)


@pytest.mark.parametrize("learned_upsample", [True, False])
def test_exported_weights_have_their_threshold_at_zero(
    learned_upsample: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = SMALL | {"learned_upsample": learned_upsample}
    net = PeakNet(**settings).eval()
    save_checkpoint(tmp_path / "best.ckpt", net, threshold=1.25)
    sha256 = export_weights(tmp_path / "best.ckpt", tmp_path / "new" / "w.safetensors")
    loaded = PeakNet(**settings, weights=str(tmp_path / "new" / "w.safetensors")).eval()
    assert loaded.weights_sha256 == sha256
    assert next(loaded.parameters()).dtype == torch.float32
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        before, after = peak_log_odds(net(images)), peak_log_odds(loaded(images))
    torch.testing.assert_close(after, before - 1.25, atol=5e-3, rtol=0)
    with safe_open(tmp_path / "new" / "w.safetensors", "pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {torch.float16, torch.bool}
        origin = json.loads(file.metadata()[METADATA])
        assert origin["steps"] == 7
        assert origin["validation"]["threshold"] == 1.25
        assert origin["threshold"] == 0.0, "it is part of the weights"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


class Own(nn.Module):
    """A network of somebody else: logits of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, images_N1HW: Tensor) -> Tensor:
        logits_NCHW: Tensor = self.conv(images_N1HW)
        return logits_NCHW


def test_an_own_networks_operating_point_goes_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Own()
    save_checkpoint(tmp_path / "best.ckpt", net, threshold=0.75)
    export_weights(tmp_path / "best.ckpt", tmp_path / "w.safetensors")
    steps = [LocalNorm(), MergeBatchChannelDims()]
    module = PeakNetModule(Own(), steps, weights=str(tmp_path / "w.safetensors")).eval()
    assert module.provenance.threshold == 0.75
    image = np.random.default_rng(0).poisson(3, (1, 32, 32)).astype(np.float32)
    event = Event(EventId("s", 0, 0), image, 9000.0)
    batch = EventBatch(torch.from_numpy(image)[None], [event], [])
    with torch.inference_mode():
        (result,) = module.predict_step(batch, 0).result().results
        odds_NHW = peak_log_odds(module.net(module.preprocess(batch.images_BPHW).images_N1HW))
        expected = find_peaks(odds_NHW > 0.75).split(1, 1)[0]
        at_zero = find_peaks(odds_NHW > 0).split(1, 1)[0]
    assert np.array_equal(result.peaks, expected)
    assert not np.array_equal(result.peaks, at_zero)


def test_exports_that_cannot_be_name_the_reason(tmp_path: Path) -> None:
    net = PeakNet(**SMALL)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*gone.ckpt"):
        export_weights(tmp_path / "gone.ckpt", tmp_path / "w.safetensors")
    save_checkpoint(tmp_path / "a.ckpt", net, threshold=None)
    with pytest.raises(ValueError, match="give the path that suffix"):
        export_weights(tmp_path / "a.ckpt", tmp_path / "w.pt")
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="holds no network"):
        export_weights(tmp_path / "b.ckpt", tmp_path / "w.safetensors")
    (tmp_path / "c.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        export_weights(tmp_path / "c.ckpt", tmp_path / "w.safetensors")
    with torch.no_grad():
        net.head_segmask.weight[0, 0] = 1e6
    save_checkpoint(tmp_path / "d.ckpt", net, threshold=None)
    with pytest.raises(ValueError, match="head_segmask.weight has values that are not finite"):
        export_weights(tmp_path / "d.ckpt", tmp_path / "w.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_export_without_validation_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    net = PeakNet(**SMALL)
    save_checkpoint(tmp_path / "a.ckpt", net, threshold=None)
    export_weights(tmp_path / "a.ckpt", tmp_path / "w.safetensors")
    assert "never validated" in caplog.text
    loaded = PeakNet(**SMALL, weights=str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(loaded.head_segmask.bias, net.head_segmask.bias, atol=2e-4, rtol=0)


def test_lightnings_timer_has_what_progress_reads() -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_time="00:00:01:00"
    )
    (timer,) = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    assert timer.time_remaining() == 60.0


@pytest.mark.parametrize("steps", [40, 400, 20000])
def test_averaged_weights_forget_the_start_and_reach_back_to_their_horizon(steps: int) -> None:
    share_of_first, reach = 1.0, 0.0
    for number in range(steps // 5):
        new = weight_of_new(number, least=0.01)
        share_of_first = new if number == 0 else share_of_first * (1 - new)
        reach = (reach + 5) * (1 - new)
    assert share_of_first < 0.03
    assert reach == pytest.approx(min(500, steps / 10), rel=0.25)


def test_averaged_weights_are_lightnings_average(tmp_path: Path) -> None:
    averaged = AveragedWeights(horizon_steps=20, every_n_steps=2)
    module = L.LightningModule()
    layer = module.layer = nn.Linear(1, 1, bias=False)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    averaged.setup(trainer, module, "fit")
    assert averaged._average_model is not None
    expected, seen = 0.0, 0
    for step in range(40):
        value = float(step)
        nn.init.constant_(layer.weight, value)
        if averaged.should_update(step_idx=step):
            averaged._average_model.update_parameters(module)
            new = max(0.1, 9 / (9 + seen))
            expected, seen = (1 - new) * expected + new * value, seen + 1
    assert seen == 20
    (average,) = averaged._average_model.module.parameters()
    assert average.item() == pytest.approx(expected, rel=1e-5)
    assert not averaged.should_update(epoch_idx=1)
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        AveragedWeights(every_n_steps=0)
