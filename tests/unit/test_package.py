"""The package as such: where its parts come from and what they load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peaknet_predict
import peaknet_predict.callbacks
from tests.helpers.commands import HANGS_S

PACKAGE = Path(peaknet_predict.__file__).parent


def test_callbacks_come_from_the_same_tree() -> None:
    assert Path(peaknet_predict.callbacks.__file__).resolve().parents[1] == PACKAGE.parent


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["predict", "--help"], ["fit", "-h"]])
def test_help_is_shown_at_once(words: list[str]) -> None:
    """What takes its time is importing these: `python -X importtime -m peaknet_predict --help`."""
    heavy = {"torch", "ray", "lightning", "numpy", "h5py", "jsonargparse", "yaml"}
    code = f"import sys; from peaknet_predict.cli import main; code = main({words})\n"
    code += f"assert not code; print(*{heavy} & set(sys.modules), file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=HANGS_S, capture_output=True, text=True
    )
    assert "peaknet-predict" in ran.stdout
    assert ran.stderr.split() == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("peaknet_predict", {"torch", "ray", "lightning", "numpy"}),
        ("peaknet_predict.types", {"torch", "ray"}),
        ("peaknet_predict.cxi.writer", {"torch", "ray"}),
        # So that `run --help`, `feed --help` and the others are there in a second.
        ("peaknet_predict.run_files", {"torch", "ray", "lightning"}),
        ("peaknet_predict.feed", {"torch", "ray", "lightning"}),
        ("peaknet_predict.consume", {"torch", "ray", "lightning"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    """Beyond the import contracts: importing a module also runs its packages' `__init__`."""
    code = f"import sys, {module}; print(*{absent} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=HANGS_S, capture_output=True, text=True
    )
    assert ran.stdout.split() == []
