"""The template of a network, as its page says: fit, export, predict."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.helpers.commands import environment, finish, start
from tests.helpers.paths import REPOSITORY

CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
TINY = {"batch_size": 2, "panels": 1, "height": 64, "width": 64, "val_batches": 1}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A copy, as somebody makes it who begins with it."""
    return Path(shutil.copytree(REPOSITORY / "examples" / "my_network", tmp_path / "mine"))


def played(template: Path, *words: object, expected: int = 0) -> str:
    return finish(start(*words, cwd=template), expected)


@pytest.mark.slow
def test_a_network_of_ones_own_from_fit_to_predict(template: Path) -> None:
    few = ["--trainer.max_steps", 4, "--trainer.max_time", "null", "--data.init_args"]
    tiny = json.dumps(TINY | {"steps_per_epoch": 4})
    net, train = ("-c", "my_network.yaml"), ("-c", "train")
    said = played(template, "fit", *net, *train, *CPU, *few, tiny)
    assert "this goes into the file's metadata" in said
    weights = template / "runs" / "train" / "weights.safetensors"
    with safe_open(weights, "pt") as file:
        stored = json.loads(file.metadata()["peaknet_predict"])
    threshold = stored["threshold"]
    assert threshold == stored["validation"]["threshold"]

    again = ["--checkpoint", "runs/train/best.ckpt", "--path", "again.safetensors"]
    assert f"above log odds of {threshold:g}" in played(template, "export", *again)
    assert (template / "again.safetensors").read_bytes() == weights.read_bytes()

    demo = ["predict", "-c", "demo", *net, "-c", "topology/cpu"]
    shots = {"num_events": 2, "panels": 1, "height": 65, "width": 64}
    options: list[Any] = [f"--data.init_args.source.init_args.{k}={n}" for k, n in shots.items()]
    refused = played(template, *demo, *options, expected=1)
    assert "SmallUNet has no weights: its parameters are random" in refused
    options += ["--model.init_args.weights", "again.safetensors", "--output.min_peaks", 0]
    said = played(template, *demo, *options)
    assert f"a pixel is peak above log odds of {threshold:g}" in said
    assert "received 2 = predicted 2 + refused 0" in said
    record = json.loads((template / "demo_output" / "balance.json").read_text())["network"]
    assert record["threshold"] == threshold
    assert record["class"] == "SmallUNet"


def test_its_own_tests_pass(template: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(template)],
        cwd=template,
        env=environment(PYTHONPATH=str(template)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert "5 passed" in ran.stdout


def test_configurations_come_in_the_other_order_too(template: Path) -> None:
    configs = ("-c", "train", "-c", "my_network.yaml")
    printed = played(template, "fit", *configs, "--print_config")
    assert "class_path: peaknet_predict.training.module.PeakNetTraining" in printed
    assert "class_path: my_network.SmallUNet" in printed
