"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    verdict: Literal["ok", "warn", "FAIL"]
    text: str
