"""Where the ranks of a run meet."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
from torch import distributed

from peaknet_predict.process import meeting_point, supervise
from peaknet_predict.process.meeting_point import meeting_of_ranks
from tests.helpers.sockets import LOOPBACK, listening


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a meeting writes there."""
    for name in meeting_point.meeting_variables("127.0.0.1", 1):
        monkeypatch.setenv(name, "")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_on_several_machines_the_store_listens_at_the_address_named() -> None:
    assert supervise.Layout(2, 2, 0, "somewhere", 1).meets_at == "127.0.0.1"
    assert supervise.Layout(2, 4, 0, "somewhere", 1).meets_at == "somewhere"
    with meeting_point._listen("127.0.0.1", 0) as bound:
        assert bound.family == socket.AF_INET
        assert bound.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="set MASTER_ADDR to an address of the first machine"):
            meeting_point._listen("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize(("nodes", "where"), [(1, "127.0.0.1"), (2, "127.0.0.2")])
def test_the_first_of_ranks_that_srun_has_started_keeps_their_store(
    nodes: int, where: str, said: pytest.LogCaptureFixture
) -> None:
    before = listening([os.getpid()])
    port = free_port()
    with meeting_of_ranks("127.0.0.2", port, nodes, is_first=True):
        added = listening([os.getpid()]) - before
        assert added <= (LOOPBACK if nodes == 1 else {"0200007F"})
        assert os.environ["MASTER_ADDR"] == where
        with meeting_of_ranks("127.0.0.2", port, nodes, is_first=False):
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                where, port, is_master=False, timeout=timedelta(minutes=1)
            )
            store.set("key", "value")
    assert ("127.0.0.2 is an address of this machine alone" in said.text) == (nodes == 2)
