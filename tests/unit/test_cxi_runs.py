"""Several runs in one directory, several shapes in one run: no list and no balance mixes them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict import __version__
from peaknet_predict.cxi.account import ConsumeReport
from peaknet_predict.cxi.file import read_ids
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.types import EventId, Result


def write(
    directory: Path,
    run: str,
    events: int = 4,
    shape: tuple[int, ...] = (1, 8, 8),
    end: bool = True,
    first: int = 0,
    **more: Any,
) -> CxiWriter:
    """Write files of two events each, and the balance."""
    writer = CxiWriter(directory, run=run, events_per_file=2, **more)
    image = np.ones(shape, np.float32)
    for idx in range(first, first + events):
        writer.add(Result(EventId(f"stream of {run}", 0, idx), image, np.empty((0, 3)), 9e3))
    if end:
        writer.close()
        statistics = writer.statistics
        writer.account.write_balance(ConsumeReport(statistics.taken, cxi=statistics), {})
    return writer


def listed(directory: Path, name: str = "files.lst") -> list[str]:
    paths = [Path(line) for line in (directory / name).read_text().splitlines()]
    assert {path.parent for path in paths} <= {directory.resolve()}
    return [path.name for path in paths]


def balance(directory: Path, name: str = "peaks_balance.json") -> Any:
    found = json.loads((directory / name).read_text())
    cxi = found["stages"]["files"]["cxi"]
    return found["run"], found["stages"]["files"]["taken"], cxi["written"]


def test_a_second_run_has_a_list_and_a_balance_of_its_own_and_says_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "queue-12.0")
    assert "are here" not in caplog.text
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert balance(tmp_path) == ("queue-12.0", 4, 4)
    with caplog.at_level(logging.WARNING):
        write(tmp_path, "queue-34.0", events=2)
    assert "4 events of other runs are here, in 2 files" in caplog.text
    assert listed(tmp_path) == ["peaks_0002.cxi"]
    assert balance(tmp_path) == ("queue-34.0", 2, 2)
    assert listed(tmp_path, "files_queue-12.0.lst") == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert balance(tmp_path, "peaks_balance_queue-12.0.json") == ("queue-12.0", 4, 4)
    write(tmp_path, "a third/run", events=2)
    assert listed(tmp_path, "files_queue-34.0.lst") == ["peaks_0002.cxi"]
    assert listed(tmp_path) == ["peaks_0003.cxi"]
    with h5py.File(tmp_path / "peaks_0003.cxi") as file:
        assert file["entry_1/peaknet_predict"].attrs["run"] == "a third/run"
        assert file.attrs["creator_version"] == __version__


def test_a_resumed_writer_goes_on_with_the_lists_and_the_balance_of_its_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "r", events=3, end=False, owner="killed")
    (tmp_path / "files.lst").unlink()  # it died before it could write this
    write(tmp_path, "r", events=2, first=2, owner="next", create=False)
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert balance(tmp_path) == ("r", 4, 4)
    writers = json.loads((tmp_path / "peaks_balance.json").read_text())["writers"]
    assert writers["killed"] is None
    assert writers["next"]["cxi"]["written"] == 2
    assert "WARNING" not in caplog.text
    # Nothing is left to do: the list and the balance stay what they are.
    (tmp_path / "files.lst").unlink()
    write(tmp_path, "r", events=0, owner="last", create=False)
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert balance(tmp_path) == ("r", 4, 4)


def test_a_run_that_goes_on_after_a_later_one_has_begun_leaves_it_the_plain_names(
    tmp_path: Path,
) -> None:
    slow = write(tmp_path, "slow", end=False, owner="slow")
    write(tmp_path, "quick", events=2)
    image = np.ones((1, 8, 8), np.float32)
    for idx in (8, 9):
        slow.add(Result(EventId("s", 0, idx), image, np.empty((0, 3)), 9e3))
    slow.close()
    slow.account.write_balance(ConsumeReport(6, cxi=slow.statistics), {})
    assert listed(tmp_path) == ["peaks_0002.cxi"]
    slow_files = ["peaks_0000.cxi", "peaks_0001.cxi", "peaks_0003.cxi"]
    assert listed(tmp_path, "files_slow.lst") == slow_files
    assert balance(tmp_path) == ("quick", 2, 2)
    assert balance(tmp_path, "peaks_balance_slow.json") == ("slow", 6, 6)


def test_prefixes_of_one_run_share_its_list(tmp_path: Path) -> None:
    write(tmp_path, "r", prefix="a")
    write(tmp_path, "r", events=2, prefix="b", first=10)
    assert listed(tmp_path) == ["a_0000.cxi", "a_0001.cxi", "b_0000.cxi"]
    assert balance(tmp_path, "a_balance.json") == ("r", 4, 4)
    assert balance(tmp_path, "b_balance.json") == ("r", 2, 2)


def test_every_shape_has_a_list_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "r", shape=(2, 8, 16))
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    write(tmp_path, "r", shape=(16, 16), first=10)  # a slab of the same shape, another detector
    assert not (tmp_path / "files.lst").exists()
    assert listed(tmp_path, "files_2x8x16.lst") == ["peaks_0000.cxi", "peaks_0001.cxi"]
    assert listed(tmp_path, "files_1x16x16.lst") == ["peaks_0002.cxi", "peaks_0003.cxi"]
    assert "there is no files.lst" in caplog.text
    write(tmp_path, "next")
    assert listed(tmp_path) == ["peaks_0004.cxi", "peaks_0005.cxi"]
    assert sorted(path.name for path in tmp_path.glob("files*.lst")) == [
        "files.lst",
        "files_1x16x16_r.lst",
        "files_2x8x16_r.lst",
    ]
    write(tmp_path, "r", first=20, events=2)
    assert listed(tmp_path, "files_1x8x8_r.lst") == ["peaks_0006.cxi"]
    assert listed(tmp_path) == ["peaks_0004.cxi", "peaks_0005.cxi"]


def test_what_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / "files.lst").write_text("/elsewhere/cheetah.cxi\n")
    (tmp_path / "peaks_balance.json").write_text("{}")
    (tmp_path / "cheetah.cxi").write_bytes(b"no HDF5")
    write(tmp_path, "r")
    assert listed(tmp_path) == ["peaks_0000.cxi", "peaks_0001.cxi"]
    (kept,) = tmp_path.glob("files_before-*.lst")
    assert kept.read_text() == "/elsewhere/cheetah.cxi\n"
    (kept,) = tmp_path.glob("peaks_balance_before-*.json")
    assert kept.read_text() == "{}"


def test_a_link_whose_answer_was_lost_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)  # as a network file system may, and then reports the second

    monkeypatch.setattr(os, "link", repeated)
    writer = write(tmp_path, "r", events=2)
    assert writer.statistics.written == 2
    assert len([key for path in tmp_path.glob("*.cxi") for key in read_ids(path)]) == 2
