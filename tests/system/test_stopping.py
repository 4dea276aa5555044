"""Asked to stop, once and twice, while something hangs: real processes, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.types import EventId, Result
from tests.helpers.chain import chain, ranks_of, written
from tests.helpers.commands import HANGS_S, finish, start, wait_until
from tests.helpers.paths import CONFIGS
from tests.helpers.queues import event, statistics
from tests.helpers.watched import Watched

EVENTS = 60
LEASE_S = 2.0


def hanging_model(tmp_path: Path, **net: Any) -> Path:
    model = yaml.safe_load((CONFIGS / "models" / "snr.yaml").read_text())
    model["model"]["init_args"]["net"] = {"class_path": "tests.helpers.failing.HangingNet"}
    model["model"]["init_args"]["net"]["init_args"] = net
    path = tmp_path / "hanging.yaml"
    path.write_text(yaml.safe_dump(model))
    return path


def fill(address: QueueAddress, name: str, events: int = EVENTS) -> Any:
    queue = connect_queue(QueueAddress(name, lease_s=LEASE_S, producer_timeout_s=10.0), "events")
    queue.producer.open("p")
    queue.producer.put("p", [event(idx, side=32) for idx in range(events)])
    queue.producer.close("p")
    return queue


def hang(command: Watched, tmp_path: Path) -> None:
    wait_until(lambda: (tmp_path / "hanging").exists() or command.process.poll() is not None)
    assert command.process.poll() is None, command.said


@pytest.mark.parametrize(
    "deaf",
    [
        pytest.param(False, marks=pytest.mark.slow, id="in Python"),
        pytest.param(True, id="outside Python"),
    ],
)
def test_a_second_signal_stops_at_once_and_a_following_run_does_the_rest(
    cluster: str, address: QueueAddress, tmp_path: Path, deaf: bool
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "cpu.yaml")
    queue = fill(address, names[0])
    (tmp_path / "hold").touch()
    # What hangs outside Python has to be ended; what hangs in Python ends by itself.
    model = hanging_model(tmp_path, deaf=deaf)
    command = Watched(*words, "-c", model, cwd=tmp_path, patient=not deaf)
    hang(command, tmp_path)
    command.ask_to_stop()
    assert command.process.poll() is None, "it waits for what is under way"
    command.stop_at_once(signal.SIGINT)
    said = command.finish(3)
    assert "again: stopping at once" in said
    now = statistics(queue)
    assert now.acknowledged < EVENTS
    if not deaf:
        assert now.leased == 0, "given back, without waiting for the leases' end"
        balance = json.loads((tmp_path / "predict_balance.json").read_text())
        assert balance["problem"] == "stopped at once by a second signal"
    (tmp_path / "hold").unlink()
    said = finish(start(*words, "--data.init_args.resume", "true", cwd=tmp_path))
    assert written(tmp_path / "cxi") == list(range(EVENTS)), said


def test_what_hangs_is_ended_when_its_grace_is_over(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "cpu.yaml", grace_s=1.0)
    queue = fill(address, names[0])
    (tmp_path / "hold").touch()
    command = Watched(*words, "-c", hanging_model(tmp_path, deaf=True), cwd=tmp_path)
    hang(command, tmp_path)
    command.ask_to_stop()
    assert "still here 11 s after being asked to stop" in command.finish(3)
    # Nothing is lost with it, as after a second signal: see the test above.
    now = statistics(queue)
    assert now.acknowledged + now.leased + now.ready == EVENTS


@pytest.mark.slow
def test_two_ranks_end_within_the_grace_and_a_following_run_does_the_rest(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "two_cpus.yaml", grace_s=HANGS_S)
    command = Watched(*words, cwd=tmp_path, patient=True, ONE_REQUEST_S=str(HANGS_S))
    process = command.process
    queue = connect_queue(
        QueueAddress(names[0], lease_s=LEASE_S, producer_timeout_s=10.0), "events"
    )
    results = connect_queue(
        QueueAddress(names[1], lease_s=LEASE_S, producer_timeout_s=10.0), "results"
    )
    queue.producer.open("p")
    idx = 0
    while statistics(results).accepted < 40:
        assert process.poll() is None, command.said
        idx += queue.producer.put("p", [event(idx, side=32)])
        time.sleep(0.01)
    queue.producer.put("p", [event(i, side=32) for i in range(idx, idx + EVENTS)])
    process.send_signal(signal.SIGTERM)
    # A batch system's signal reaches the ranks too: that is no second one.
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGTERM)
    said = command.finish(3)
    assert "at once" not in said.replace("once more stops at once", "")
    balances = [
        json.loads((tmp_path / f"predict_balance{rank}.json").read_text())
        for rank in ("", ".rank1")
    ]
    taken = sum(balance["stages"]["predict"]["received"] for balance in balances)
    assert all(balance["stages"]["predict"]["given_back"] == 0 for balance in balances)
    assert all("interrupted" in balance["problem"] for balance in balances)
    assert statistics(queue).acknowledged == taken
    assert statistics(queue).leased == 0
    queue.producer.close("p")
    said = finish(start(*words, "--data.init_args.resume", "true", cwd=tmp_path))
    assert written(tmp_path / "cxi") == list(range(idx + EVENTS)), said


@pytest.mark.slow
def test_a_second_signal_to_two_ranks_stops_them_at_once(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "two_cpus.yaml")
    fill(address, names[0])
    (tmp_path / "hold").touch()
    command = Watched(*words, "-c", hanging_model(tmp_path), cwd=tmp_path, patient=True)
    hang(command, tmp_path)
    ranks = ranks_of(command.process)
    command.ask_to_stop()
    command.stop_at_once()
    command.finish(3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    (tmp_path / "hold").unlink()
    said = finish(start(*words, "--data.init_args.resume", "true", cwd=tmp_path))
    assert written(tmp_path / "cxi") == list(range(EVENTS)), said


def test_a_writer_whose_directory_is_gone_stops_at_once_and_the_next_writes_everything_once(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    queue = connect_queue(
        QueueAddress(address.name, lease_s=LEASE_S, producer_timeout_s=10.0), "results"
    )
    queue.producer.open("p")
    image = np.zeros((1, 32, 32), np.float32)
    results = [Result(EventId("s", 0, i), image, np.empty((0, 3)), 9e3) for i in range(EVENTS)]
    queue.producer.put("p", results[:30])
    directory = tmp_path / "cxi"
    words = (
        *("write-cxi", "--address", cluster, "--queue.name", address.name),
        *("--queue.lease_s", LEASE_S, "--directory", directory, "--events_per_file", 10),
    )
    writer = Watched(*words, cwd=tmp_path, patient=True)
    wait_until(lambda: statistics(queue).acknowledged == 30)
    shutil.move(directory, tmp_path / "away")
    queue.producer.put("p", results[30:])
    queue.producer.close("p")
    wait_until(lambda: statistics(queue).leased >= 10)
    writer.wait_for("trying again")
    writer.ask_to_stop()
    assert writer.process.poll() is None, "it tries until its grace is over"
    writer.stop_at_once()
    writer.finish(3)
    shutil.move(tmp_path / "away", directory)
    said = finish(start(*words, "--resume", "true", cwd=tmp_path))
    assert written(directory) == list(range(EVENTS)), said


def test_a_producer_whose_source_hangs_ends_when_it_is_asked(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    words = (
        *("feed", "--address", cluster, "--queue.name", address.name),
        *("--source", "tests.helpers.failing.HangingSource", "--rate_hz", 100),
    )
    queue = connect_queue(address, "events")
    command = Watched(*words, cwd=tmp_path)
    # What has been read is put, although the source does not come back with more.
    wait_until(lambda: statistics(queue).accepted == 5)
    command.ask_to_stop(signal.SIGINT)
    command.finish(3)
    balance = json.loads((tmp_path / "feed_balance.json").read_text())
    assert balance["stages"]["feed"]["fed"] == balance["stages"]["input"]["accepted"] == 5
    assert balance["problem"] == "interrupted"
    assert statistics(queue).ended
