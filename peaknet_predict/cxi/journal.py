"""A writer's journal: events that it left out, which no CXI file shows, and its balance.

Each writer appends to its own file, ``{prefix}_journal_{writer}.jsonl``. A line is ``[entry,
checksum]``; the first entry names the run and the writer. A line counts once it is synced, and only
then are its events acknowledged.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peaknet_predict.keys import KeySet
from peaknet_predict.process.files import FileSystem, sync_directory, write_all


class Journal:
    """Appends entries to the journal of one writer.

    After an error the file is left alone, because a sync that succeeds after a failed one proves
    nothing: the next entry starts another file.

    Parameters
    ----------
    directory
        Where the CXI files are.
    prefix, run, writer
        The prefix of those files, the run they belong to, and the process that writes them.
    fs
        The file system.
    """

    def __init__(
        self, directory: Path, prefix: str, run: str, writer: str, fs: FileSystem = os
    ) -> None:
        self._directory = directory
        self._header = {"run": run, "writer": writer}
        safe = re.sub(r"[^\w.@-]", "_", writer)[:100]
        self._stem = f"{prefix}_journal_{safe}"
        self._fs = fs
        self._file: int | None = None
        self._number = 0

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, durably.

        Raises
        ------
        OSError
            If that is not possible. The entry may or may not be there.
        """
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            self._write(entry)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, if one is open; a later entry starts another."""
        if self._file is not None:
            file, self._file = self._file, None
            self._fs.close(file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        while self._file is None:
            number = f"_{self._number}" if self._number else ""
            path = self._directory / f"{self._stem}{number}.jsonl"
            self._number += 1
            try:
                self._file = self._fs.open(str(path), flags, 0o666)
            except FileExistsError:
                continue
        self._write(self._header)
        sync_directory(self._directory, self._fs)

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None
        write_all(self._file, (_line(entry) + "\n").encode(), self._fs)
        self._fs.fsync(self._file)


@dataclass(slots=True)
class JournalContents:
    """The contents of a journal.

    Attributes
    ----------
    run, writer
        The run and the writer; None if the first line is damaged or was never finished.
    filtered
        The events left out for having too few peaks.
    balance
        What became of all events that the writer took; None if it has not ended, or died.
    damaged
        Number of lines that were synced but can no longer be read.
    """

    run: str | None = None
    writer: str | None = None
    filtered: KeySet = field(default_factory=KeySet)
    balance: dict[str, Any] | None = None
    damaged: int = 0


def read_journal(content: bytes) -> JournalContents:
    """Read what is in a journal.

    An unfinished last line was never synced, so it does not count. Any other line that does not
    have its checksum is damage.
    """
    contents = JournalContents()
    lines = content.split(b"\n")
    # After the last line break comes nothing, or an unfinished line; if that is complete, the line
    # break was damaged.
    *finished, tail = lines
    entries = [_entry(line) for line in finished]
    entries += [entry for entry in (_entry(tail), _entry(tail[:-1])) if entry is not None]
    for entry in entries:
        if entry is None:
            contents.damaged += 1
            continue
        if "writer" in entry:
            contents.run, contents.writer = entry["run"], entry["writer"]
        if "filtered" in entry:
            contents.filtered.update(KeySet.from_json(entry["filtered"]))
        contents.balance = entry.get("balance", contents.balance)
    return contents


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry, _checksum(entry)])


def _checksum(entry: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(entry).encode()):08x}"


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line's entry, or None if it is damaged."""
    try:
        entry, checksum = json.loads(line)
    except (ValueError, TypeError):
        return None
    if not isinstance(entry, dict) or _checksum(entry) != checksum:
        return None
    return entry
