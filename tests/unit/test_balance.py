"""The record of a run: whole, and beside those of earlier runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peaknet_predict.process.balance import write_balance


def test_a_record_leaves_those_of_earlier_runs_alone(tmp_path: Path) -> None:
    path = tmp_path / "predict_balance.json"
    for run in range(3):
        write_balance(path, {"run": run, "files": [Path("/a/b.cxi")]})
        os.utime(path, (1_795_860_216 + run, 1_795_860_216 + run))
    assert json.loads(path.read_text()) == {"run": 2, "files": ["/a/b.cxi"]}
    earlier = sorted(set(tmp_path.iterdir()) - {path})
    assert [file.name for file in earlier] == [
        "predict_balance_20261128T100336.json",
        "predict_balance_20261128T100337.json",
    ]
    assert [json.loads(file.read_text())["run"] for file in earlier] == [0, 1]


def test_two_records_of_one_second_are_two(tmp_path: Path) -> None:
    path = tmp_path / "balance.json"
    for run in range(3):
        write_balance(path, {"run": run})
        os.utime(path, ns=(10**9, 10**9 + run))
    assert sorted(json.loads(file.read_text())["run"] for file in tmp_path.iterdir()) == [0, 1, 2]


def test_a_record_that_is_brought_up_to_date_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "balance.json"
    for taken in range(3):
        write_balance(path, {"taken": taken}, keep_earlier=False)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"taken": 2}
