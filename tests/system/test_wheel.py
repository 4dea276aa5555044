"""What users install: the wheel, and the commands out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import peaknet_predict
from tests.helpers.paths import CONFIGS, REPOSITORY

LINKED = ("callbacks", "configs")  # folders of the repository that are links in the package

PYTHON = sys.executable


def run(*words: object, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed, without this repository on its path."""
    ran = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def class_paths(value: Any) -> set[str]:
    """Return every class path in a configuration."""
    if isinstance(value, dict):
        own = {value["class_path"]} if "class_path" in value else set()
        return own.union(*map(class_paths, value.values()))
    return set().union(*map(class_paths, value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made the long way: repository, source archive, wheel."""
    directory = tmp_path_factory.mktemp("dist")
    run(PYTHON, "-m", "hatchling", "build", "-t", "sdist", "-d", directory, cwd=REPOSITORY)
    with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
        archive.extractall(directory, filter="data")
    source = next(path for path in directory.iterdir() if path.is_dir())
    run(PYTHON, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, cwd=source)
    return next(directory.glob("*.whl"))


def test_the_wheel_has_one_package_with_all_files_of_the_tree(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    version = peaknet_predict.__version__
    tops = {"peaknet_predict", f"peaknet_predict-{version}.dist-info"}
    assert {name.split("/")[0] for name in names} == tops
    tracked = run("git", "ls-files", "peaknet_predict", *LINKED, cwd=REPOSITORY).split()
    assert len(tracked) > 100
    expected = {
        f"peaknet_predict/{name}" if name.split("/")[0] in LINKED else name
        for name in tracked
        if name not in {f"peaknet_predict/{link}" for link in LINKED}
    }
    assert "peaknet_predict/configs/topology/one_gpu.yaml" in expected
    assert expected <= names


def test_installed_it_runs_beside_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    pip = (PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site)
    run(*pip, wheel, cwd=tmp_path)
    home.mkdir()
    (home / "callbacks.py").write_text("raise SystemExit('a file of the user has been imported')")
    named = set().union(
        *(class_paths(yaml.safe_load(path.read_text())) for path in CONFIGS.rglob("*.yaml"))
    )
    ours = sorted(name for name in named if name.startswith("peaknet_predict."))
    assert "peaknet_predict.callbacks.queue_writer.QueueWriter" in ours
    program = f"""
import importlib, pathlib, peaknet_predict
assert pathlib.Path(peaknet_predict.__file__).is_relative_to({str(site)!r})
for name in {ours}:
    module, _, attribute = name.rpartition(".")
    getattr(importlib.import_module(module), attribute)
model = peaknet_predict.load_model("peaknet_small")
assert model.provenance.weights_sha256, "its configuration and its weights are in the wheel"
"""
    run(PYTHON, "-c", program, cwd=home, PYTHONPATH=str(site))
    command = site / "bin" / "peaknet-predict"
    said = run(command, "--version", cwd=home, PYTHONPATH=str(site))
    assert said == f"peaknet-predict {peaknet_predict.__version__}\n"
    # Configurations by name, and a network beside them, from a folder that is not the repository.
    (home / "my_net.py").write_text(
        "from peaknet_predict.models import LocalSnr\nclass Net(LocalSnr): pass\n"
    )
    words = ("-c", "predict", "-c", "models/snr", "-c", "topology/cpu")
    own = ("--model.init_args.net", "my_net.Net", "--print_config")
    printed = run(command, "predict", *words, *own, cwd=home, PYTHONPATH=str(site))
    assert "peaknet_predict.callbacks.queue_writer.QueueWriter" in printed
    assert "class_path: my_net.Net" in printed
