from __future__ import annotations

from peaknet_predict.queues.clock import RunningClock


def test_a_pause_of_the_process_is_nobodys_silence() -> None:
    now = 100.0
    clock = RunningClock(1.0, lambda: now)
    read = []
    for step_s in (0.5, 0.5, 61.0, 0.5, 1e6, 0.25):
        now += step_s
        read.append(clock())
    assert read == [0.5, 1.0, 2.0, 2.5, 3.5, 3.75]
