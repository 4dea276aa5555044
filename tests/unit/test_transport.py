from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from peaknet_predict.queues import transport
from peaknet_predict.queues.address import QueueAddress, QueueError


def test_who_has_given_up_waits_no_minute_for_every_thing_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    is_there = False

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def get(reference: Any, timeout: float | None) -> str:
        if not is_there:
            raise ray.exceptions.ActorUnavailableError("on its way back", None)
        return "an answer"

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now)
    monkeypatch.setattr("peaknet_predict.queues.transport.time", clock)
    monkeypatch.setattr(ray, "get", get)
    method = SimpleNamespace(remote=lambda *args: None)
    calls = transport.ActorCalls(SimpleNamespace(put=method, close=method), QueueAddress("q"))
    with pytest.raises(QueueError, match="did not answer a put for 60 s"):
        calls.call("put")
    assert 60 <= now < 62
    now = 0.0
    with pytest.raises(QueueError, match="did not answer a close for 5 s"):
        calls.call("close")
    assert now < 7
    is_there = True
    assert calls.call("close") == "an answer"
    is_there, now = False, 0.0
    with pytest.raises(QueueError, match="for 60 s"):
        calls.call("put")
