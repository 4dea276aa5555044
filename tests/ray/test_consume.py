"""`write-cxi` on real queues: one stream after another, and another program's queue."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from peaknet_predict.consume import write_cxi
from peaknet_predict.cxi.file import read_cxi, read_ids
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.types import EventId, Result
from tests.helpers.foreign import make_three_method_queue
from tests.helpers.queues import statistics

IMAGE = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(2, 16, 16)
PEAKS = [[1.0, 7.0, 8.5], [0.0, 3.0, 4.0]]


def listed(directory: Path, name: str = "files.lst") -> list[str]:
    return [Path(line).name for line in (directory / name).read_text().splitlines()]


def counts(directory: Path) -> tuple[int, int, int]:
    files = json.loads((directory / "peaks_balance.json").read_text())["stages"]["files"]
    return files["taken"], files["cxi"]["written"], files["cxi"]["filtered"]


def test_streams_of_one_queue_into_one_directory_are_runs_of_their_own(
    cluster: str, address: QueueAddress, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = connect_queue(address, "results")
    none = np.empty((0, 3))

    def stream(name: str, events: int) -> None:
        queue.producer.open(name)
        for idx in range(events):
            peaks = np.array(PEAKS) if idx % 2 else none
            queue.producer.put(name, [Result(EventId(name, 0, idx), IMAGE, peaks, 9e3)])
        queue.producer.close(name)

    arguments: dict[str, Any] = {"min_peaks": 1, "events_per_file": 2}
    stream("morning", 8)
    report = write_cxi(address, str(tmp_path), cluster, **arguments)
    assert (report.cxi.written, report.cxi.filtered, report.balanced) == (4, 4, True)
    assert counts(tmp_path) == (8, 4, 4)
    # In another's place at its end: nothing is left to do, and nothing changes.
    write_cxi(address, str(tmp_path), cluster, resume=True, **arguments)
    assert counts(tmp_path) == (8, 4, 4)
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert "are here" not in caplog.text

    stream("evening", 4)
    with caplog.at_level(logging.WARNING):
        write_cxi(address, str(tmp_path), cluster, **arguments)
    assert "4 events of other runs are here" in caplog.text
    assert counts(tmp_path) == (4, 2, 2)
    assert listed(tmp_path) == ["peaks_0002.cxi"]
    (earlier,) = tmp_path.glob("files_*.lst")
    assert listed(tmp_path, earlier.name) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert len(list(tmp_path.glob("peaks_balance_*.json"))) == 1
    now = statistics(queue)
    assert (now.acknowledged, now.quarantined) == (12, 0)


def test_results_of_another_programs_queue(
    cluster: str, address: QueueAddress, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = make_three_method_queue(address.name, address.namespace, 100)

    def fill() -> None:
        good = (IMAGE, PEAKS, 9500.0)
        for item in ([good, good], [good, (IMAGE, [], 9500.0)], [(IMAGE, [[9, 9, 9]], 1.0)], "END"):
            assert ray.get(foreign.put.remote(item))

    fill()
    address = replace(address, idle_timeout_s=0.3)
    report = write_cxi(address, str(tmp_path), cluster, min_peaks=1)
    assert str(report) == "taken 5 = written 3 + filtered 1 + refused 1, in 1 files"
    events = list(read_cxi(tmp_path / "peaks_0000.cxi"))
    for event in events:
        np.testing.assert_array_equal(event.image, IMAGE)
        assert sorted(event.peaks.tolist()) == sorted(PEAKS)
        assert not event.mask.any()
    fill()
    with caplog.at_level(logging.WARNING):
        report = write_cxi(address, str(tmp_path), cluster, min_peaks=1)
    assert "3 events of this run are here already" in caplog.text
    assert report.balanced
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert counts(tmp_path) == (10, 6, 2)
    ids = [key for path in tmp_path.glob("*.cxi") for key in read_ids(path)]
    assert len(set(ids)) == 6
