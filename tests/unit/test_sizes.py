"""No class and no module grows past what one can read at a sitting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import REPOSITORY

CLASS_LINES, METHODS, MODULE_LINES = 250, 20, 350
EXCEPTIONS = REPOSITORY / "docs" / "decisions" / "sizes.md"


def modules(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        # pathlib does not follow the link peaknet_predict/callbacks.
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield str(path.relative_to(REPOSITORY)), path.read_text()


def too_large(source: str) -> Iterator[str]:
    if source.count("\n") <= CLASS_LINES and source.count("    def ") <= METHODS:
        return  # without parsing it
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            methods = sum(isinstance(one, ast.FunctionDef) for one in node.body)
            if lines > CLASS_LINES or methods > METHODS:
                yield node.name


def test_no_class_is_too_large_but_those_that_a_decision_names() -> None:
    found = {
        f"{Path(path).stem}.{name}"
        for path, source in modules("peaknet_predict", "callbacks", "benchmarks", "tests")
        for name in too_large(source)
    }
    assert found == set(re.findall(r"^\| `([\w.]+)`", EXCEPTIONS.read_text(), re.MULTILINE))


def test_no_module_is_too_long() -> None:
    found = [
        (path, source.count("\n"))
        for path, source in modules("peaknet_predict", "callbacks")
        if source.count("\n") > MODULE_LINES
    ]
    assert not found
