"""The supervisor with real processes in the place of ranks: they do at once what they are told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from peaknet_predict.process import stopping, supervise
from peaknet_predict.process.supervise import Layout
from tests.helpers.commands import wait_until
from tests.helpers.paths import REPOSITORY


@pytest.fixture(autouse=True)
def quick_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_COMMAND", (sys.executable, "-m", "tests.helpers.rank"))
    monkeypatch.setattr(supervise, "_LOOK_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(directory: Path, *plans: str, grace_s: float = 600.0) -> int:
    layout = Layout(len(plans), len(plans), 0, "127.0.0.1", free_port())
    return supervise.supervise([str(directory), *plans], layout, grace_s)


def pids(directory: Path, ranks: int) -> list[int]:
    """Wait until so many ranks have begun."""
    files = [directory / str(rank) for rank in range(ranks)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("plans", "code"),
    [
        (["start+0", "start+0"], 0),
        (["start+4", "start+kill"], 4),
        (["start+1", "start+0"], 4),
        (["start+3", "start+3"], 3),
        (["start+1", "start+3"], 3),
        (["start+1", "start+1"], 1),
        (["start+kill"], 1),
        (["start+0", "start+stop"], 4),
    ],
)
def test_the_exit_code_says_what_became_of_the_ranks(
    plans: list[str], code: int, tmp_path: Path
) -> None:
    assert run(tmp_path, *plans) == code
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(tmp_path, len(plans)))


def test_a_rank_that_dies_before_all_have_started_ends_the_run(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path, "1", "end", "ignore") == 1
    assert "rank 0 ended with 1 before all ranks had started: the run ends" in said.text


def test_a_request_to_stop_that_comes_before_the_ranks_have_begun_is_no_failure(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, "term", "ignore") == 3


def test_a_rank_that_dies_later_is_reported_and_the_others_go_on(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    def end_the_other() -> None:
        wait_until(lambda: "rank 0 was ended by SIGKILL" in said.text)
        os.kill(pids(tmp_path, 2)[1], signal.SIGTERM)

    threading.Thread(target=end_the_other).start()
    assert run(tmp_path, "start+kill", "start+end") == 3
    assert "rank 0 was ended by SIGKILL; the others take over what it held" in said.text
    assert "rank 1 ended with 3" in said.text


def signal_when_begun(directory: Path, ranks: int, times: int = 1) -> None:
    def act() -> None:
        pids(directory, ranks)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    threading.Thread(target=act).start()


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    signal_when_begun(tmp_path, 2)
    assert run(tmp_path, "start+end", "start+end") == 3


def test_ranks_that_ignore_it_are_killed_when_their_grace_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervise, "_MARGIN_S", 0.1)
    signal_when_begun(tmp_path, 2)
    assert run(tmp_path, "start+ignore", "start+ignore", grace_s=0.0) == 1
    assert "ranks that do not end are killed" in said.text


def test_after_a_second_signal_nobody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_ONE_REQUEST_S", 0.0)
    monkeypatch.setattr(stopping, "_AT_ONCE_S", 600.0)
    signal_when_begun(tmp_path, 2, times=2)
    assert run(tmp_path, "start+ignore", "start+ignore") == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(tmp_path, 2))


@pytest.mark.thorough
def test_ranks_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    program = (
        "import sys; from peaknet_predict.process import supervise\n"
        "supervise._COMMAND = (sys.executable, '-m', 'tests.helpers.rank')\n"
        f"layout = supervise.Layout(2, 2, 0, '127.0.0.1', {free_port()})\n"
        f"supervise.supervise([{str(tmp_path)!r}, 'ignore', 'ignore'], layout, 600.0)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    ranks = pids(tmp_path, 2)
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not any(_runs(pid) for pid in ranks))


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
