"""Configurations that say a thing twice."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from peaknet_predict.cli import main
from peaknet_predict.config_files import ConfigurationError, refuse_duplicate_keys
from peaknet_predict.doctor import doctor
from tests.helpers.paths import CONFIGS

TWICE = """\
data:
  init_args:
    batch_size: 8
    queue: {name: a}
    batch_size: 16
"""


def test_a_key_that_stands_twice_is_named_with_its_file_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TWICE)
    for words in (["-c", str(path)], [f"--config={path}"], ["--data", str(path)]):
        with pytest.raises(ConfigurationError, match="mine.yaml has the key 'batch_size' twice"):
            refuse_duplicate_keys(words)
    with pytest.raises(ConfigurationError, match="lines 3 and 5"):
        refuse_duplicate_keys(["predict", "-c", str(path)])
    with pytest.raises(ConfigurationError, match="the command line has the key 'name' twice"):
        refuse_duplicate_keys(["--queue", "{name: a, name: b}"])


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: 1}\nc: {b: 1}\n",
        "- {b: 1}\n- {b: 1}\n",
        "a: &x {b: 1}\nc: {<<: *x, b: 2}\n",
        "a: [1, 2\n",  # no YAML: the parser says so better
        "",
    ],
)
def test_equal_keys_of_several_mappings_are_fine(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fine.yaml"
    path.write_text(text)
    refuse_duplicate_keys(["-c", str(path), "--x", "[{b: 1}, {b: 1}]", "{", "missing.yaml"])


@pytest.mark.parametrize("command", ["predict", "fit", "feed", "write-cxi", "doctor"])
def test_every_command_refuses_them_as_a_wrong_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TWICE)
    log = logging.getLogger("peaknet_predict")
    log.addHandler(caplog.handler)
    try:
        assert main([command, "-c", str(path)]) == 2
    finally:
        log.removeHandler(caplog.handler)
    assert f"{path} has the key 'batch_size' twice" in caplog.text


def test_doctor_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TWICE)
    assert doctor(configs=[str(CONFIGS / "predict.yaml"), str(path)]) == 1
    assert "has the key 'batch_size' twice" in capsys.readouterr().out


def test_shipped_configurations_have_none() -> None:
    refuse_duplicate_keys([str(path) for path in CONFIGS.rglob("*.yaml")])
