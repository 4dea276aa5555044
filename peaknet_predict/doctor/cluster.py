"""Checks of a Ray cluster: who is admitted, and the queues in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from peaknet_predict.doctor.finding import Finding
from peaknet_predict.queues import ClusterError, QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.cluster import connect

_STRANGER_S = 120.0  # most of it for importing Ray on a busy machine
_QUARANTINE_SHOWN = 5


def check_cluster(address: str, queues: list[str], namespace: str) -> Iterator[Finding]:
    """Join a cluster as a run would; see whom it admits, and what its queues hold."""
    try:
        cluster = connect(address)
    except ClusterError as error:
        yield Finding("FAIL", str(error))
        return
    import ray  # not before: it reads its settings when it is imported

    alive = [node for node in ray.nodes() if node["Alive"]]
    gpus = ray.cluster_resources().get("GPU", 0)
    yield Finding(
        "ok", f"Ray {ray.__version__} cluster {cluster}: {len(alive)} nodes, {gpus:g} GPUs"
    )
    yield check_admission(cluster)
    for name in queues:
        yield from _check_queue(QueueAddress(name, namespace=namespace, create=False))


def check_admission(cluster: str) -> Finding:
    """Query the cluster without a token, as a stranger would, in a separate process.

    Only an answer, or a refusal for lack of a token, counts; anything else is not called safe.
    """
    program = (
        "from peaknet_predict.queues.cluster import ask_without_token; "
        f"print(ask_without_token({cluster!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as home:
        try:
            stranger = subprocess.run(
                [sys.executable, "-P", "-c", program],
                env=environment | {"HOME": home, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=_STRANGER_S,
            )
        except subprocess.TimeoutExpired:
            answer = f"no answer in {_STRANGER_S:.0f} s"
        else:
            lines = (stranger.stdout or stranger.stderr).splitlines()
            answer = lines[-1] if lines else f"the probe ended with {stranger.returncode}"
    if answer == "open":
        return Finding(
            "FAIL",
            f"{cluster} admits processes without a token: everyone who reaches it can run code as "
            "you. Start it with RAY_AUTH_MODE=token",
        )
    if answer == "closed":
        return Finding("ok", f"{cluster} admits nobody without its token")
    return Finding(
        "warn", f"whether {cluster} admits strangers could not be checked ({answer}); try again"
    )


def _check_queue(address: QueueAddress) -> Iterator[Finding]:
    problem = ""
    for kind in ("events", "results"):
        try:
            admin = connect_queue(address, kind).admin
        except QueueError as error:
            problem = str(error)
            continue
        now = admin.statistics()
        if now is None:
            yield Finding(
                "warn",
                f"queue {address.name!r}: {admin.size()} waiting; three methods only, as "
                f"psana-ray's. {admin.promise}",
            )
            return
        yield Finding(
            "warn" if now.problem else "ok",
            f"queue {address.name!r}: {now.ready} waiting, {now.leased} leased, "
            f"{now.acknowledged} acknowledged, {now.quarantined} in quarantine; {admin.promise}; "
            f"open producers: {', '.join(now.open_producers) or 'none'}"
            + (f"; {now.problem}" if now.problem else ""),
        )
        for line in now.quarantine[-_QUARANTINE_SHOWN:]:
            yield Finding("warn", f"queue {address.name!r}, in quarantine: {line}")
        return
    yield Finding("FAIL", problem)
