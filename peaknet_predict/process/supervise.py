"""The ranks of one machine as processes that may die one by one.

Lightning's own launcher makes rank 0 the parent of the others and kills them all when one fails.
For a stream that is wrong: what a dead rank had taken goes back into the queue, and the others
process it. So the command becomes a supervisor that starts every rank, including rank 0, passes
signals on, and reports in its exit code what happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from peaknet_predict.process.balance import EXIT_INCOMPLETE, EXIT_SURVIVED, exit_code_of_ranks
from peaknet_predict.process.meeting_point import LOOPBACK, hosted_store, meeting_variables
from peaknet_predict.process.stopping import stop_requests

log = logging.getLogger(__name__)

_STARTED = "PEAKNET_PREDICT_STARTED"
"""In a rank's environment: the directory where it notes that it has started work."""

_SUPERVISOR = "PEAKNET_PREDICT_SUPERVISOR"
"""In a rank's environment: the process that must be its parent."""

# -P: a file in the working directory must not take the place of a library.
_COMMAND = (sys.executable, "-P", "-m", "peaknet_predict")
_LOOK_S = 0.2
_MARGIN_S = 15.0  # beyond the grace, before ranks that have not ended are killed
_HUNG_S = 900.0  # after a rank has seen the end of the stream, the others have nothing to wait for


@dataclass(frozen=True)
class Layout:
    """The processes of this machine: how many, out of how many, and where they meet."""

    local_ranks: int
    world_size: int
    node_rank: int
    main_address: str
    main_port: int

    @property
    def meets_at(self) -> str:
        """Where the ranks meet: out of other machines' reach if this one has all of them."""
        return LOOPBACK if self.local_ranks == self.world_size else self.main_address


def stay_with_supervisor() -> None:
    """Let this process die with its supervisor, if it has one."""
    if _SUPERVISOR in os.environ:
        # SIGKILL, because it may wait for other ranks until it works, deaf to requests to stop.
        _end_with_parent(signal.SIGKILL)


def note_started(rank: int) -> None:
    """Tell the supervisor, if there is one, that this rank needs no other rank any more."""
    directory = os.environ.get(_STARTED)
    if directory is not None:
        _end_with_parent(signal.SIGTERM)
        with contextlib.suppress(OSError):
            (Path(directory) / str(rank)).touch()


def _end_with_parent(number: signal.Signals) -> None:
    """Arrange for a signal to this process when its supervisor is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))
    if os.getppid() != int(os.environ[_SUPERVISOR]):
        os.kill(os.getpid(), number)


def supervise(words: Sequence[str], layout: Layout, grace_s: float) -> int:
    """Run the ranks of this machine until they end.

    Parameters
    ----------
    words
        The command line of every rank.
    layout
        The processes.
    grace_s
        How long the ranks may take to end after Ctrl-C or SIGTERM.

    Returns
    -------
    int
        The exit code of the run.
    """
    with (
        stop_requests(grace_s + 2 * _MARGIN_S) as stop,
        _store_of(layout),
        tempfile.TemporaryDirectory(prefix="peaknet-predict-") as started,
    ):
        ranks = _Ranks(words, layout, Path(started))
        asked = False
        try:
            while ranks.alive():
                time.sleep(_LOOK_S)
                if stop.is_set() and not asked:
                    asked = True
                    ranks.signal(signal.SIGTERM)
                if stop.out_of_time(_MARGIN_S):
                    log.error("ranks that do not end are killed; what they hold goes back")
                    ranks.signal(signal.SIGKILL)
                ranks.look()
        except KeyboardInterrupt:
            log.error("stopped at once; what the ranks hold goes back into the queue")
            ranks.signal(signal.SIGKILL)
            ranks.wait()
            return EXIT_INCOMPLETE
        finally:
            ranks.signal(signal.SIGKILL)
        return ranks.exit_code()


class _Ranks:
    def __init__(self, words: Sequence[str], layout: Layout, started: Path) -> None:
        self._started = started
        self._layout = layout
        self._reported: set[int] = set()
        self._ended_at: float | None = None
        shared = {
            **meeting_variables(layout.meets_at, layout.main_port),
            "NODE_RANK": str(layout.node_rank),
            "WORLD_SIZE": str(layout.world_size),
            _STARTED: str(started),
            _SUPERVISOR: str(os.getpid()),
        }
        self._processes = [
            subprocess.Popen(
                [*_COMMAND, *words],
                env=os.environ | shared | {"LOCAL_RANK": str(rank)},
                # A separate session: Ctrl-C reaches it once, through the supervisor.
                start_new_session=True,
            )
            for rank in range(layout.local_ranks)
        ]

    def alive(self) -> bool:
        """Whether any rank still runs."""
        return any(process.poll() is None for process in self._processes)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank that still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> None:
        """Wait until every rank is gone."""
        for process in self._processes:
            process.wait()

    def look(self) -> None:
        """Report ranks that are gone, and end those that have nothing left to do."""
        codes = [process.poll() for process in self._processes]
        for rank, code in enumerate(codes):
            if code is not None and rank not in self._reported:
                self._reported.add(rank)
                self._report(rank, code)
        if self._ended_at is None and any(code in (0, EXIT_SURVIVED) for code in codes):
            self._ended_at = time.monotonic()
        if self._ended_at is None:
            return
        for rank, code in enumerate(codes):
            if code is not None:
                continue
            process = self._processes[rank]
            hung = time.monotonic() - self._ended_at > _HUNG_S
            if hung or (_is_stopped(process.pid) and not self._waited_for(codes)):
                log.error("rank %d does not end and is killed", self._number(rank))
                process.kill()

    def exit_code(self) -> int:
        """Wait for every rank, and return the exit code of the run."""
        codes = [process.wait() for process in self._processes]
        # A rank that has not begun hears no request to stop: the signal itself ends it.
        return exit_code_of_ranks([EXIT_INCOMPLETE if c == -signal.SIGTERM else c for c in codes])

    def _report(self, rank: int, code: int) -> None:
        if code == 0:
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        number = self._number(rank)
        if len(list(self._started.iterdir())) < self._layout.local_ranks:
            log.error("rank %d %s before all ranks had started: the run ends", number, how)
            self.signal(signal.SIGKILL)
        elif self.alive():
            log.error("rank %d %s; the others take over what it held", number, how)
        else:
            log.error("rank %d %s", number, how)

    def _waited_for(self, codes: Sequence[int | None]) -> bool:
        """Whether a rank that runs and is not suspended may still finish by itself."""
        return any(
            code is None and not _is_stopped(process.pid)
            for code, process in zip(codes, self._processes, strict=True)
        )

    def _number(self, local_rank: int) -> int:
        return self._layout.node_rank * self._layout.local_ranks + local_rank


def _store_of(layout: Layout) -> AbstractContextManager[None]:
    """Keep the store where the ranks find each other, on the first machine."""
    if layout.node_rank:
        return nullcontext()
    return hosted_store(layout.meets_at, layout.main_port)


def _is_stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # The name in parentheses may hold anything; the state follows it.
    return status.rpartition(")")[2].split()[0] in ("T", "t")
