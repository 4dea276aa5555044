"""Settings of queues: what is refused, and that the documentation has the defaults."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from peaknet_predict.queues import QueueAddress
from tests.helpers.paths import REPOSITORY

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        *(
            ({setting: value}, f"{setting} must be a positive number of seconds")
            for setting in ("lease_s", "producer_timeout_s", "idle_timeout_s")
            for value in (NAN, INFINITY, -1.0, 0.0, 1e30, True)
        ),
        *(
            ({setting: value}, f"{setting} must be an integer and at least 1")
            for setting in ("max_events", "max_bytes", "max_losses")
            for value in (0, -5, True, NAN, 1.5)
        ),
        ({"quarantine_bytes": -1}, "quarantine_bytes must be an integer and at least 0"),
        *(
            ({what: text}, f"{what} must be printable")
            for what in ("name", "namespace")
            for text in ("", "two\nlines", "nul\0", "bell\a", "half\ud800")
        ),
    ],
)
def test_what_is_no_setting_is_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        QueueAddress(**{"name": "q", **settings})


def test_the_documentation_has_every_setting_and_its_default() -> None:
    page, _, _ = (REPOSITORY / "docs" / "queues.md").read_text().partition("\n## ")
    rows = re.findall(r"^\| (`.*`) \| .* \| (.*) \|$", page, re.MULTILINE)
    documented: dict[str, str] = {}
    for names, defaults in rows:
        keys, values = re.findall(r"`(\w+)`", names), defaults.split(", ")
        documented |= dict(zip(keys, [value.strip("`") for value in values], strict=True))
    for field in fields(QueueAddress):
        assert field.name in documented, field.name
        said = documented[field.name]
        units = {"GiB": 1024**3}
        if isinstance(field.default, bool):
            assert said == str(field.default).lower()
        elif isinstance(field.default, int | float):
            number, _, unit = said.partition(" ")
            assert float(number) * units.get(unit, 1) == field.default, field.name
        elif isinstance(field.default, str):
            assert said == field.default
