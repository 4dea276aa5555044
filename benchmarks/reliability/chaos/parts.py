"""The processes of a run: every life of each, what has hit it, and how it may have ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.reliability.chaos.cluster import children, environment
from benchmarks.reliability.chaos.fragile import CHANCE, DEATHS

KILLED = -signal.SIGKILL

CODES: dict[str, dict[str, tuple[int, ...]]] = {
    "feed": {
        "": (0,),
        "kill": (KILLED,),
        "end": (0, 3),
        "cluster": (0, 1),  # 0 if it had done all before it noticed
        "queue gone": (1,),
    },
    "predict": {
        "": (0,),
        "kill": (KILLED,),
        "end": (0, 3, 4),
        "rank killed": (1, 3, 4),
        "rank paused": (0, 4),
        "cluster": (0, 1, 3, 4),  # 0 if it had done all before it noticed
        "queue gone": (1,),
    },
    "write-cxi": {
        "": (0,),
        "kill": (KILLED,),
        "end": (0, 3),
        "results incomplete": (0, 3),
        "directory away": (0, 1),
        "cluster": (0, 1),  # 0 if it had done all before it noticed
        "queue gone": (1,),
    },
    "peer": {"": (0,)},
}
"""How a command may end after what has hit it, as docs/reliability.md says; else it is a bug.

What is not listed here, a pause or a full disk, may show in no exit code.
"""

_NOT_BEGUN = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)
_LAST_WORDS_S = 20.0
# Ray's own sentence is all there is of a process that had done its work and was about to leave.
_REASON = re.compile(r" ERROR |GCS may have been killed")
_CRASH = re.compile(r"Fatal Python error|Segmentation fault|ended by SIG(?!KILL|TERM|INT)\w+")


class WrongError(RuntimeError):
    """Something happened that the documentation excludes."""


@dataclass
class Life:
    """One process, from its start to its end."""

    process: subprocess.Popen[bytes]
    log_from: int
    hits: list[str] = field(default_factory=list)
    code: int | None = None
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float = float("inf")
    second_signal_at: float | None = None

    @property
    def was_disturbed(self) -> bool:
        """Whether something has hit it that may have left its work to others."""
        return any("paused" not in hit for hit in self.hits) or self.code not in (0, 4, None)


class Part:
    """One command of a run, started again when a fault has ended it.

    Parameters
    ----------
    name
        Of its log.
    kind
        Which of `CODES` are its exit codes.
    command
        What is run: a module and its words.
    directory
        Where it runs and has its log.
    resuming
        More words, from the second start on.
    fragility
        How likely it dies before an acknowledgement.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        command: Callable[[], Sequence[str]],
        directory: Path,
        resuming: Sequence[str] = (),
        fragility: float = 0.0,
    ) -> None:
        self.name = name
        self.kind = kind
        self.lives: list[Life] = []
        self.log = directory / f"{name}.log"
        self._command = command
        self._directory = directory
        self._resuming = resuming
        self._fragility = fragility
        self._deaths = directory / "deaths"
        self._deaths.mkdir(exist_ok=True)

    def start(self, *hits: str) -> None:
        """Begin a life, which some faults hit already."""
        words = [*self._command(), *(self._resuming if self.lives else ())]
        more = {CHANCE: str(self._fragility), DEATHS: str(self._deaths)}
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                cwd=self._directory,
                env=environment() | more,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            self.lives.append(Life(process, log.tell(), list(hits)))

    @property
    def last(self) -> Life:
        """The latest life."""
        return self.lives[-1]

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return bool(self.lives) and self.last.process.poll() is None

    @property
    def has_begun(self) -> bool:
        """Whether it has come to its work: then a small process keeps its last words."""
        return self.is_alive and bool(children(self.pid))

    @property
    def pid(self) -> int:
        """The process of the latest life."""
        return self.last.process.pid

    def hit(self, what: str) -> None:
        """Note a fault that the process has to show, or may."""
        self.last.hits.append(what)

    def ranks(self) -> list[int]:
        """Return the processes of the ranks, where there is a supervisor."""
        return [pid for pid in children(self.pid) if b"LOCAL_RANK=" in _environment(pid)]

    def signal(self, number: int, pid: int | None = None) -> None:
        """Send a signal, if there is still somebody to send it to."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid or self.pid, number)

    def said(self) -> str:
        """Return what the latest life has said."""
        with open(self.log, errors="replace") as log:
            log.seek(self.last.log_from)
            return log.read()

    def look(self) -> int | None:
        """Return the exit code of a life that has just ended, after judging it; else None.

        Raises
        ------
        WrongError
            If it should not have ended so.
        """
        life = self.last
        if life.code is not None or (code := life.process.poll()) is None:
            return None
        life.ended_at = min(life.ended_at, time.monotonic())
        said = self.said()
        if (
            code == 1
            and not _REASON.search(said)
            and time.monotonic() < life.ended_at + _LAST_WORDS_S
        ):
            return None  # the process that speaks for it has yet to find out why
        life.code = code
        if self._died(life.process.pid):
            life.hits.append("kill")
        if any(f"rank {rank} was ended by SIGKILL" in said for rank in range(8)):
            # By the harness, by itself before an acknowledgement, or by its supervisor at the end.
            if "rank paused" in life.hits or "end" in life.hits or self._ranks_died():
                life.hits.append("rank killed")
        problem = self._problem(life, code, said)
        if problem is not None:
            raise WrongError(f"{self.name}: {problem}; hit by {life.hits}. Its log: {said[-3000:]}")
        return code

    def _problem(self, life: Life, code: int, said: str) -> str | None:
        if crash := _CRASH.search(said):
            return f"crashed: {crash.group()}"
        known = CODES[self.kind]
        codes = {one for hit in life.hits or [""] for one in known.get(hit, known[""])}
        if "end" in life.hits and "ended without a word" not in said:
            codes |= set(_NOT_BEGUN)  # it had not come to what it needs to bring to an end
        if code not in codes:
            return f"ended with {code}, expected one of {sorted(codes)}"
        if code == 1 and not _REASON.search(said):
            return "ended with 1 and says no reason"
        if life.second_signal_at is not None and life.ended_at - life.second_signal_at > 60:
            return "ended a minute after its second signal"
        return None

    def _died(self, pid: int) -> bool:
        return (self._deaths / str(pid)).exists()

    def _ranks_died(self) -> bool:
        return any(self._deaths.glob("rank-*"))

    def end(self) -> None:
        """Leave nothing of it behind."""
        if not self.lives:
            return
        for pid in (*children(self.pid), self.pid) if self.is_alive else ():
            self.signal(signal.SIGKILL, pid)
        self.last.process.wait()


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
