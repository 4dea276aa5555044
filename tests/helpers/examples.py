"""What `make check` leaves to `make test`: most examples of a property, and some parameters."""

from __future__ import annotations

import os

import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings

QUICK = "QUICK_TESTS" in os.environ


def examples(number: int) -> settings:
    """Return settings with `number` examples, or a tenth of them (at least 5) in a quick run."""
    return settings(max_examples=max(5, number // 10) if QUICK else number)


def thorough(*values: object) -> list[ParameterSet]:
    """Return parameters of tests that `make check` leaves out."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]
