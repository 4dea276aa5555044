from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

from peaknet_predict.queues import QueueAddress
from peaknet_predict.queues.cluster import connect, disconnect, keep_to_loopback
from tests.helpers.examples import examples

keep_to_loopback()  # before a test module imports Ray

# No test depends on how fast the machine is.
settings.register_profile(
    "any machine",
    examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Hear Ctrl-C, as the commands under test must, also as a job in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Our own log, whatever a command has made of its handlers."""
    log = logging.getLogger("peaknet_predict")
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level(logging.INFO, "peaknet_predict")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """An embedded Ray cluster for all tests of this process; its address."""
    yield connect("local")
    disconnect()


@pytest.fixture(autouse=True)
def _no_queue_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill the queues of a test: dozens of idle ones slow down those that follow."""
    yield
    if "cluster" not in request.fixturenames:
        return
    import ray
    from ray.util import list_named_actors

    if not ray.is_initialized():
        return
    for actor in list_named_actors(all_namespaces=True):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


@pytest.fixture
def address(cluster: str, tmp_path: Path) -> QueueAddress:
    """A queue of its own for every test."""
    return QueueAddress(f"queue-{uuid4().hex[:8]}", quarantine=str(tmp_path / "quarantine"))
