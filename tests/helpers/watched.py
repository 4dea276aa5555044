"""A command that is listened to while it runs, so that a test can wait for what it says."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.helpers.commands import COMMAND, HANGS_S, environment, wait_until

FIRST = "once more stops at once"
SECOND = "stopping at once"


class Watched:
    """A started command.

    Parameters
    ----------
    words
        Of its command line.
    cwd
        Where it runs.
    patient
        Whether nothing ends it if it is slow to stop at once, see `tests.helpers.patient`.
    variables
        Of its environment, besides a user's.
    """

    def __init__(self, *words: object, cwd: Path, patient: bool = False, **variables: str) -> None:
        program = [sys.executable, "-m", "tests.helpers.patient"] if patient else [COMMAND]
        self.process = subprocess.Popen(
            [*program, *map(str, words)],
            cwd=cwd,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_for(self, text: str) -> None:
        """Wait until it says something."""
        wait_until(lambda: text in self.said or self.process.poll() is not None)
        self._listener.join(HANGS_S if self.process.poll() is not None else 0)
        assert text in self.said, self.said

    def ask_to_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a first signal; it has been heard when this returns."""
        self.process.send_signal(number)
        self.wait_for(FIRST)

    def stop_at_once(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a second signal, as often as it takes to count as one."""
        while SECOND not in self.said.replace(FIRST, "") and self.process.poll() is None:
            self.process.send_signal(number)
            time.sleep(0.3)

    def finish(self, expected: int) -> str:
        """Wait for its end with this exit code, and return what it said."""
        self.process.wait(HANGS_S)
        self._listener.join(HANGS_S)
        assert self.process.returncode == expected, self.said
        return self.said

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self.said += line
