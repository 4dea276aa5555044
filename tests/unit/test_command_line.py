"""The command line: configurations by name, help, and one sentence about what is wrong."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from peaknet_predict.cli import main
from peaknet_predict.complaints import innermost
from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.named_configs import find_config, shipped_configs
from peaknet_predict.run_files import predict_words
from peaknet_predict.usage import FIT, PREDICT, USAGE
from tests.helpers.input_files import KINDS
from tests.helpers.paths import CONFIGS


def printed(*words: str) -> Any:
    """Return the configuration that a command shows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(said.getvalue())


def test_every_configuration_that_ships_has_a_name() -> None:
    shipped = shipped_configs()
    assert {"demo", "files", "predict", "models/peaknet_small", "topology/one_gpu"} <= set(shipped)
    assert len(shipped) == sum(path.is_file() for path in CONFIGS.rglob("*"))
    for name, path in shipped.items():
        if path.suffix == ".yaml":
            assert Path(find_config(name)).read_text() == path.read_text()


def test_a_path_and_a_configuration_written_out_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", str(tmp_path))
    Path("mine.yaml").write_text("trainer: {devices: 1}")
    assert find_config("mine.yaml") == "mine.yaml"
    assert find_config("$MINE/mine.yaml") == str(tmp_path / "mine.yaml")
    assert find_config('{"trainer": {}}') == '{"trainer": {}}'
    Path("demo").mkdir()  # a folder of a name that ships, as a user may have one
    assert Path(find_config("demo")).is_file()


@pytest.mark.parametrize("wrong", ["demmo", "demo.yaml", "configs/demo.yaml"])
def test_an_unknown_name_lists_those_there_are(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"demo, files, .*did you mean demo\?"):
        find_config(wrong)


@pytest.mark.thorough
def test_names_are_merged_like_paths() -> None:
    named = printed("predict", "-c", "demo", "-c", "topology/one_gpu")
    paths = [str(CONFIGS / "demo.yaml"), str(CONFIGS / "topology" / "one_gpu.yaml")]
    assert named == printed("predict", "-c", paths[0], f"--config={paths[1]}")
    assert named["trainer"]["precision"] == "bf16-mixed"


def test_configurations_are_listed_shown_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: Any
) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert all(20 < len(line) <= 110 for line in lines)
    assert main(["configs", "topology/cpu"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "topology" / "cpu.yaml").read_text()
    copy = tmp_path / "mine.yaml"
    assert main(["configs", "demo", "-o", str(copy)]) == 0
    assert copy.read_text() == (CONFIGS / "demo.yaml").read_text()
    copy.write_text("changed")
    assert main(["configs", "demo", "-o", str(copy)]) == 1
    assert "is there already" in said.text
    assert copy.read_text() == "changed"
    assert main(["configs", "dmo"]) == 2
    assert main(["configs", "-o", str(copy)]) == 2


def options(text: str) -> list[str]:
    return re.findall(r"^  --([\w.]+\.\w+)", text, re.MULTILINE)


def keys(parsed: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in parsed.items():
        yield before + key
        if isinstance(value, dict):
            yield from keys(value, f"{before}{key}.")


@pytest.mark.parametrize(
    ("command", "brief", "configs"),
    [
        ("predict", PREDICT, ("files",)),
        ("fit", FIT, ("models/peaknet_small", "finetune")),
    ],
)
def test_help_is_short_and_names_keys_that_exist(
    command: str, brief: str, configs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.splitlines() == [*brief.splitlines(), ""]
    assert len(brief.splitlines()) <= 80
    assert max(map(len, brief.splitlines())) <= 100
    words = [word for name in configs for word in ("-c", name)]
    parsed = printed(command, *words, *(["--output.queue.name", "x"] * (command == "predict")))
    named = [one for one in options(brief) if not one.endswith(".help")]
    assert len(named) > 8
    assert set(named) <= set(keys(parsed))


def test_help_of_everything_is_lightnings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in shown
    assert "usage: peaknet-predict" in shown


def test_the_overview_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in re.findall(r"^  ([a-z-]+) ", USAGE, re.MULTILINE):
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        assert f"usage: peaknet-predict {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["predict", "-c", "demo", "--data.init_args.batch_sise", "4"],
            r"data \(peaknet_predict.data.QueueDataModule\): Option 'batch_sise' is not accepted",
        ),
        (["predict", "-c", "demo", "-c", '{"dta": 4}'], "does not accept option 'dta'"),
        (
            ["predict", "-c", "demo", "--data.init_args.batch_size", "few"],
            r"data.batch_size: Expected a <class 'int'>. Got value: few",
        ),
        (
            ["predict", "-c", "train", "-c", "models/snr"],
            "a configuration for fit was given to predict: .*SimulatedShots",
        ),
        (
            ["fit", "-c", "predict", "-c", "models/snr"],
            "a configuration for predict was given to fit: .*QueueDataModule",
        ),
        (
            ["predict", "-c", "models/snr", "--model.init_args.net", "no_such_module.Net"],
            "No module named 'no_such_module'",
        ),
        (["predict", "-c", "models/snr"], "queue"),
        (["feed", "--queue.name", "x"], "source"),
        (["run", "x.h5"], "output"),
    ],
)
def test_an_error_is_one_sentence(words: list[str], sentence: str, said: Any) -> None:
    assert main(words) == 2
    (complaint,) = (one.message for one in said.records if one.levelname == "ERROR")
    assert re.search(sentence, complaint)
    assert "\n" not in complaint
    assert len(complaint) < 300


@pytest.mark.thorough
def test_wrong_weights_are_one_sentence_too(said: Any) -> None:
    words = ["--model.init_args.net.init_args.weights", "gone.pt", "-c", "topology/cpu"]
    assert main(["predict", "-c", "demo", *words]) == 1
    (complaint,) = (one.message for one in said.records if one.levelname == "ERROR")
    assert complaint.startswith("there is no weight file gone.pt: check the path")
    assert "\n" not in complaint


@pytest.mark.thorough
def test_what_a_configuration_lacks_may_come_in_a_later_one(tmp_path: Path) -> None:
    """Neither class path nor order matters: what is merged is complete."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {init_args: {max_latency_ms: 5}}")
    for configs in ([str(mine), "demo"], ["demo", str(mine)]):
        parsed = printed("predict", *(word for one in configs for word in ("-c", one)))
        assert parsed["data"]["init_args"]["max_latency_ms"] == 5


def test_a_sentence_stays_and_alternatives_are_all_named() -> None:
    assert innermost("the disk is full") == "the disk is full"
    tree = """Parser key "a":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'str'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'float'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [1]"""
    assert innermost(tree) == "a: Expected a <class 'int'>; Expected a <class 'float'>"


_COMPLETE = """
source "$1"; shift
function=$(complete -p peaknet-predict | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$function peaknet-predict "${@: -1}" "${@: -2:1}"
echo "${COMPREPLY[@]}"
"""


def test_the_shell_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str], said: Any) -> None:
    assert main(["completion", "bash"]) == 0
    (script := tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        typed = ["bash", "-c", _COMPLETE, "bash", str(script), "peaknet-predict", *words]
        ran = subprocess.run(typed, capture_output=True, text=True, check=True)
        return ran.stdout.split()

    assert completed("wr") == ["write-cxi"]
    assert completed("predict", "--output.d") == ["--output.directory"]
    assert completed("predict", "-c", "topology/c") == ["topology/cpu"]
    assert completed("run", "--geo") == ["--geometry"]
    assert completed("feed", "--rate") == ["--rate_hz"]
    assert main(["completion", "ksh"]) == 2
    assert "there is bash, zsh" in said.text


@pytest.mark.parametrize("kind", KINDS)
def test_run_sees_from_a_file_what_reads_it(kind: str, tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "input-data.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {kind}"))
    named = row.split("|")[3].strip("` ")
    words = predict_words([str(KINDS[kind](tmp_path).path)], str(tmp_path / "out"))
    (settings,) = (word for word in words if word.startswith("{"))
    source = yaml.safe_load(settings)["data"]["init_args"]["source"]
    assert source["class_path"] == f"peaknet_predict.sources.{named}"


@pytest.mark.thorough
def test_the_options_of_run_reach_what_they_are_for(tmp_path: Path) -> None:
    files = str(KINDS["Jungfrau 4M, CXI"](tmp_path).path)
    words = predict_words(
        [files], "peaks", "det.geom", 1.5, 3, {"panel_height": 512}, ["models/snr"]
    )
    parsed = printed(*words)
    model, data = parsed["model"]["init_args"], parsed["data"]["init_args"]
    assert (model["mask"], model["threshold"]) == ("det.geom", 1.5)
    assert model["net"]["class_path"].endswith("LocalSnr")
    assert data["source"]["init_args"]["path"] == [files]
    assert data["source"]["init_args"]["panel_height"] == 512
    assert data["queue"]["quarantine"] == "peaks/quarantine"
    assert parsed["output"]["min_peaks"] == 3


def test_run_refuses_files_of_several_kinds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one = KINDS["Jungfrau 4M, CXI"](tmp_path / "a").path
    other = KINDS["CSPAD, npz"](tmp_path / "b").path
    with pytest.raises(ValueError, match="files of several kinds"):
        predict_words([str(one), str(other)], "peaks")
