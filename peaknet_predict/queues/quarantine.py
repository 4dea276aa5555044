"""Where events go that cannot be processed: one file each, with the reason, up to a size.

The directory is made with the first of them. ``index.jsonl`` has a line for every one, also for
those whose data no longer had room.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peaknet_predict.types import Event, EventId, Result

log = logging.getLogger(__name__)

INDEX_NAME = "index.jsonl"
_TEXT = 10_000  # characters kept of an object that is no array


@dataclass(slots=True)
class _Kept:
    key: EventId
    reason: str
    record: Any
    losses: int
    at: float

    @property
    def nbytes(self) -> int:
        return int(getattr(self.record, "nbytes", 0))


class Quarantine:
    """A directory of refused events.

    What cannot be written (disk full, directory gone) stays in memory, up to the same size, and is
    written with a later `keep` or `retry`.

    Parameters
    ----------
    directory
        Where the files go; made, with its parents, when the first event comes.
    max_bytes
        Most bytes of data kept, on disk. Beyond it an event leaves its line in the index alone.

    Attributes
    ----------
    problem
        Why the directory cannot be written at the moment; None if it can.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        # Resolved, so that it does not matter whose working directory it is.
        self.directory = Path(directory).resolve()
        self.problem: str | None = None
        self._max_bytes = max_bytes
        self._used: int | None = None
        self._waiting: deque[_Kept] = deque()
        self._waiting_bytes = 0

    def keep(self, key: EventId, reason: str, record: Any, losses: int = 0) -> None:
        """Write an event's data and reason.

        Parameters
        ----------
        key
            Its identity.
        reason
            Why it is here, in words.
        record
            An `Event`, a `Result`, or whatever came in its place.
        losses
            How many readers it has cost.
        """
        kept = _Kept(key, reason, record, losses, time.time())
        if self._waiting_bytes + kept.nbytes > self._max_bytes:
            kept.record = None
        self._waiting.append(kept)
        self._waiting_bytes += kept.nbytes
        self.retry()

    def retry(self) -> None:
        """Write what could not be written before."""
        while self._waiting:
            try:
                self._write(self._waiting[0])
            except OSError as error:
                if self.problem is None:
                    log.error("quarantine %s: %s", self.directory, error)
                self.problem = f"quarantine {self.directory}: {error}"
                return
            self._waiting_bytes -= self._waiting.popleft().nbytes
        self.problem = None

    def _write(self, kept: _Kept) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._used is None:
            self._used = sum(file.stat().st_size for file in self.directory.glob("*.h5"))
        name = None
        if kept.record is not None and self._used + kept.nbytes <= self._max_bytes:
            name = self._write_file(kept)
        line = {
            **kept.key._asdict(),
            "reason": kept.reason,
            "losses": kept.losses,
            "time": kept.at,
            "file": name,
        }
        with open(self.directory / INDEX_NAME, "a", encoding="utf-8") as index:
            index.write(json.dumps(line) + "\n")
            index.flush()
            os.fsync(index.fileno())

    def _write_file(self, kept: _Kept) -> str:
        import h5py

        stem = re.sub(r"[^\w.#@-]", "_", f"{kept.key.stream}_{kept.key.rank}_{kept.key.idx}")[-150:]
        name = f"{stem}.h5"
        if (self.directory / name).exists():
            name = f"{stem}.{secrets.token_hex(3)}.h5"
        temporary = self.directory / f".{name}.tmp"
        try:
            with h5py.File(temporary, "w") as file:
                for field, value in {**kept.key._asdict(), "reason": kept.reason}.items():
                    file.attrs[field] = value
                file.attrs["losses"] = kept.losses
                for field, value in _parts(kept.record).items():
                    if isinstance(value, np.ndarray):
                        _write_array(file, field, value)
                    else:
                        file.attrs[field] = str(value)[:_TEXT]
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, self.directory / name)
        except RuntimeError as error:  # HDF5's own, where the system gives no number
            raise OSError(str(error)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        assert self._used is not None
        self._used += kept.nbytes
        return name


def _write_array(file: Any, field: str, value: np.ndarray[Any, Any]) -> None:
    try:
        file[field] = value
    except (TypeError, ValueError):
        file.attrs[field] = repr(value)[:_TEXT]  # a dtype that HDF5 has not


def _parts(record: Any) -> dict[str, Any]:
    """Return what a record consists of, by name."""
    if isinstance(record, Event | Result):
        parts = {"image": record.image, "photon_energy": record.photon_energy}
        if record.bad_bits is not None:
            parts["bad_bits"] = record.bad_bits
        if isinstance(record, Result):
            parts["peaks"] = record.peaks
        return parts
    payload = getattr(record, "payload", record)
    if isinstance(payload, list | tuple):
        return {f"item_{k}": part for k, part in enumerate(payload[:100])}
    return {"item": payload}


def read_index(directory: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a quarantine's index; none if nothing was ever kept there."""
    path = Path(directory) / INDEX_NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
