"""Where the tests find what they read."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"

REAL_DATA = REPOSITORY.parent / "shared" / "realdata"
"""Measured shots, which are not part of the repository; tests of them skip without them."""
