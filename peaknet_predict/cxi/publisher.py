"""From events in memory to a finished, named file; a step that fails says so."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from peaknet_predict.cxi.directory import CxiDirectory, write_error
from peaknet_predict.cxi.file import CxiSummary, write_cxi_file
from peaknet_predict.cxi.layout import contents_of
from peaknet_predict.cxi.lists import LIST_NAME, FileLists
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.cxi.verify import verify_cxi_file
from peaknet_predict.types import EventId

log = logging.getLogger(__name__)


class FilePublisher:
    """Writes files of one writer under temporary names, and gives them their names.

    Parameters
    ----------
    directory
        Where they go.
    run
        The run they belong to.
    max_peaks, compression, still_ours
        As for `peaknet_predict.cxi.writer.CxiWriter`.
    """

    def __init__(
        self,
        directory: CxiDirectory,
        run: str,
        max_peaks: int,
        compression: str,
        still_ours: Callable[[Collection[EventId]], Collection[EventId]],
    ) -> None:
        self._directory = directory
        self._run = run
        self._max_peaks = max_peaks
        self._compression = compression
        self._still_ours = still_ours
        self._lists = FileLists(directory.path, run, directory.summary_of)

    def publish(self, rows: Sequence[CxiRow]) -> Path | set[EventId]:
        """Write one file of all these events.

        Returns
        -------
        pathlib.Path or set of EventId
            The file; or, without a file, those events that other writers have by now.

        Raises
        ------
        CxiWriteError
            If it could not be written; there is then no file with these events.
        """
        ids = {row.result.id for row in rows}
        contents = contents_of(rows, self._max_peaks, self._run, self._directory.owner)
        temporary = self._directory.temporary_name()
        try:
            with self._errors_of_storage(len(rows)):
                with open(temporary, "xb+", buffering=0) as raw:
                    write_cxi_file(raw, rows, contents, self._compression)
                    os.fsync(raw.fileno())
                verify_cxi_file(temporary, rows, contents)
            # Asked while the file exists: if another writer takes over later, it deletes the file,
            # and the next step fails.
            lost = ids.difference(self._still_ours(ids))
            if lost:
                return lost
            with self._errors_of_storage(len(rows)):
                path = self._directory.publish(temporary, self._summary_of(rows), ids)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        try:
            self._lists.update()
        except OSError as error:
            # The events are safe; the list is made again with the next file, or at the end.
            log.warning("%s", write_error(self._directory.path / LIST_NAME, error, ""))
        return path

    def update_lists(self) -> None:
        """Write the lists, including files that other writers of the run have finished.

        Raises
        ------
        CxiWriteError
            If a list cannot be written; the CXI files are complete without it.
        """
        try:
            # A writer that died between a file and its list leaves the list to the next one.
            if self._lists.stale or self._directory.files_of(self._run):
                self._lists.update()
        except OSError as error:
            complete = "The CXI files are complete. "
            raise write_error(self._directory.path / LIST_NAME, error, complete) from error

    @contextlib.contextmanager
    def _errors_of_storage(self, num_events: int) -> Iterator[None]:
        """Convert errors in the block to errors that say what to do."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError) as error:  # HDF5 raises all of them
            stay = f"The {num_events} events of the file stay in memory. "
            raise write_error(self._directory.path, error, stay) from error

    def _summary_of(self, rows: Sequence[CxiRow]) -> CxiSummary:
        panels, height, width = rows[0].kind[0]
        return CxiSummary(
            run=self._run,
            writer=self._directory.owner,
            shape_PHW=(panels, height, width),
            num_events=len(rows),
            truncated=sum(row.truncated for row in rows),
            without_energy=sum(not row.result.photon_energy > 0 for row in rows),
        )
