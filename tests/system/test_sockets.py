"""What a run of two ranks on one machine opens to the network: nothing."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from peaknet_predict.process import supervise
from peaknet_predict.queues import QueueAddress, connect_queue
from tests.helpers.chain import chain, ranks_of
from tests.helpers.commands import finish, start
from tests.helpers.queues import event, statistics

LOOPBACK = {
    "0100007F",  # 127.0.0.1, as the kernel prints it
    "0000000000000000FFFF00000100007F",  # the same, of an IPv6 socket
    "00000000000000000000000001000000",  # ::1
}


def listening(pids: list[int]) -> set[str]:
    """Return the addresses at which these processes listen, as /proc has them."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue  # closed meanwhile
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.partition(":")[0])
    return found


def test_two_ranks_listen_on_loopback_only_and_never_start_mpi(
    cluster: str, address: QueueAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpi = tmp_path / "site" / "mpi4py"
    mpi.mkdir(parents=True)
    (mpi / "__init__.py").touch()
    (mpi / "MPI.py").write_text(f"open({str(tmp_path / 'mpi_was_started')!r}, 'w')\n")
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "two_cpus.yaml")
    process = start(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    queue = connect_queue(QueueAddress(names[0], lease_s=2.0), "events")
    results = connect_queue(QueueAddress(names[1], lease_s=2.0), "results")
    queue.producer.open("p")
    idx = 0
    while statistics(results).accepted < 20:
        assert process.poll() is None, process.communicate()[0]
        idx += queue.producer.put("p", [event(idx, side=32)])
        time.sleep(0.01)
    found = listening([process.pid, *ranks_of(process)])
    queue.producer.close("p")
    finish(process)
    assert found
    assert found <= LOOPBACK
    assert not (tmp_path / "mpi_was_started").exists()


def test_on_several_machines_the_store_listens_at_the_address_named() -> None:
    assert supervise.Layout(2, 2, 0, "somewhere", 1).meets_at == "127.0.0.1"
    assert supervise.Layout(2, 4, 0, "somewhere", 1).meets_at == "somewhere"
    with supervise._listen("127.0.0.1", 0) as bound:
        assert bound.family == socket.AF_INET
        assert bound.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="set MASTER_ADDR to an address of the first machine"):
            supervise._listen("127.0.0.1", bound.getsockname()[1])
