"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import peaknet_predict
import peaknet_predict.callbacks

PACKAGE = Path(peaknet_predict.__file__).parent


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in names_in(node)}


def names_in(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def uses(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name in imports(path))


def files(*parts: str) -> list[Path]:
    root = PACKAGE.joinpath(*parts)
    found = [root] if root.suffix == ".py" else sorted(root.rglob("*.py"))
    return [path for path in found if "callbacks" not in path.parts]


def test_both_packages_come_from_one_tree() -> None:
    assert Path(peaknet_predict.callbacks.__file__).resolve().parents[1] == PACKAGE.parent


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("ray", {"queues/*", "doctor.py"}),
        ("cupy", {"peaks/*", "models/fast/cuda_ops.py", "doctor.py"}),
        ("cupyx", {"peaks/*"}),
        ("triton", {"models/fast/triton_*.py"}),
    ],
)
def test_only_these_import(module: str, allowed: set[str]) -> None:
    for path in files():
        name = path.relative_to(PACKAGE).as_posix()
        if uses(path, module):
            assert any(fnmatch(name, pattern) for pattern in allowed), f"{name} imports {module}"


def test_kernels_are_loaded_only_where_there_is_a_gpu() -> None:
    """CuPy and Triton may not be installed: nothing imports them when it is itself imported."""
    kernels = {"cuda_ops", "triton_ops", "triton_kernels"}
    for path in files():
        if path.stem in kernels:
            continue
        tops = {
            name.rpartition(".")[2]
            for node in ast.parse(path.read_text()).body
            for name in names_in(node)
        }
        assert not tops & kernels, f"{path} imports {tops & kernels} when it is imported"


@pytest.mark.parametrize(
    ("parts", "never"),
    [
        (("module.py",), ["queues", "data", "sources"]),
        (("data.py",), ["models", "module", "preprocess"]),
        (("models",), ["queues", "data", "module", "peaks"]),
        (("peaks",), ["queues", "models", "module"]),
        (("preprocess",), ["queues", "models", "module", "data", "training"]),
        (("training",), ["queues", "module", "data"]),
        (("models",), ["training"]),
        (("cxi",), ["queues", "module", "data"]),
        (("types.py",), ["queues", "data"]),
    ],
)
def test_arrows_go_down(parts: tuple[str, ...], never: list[str]) -> None:
    for path in files(*parts):
        for module in never:
            assert not uses(path, f"peaknet_predict.{module}"), f"{path} imports {module}"


@pytest.mark.parametrize("module", ["peaknet_predict.types", "peaknet_predict.cxi.writer"])
def test_the_file_writer_needs_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
