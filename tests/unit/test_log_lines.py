"""What commands say, line by line."""

from __future__ import annotations

import logging

import pytest

from peaknet_predict import cli


def test_a_name_forges_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.Logger("peaknet_predict")
    monkeypatch.setattr(cli, "log", log)
    cli._set_up_logging()
    (handler,) = log.handlers
    name = "run\n12:00:00 INFO done\r\x1b[2J.h5"
    line = handler.format(log.makeRecord("", logging.ERROR, "", 0, "%s: röntgen", (name,), None))
    assert line.isprintable()
    assert line.endswith(r"ERROR run\n12:00:00 INFO done\r\x1b[2J.h5: röntgen")
