"""Every shipped configuration parses; those that this machine can run are run elsewhere."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from peaknet_predict.cli import main
from peaknet_predict.doctor import doctor
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Transform
from peaknet_predict.types import Event, EventBatch, EventId
from tests.helpers.paths import CONFIGS

MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
TRAINING = [CONFIGS / "train.yaml", CONFIGS / "models" / "peaknet_small.yaml"]
TOPOLOGIES = sorted((CONFIGS / "topology").glob("*.yaml"))


def printed(
    *configs: Path, more: tuple[str, ...] = (), command: str = "predict"
) -> dict[str, object]:
    """Parse configurations as a user would and return what ``--print_config`` shows."""
    words = [word for config in configs for word in ("-c", str(config))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main([command, *words, *more, "--print_config"])
    assert stop.value.code == 0
    parsed: dict[str, object] = yaml.safe_load(said.getvalue())
    return parsed


@pytest.mark.thorough
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda path: path.stem)
def test_every_model_goes_with_every_topology(model: Path, topology: Path) -> None:
    parsed = printed(CONFIGS / "predict.yaml", model, topology)
    assert set(parsed) >= {"trainer", "model", "data"}


def test_the_demo_parses_alone_and_with_a_gpu() -> None:
    printed(CONFIGS / "demo.yaml")
    parsed = printed(CONFIGS / "demo.yaml", CONFIGS / "topology" / "one_gpu.yaml")
    assert parsed["trainer"]["precision"] == "bf16-mixed"  # type: ignore[index]


def test_the_demos_model_is_the_one_that_ships() -> None:
    shipped = printed(CONFIGS / "predict.yaml", CONFIGS / "models" / "peaknet_small.yaml")["model"]
    assert printed(CONFIGS / "demo.yaml")["model"] == shipped


@pytest.mark.thorough
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_model_can_take_the_place_of_the_demos(model: Path) -> None:
    alone: Any = printed(CONFIGS / "predict.yaml", model)["model"]
    merged: Any = printed(CONFIGS / "demo.yaml", model)["model"]
    for part in ("net", "preprocess"):
        assert merged["init_args"][part] == alone["init_args"][part]


def test_predictions_cannot_be_kept_and_streams_are_not_fetched_ahead() -> None:
    parsed = printed(CONFIGS / "demo.yaml")
    assert "return_predictions" not in parsed
    assert parsed["trainer"]["limit_predict_batches"] == 10**9  # type: ignore[index]


def test_fine_tuning_parses() -> None:
    parsed = printed(
        CONFIGS / "models" / "peaknet_small.yaml", CONFIGS / "finetune.yaml", command="fit"
    )
    assert parsed["model"]["init_args"]["learning_rate"] == 3e-4  # type: ignore[index]


class Far(nn.Module):
    """Peak where a pixel stands out by more than 6, in whatever the preprocessing measures."""

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return torch.cat([torch.full_like(images_N1HW, 6.0), images_N1HW], dim=1)


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_model_covers_whole_panels_and_finds_each_peak_once(model: Path) -> None:
    """Peaks in both halves of a JUNGFRAU module, and where a crop or patch could end."""
    parsed: Any = yaml.safe_load(model.read_text())["model"]["init_args"]
    parser = ArgumentParser()
    parser.add_argument("--preprocess", type=list[Transform])
    steps = parser.instantiate(parser.parse_object({"preprocess": parsed["preprocess"]})).preprocess
    places = [(0, 3, 9), (0, 255, 511), (1, 256, 512), (1, 500, 700), (0, 511, 1023), (1, 40, 768)]
    image = np.random.default_rng(0).normal(100, 1, (2, 512, 1024)).astype(np.float32)
    for panel, y, x in places:
        image[panel, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] += 1000
    event = Event(EventId("s", 0, 0), image, 9000.0)
    batch = EventBatch(torch.from_numpy(image)[None], [event], [])
    module = PeakNetModule(Far(), steps).eval()
    with torch.inference_mode():
        (result,) = module.predict_step(batch, 0).result().results
    found = [(int(panel), round(y), round(x)) for panel, y, x in result.peaks]
    # A peak in the last pixel is cut off by the border: 510.5 and 1022.5, rounded to even.
    assert sorted(found) == sorted(
        (panel, 510, 1022) if y == 511 else (panel, y, x) for panel, y, x in places
    )


@pytest.mark.parametrize("models_first", [True, False])
def test_a_networks_configuration_serves_predict_and_fit_in_any_order(models_first: bool) -> None:
    for command, other, kind in (
        ("predict", "predict.yaml", "peaknet_predict.module.PeakNetModule"),
        ("fit", "train.yaml", "peaknet_predict.training.module.PeakNetTraining"),
        ("fit", "finetune.yaml", "peaknet_predict.training.module.PeakNetTraining"),
    ):
        configs = [CONFIGS / "models" / "peaknet_small.yaml", CONFIGS / other]
        parsed: Any = printed(*configs[:: 1 if models_first else -1], command=command)["model"]
        assert parsed["class_path"] == kind
        assert parsed["init_args"]["net"]["init_args"]["weights"] == "peaknet_small"
        assert ("learning_rate" in parsed["init_args"]) == (command == "fit")


def test_a_model_that_only_predicts_is_not_trained(
    tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("model: {class_path: peaknet_predict.module.PeakNetModule}")
    configs = [str(CONFIGS / "models" / "snr.yaml"), str(CONFIGS / "train.yaml"), str(own)]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    assert main(["fit", *(word for path in configs for word in ("-c", path)), *cpu]) == 1
    assert "PeakNetModule cannot be trained: set model.class_path to" in said.text
    assert "peaknet_predict.training.module.PeakNetTraining" in said.text
    assert doctor(configs=configs) == 1


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda path: path.stem)
def test_training_goes_with_every_topology(topology: Path) -> None:
    parsed = printed(*TRAINING, topology, command="fit")
    assert set(parsed) >= {"trainer", "model", "data", "ckpt_path", "seed_everything"}


@pytest.mark.parametrize("model", ["snr", "peaknet_small"])
def test_doctor_makes_everything_that_a_configuration_names(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ["predict.yaml", f"models/{model}.yaml", "topology/cpu.yaml"]
    assert doctor(configs=[str(CONFIGS / name) for name in configs]) == 0
    assert "network and data could be made" in capsys.readouterr().out


def test_doctor_makes_everything_that_training_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor(configs=[str(path) for path in TRAINING]) == 0
    said = capsys.readouterr().out
    assert "network and data could be made" in said
    assert "has no weights" not in said


DEFAULT = [str(CONFIGS / name) for name in ("predict.yaml", "models/peaknet.yaml")]
CPU = str(CONFIGS / "topology" / "cpu.yaml")


@pytest.mark.thorough
def test_a_network_of_random_weights_is_refused_before_anything_starts(
    said: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sizes of the default network change nothing but how long this takes.
    small = "--model.init_args.net.init_args.hidden_sizes=[8,8,8,8]"
    words = [word for path in [*DEFAULT, CPU] for word in ("-c", path)]
    assert main(["predict", *words, small]) == 1
    assert "set model.init_args.random_weights: true" in said.text
    assert "Give a weight file as model.init_args.net.init_args.weights" in said.text
    assert "cluster" not in said.text, "it joined one first"
    assert doctor(configs=[*DEFAULT, CPU]) == 1
    assert "PeakNet has no weights" in capsys.readouterr().out


@pytest.mark.thorough
def test_random_weights_that_are_asked_for_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "random.yaml"
    asked.write_text("model: {init_args: {random_weights: true}}")
    assert doctor(configs=[*DEFAULT, CPU, str(asked)]) == 0
    assert "warn  PeakNet predicts with random parameters" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "configs/slurm.sbatch"])
def test_predictions_that_we_recommend_have_weights(page: str) -> None:
    text = (CONFIGS.parent / page).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.search(r" predict -c |CONFIGS:=", line)]
    found = [re.findall(r"-c (models/\w+)", line) for line in lines]
    assert any(found)
    for line, models in zip(lines, found, strict=True):
        for model in models:
            parsed = yaml.safe_load((CONFIGS / f"{model}.yaml").read_text())["model"]["init_args"]
            settings = parsed["net"].get("init_args", {})
            assert settings.get("weights", "none needed") or "weights " in line


def test_doctor_names_what_is_wrong_in_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (CONFIGS / "models" / "peaknet_small.yaml").read_text()
    model = model.replace("weights: peaknet_small", "weights: gone.pt")
    (tmp_path / "model.yaml").write_text(model)
    configs = [str(CONFIGS / "predict.yaml"), str(tmp_path / "model.yaml")]
    assert doctor(configs=configs, directory=str(tmp_path / "missing" / "deep")) == 2
    said = capsys.readouterr().out
    assert "gone.pt" in said
    assert "cannot write to" in said
    assert doctor(directory=str(tmp_path / "missing")) == 0
    assert "it will be made" in capsys.readouterr().out


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predikt"]) == 2
    assert main(["--help"]) == 0
    assert "write-cxi" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["feed", "write-cxi", "doctor"])
def test_every_command_shows_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--address" in capsys.readouterr().out
