"""Signals as requests to stop, in this process."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from peaknet_predict.process import stopping
from peaknet_predict.process.stopping import StopRequest, listen_again, stop_requests


def signal_soon(number: int = signal.SIGTERM, delay_s: float = 0.1) -> None:
    threading.Timer(delay_s, os.kill, (os.getpid(), number)).start()


def test_signals_close_together_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_REQUEST_S", 1e9)
    with stop_requests(5.0) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60.0)
    assert not stop.at_once, "heard of, or the block would not have ended, and not counted"


def test_a_second_signal_interrupts_what_the_main_thread_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "_ONE_REQUEST_S", 0.0)
    with stop_requests(60.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60.0)
        signal_soon()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60.0)
        assert stop.at_once


def test_blocks_within_a_block_share_its_request_and_its_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests(60.0) as stop:
        with stop_requests() as inner:
            assert inner is stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a library does
        listen_again()
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60.0)
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_requests() as later:
        assert not later.is_set()


def test_before_there_is_anything_to_finish_a_first_signal_stops_at_once() -> None:
    with stop_requests(begun=False) as stop:
        signal_soon()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60.0)
        assert stop.at_once
    with stop_requests(begun=False) as stop:
        with stop_requests():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60.0)
        assert not stop.at_once


def test_a_second_signal_that_comes_late_interrupts_nothing_behind_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end_after = StopRequest._end_after
    left = threading.Event()

    def interrupt_early(self: StopRequest, seconds: float) -> None:
        # The main thread is on its way out before it is told.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        assert left.wait(60.0)
        end_after(self, seconds)

    monkeypatch.setattr(StopRequest, "_end_after", interrupt_early)
    with stop_requests(begun=False):
        signal_soon()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60.0)
        left.set()
    watchdogs = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
    assert all(one.finished.is_set() for one in watchdogs), "nobody ends the process any more"


def test_a_request_says_when_its_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("peaknet_predict.process.stopping.time.monotonic", lambda: now)
    stop = StopRequest(grace_s=30.0)
    assert not stop.out_of_time(1e9), "nobody has asked"
    stop.set()
    now += 25.0
    stop.set()  # asked again: the time goes on
    assert not stop.out_of_time()
    assert stop.out_of_time(margin_s=5.1), "what takes that long would end too late"
    now += 5.1
    assert stop.out_of_time()
