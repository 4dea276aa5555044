"""Every row of the table in docs/input-data.md, on a small file laid out like the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import peaknet_predict.sources
from peaknet_predict.batching import check_event
from peaknet_predict.sources import EventSource, ImageFileSource
from peaknet_predict.types import Event, EventId
from tests.helpers.input_files import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "input-data.md"


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return source and options by what the first column begins with."""
    table = PAGE.read_text().split("## Detectors and files")[1].split("\n## ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0].startswith(("detector", "---")):
            continue
        first, _, source, options, _ = cells
        (kind,) = (kind for kind in KINDS if first.startswith(kind))
        found[kind] = (source.strip("`"), yaml.safe_load(options.strip("`")))
    return found


ROWS = rows()


def test_the_table_has_a_row_for_each_kind() -> None:
    assert ROWS.keys() == KINDS.keys()


def test_image_files_that_cannot_be_read_are_left_out_if_asked(tmp_path: Path) -> None:
    written = KINDS["PILATUS, CBF"](tmp_path)
    (tmp_path / "thau_0000a.cbf").write_bytes(b"###CBF: VERSION 1.5\nno more than this")
    (tmp_path / "first.cbf").touch()
    with pytest.raises(ValueError, match=r"first.cbf cannot be read.*set skip_unreadable: true"):
        ImageFileSource(str(tmp_path / "*.cbf"))
    source = ImageFileSource(str(tmp_path / "*.cbf"), skip_unreadable=True)
    assert [(lost.path.name, lost.events) for lost in source.skipped] == [
        ("first.cbf", 1),
        ("thau_0000a.cbf", 1),
    ]
    read = list(source.events())
    assert [idx for idx, _, _ in read] == [0, 1]
    for idx, image, _ in read:
        np.testing.assert_array_equal(np.ma.getdata(image), written.images[idx])
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        ImageFileSource(str(tmp_path / "first.cbf"), skip_unreadable=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_reads_its_kind_of_file(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = KINDS[kind](tmp_path)
    name, options = ROWS[kind]
    source: EventSource = getattr(peaknet_predict.sources, name)(str(written.path), **options)
    caplog.set_level("INFO")
    source.check()
    assert re.search(r"panels \d+, slow \d+, fast \d+", caplog.text), "one line says what is what"
    assert len(source) == len(written.images)
    bad = written.bad
    if bad is not None and bad.shape != written.images.shape:
        bad = np.broadcast_to(bad, written.images.shape)
    for idx, image, energy in source.events():
        assert image.ndim > 1, str(image)
        assert image.dtype == written.images.dtype
        assert energy == pytest.approx(written.energies[idx], rel=1e-6)
        masked = np.ma.getmaskarray(image)
        expected = np.zeros(image.shape, bool) if bad is None else bad[idx]
        np.testing.assert_array_equal(masked, expected)
        pixels = np.ma.getdata(image)
        np.testing.assert_array_equal(pixels[~masked], written.images[idx][~masked])
        assert check_event(Event(EventId("s", 0, idx), image, energy)) is None
