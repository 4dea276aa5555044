"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import callbacks
import peaknet_predict

PACKAGE = Path(peaknet_predict.__file__).parent


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in imports(path))


def files(*parts: str) -> list[Path]:
    root = PACKAGE.joinpath(*parts)
    return [root] if root.suffix == ".py" else sorted(root.rglob("*.py"))


def test_both_packages_come_from_one_tree() -> None:
    assert Path(callbacks.__file__).parents[1] == PACKAGE.parent


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("ray", {"queues", "doctor.py"}),
        ("cupy", {"peaks", "doctor.py"}),
        ("cupyx", {"peaks"}),
        ("callbacks", set()),
    ],
)
def test_only_these_import(module: str, allowed: set[str]) -> None:
    users = {path.relative_to(PACKAGE).parts[0] for path in files() if uses(path, module)}
    assert users <= allowed


@pytest.mark.parametrize(
    ("parts", "never"),
    [
        (("module.py",), ["queues", "data", "sources"]),
        (("data.py",), ["models", "module", "preprocess"]),
        (("models",), ["queues", "data", "module", "peaks"]),
        (("peaks",), ["queues", "models", "module"]),
        (("preprocess.py",), ["queues", "models", "module", "data"]),
        (("cxi.py",), ["queues", "module", "data"]),
        (("types.py",), ["queues", "wire", "data"]),
    ],
)
def test_arrows_go_down(parts: tuple[str, ...], never: list[str]) -> None:
    for path in files(*parts):
        for module in never:
            assert not uses(path, f"peaknet_predict.{module}"), f"{path} imports {module}"


@pytest.mark.parametrize("module", ["peaknet_predict.types", "peaknet_predict.cxi"])
def test_the_file_writer_needs_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
