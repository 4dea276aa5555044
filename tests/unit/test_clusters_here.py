"""`address: auto`: which of the Ray clusters on a machine is joined, and which one is dead."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from peaknet_predict.queues import ClusterError, cluster, clusters_here
from peaknet_predict.queues.clusters_here import (
    FoundCluster,
    NoClusterError,
    cluster_of_mine,
    why_silent,
)

NOW = time.time()
MINE = FoundCluster("10.0.0.1:6379", "ada", True, NOW - 7999)
OTHERS = replace(MINE, address="10.0.0.1:6380", user="bob", mine=False)
EMBEDDED = replace(MINE, address="127.0.0.1:7000", embedded=True)


@pytest.fixture(autouse=True)
def _it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)  # however long the tests take


def test_only_a_standing_cluster_of_this_user_counts() -> None:
    assert cluster_of_mine([OTHERS, EMBEDDED, MINE]) == MINE
    assert str(MINE) == "10.0.0.1:6379 of ada, started 2 h 13 min ago"


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([], "no Ray cluster of yours runs on this machine. Start one with `ray start --head`"),
        ([OTHERS], "others' do: 10.0.0.1:6380 of bob, started 2 h 13 min ago"),
        ([EMBEDDED], "a run's own, which ends with it, is at 127.0.0.1:7000 of ada"),
        ([MINE, replace(MINE, address="x:1")], "several Ray clusters of yours .*RAY_ADDRESS"),
        ([replace(MINE, stopped=True)], "is suspended and answers nobody"),
    ],
)
def test_otherwise_a_sentence_says_what_there_is(found: list[FoundCluster], sentence: str) -> None:
    with pytest.raises(NoClusterError, match=sentence):
        cluster_of_mine(found)


@pytest.fixture
def silent() -> Iterator[str]:
    """What accepts connections and says nothing: a head that hangs or is suspended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_dead_head_is_found_out_and_named(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clusters_here._CONNECT_S + clusters_here._ANSWER_S < 20
    monkeypatch.setattr(clusters_here, "_ANSWER_S", 0.1)
    assert why_silent(silent) == "no answer within 0.1 s"
    assert "refused" in str(why_silent("127.0.0.1:1"))
    assert why_silent("nonsense:port") is not None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    found = replace(MINE, address=silent)
    with pytest.raises(ClusterError, match="of ada, started 2 h 13 min ago, is dead: .*`ray stop`"):
        cluster._check_answers(silent, found)
    with pytest.raises(ClusterError, match="nothing answers at 127.0.0.1:1 .*`ray status`"):
        cluster._check_answers("127.0.0.1:1", None)
