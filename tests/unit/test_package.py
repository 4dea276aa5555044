"""The package as such: where its parts come from and what they load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peaknet_predict
import peaknet_predict.callbacks

PACKAGE = Path(peaknet_predict.__file__).parent


def test_callbacks_come_from_the_same_tree() -> None:
    assert Path(peaknet_predict.callbacks.__file__).resolve().parents[1] == PACKAGE.parent


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("peaknet_predict", {"torch", "ray", "lightning", "numpy"}),
        ("peaknet_predict.types", {"torch", "ray"}),
        ("peaknet_predict.cxi.writer", {"torch", "ray"}),
        # So that they start, and answer --help, at once.
        ("peaknet_predict.cli", {"torch", "ray", "lightning"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    """Beyond the import contracts: importing a module also runs its packages' `__init__`."""
    code = f"import sys, {module}; print(*{absent} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert ran.stdout.split() == []
