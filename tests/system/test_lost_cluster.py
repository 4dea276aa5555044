"""What the commands leave behind when their queue, or the whole of Ray, is taken from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray

from peaknet_predict.queues import QueueAddress, connect_queue
from tests.helpers.chain import chain, written
from tests.helpers.commands import finish, start, wait_until
from tests.helpers.own_cluster import own_cluster
from tests.helpers.queues import statistics


def feed(cluster: str, queue: str, cwd: Path) -> subprocess.Popen[str]:
    source = ("--source", "Simulator", "--source.panels", 1)
    size = ("--source.height", 64, "--source.width", 64)
    pace = ("--loop", "true", "--rate_hz", 100, "--queue.lease_s", 2, "--stream", "s")
    words = ("feed", "--address", cluster, "--queue.name", queue, *source, *size, *pace)
    return start(*words, cwd=cwd)


def record(path: Path) -> Any:
    return json.loads(path.read_text())


def test_when_the_input_queue_dies_all_that_was_predicted_is_in_files_and_every_command_says_why(
    cluster: str, address: QueueAddress, tmp_path: Path
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words = chain(tmp_path, cluster, names, "cpu.yaml")
    feeding = feed(cluster, names[0], tmp_path)
    predict = start(*words, cwd=tmp_path)
    results = connect_queue(QueueAddress(names[1]), "results")
    wait_until(lambda: statistics(results).accepted >= 20 or predict.poll() is not None)
    handle = ray.get_actor(names[0], namespace="peaknet")
    os.kill(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
    said = finish(predict, expected=1)
    gone = f"the actor of queue '{names[0]}' is gone"
    assert gone in said.splitlines()[-1]
    assert "Restart the producer and this run" in said.splitlines()[-1]
    balance = record(tmp_path / "predict_balance.json")
    assert gone in balance["problem"]
    assert gone in balance["stages"]["input"]["problem"]
    delivered = balance["stages"]["output"]["accepted"]
    assert delivered == balance["stages"]["predict"]["predicted"] >= 20
    assert len(written(tmp_path / "cxi")) == delivered, said
    now = statistics(results)
    assert now.ended
    assert gone in " ".join(now.failures.values())
    said = finish(feeding, expected=1)
    assert gone in said
    balance = record(tmp_path / "feed_balance.json")
    assert gone in balance["problem"]
    assert balance["stages"]["feed"]["fed"] >= 20


@pytest.mark.slow
# Ray looks for its head for a minute before it ends a process.
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_when_ray_dies_every_command_leaves_a_sentence_and_a_record(
    victim: str, tmp_path: Path
) -> None:
    with own_cluster() as cluster:
        words = chain(tmp_path, cluster.address, ("in", "out"), "cpu.yaml")
        processes = {
            "predict": start(*words, cwd=tmp_path),
            "feed": feed(cluster.address, "in", tmp_path),
            "write-cxi": start(
                *("write-cxi", "--address", cluster.address, "--queue.name", "other"),
                *("--directory", tmp_path / "other"),
                cwd=tmp_path,
            ),
        }
        # The first file is there when every one of them works; the second writer has nothing to do.
        wait_until(lambda: any((tmp_path / "cxi").glob("*.cxi")) and (tmp_path / "other").is_dir())
        cluster.kill(victim)
        said = {name: finish(process, expected=1) for name, process in processes.items()}
    for name in ("predict", "feed"):
        assert "ERROR" in said[name], said[name]
        assert "Look at the cluster" in said[name] or "Restart" in said[name]
        balance = record(tmp_path / f"{name}_balance.json")
        assert balance["problem"]
    stages = record(tmp_path / "predict_balance.json")["stages"]
    assert stages["predict"]["received"] >= stages["predict"]["predicted"] >= 100
    assert record(tmp_path / "feed_balance.json")["stages"]["feed"]["fed"] >= 100
    assert "ERROR" in said["write-cxi"]
    assert (tmp_path / "other" / "peaks_balance.json").exists()
