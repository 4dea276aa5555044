"""What is said of a process that ends without a word: real processes, really killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peaknet_predict.process.last_words import LastWords, speak
from tests.helpers.commands import environment

PROGRAM = """
import os, sys
from peaknet_predict.process.last_words import LastWords
words = LastWords("predict (rank 1)", sys.argv[1], "Start again with resume.")
words.note({"other_ranks": None, "stages": {"predict": {"predicted": 3}}})
words.note({"other_ranks": None, "stages": {"predict": {"predicted": 4}}})
if sys.argv[2] == "is done":
    words.done()
elif sys.argv[2] == "exits":
    os._exit(1)
else:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["is killed", "exits", "is done"])
def test_a_sentence_and_a_record_if_it_could_not_say_that_it_is_done(
    how: str, tmp_path: Path
) -> None:
    path = tmp_path / "balance.json"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), how],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == {"is killed": -signal.SIGKILL, "exits": 1, "is done": 0}[how]
    if how == "is done":
        assert ended.stderr == ""
        assert not path.exists()
        return
    assert "ERROR predict (rank 1) ended without a word: killed (SIGKILL)" in ended.stderr
    assert f"what it had counted is in {path}. Start again with resume." in ended.stderr
    record = json.loads(path.read_text())
    assert record["stages"]["predict"]["predicted"] == 4
    assert "ended without a word" in record["problem"]


def known(tmp_path: Path, **signs: str) -> dict[str, Any]:
    return {
        "who": "feed",
        "path": str(tmp_path / "balance.json"),
        "next_step": "Look.",
        "vital_signs": signs,
        "record": {},
    }


def test_it_says_what_of_ray_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = str(tmp_path / "raylet")
    with socket.socket() as head, socket.socket(socket.AF_UNIX) as raylet:
        head.bind(("127.0.0.1", 0))
        head.listen()
        raylet.bind(node)
        raylet.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        speak(known(tmp_path, head=address, node=node))
        assert "killed (SIGKILL)" in capsys.readouterr().err
        raylet.close()
        speak(known(tmp_path, head=address, node=node))
        assert "the Ray processes of this machine have died" in capsys.readouterr().err
    speak(known(tmp_path, head=address, node=node))
    assert f"the head of its Ray cluster, {address}, does not answer" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_said_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    speak(known(tmp_path) | {"path": str(tmp_path / "file" / "balance.json")})
    assert "its record could not be written" in capsys.readouterr().err


def test_a_killed_writer_does_not_replace_the_balance_that_others_have_struck(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peaks_balance.json"
    struck = {"run": "r.0", "writers": {"killed": None, "other": {"taken": 5}}}
    words = known(tmp_path) | {"path": str(path), "record": {"run": "r.0", "writers": {}}}
    path.write_text(json.dumps(struck))
    speak(words)
    assert json.loads(path.read_text()) == struck
    assert "the balance of its run" in capsys.readouterr().err
    path.write_text(json.dumps(struck | {"run": "r.1"}))
    speak(words)
    assert "ended without a word" in json.loads(path.read_text())["problem"]


def test_a_process_without_a_record_has_a_sentence_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speak(known(tmp_path) | {"path": None})
    assert "feed ended without a word" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_being_done_twice_is_no_error(tmp_path: Path) -> None:
    words = LastWords("feed", tmp_path / "balance.json", "Look.")
    words.done()
    words.done()
    words.note({})
    assert list(tmp_path.iterdir()) == []
