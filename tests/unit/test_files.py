from __future__ import annotations

import os
from pathlib import Path

import pytest

from peaknet_predict.process.files import write_whole
from tests.helpers.failing_disk import FailingDisk


def test_a_file_gets_its_name_after_its_bytes_and_the_directory_is_synced(tmp_path: Path) -> None:
    disk = FailingDisk()
    write_whole(tmp_path / "a.txt", b"new", fs=disk)
    steps = [step for step in disk.done if step not in ("open", "close")]
    assert steps == ["write", "fsync", "replace", "fsync"]
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, fails: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", b"new", fs=FailingDisk(fails))
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_short_write_is_gone_on_with_and_long_names_are_no_obstacle(tmp_path: Path) -> None:
    class ByThrees(FailingDisk):
        def write(self, file: int, data: bytes | memoryview) -> int:
            return os.write(file, data[:3])

    path = tmp_path / ("é" * 127)
    write_whole(path, b"0123456789", fs=ByThrees())
    assert path.read_bytes() == b"0123456789"


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_whole(tmp_path / "private", b"", private=True)
        write_whole(tmp_path / "shared", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644
