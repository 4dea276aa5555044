"""Several nodes under SLURM, as far as one machine can stand for them.

Every node is a Ray process of its own; the ranks find each other in the variables that `srun` sets.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peaknet_predict.queues import QueueAddress, connect_queue
from tests.helpers.chain import written
from tests.helpers.commands import COMMAND, environment, finish, start
from tests.helpers.paths import CONFIGS
from tests.helpers.queues import event, statistics
from tests.helpers.sockets import listening

LEASE_S = 2.0

Popen = subprocess.Popen[str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def configuration(tmp_path: Path, names: tuple[str, str]) -> list[str]:
    """The shipped configuration for SLURM, with two nodes of one CPU each."""
    config = yaml.safe_load((CONFIGS / "predict.yaml").read_text())
    settings = {"lease_s": LEASE_S, "producer_timeout_s": 20.0}
    config["data"]["init_args"]["batch_size"] = 4
    config["data"]["init_args"]["queue"] |= {"name": names[0], **settings}
    config["trainer"]["callbacks"][0]["init_args"]["queue"] |= {"name": names[1], **settings}
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(config))
    topology = yaml.safe_load((CONFIGS / "topology" / "slurm.yaml").read_text())
    topology["trainer"] |= {"accelerator": "cpu", "precision": "32-true"}
    topology["trainer"] |= {"num_nodes": 2, "devices": 1}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(topology))
    parts = tmp_path / "predict.yaml", CONFIGS / "models" / "snr.yaml", tmp_path / "slurm.yaml"
    return [word for path in parts for word in ("-c", str(path))]


def rank_of_two(rank: int, words: list[str], address: str, port: int, cwd: Path) -> Popen:
    """Start what `srun` starts on a node of two, in a process group of its own."""
    slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "PROCID": rank, "LOCALID": 0}
    slurm |= {"NODEID": rank, "JOB_ID": 4711}
    variables = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    variables |= {"SLURM_JOB_NAME": "peaknet-predict", "SLURM_NODELIST": "127.0.0.1"}
    variables |= {"RAY_ADDRESS": address, "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [COMMAND, "predict", *words],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_nodes_share_a_stream_and_one_does_the_other_s_part(
    cluster: str, address: QueueAddress, tmp_path: Path, victim: int
) -> None:
    names = f"{address.name}-in", f"{address.name}-out"
    words, port = configuration(tmp_path, names), free_port()
    settings = replace(address, lease_s=LEASE_S, producer_timeout_s=20.0)
    queue = connect_queue(replace(settings, name=names[0]), "events")
    results = connect_queue(replace(settings, name=names[1]), "results")
    writer = start(
        *("write-cxi", "--address", cluster, "--queue.name", names[1]),
        *("--queue.lease_s", LEASE_S, "--directory", tmp_path / "cxi", "--events_per_file", 10),
        cwd=tmp_path,
    )
    ranks = [rank_of_two(rank, words, cluster, port, tmp_path) for rank in (0, 1)]
    queue.producer.open("p")
    idx = 0
    while statistics(results).accepted < 40:
        idx += queue.producer.put("p", [event(idx, side=32)])
        time.sleep(0.01)
        assert all(rank.poll() is None for rank in ranks)
    everywhere = {"00000000", "0" * 32}
    assert not everywhere & listening([rank.pid for rank in ranks])
    os.killpg(ranks[victim].pid, signal.SIGKILL)
    queue.producer.put("p", [event(i, side=32) for i in range(idx, idx + 60)])
    queue.producer.close("p")
    said = finish(ranks[1 - victim], expected=4)
    said += finish(writer)
    ranks[victim].communicate()
    assert written(tmp_path / "cxi") == list(range(idx + 60)), said
    path = tmp_path / ("predict_balance.json" if victim else "predict_balance.rank1.json")
    stages = json.loads(path.read_text())["stages"]
    assert stages["input"]["acknowledged"] == stages["output"]["accepted"] == idx + 60


SRUN = """\
#!{python}
'''As srun, on one machine: as many processes as tasks, each with its variables.'''
import os, signal, subprocess, sys

options, words = {{"nodes": os.environ["SLURM_NNODES"]}}, sys.argv[1:]
options["ntasks-per-node"] = os.environ["SLURM_NTASKS_PER_NODE"]
while words[0].startswith("-"):
    word = words.pop(0)
    if word in ("-w", "-x"):
        words.pop(0)
        continue
    name, _, value = word.lstrip("-").partition("=")
    assert value or name == "overlap", word
    options[name] = value
each, nodes = int(options["ntasks-per-node"]), int(options["nodes"])
assert int(options.get("ntasks", each * nodes)) == each * nodes, options
tasks = []
for rank in range(each * nodes):
    values = {{"NTASKS": each * nodes, "NTASKS_PER_NODE": each, "NNODES": nodes, "PROCID": rank}}
    values |= {{"LOCALID": rank % each, "NODEID": rank // each}}
    variables = {{f"SLURM_{{name}}": str(value) for name, value in values.items()}}
    tasks.append(subprocess.Popen(words, env=os.environ | variables, start_new_session=True))
def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
signal.signal(signal.SIGTERM, forward)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on two nodes that are both this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()
    hosts = f"#!/bin/sh\necho {socket.gethostname()}\necho another\n"
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", hosts)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(COMMAND).parent}:{os.environ['PATH']}"
    slurm = {"NNODES": "2", "NTASKS": "2", "NTASKS_PER_NODE": "1", "CPUS_PER_TASK": "1"}
    slurm |= {"JOB_ID": str(free_port()), "JOB_NAME": "peaknet-predict"}
    slurm |= {"JOB_NODELIST": "two", "NODELIST": "127.0.0.1"}
    return environment(
        PATH=path,
        MASTER_PORT=str(free_port()),
        **{f"SLURM_{name}": value for name, value in slurm.items()},
    )


@pytest.fixture
def batch(tmp_path: Path, allocation: dict[str, str]) -> Iterator[list[Popen]]:
    """Batch scripts that a test has started; what is left of them is ended."""
    scripts: list[Popen] = []
    yield scripts
    for script in scripts:
        if script.poll() is None:
            script.kill()
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                ours = f"SLURM_JOB_ID={allocation['SLURM_JOB_ID']}\0" in status.read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if ours:
                os.kill(int(status.parent.name), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["to the end", "asked to stop"])
def test_the_batch_script(
    tmp_path: Path, allocation: dict[str, str], batch: list[Popen], how: str
) -> None:
    words = configuration(tmp_path, ("detector_events", "peak_results"))
    source = "--source Simulator --source.panels 1 --source.height 32 --source.width 32"
    slowly = "--source.num_events 4000 --rate_hz 25"
    source += " --source.num_events 40" if how == "to the end" else f" {slowly}"
    own = {"CONFIGS": " ".join(words), "PRODUCER": source, "OUTPUT": str(tmp_path / "cxi")}
    log = tmp_path / "slurm.out"
    with open(log, "w") as out:
        script = subprocess.Popen(
            ["bash", str(CONFIGS / "slurm.sbatch")],
            cwd=tmp_path,
            env=allocation | own,
            stdout=out,
            stderr=out,
            text=True,
        )
    batch.append(script)
    if how == "asked to stop":
        deadline = time.monotonic() + 150
        while not list((tmp_path / "cxi").glob("*.cxi")):
            assert script.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        script.send_signal(signal.SIGTERM)
    code = script.wait(timeout=150)
    said = log.read_text()
    assert code == (0 if how == "to the end" else 3), said
    fed = json.loads((tmp_path / "feed_balance.json").read_text())["stages"]["feed"]["fed"]
    stages = json.loads((tmp_path / "predict_balance.json").read_text())["stages"]
    done = written(tmp_path / "cxi")
    assert len(done) == len(set(done)) == stages["output"]["accepted"], said
    assert (done == list(range(40))) == (how == "to the end"), said
    assert stages["input"]["accepted"] == fed >= len(done) > 0, said
