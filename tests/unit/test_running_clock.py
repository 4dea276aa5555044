from __future__ import annotations

import asyncio
import logging

import pytest

from peaknet_predict.queues.clock import RunningClock, Ticker


def test_a_pause_of_the_process_is_nobodys_silence() -> None:
    now = 100.0
    clock = RunningClock(1.0, lambda: now)
    read = []
    for step_s in (0.5, 0.5, 61.0, 0.5, 1e6, 0.25):
        now += step_s
        read.append(clock())
    assert read == [0.5, 1.0, 2.0, 2.5, 3.5, 3.75]


def test_work_that_fails_stops_neither_the_other_nor_the_next_round(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    done: list[str] = []

    async def test() -> None:
        enough = asyncio.Event()

        def fails() -> None:
            raise OSError("no space")

        async def counts() -> None:
            done.append("counted")
            if len(done) == 3:
                enough.set()

        ticker = Ticker(0.001, fails, counts)
        ticker.start()
        ticker.start()
        await asyncio.wait_for(enough.wait(), 30)

    asyncio.run(test())
    assert len(done) == 3, "one round after the other"
    assert "no space" in caplog.text
