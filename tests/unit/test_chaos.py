"""The chaos harness judges rightly: what it takes for an event's truth, and for a right end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reliability.chaos.events import differs, truth
from benchmarks.reliability.chaos.parts import CODES, Life, Part, WrongError
from peaknet_predict.batching import check_event
from peaknet_predict.peaks.labels_scipy import find_peaks_scipy
from peaknet_predict.types import Event, EventId


def test_every_event_has_the_peaks_and_the_fate_that_it_is_said_to_have() -> None:
    fates = set()
    for idx in range(350):
        one = truth(1, idx)
        fates.add(one.fate)
        problem = check_event(Event(EventId("s", 1, idx), one.image, one.photon_energy))
        if one.fate == "quarantined":
            is_empty = one.image.dtype.kind == "f" and not np.isfinite(one.image).any()
            assert is_empty or one.reason in (problem or "")
            continue
        assert problem is None
        with np.errstate(invalid="ignore"):
            above = (one.image > 500) & (one.image != 65535)
        found = find_peaks_scipy(above)
        peaks = np.stack([found.panel, found.y, found.x], axis=1)
        assert differs((1, idx), one.image, peaks, one.photon_energy) is None
        assert (one.fate == "filtered") == (len(peaks) < 3)
    assert fates == {"written", "filtered", "quarantined"}


def test_one_wrong_bit_is_noticed() -> None:
    one = truth(0, 0)
    peaks, energy = one.peaks, one.photon_energy
    assert differs((0, 0), one.image, peaks[::-1], energy) is None
    pixels = one.image.copy()
    pixels.view(np.uint8)[0, 5, 7] ^= 1
    assert differs((0, 0), pixels, peaks, energy) == "its pixels differ"
    moved = peaks.copy()
    moved[0, 1] = np.nextafter(moved[0, 1], 99)
    for wrong in (moved, peaks[1:], np.concatenate([peaks, peaks[:1]])):
        assert "its peaks are" in str(differs((0, 0), one.image, wrong, energy))
    assert "photon energy" in str(differs((0, 0), one.image, peaks, np.nextafter(energy, 0)))


@pytest.mark.parametrize(
    ("code", "hits", "said", "problem"),
    [
        (0, [], "", None),
        (3, [], "", "expected one of"),
        (1, ["paused"], "12:00:00 ERROR why", "expected one of"),
        (1, ["cluster"], "12:00:00 ERROR why", None),
        (1, ["cluster"], "", "says no reason"),
        (0, ["end"], "", None),
        (9, ["end"], "", "expected one of"),
        (0, [], "Fatal Python error: Segmentation fault", "crashed"),
    ],
)
def test_an_end_that_no_fault_explains_is_an_error(
    tmp_path: Path, code: int, hits: list[str], said: str, problem: str | None
) -> None:
    part = Part("feed0", "feed", lambda: (), tmp_path)
    part.log.write_text(said)
    process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])
    process.wait()
    part.lives.append(Life(process, 0, hits, ended_at=-60.0))
    if problem is None:
        assert part.look() == code
    else:
        with pytest.raises(WrongError, match=problem):
            part.look()


def test_every_command_is_to_end_with_zero_where_nothing_has_hit_it() -> None:
    assert all(codes[""] == (0,) for codes in CODES.values())
