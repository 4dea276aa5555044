"""The commands as users start them: processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.paths import REPOSITORY

COMMAND = str(Path(sys.executable).with_name("peaknet-predict"))

HANGS_S = 600.0
"""What has not come by then never comes: far longer than the busiest machine takes."""


def environment(**more: str) -> dict[str, str]:
    """Return a user's environment: what this process's own cluster has set must not help."""
    own = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), more.pop("PYTHONPATH", None))))
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def start(*words: object, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start ``peaknet-predict`` with these words, and these variables besides a user's."""
    return subprocess.Popen(
        [COMMAND, *map(str, words)],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Wait for a command's end with this exit code, and return what it said."""
    said, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode == expected, said
    return said


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a state."""
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
