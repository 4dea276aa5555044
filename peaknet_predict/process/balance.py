"""What became of the events of a run: the errors that say it does not add up, and the record."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from peaknet_predict.process.files import expanded, write_whole

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


def exit_code_of_ranks(codes: Sequence[int]) -> int:
    """Return the exit code of a run from those of its ranks; below 0 are signals.

    A rank that reports that every event is accounted for knows that for all ranks.
    """
    if not any(codes):
        return 0
    if any(code in (0, EXIT_SURVIVED) for code in codes):
        return EXIT_SURVIVED
    return EXIT_INCOMPLETE if EXIT_INCOMPLETE in codes else EXIT_FAILED


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
    path = expanded(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def write_balance(path: str | Path, balance: Mapping[str, Any], keep_earlier: bool = True) -> None:
    """Write the record of a run as JSON, whole or not at all.

    Parameters
    ----------
    path
        The file.
    balance
        Numbers, texts, lists and mappings; dataclasses are taken apart and paths become texts.
    keep_earlier
        Whether an earlier run's record is kept under a name with its time in it, such as
        ``predict_balance_20261128T100336.json``.
    """
    path = expanded(path)
    text = json.dumps(balance, indent=2, default=_plain) + "\n"
    if keep_earlier:
        with contextlib.suppress(FileNotFoundError):
            _keep(path)
    write_whole(path, text.encode())


def _keep(path: Path) -> None:
    """Give a record a second name with its time in it, which stays when the first one is taken."""
    written_at = path.stat().st_mtime_ns
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(written_at // 10**9))
    for more in ("", f".{written_at % 10**9:09d}"):  # two records of one second
        with contextlib.suppress(FileExistsError):
            os.link(path, path.with_name(f"{path.stem}_{stamp}{more}{path.suffix}"))
            return


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
