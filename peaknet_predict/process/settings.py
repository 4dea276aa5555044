"""Numbers in settings: what no program can work with is refused, by the name of the setting."""

from __future__ import annotations

import math

LONGEST_S = 1e7
"""Four months. More is taken for a slip; the clocks of a process cannot wait for ever either."""


def check_seconds(setting: str, value: float, zero: bool = False) -> None:
    """Raise ValueError unless a setting is a positive number of seconds, or perhaps 0."""
    # Written so that it holds for NaN, which is neither smaller nor larger than anything.
    if isinstance(value, bool) or not (0 < value <= LONGEST_S or (zero and value == 0)):
        raise ValueError(
            f"{setting} must be a positive number of seconds{' or 0' if zero else ''}, at most "
            f"{LONGEST_S:.0f}, not {value}"
        )


def check_rate(setting: str, value: float) -> None:
    """Raise ValueError unless a setting is a positive number of events per second."""
    if isinstance(value, bool) or not 1 / LONGEST_S <= value < math.inf:
        raise ValueError(
            f"{setting} must be a positive number of events per second, at least "
            f"{1 / LONGEST_S:g}, not {value}"
        )


def check_count(setting: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless a setting is an integer that is not too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{setting} must be an integer and at least {least}, not {value}")
