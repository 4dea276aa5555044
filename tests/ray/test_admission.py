"""Clusters that admit strangers, and what is said of them: real ones, with and without a token."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peaknet_predict.doctor import cluster as doctor_cluster
from peaknet_predict.queues.admission import admits_strangers
from tests.helpers.chain import chain
from tests.helpers.commands import COMMAND, HANGS_S, environment, wait_until
from tests.helpers.watched import Watched


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def open_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster that was started without authentication, and the environment for it."""
    directory = tmp_path_factory.mktemp("r")
    (directory / "home").mkdir()
    own = environment(
        RAY_AUTH_MODE="disabled",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        HOME=str(directory / "home"),
    )
    port = free_port()
    # Ports that are given need not be waited for: Ray gives up on a busy machine otherwise.
    agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
    ports = [f"--{name}-port={free_port()}" for name in (*agents, "metrics-export")]
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
    options += ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=1", *ports]
    said = directory / "log"
    with open(said, "w") as log:
        head = subprocess.Popen([ray, "start", *options], env=own, stdout=log, stderr=log)
        try:
            wait_until(
                lambda: (
                    head.poll() is not None or "block forever" in (directory / "log").read_text()
                )
            )
            assert head.poll() is None, (directory / "log").read_text()
            yield f"127.0.0.1:{port}", own
        finally:
            head.terminate()
            head.wait(timeout=HANGS_S)


def test_an_open_cluster_fails_and_joining_it_warns(
    open_cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, own = open_cluster
    said = subprocess.run(
        [COMMAND, "doctor", "--address", address],
        cwd=tmp_path,
        env={name: value for name, value in own.items() if name != "RAY_AUTH_MODE"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1, said
    assert f"FAIL  {address} admits processes without a token" in said.stdout
    assert f"the Ray cluster at {address} let this process in without a token" in said.stderr


def test_every_command_warns_also_where_we_have_a_token(
    open_cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, own = open_cluster
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    ours: dict[str, Any] = {"RAY_AUTH_TOKEN_PATH": str(token), "HOME": own["HOME"]}
    to = ("--address", address, "--queue.name", "q")
    source = ("--source", "Simulator", "--num_events", "0")
    commands = [
        Watched("feed", *to, *source, cwd=tmp_path, **ours),
        Watched("write-cxi", *to, "--directory", tmp_path / "cxi", cwd=tmp_path, **ours),
        Watched(*chain(tmp_path, address, ("in", "out"), "cpu.yaml"), cwd=tmp_path, **ours),
    ]
    for command in commands:
        command.wait_for(f"the Ray cluster at {address} asks for no token, and lets in everyone")
        command.process.kill()
        command.process.wait()


def test_a_cluster_with_a_token_admits_nobody(cluster: str) -> None:
    assert admits_strangers(cluster) is False
    finding = doctor_cluster.check_admission(cluster)
    assert (finding.verdict, "admits nobody" in finding.text) == ("ok", True)


@pytest.mark.slow
def test_a_probe_that_fails_is_not_taken_for_safety(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    assert admits_strangers(nobody) is None
    finding = doctor_cluster.check_admission(nobody)
    assert finding.verdict == "warn"
    assert "could not be checked" in finding.text
    monkeypatch.setattr(doctor_cluster, "_STRANGER_S", 0.01)
    finding = doctor_cluster.check_admission(nobody)
    assert (finding.verdict, "no answer in" in finding.text) == ("warn", True)
