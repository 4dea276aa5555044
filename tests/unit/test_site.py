"""The pages against the code: what they quote, name and show is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import yaml

from peaknet_predict.named_configs import shipped_configs
from peaknet_predict.preprocess import Transform
from peaknet_predict.queues import QueueAddress
from peaknet_predict.sources import EventSource
from peaknet_predict.usage import USAGE
from tests.helpers.paths import CONFIGS, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))
table = importlib.import_module("settings_table")

DOCS = REPOSITORY / "docs"
PAGES = sorted(
    [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *DOCS.glob("*.md"),
        *DOCS.glob("reference/*.md"),
    ]
)
REFERENCE = {
    path: page.name
    for page in (DOCS / "reference").glob("*.md")
    for path in re.findall(r"^```\{settings\} (\S+)", page.read_text(), re.MULTILINE)
}


@cache
def sentences() -> str:
    """Return all text that the program can say, with a gap where it puts values in."""
    said = []
    for path in [*REPOSITORY.glob("peaknet_predict/**/*.py"), *REPOSITORY.glob("callbacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                said.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(re.sub(r"%[-+.\d]*[a-zA-Z]", "\0", node.value))
    return "\n".join(said)


def test_what_to_do_when_quotes_what_the_program_says() -> None:
    page = (DOCS / "what-to-do-when.md").read_text()
    quoted = [q for row in re.findall(r"^\| (\".*?\") \|", page, re.M) for q in row.split(" ... ")]
    assert len(quoted) > 40
    assert [one for one in quoted if one.strip('"') not in sentences()] == []


@pytest.mark.parametrize("path", sorted(REFERENCE))
def test_the_reference_describes_every_setting(path: str) -> None:
    for one in table.settings(path):
        assert one.meaning, f"{path}: {one.name}"
        assert not one.meaning.startswith("As for"), f"{path}: {one.name}: {one.meaning}"


def test_every_class_of_a_configuration_is_in_the_reference() -> None:
    texts = [path.read_text() for path in CONFIGS.rglob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"class_path: (peaknet_\S+)", text)}
    assert len(named) > 10
    assert named <= set(REFERENCE)
    for package, base in (("sources", EventSource), ("preprocess", Transform)):
        module = importlib.import_module(f"peaknet_predict.{package}")
        for name in module.__all__:
            one = getattr(module, name)
            if inspect.isclass(one) and issubclass(one, base) and one is not base:
                assert f"peaknet_predict.{package}.{name}" in REFERENCE


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_blocks_of_yaml_and_python_parse() -> None:
    seen = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            assert isinstance(yaml.safe_load(block), dict), page.name
            seen += 1
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("page", ["own-detector.md", "monitoring.md"])
def test_definitions_on_pages_run(page: str) -> None:
    for block in blocks(DOCS / page, "python"):
        exec(block, {})


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words behind ``peaknet-predict`` in every indented line of a page."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?: {4}|\$ )(.*peaknet-predict .*)$", text, re.M):
        if "├" not in line and "->" not in line:
            command = line.partition("peaknet-predict ")[2].replace("...", "")
            yield shlex.split(command, comments=True)


def of(path: str) -> set[str]:
    return {one.name for one in table.settings(path)}


OF_SECTIONS = {
    "model.init_args": of("peaknet_predict.training.module.PeakNetTraining"),
    "model.init_args.net.init_args": of("peaknet_predict.models.PeakNet"),
    "data.init_args": of("peaknet_predict.data.QueueDataModule")
    | of("peaknet_predict.training.cxi_shots.CxiShots")
    | of("peaknet_predict.training.simulated_shots.SimulatedShots"),
    "data.init_args.queue": set(inspect.signature(QueueAddress).parameters),
    "data.init_args.source.init_args": of("peaknet_predict.sources.Simulator"),
    "trainer": set(inspect.signature(L.Trainer).parameters),
    "output": {"queue", "directory", "min_peaks", "balance"},
    "output.queue": set(inspect.signature(QueueAddress).parameters),
    "": {"ckpt_path", "seed_everything", "print_config"},
}


def known(command: str, option: str, source: str) -> bool:
    """Whether a command has an option; ``--model.init_args.weights``, say."""
    section, _, name = option.rpartition(".")
    if section == "source":
        return name in of(f"peaknet_predict.sources.{source}")
    if command in ("predict", "fit"):
        return name in OF_SECTIONS.get(section, set())
    if command == "run":
        return f"--{option}" in of("peaknet_predict.run_files.add_run_options")
    if section == "queue":
        return name in OF_SECTIONS["output.queue"]
    paths = {
        "feed": "peaknet_predict.feed.feed",
        "write-cxi": "peaknet_predict.consume.write_cxi",
        "export": "peaknet_predict.training.export.export_weights",
        "doctor": "peaknet_predict.doctor.doctor",
    }
    return command in paths and option in of(paths[command])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_have_options_that_there_are(page: Path) -> None:
    for words in command_lines(page):
        command, *rest = words
        if command.startswith("-") or command == "COMMAND":
            continue
        source = "Hdf5Source"
        if "--source" in rest:
            source = rest[rest.index("--source") + 1]
        for word, following in zip(rest, [*rest[1:], ""], strict=False):
            if word == "-c" and not following.endswith(".yaml"):
                assert following in {*shipped_configs(), "FILE"}, f"-c {following} in {words}"
            if word == "-c" and following.startswith("configs/"):
                assert (REPOSITORY / following).is_file(), following
            if word.startswith("--") and word not in ("--version", "--help", "--help-all"):
                option = word.removeprefix("--").partition("=")[0]
                assert known(command, option, source), f"{command} has no {word}: {words}"


def test_every_command_is_in_the_reference() -> None:
    commands = re.findall(r"^  ([\w-]+)  ", USAGE, re.M)
    page = (DOCS / "reference" / "commands.md").read_text()
    assert len(commands) > 5
    assert [one for one in commands if f"\n## {one}\n" not in page] == []
