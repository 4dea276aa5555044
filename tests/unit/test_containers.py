"""The container recipes: no builder is at hand here, so what they say is checked."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.helpers.paths import REPOSITORY

RECIPES = sorted((REPOSITORY / "containers").glob("*.Dockerfile"))
KNOWN = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def test_there_is_one_with_and_one_without_a_gpu() -> None:
    assert [path.name for path in RECIPES] == ["cpu.Dockerfile", "cuda13.Dockerfile"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_installs_what_there_is_and_runs_as_no_root(path: object) -> None:
    text = (REPOSITORY / str(path)).read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    words = [line.split(maxsplit=1) for line in lines if line.strip()]
    assert {word for word, _ in words} <= KNOWN
    order = [word for word, _ in words]
    assert order[0] == "FROM"
    assert "USER peaknet" in text
    assert order.index("USER") > max(k for k, word in enumerate(order) if word == "RUN")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"^FROM python:(3\.\d+)-slim$", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "-c constraints.txt" in text
    (pinned,) = re.findall(
        r"^torch==.*$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned
    assert 'ENTRYPOINT ["peaknet-predict"]' in text
