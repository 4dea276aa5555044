"""How many examples a property is tested on: a few in `make check`, all in `make test`."""

from __future__ import annotations

import os

from hypothesis import settings

QUICK = "QUICK_TESTS" in os.environ


def examples(number: int) -> settings:
    """Return settings with `number` examples, or a tenth of them (at least 5) in a quick run."""
    return settings(max_examples=max(5, number // 10) if QUICK else number)
