"""A stranger's first hour, on each Python that the package is for and this machine has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import environment
from tests.helpers.paths import REPOSITORY


def python(version: str) -> str:
    """Return an interpreter of a version; skips where there is none."""
    found = shutil.which(f"python{version}")
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        found = sys.executable
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no Python {version} here")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_first_hour(version: str, tmp_path: Path) -> None:
    interpreter = python(version)
    built = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        str(tmp_path / "dist"),
    ]
    subprocess.run(built, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (folder := tmp_path / "folder").mkdir()
    script = REPOSITORY / "tests" / "system" / "first_hour.sh"
    words = [script, interpreter, wheel, REPOSITORY / "constraints.txt", folder]
    ran = subprocess.run(
        list(map(str, words)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.endswith("all is well\n")
