"""What became of the events of a run: the errors that say it does not add up, and the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from peaknet_predict.process.files import write_whole

EXIT_FAILED = 1
"""A command could not do its work; the last line of the log says why."""
EXIT_INCOMPLETE = 3
"""A command ended, but not every event that went in is accounted for at its end."""
EXIT_SURVIVED = 4
"""Every event is accounted for, but a process of the run died or failed; others did its work."""


class BalanceError(RuntimeError):
    """A run ended, but not every event that went in is accounted for at its end."""


class SurvivedError(RuntimeError):
    """Every event is accounted for, but a process of the run died or failed."""


def queue_balance(admin: Any) -> dict[str, Any]:
    """Return what a queue promises of its events and, if it counts them, its counts."""
    balance: dict[str, Any] = {"promise": admin.promise}
    statistics = admin.statistics()
    if statistics is not None:
        balance |= asdict(statistics)
        balance.pop("largest")
    return balance


def path_of_rank(path: str | Path, rank: int) -> Path:
    """Return where a rank writes its record: rank 0 under the given name, others beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def write_balance(path: str | Path, balance: Mapping[str, Any]) -> None:
    """Write the record of a run as JSON, whole or not at all.

    Parameters
    ----------
    path
        The file; replaced if it exists.
    balance
        Numbers, texts, lists and mappings; dataclasses are taken apart and paths become texts.
    """
    text = json.dumps(balance, indent=2, default=_plain) + "\n"
    write_whole(path, text.encode())


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
