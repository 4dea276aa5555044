"""What a reader of another program's queue refuses: it keeps the quarantine itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from peaknet_predict.queues import QueueAddress
from peaknet_predict.queues.foreign import ForeignReader
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.types import EventId, Refusal


def test_what_the_quarantine_has_no_room_for_is_written_at_the_end_or_fails_the_run(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("not a directory")
    address = QueueAddress("q", quarantine=str(blocked / "q"))
    reader = ForeignReader(None, address, "events", "uid")
    reader.reject([Refusal(EventId("s", 0, 1), "bad")])
    assert "refused events are in no file: quarantine" in reader.failures["quarantine"]
    reader.release()
    assert "refused events of queue 'q' are lost" in said.text
    blocked.unlink()
    reader.release()
    assert [line["reason"] for line in read_index(blocked / "q")] == ["bad"]
    assert reader.failures == {}
