"""Lists of CXI files for ``indexamajig -i``: one for each run and detector shape."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from peaknet_predict.cxi.file import CxiSummary
from peaknet_predict.cxi.run_names import is_displaced, keep_under_run_name, with_run
from peaknet_predict.process.files import write_whole

log = logging.getLogger(__name__)

LIST_NAME = "files.lst"
_PLAIN_NAMES = re.compile(r"files(_\d+x\d+x\d+)?\.lst")


class FileLists:
    """Keeps ``files.lst`` for the latest run that writes to a directory.

    A list with files of two detectors is of no use for indexing. If a run has events of several
    shapes, there is one list for each, such as ``files_4x512x1024.lst``, and no ``files.lst``.

    Parameters
    ----------
    directory
        Where the files are.
    run
        Only its files are listed, whatever their prefix.
    summary_of
        Returns what a file holds; None if it is not one of ours.

    Attributes
    ----------
    stale
        Whether the last `update` has failed.
    """

    def __init__(
        self, directory: Path, run: str, summary_of: Callable[[str], CxiSummary | None]
    ) -> None:
        self.stale = False
        self._directory = directory
        self._run = run
        self._summary_of = summary_of
        self._mentioned = False

    def update(self) -> None:
        """Write the lists of this run.

        Raises
        ------
        OSError
            If a list cannot be written.
        """
        self.stale = True
        seen: tuple[bool, list[str]] | None = None
        # Another writer may finish a file, or a later run begin, between our two steps. The last
        # one to write checks again, so no file is missed.
        while (state := (is_displaced(self._directory, self._run), self._cxi_files())) != seen:
            self._write(*state)
            seen = state
        self.stale = False

    def _cxi_files(self) -> list[str]:
        return sorted(path.name for path in self._directory.glob("*.cxi"))

    def _write(self, displaced: bool, names: list[str]) -> None:
        of_shape: dict[tuple[int, int, int], list[str]] = {}
        for name in names:
            summary = self._summary_of(name)
            if summary is not None and summary.run == self._run:
                of_shape.setdefault(summary.shape_PHW, []).append(name)
        several = len(of_shape) > 1
        wanted = {
            f"files_{'x'.join(map(str, shape))}.lst" if several else LIST_NAME: listed
            for shape, listed in of_shape.items()
        }
        if not displaced:
            self._take_plain_names(wanted)
        for name, listed in wanted.items():
            path = self._directory / name
            lines = "".join(f"{self._directory / file}\n" for file in listed)
            write_whole(with_run(path, self._run) if displaced else path, lines.encode())
        if several:
            path = self._directory / LIST_NAME
            (with_run(path, self._run) if displaced else path).unlink(missing_ok=True)
            self._mention(wanted)

    def _take_plain_names(self, wanted: Collection[str]) -> None:
        """Keep other runs' lists: give those with plain names a name with their run in it."""
        for path in self._directory.glob("files*.lst"):
            if _PLAIN_NAMES.fullmatch(path.name):
                other = self._run_of(path)
                if other != self._run:
                    keep_under_run_name(path, other)
                    if path.name not in wanted:
                        path.unlink(missing_ok=True)

    def _run_of(self, path: Path) -> str | None:
        try:
            with open(path, encoding="utf-8", errors="replace") as lines:
                first = Path(lines.readline().rstrip("\n"))
        except FileNotFoundError:
            return None
        summary = self._summary_of(first.name) if first.parent == self._directory else None
        return None if summary is None else summary.run

    def _mention(self, wanted: Collection[str]) -> None:
        if not self._mentioned:
            self._mentioned = True
            log.warning(
                "%s: the events have several shapes, and a geometry fits one of them: there are "
                "the lists %s, and there is no %s",
                *(self._directory, ", ".join(wanted), LIST_NAME),
            )
