"""Training through the command line, and its data."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from peaknet_predict.cli import main
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.models import PeakNet
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import LocalNorm, MergeBatchChannelDims, PadToMultiple
from peaknet_predict.simulation.labels import IGNORED
from peaknet_predict.training.cxi_shots import CxiShots
from peaknet_predict.training.module import PeakNetTraining
from peaknet_predict.training.simulated_shots import SimulatedShots
from peaknet_predict.types import Event, EventBatch, EventId, Result
from tests.helpers.paths import CONFIGS

NET: dict[str, Any] = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "bifpn_features": 16,
    "head_channels": 16,
    "head_groups": 4,
    "learned_upsample": True,
}


def easy_shots(num_events: int, panels: int = 2, size: int = 64) -> list[Result]:
    """Frames with bright round spots on noise, and where those are."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size, :size]
    results = []
    for idx in range(num_events):
        image = rng.normal(1000.0, 5.0, (panels, size, size))
        peaks = []
        for panel in range(panels):
            for place in rng.permutation(9)[:5]:
                cy, cx = (np.array(divmod(place, 3)) + 0.5) * size / 3 + rng.uniform(-4, 4, 2)
                image[panel] += rng.uniform(80, 400) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2)
                peaks.append((panel, cy, cx))
        results.append(
            Result(EventId("s", 0, idx), image.astype(np.float32), np.array(peaks), 9500.0)
        )
    return results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of CXI files of our own, of 24 events."""
    directory = tmp_path_factory.mktemp("cxi")
    writer = CxiWriter(directory, "easy", events_per_file=10)
    for result in easy_shots(24):
        writer.add(result)
    writer.close()
    return directory


def settings(tmp_path: Path, data: dict[str, Any], **trainer: Any) -> Path:
    """Write what turns the shipped configurations into a run of seconds, and return its path."""
    path = tmp_path / "tiny.yaml"
    init_args = {"net": {"init_args": NET | {"weights": None}}, "warmup_steps": 10}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_time": None,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "default_root_dir": "runs/train",
        }
        | trainer,
        "model": {"init_args": init_args | {"learning_rate": 0.01}},
        "data": data,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def fit(*more: str) -> int:
    words = ["-c", str(CONFIGS / "train.yaml"), "-c", str(CONFIGS / "models/peaknet_small.yaml")]
    return main(["fit", *words, *more])


def simulated(steps_per_epoch: int = 6) -> dict[str, Any]:
    init_args = {"batch_size": 2, "panels": 1, "height": 64, "width": 64, "val_batches": 1}
    return {"init_args": init_args | {"steps_per_epoch": steps_per_epoch}}


def from_files(files: Path, **more: Any) -> dict[str, Any]:
    init_args = {"path": str(files / "*.cxi"), "batch_size": 7, "height": 64, "width": 64}
    return {
        "class_path": "peaknet_predict.training.cxi_shots.CxiShots",
        "init_args": init_args | {"num_workers": 0} | more,
    }


def curve(directory: Path, column: str) -> list[float]:
    """Return a column of the latest run's metrics.csv."""
    path = max(directory.glob("lightning_logs/*/metrics.csv"), key=lambda p: p.stat().st_mtime_ns)
    with path.open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_a_network_learns_from_files_and_its_weights_predict(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a facility: own files, fit, weights, predict."""
    monkeypatch.chdir(tmp_path)
    data = from_files(files, val_fraction=0.3, batch_size=8)
    config = settings(tmp_path, data, max_steps=240, check_val_every_n_epoch=20)
    assert fit("-c", str(config)) == 0
    losses = curve(tmp_path / "runs/train", "train/loss")
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])
    assert max(curve(tmp_path / "runs/train", "val/f1")) > 0.9
    rates = curve(tmp_path / "runs/train", "lr-AdamW/pg1")
    assert rates[-1] < 0.02 * max(rates)

    net = PeakNet(**NET, weights=str(tmp_path / "runs/train/weights.safetensors"))
    module = PeakNetModule(net, [LocalNorm(), PadToMultiple(32), MergeBatchChannelDims()])
    module.eval()
    truth = easy_shots(30)[24:]  # none of those it has seen
    events = [Event(r.id, r.image * 3 - 77, r.photon_energy) for r in truth]
    images = torch.from_numpy(np.stack([event.image for event in events]))
    with torch.inference_mode():
        found = module.predict_step(EventBatch(images, events, []), 0).result().results
    matched = listed = 0
    for result, true in zip(found, truth, strict=True):
        listed += len(result.peaks)
        matched += sum(
            np.abs(result.peaks - peak).max(axis=1).min(initial=9) < 1 for peak in true.peaks
        )
    assert matched >= 0.9 * 60
    assert listed <= 1.1 * matched


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, simulated(), max_steps=18)
    assert fit("-c", str(config)) == 0
    whole = curve(tmp_path / "runs/train", "train/loss")
    expected = torch.load("runs/train/last.ckpt", weights_only=True)
    shutil.rmtree("runs")

    class Stop(Exception):
        pass

    def stop_after(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 12:
            raise Stop

    with monkeypatch.context() as patch:
        from peaknet_predict.callbacks.weights_export import WeightsExport

        patch.setattr(WeightsExport, "on_train_batch_start", stop_after)
        with pytest.raises(Stop):
            fit("-c", str(config))
    assert torch.load("runs/train/last.ckpt", weights_only=True)["global_step"] == 12
    assert fit("-c", str(config), "--ckpt_path", "runs/train/last.ckpt") == 0
    resumed = curve(tmp_path / "runs/train", "train/loss")
    assert resumed == pytest.approx(whole[12:], rel=1e-4)
    state = torch.load("runs/train/last.ckpt", weights_only=True)
    for name, tensor in expected["state_dict"].items():
        torch.testing.assert_close(state["state_dict"][name], tensor, atol=1e-5, rtol=1e-3)
    assert Path("runs/train/weights.safetensors").is_file()


def test_fine_tuning_starts_from_weights_and_export_makes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, simulated(2), max_steps=2)
    assert fit("-c", str(config)) == 0
    exported = Path("runs/train/weights.safetensors").read_bytes()
    words = ["--checkpoint", "runs/train/best.ckpt", "--path", "again.safetensors"]
    assert main(["export", *words]) == 0
    assert Path("again.safetensors").read_bytes() == exported
    gone = ["--checkpoint", "gone.ckpt", "--path", "again.safetensors"]
    assert main(["export", *gone]) == 1

    shutil.move("runs", "first")
    config = settings(tmp_path, simulated(2), max_steps=2)
    weights = "--model.init_args.net.init_args.weights"
    small_steps = ["--model.init_args.learning_rate", "1e-6"]
    assert fit("-c", str(config), weights, "again.safetensors", *small_steps) == 0
    before = PeakNet(**NET, weights="again.safetensors").state_dict()
    after = torch.load("runs/train/last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in before.items():
        torch.testing.assert_close(after[f"net.{name}"], tensor, atol=1e-4, rtol=1e-3)


def test_a_run_with_neither_end_nor_full_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    endless = settings(tmp_path, simulated(), max_epochs=-1)
    assert fit("-c", str(endless)) == 1
    assert "set trainer.max_steps or trainer.max_time" in caplog.text
    rounded = settings(tmp_path, simulated(), max_steps=1)
    assert fit("-c", str(rounded), "--trainer.precision", "bf16-true") == 1
    assert "train with trainer.precision bf16-mixed or 32-true" in caplog.text


def test_a_run_that_ends_by_the_clock_ends_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A clock that only goes on when it is looked at: as many steps on every machine.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.02 * next(ticks))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    config = settings(tmp_path, simulated(10**6), max_time="00:00:00:06", max_steps=-1)
    assert fit("-c", str(config)) == 0
    rates = curve(tmp_path / "runs/train", "lr-AdamW/pg1")
    assert max(rates) > 0.3 * 0.01
    assert rates[-1] < 0.1 * max(rates)
    assert len(curve(tmp_path / "runs/train", "val/f1")) == 1
    assert Path("runs/train/weights.safetensors").is_file()


def test_the_last_weights_are_validated_in_the_midst_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, simulated(4), max_steps=6)
    assert fit("-c", str(config)) == 0
    assert len(curve(tmp_path / "runs/train", "train/loss")) == 6
    assert len(curve(tmp_path / "runs/train", "val/f1")) == 2
    assert torch.load("runs/train/last.ckpt", weights_only=True)["global_step"] == 6


class FakeTrainer:
    """What the data modules, and a module's setup, ask of a Trainer."""

    precision = "32-true"

    def __init__(self, rank: int = 0, ranks: int = 1, training: bool = True) -> None:
        self.global_rank, self.world_size, self.training = rank, ranks, training
        self.current_epoch = self.global_step = 0
        self.strategy = self
        self.root_device = torch.device("cpu")


def attached(data: Any, **trainer: Any) -> Any:
    data.trainer = FakeTrainer(**trainer)
    return data


def test_simulated_batches_repeat_and_differ_between_processes() -> None:
    def batches(rank: int, ranks: int, number: int, first: int = 0) -> list[torch.Tensor]:
        data = attached(SimulatedShots(2, 1, 64, 64, seed=3), rank=rank, ranks=ranks)
        data.load_state_dict({"batches_made": first})
        images = [data.on_after_batch_transfer(0, 0).images_BPHW for _ in range(number)]
        assert data.state_dict() == {"batches_made": first + number}
        return images

    whole = batches(0, 1, 4)
    assert not torch.equal(whole[0].nan_to_num(), whole[1].nan_to_num())
    for ours, theirs in zip(whole[2:], batches(0, 1, 2, first=2), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    shares = zip(batches(0, 2, 2), batches(1, 2, 2), strict=True)
    for ours, theirs in zip(whole, (b for pair in shares for b in pair), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_validation_batches_are_shared_out_and_always_the_same() -> None:
    data = SimulatedShots(2, 1, 64, 64, val_batches=5)
    numbers = [list(attached(data, rank=r, ranks=2).val_dataloader()) for r in range(2)]
    assert numbers == [[0, 2, 4], [1, 3]]
    attached(data, training=False)
    first, again = (data.on_after_batch_transfer(3, 0) for _ in range(2))
    assert torch.equal(first.images_BPHW.nan_to_num(), again.images_BPHW.nan_to_num())
    assert len(first.peaks_M4) == len(first.snr_M)
    with pytest.raises(ValueError, match="val_batches 0; each must be at least 1"):
        SimulatedShots(val_batches=0)


def crops(data: CxiShots, training: bool) -> list[Any]:
    attached(data, training=training)
    loader = data.train_dataloader() if training else data.val_dataloader()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_crops_of_files_have_the_peaks_where_the_lists_say(files: Path) -> None:
    data = CxiShots(
        str(files / "*.cxi"), batch_size=4, height=48, width=40, val_fraction=0.25, num_workers=0
    )
    batches = crops(data, training=False)
    assert [len(b.images_BPHW) for b in batches] == [4]  # of 6: short batches are dropped
    for shots in batches:
        assert shots.images_BPHW.shape == shots.labels_BPHW.shape == (4, 1, 48, 40)
        assert len(shots.peaks_M4) > 4
        for event, panel, y, x in shots.peaks_M4.tolist():
            where = int(event), int(panel), round(y), round(x)
            assert shots.labels_BPHW[where] == 1
            assert shots.images_BPHW[where] > 1030
    again = crops(data, training=False)
    assert torch.equal(batches[0].images_BPHW, again[0].images_BPHW)

    trained = crops(data, training=True)
    assert [len(b.images_BPHW) for b in trained] == [4, 4, 4, 4]
    for shots in trained:
        marked = shots.images_BPHW[shots.labels_BPHW == 1]
        assert float(marked.mean()) > 1040
        assert float(shots.images_BPHW[shots.labels_BPHW == 0].mean()) < 1012
    data.trainer.current_epoch = 1  # type: ignore[union-attr,misc]
    other = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert not torch.equal(trained[0].images_BPHW, other[0].images_BPHW)


def test_every_event_has_its_turn_and_none_is_in_both_parts(files: Path) -> None:
    data = CxiShots(str(files / "*.cxi"), num_workers=0, val_fraction=0.25)
    train, val = data._train.events, data._val.events
    assert (len(train), len(val)) == (18, 6)
    assert len({*train, *val}) == 24
    seen: list[Any] = []
    data._train._crop = lambda which, row, rng: seen.append((which, row))  # type: ignore[assignment,method-assign,return-value]
    for number in range(36):
        data._train[number]
    assert sorted(seen[:18]) == sorted(seen[18:]) == sorted(train)
    assert seen[:18] != seen[18:]


def cheetah(
    path: Path, data: npt.NDArray[Any], peaks: list[list[tuple[float, float]]], **more: Any
) -> None:
    """A file with the datasets that Cheetah writes, and nothing of ours."""
    most = max(map(len, peaks), default=0)
    with h5py.File(path, "w") as h5:
        h5["entry_1/data_1/data"] = data
        for name, values in more.items():
            h5[f"entry_1/data_1/{name}"] = values
        h5["entry_1/result_1/nPeaks"] = np.array([len(p) for p in peaks])
        for column, name in enumerate(("peakXPosRaw", "peakYPosRaw")):
            values = np.zeros((len(peaks), max(most, 1)), np.float32)
            for row, listed in enumerate(peaks):
                values[row, : len(listed)] = [peak[column] for peak in listed]
            h5[f"entry_1/result_1/{name}"] = values


def test_small_panels_are_filled_up_and_masks_are_heeded(tmp_path: Path) -> None:
    slab = np.zeros((4, 60, 30), np.int16)
    mask = np.zeros((60, 30), np.uint16)
    mask[:, 3] = 1
    # On panel 1 (of 20 rows), at y = 7, x = 12; x comes first in the lists.
    cheetah(tmp_path / "a.cxi", slab, [[(12.0, 27.0)]] * 4, mask=mask)
    data = CxiShots(
        str(tmp_path / "a.cxi"),
        panel_height=20,
        height=32,
        width=32,
        batch_size=1,
        val_fraction=0.75,
        num_workers=0,
    )
    batches = crops(data, training=False)
    with_peak = [b for b in batches if len(b.peaks_M4)]
    for shots in batches:
        bad = torch.isnan(shots.images_BPHW[0, 0])
        assert bad[20:].all()
        assert bad[:, 30:].all()
        assert bad[:, 3].all()
        assert (~bad).sum() == 20 * 29
        assert (shots.labels_BPHW[0, 0][bad] == IGNORED).all()
    assert [b.peaks_M4.tolist() for b in with_peak] == [[[0, 0, 7, 12]]] * len(with_peak)
    stacked = slab.reshape(4, 3, 20, 30)
    cheetah(tmp_path / "b.cxi", stacked, [[(12.0, 27.0)]] * 4, mask=mask.reshape(3, 20, 30))
    same = crops(
        CxiShots(
            str(tmp_path / "b.cxi"),
            height=32,
            width=32,
            batch_size=1,
            val_fraction=0.75,
            num_workers=0,
        ),
        training=False,
    )
    for ours, theirs in zip(batches, same, strict=True):
        assert torch.equal(ours.images_BPHW.isnan(), theirs.images_BPHW.isnan())
        assert torch.equal(ours.labels_BPHW, theirs.labels_BPHW)


def test_files_that_cannot_teach_name_the_reason(tmp_path: Path) -> None:
    frames = np.zeros((3, 60, 30), np.float32)
    with pytest.raises(FileNotFoundError, match="check the path"):
        CxiShots(str(tmp_path / "none.cxi"))
    (tmp_path / "text.cxi").write_text("no HDF5")
    with pytest.raises(ValueError, match="cannot be opened as HDF5"):
        CxiShots(str(tmp_path / "text.cxi"))
    cheetah(tmp_path / "empty.cxi", frames, [[], [], []])
    with pytest.raises(ValueError, match="lists of all 3 events are empty"):
        CxiShots(str(tmp_path / "empty.cxi"))
    cheetah(tmp_path / "short.cxi", frames, [[(1.0, 1.0)]] * 2)
    with pytest.raises(ValueError, match=r"3 frames, but peak lists of shape nPeaks \(2,\)"):
        CxiShots(str(tmp_path / "short.cxi"))
    cheetah(tmp_path / "good.cxi", frames, [[(1.0, 1.0)]] * 3)
    with pytest.raises(ValueError, match="no dataset /raw: name the frames with `data`"):
        CxiShots(str(tmp_path / "good.cxi"), data="/raw")
    with pytest.raises(ValueError, match="no dataset /lists/nPeaks, .*with `peaks`"):
        CxiShots(str(tmp_path / "good.cxi"), peaks="/lists")
    with pytest.raises(ValueError, match="60 rows .* not a multiple of panel_height=25"):
        CxiShots(str(tmp_path / "good.cxi"), panel_height=25)
    with pytest.raises(ValueError, match=r"shape \(3,\) and dtype int64"):
        CxiShots(str(tmp_path / "good.cxi"), data="/entry_1/result_1/nPeaks")
    cheetah(tmp_path / "one.cxi", frames[:1], [[(1.0, 1.0)]])
    with pytest.raises(ValueError, match="1 events; at least 2"):
        CxiShots(str(tmp_path / "one.cxi"))
    for wrong in ({"val_fraction": 1.0}, {"batch_size": 0}, {"peak_radius_px": 9.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CxiShots(str(tmp_path / "good.cxi"), **wrong)


def test_a_fresh_network_expects_few_peaks() -> None:
    torch.manual_seed(0)
    module = PeakNetTraining(PeakNet(**NET), [LocalNorm(), MergeBatchChannelDims()])
    module.trainer = FakeTrainer()  # type: ignore[assignment]
    images = torch.randn(2, 1, 64, 64)
    before = module.net(images).detach()
    module.setup("fit")
    shift = math.log(0.01 / 0.99)
    torch.testing.assert_close(module.net(images)[:, 1].detach(), before[:, 1] + shift)
    torch.testing.assert_close(module.net(images)[:, 0].detach(), before[:, 0])
