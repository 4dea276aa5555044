"""A Ray cluster in a process of its own, for tests that destroy it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.commands import environment

_PROGRAM = """
import time
from peaknet_predict.queues.cluster import connect, keep_to_loopback
keep_to_loopback()
print(connect("local"), flush=True)
time.sleep(3600)
"""


class OwnCluster:
    """A cluster and its processes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.address = process.stdout.readline().strip()
        assert self.address, "the cluster could not be started"

    def kill(self, program: str) -> None:
        """Kill ``raylet`` or ``gcs_server``."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            command = Path(f"/proc/{child}/cmdline").read_text().split("\0")[0]
            if Path(command).name == program:
                os.kill(int(child), signal.SIGKILL)
                return
        raise LookupError(f"no {program} among the children of {pid}")


@contextmanager
def own_cluster() -> Iterator[OwnCluster]:
    """Start a cluster, and end what is left of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield OwnCluster(process)
    finally:
        process.terminate()
        process.communicate()
