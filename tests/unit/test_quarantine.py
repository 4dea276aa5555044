from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict.queues.quarantine import Quarantine, read_index
from peaknet_predict.types import Event, EventId


def event(idx: int, side: int = 8) -> Event:
    return Event(EventId("a/b s", 0, idx), np.full((1, side, side), idx, np.uint16), 9500.0)


def test_data_and_reason_are_kept_and_can_be_read(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "deep" / "down", 10**6)
    assert not (tmp_path / "deep").exists(), "made when it is needed"
    quarantine.keep(event(3).id, "it is bad", event(3), losses=2)
    (line,) = read_index(tmp_path / "deep" / "down")
    assert (line["stream"], line["rank"], line["idx"]) == ("a/b s", 0, 3)
    assert (line["reason"], line["losses"]) == ("it is bad", 2)
    with h5py.File(tmp_path / "deep" / "down" / line["file"]) as file:
        np.testing.assert_array_equal(file["image"][:], event(3).image)
        assert file.attrs["photon_energy"] == "9500.0"
        assert file.attrs["reason"] == "it is bad"


@pytest.mark.parametrize(
    "record",
    [
        ["a", 1, np.zeros(3), None],
        np.array(["2026-01-01"], "M8[D]"),
        np.zeros(2, [("x", "f4"), ("y", "i4")]),
        np.array([{1}, None], object),
        {"any": "thing"},
        None,
    ],
)
def test_anything_at_all_can_be_kept(tmp_path: Path, record: Any) -> None:
    quarantine = Quarantine(tmp_path, 10**6)
    for _ in range(2):
        quarantine.keep(EventId("s", -1, 0), "strange", record)
    assert len(read_index(tmp_path)) == 2
    assert quarantine.problem is None


def test_beyond_its_size_identity_and_reason_are_kept(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 300)
    for idx in range(5):
        quarantine.keep(event(idx).id, "bad", event(idx))  # 128 bytes each
    files = [line["file"] for line in read_index(tmp_path)]
    assert [file is not None for file in files] == [True, True, False, False, False]


def test_what_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    blocked = tmp_path / "q"
    blocked.write_text("a file where the directory should be")
    quarantine = Quarantine(blocked, 10**6)
    quarantine.keep(event(0).id, "bad", event(0))
    assert quarantine.problem is not None
    blocked.unlink()
    quarantine.keep(event(1).id, "bad", event(1))
    assert quarantine.problem is None
    assert [line["idx"] for line in read_index(blocked)] == [0, 1]
