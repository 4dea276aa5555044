"""The consumer: results from an output queue into CXI files."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peaknet_predict.cxi.writer import CxiStatistics, CxiWriteError, CxiWriter
from peaknet_predict.process.balance import queue_balance, write_balance
from peaknet_predict.process.stopping import GRACE_S, StopRequest, stop_requests
from peaknet_predict.queues import (
    QueueAddress,
    QueueError,
    Reader,
    connect_queue,
    warn_of_leftovers,
)
from peaknet_predict.queues.cluster import connect
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)

_WAIT_S = 1.0
_EVENTS_PER_GET = 16  # bounds what is taken from the queue beyond what the writer holds
_RETRY_S = 5.0


@dataclass(slots=True)
class ConsumeReport:
    """What became of every result that was taken.

    Attributes
    ----------
    taken
        Items taken from the queue.
    refused
        Items that cannot be written, each named in the log and in the queue's quarantine.
    given_back
        Items that could not be written in time and are in the queue again.
    cxi
        The file writer's own counts.
    failures
        Producers that ended their part of the stream early, and why.
    interrupted
        Whether Ctrl-C or SIGTERM ended it before the stream did.
    """

    taken: int = 0
    refused: int = 0
    given_back: int = 0
    cxi: CxiStatistics = field(default_factory=CxiStatistics)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def unaccounted(self) -> int:
        """How many of the results taken were neither written, filtered, refused nor given on."""
        cxi = self.cxi
        accounted = cxi.written + cxi.filtered + cxi.duplicates + cxi.handed_over
        return self.taken - accounted - self.refused - self.given_back

    @property
    def balanced(self) -> bool:
        """Whether every result taken was written, filtered or refused, by whomever."""
        return self.unaccounted == 0 and self.given_back == 0

    def __str__(self) -> str:
        text = (
            f"taken {self.taken} = written {self.cxi.written} + filtered {self.cxi.filtered} + "
            f"refused {self.refused}"
        )
        for count, what in (
            (self.cxi.duplicates, "in files already"),
            (self.cxi.handed_over, "handed over"),
            (self.given_back, "given back"),
        ):
            text += f" + {what} {count}" if count else ""
        text += f", in {len(self.cxi.files)} files"
        if self.unaccounted:
            text += f"; LOST {self.unaccounted} that could not be written"
        if self.cxi.truncated:
            text += f"; {self.cxi.truncated} events had more peaks than a file's lists hold"
        return text


def write_cxi(
    queue: QueueAddress,
    directory: str,
    address: str = "auto",
    prefix: str = "peaks",
    events_per_file: int = 100,
    min_peaks: int = 0,
    max_peaks: int = 2048,
    compression: Literal["none", "gzip"] = "none",
    resume: bool = False,
    grace_s: float = GRACE_S,
) -> ConsumeReport:
    """Write results from an output queue to CXI files until the stream ends.

    A result is acknowledged once its file is on disk under its name. While files cannot be written
    (disk full, directory gone) nothing more is taken from the queue, and writing is tried again
    every few seconds. Ctrl-C and SIGTERM end it after what was taken has been written; what cannot
    be within the grace goes back into the queue. Started again, it knows from the finished files
    what it has.

    Parameters
    ----------
    queue
        The output queue; made if it is not there.
    directory
        Where the files go.
    address
        The Ray cluster: ``auto``, or ``host:port``.
    prefix
        Files are named ``{prefix}_{number}.cxi``; existing files are never replaced.
    events_per_file
        Events of a full file.
    min_peaks
        Events with fewer peaks are counted and left out.
    max_peaks
        Peaks listed per event; of more, the strongest are kept and the event is marked.
    compression
        Of the pixels.
    resume
        Take the place of a `write-cxi` that died: the directory must be there, because one that
        is missing (a file system not mounted) is no empty one to begin anew in; and a stream that
        others have read to its end meanwhile is the end, instead of the next one being waited for.
    grace_s
        How long it may take to its end after Ctrl-C or SIGTERM.
    """
    connect(address)
    results = connect_queue(queue, "results", resumes=resume)
    warn_of_leftovers(results.admin, queue.name)
    writer = CxiWriter(
        directory,
        prefix,
        events_per_file=events_per_file,
        min_peaks=min_peaks,
        max_peaks=max_peaks,
        compression=compression,
        create=not resume,
        owner=results.reader.holder,
        still_ours=results.reader.still_held,
    )
    report = drain(results.reader, writer, grace_s)
    try:
        stages = {"output": queue_balance(results.admin), "files": report}
        write_balance(Path(directory) / f"{prefix}_balance.json", {"stages": stages})
    except (OSError, QueueError) as error:
        log.error("the balance could not be written: %s", error)
    return report


def drain(reader: Reader, writer: CxiWriter, grace_s: float = GRACE_S) -> ConsumeReport:
    """Write everything that comes out of a connected queue until its stream ends."""
    report = ConsumeReport(cxi=writer.statistics)
    group = f"write-cxi:{secrets.token_hex(4)}"
    ended = False
    with stop_requests(grace_s) as stop:
        storage = _Storage(reader, writer, report, stop)
        try:
            while not ended and not stop.is_set():
                taken, ended = reader.get(group, _EVENTS_PER_GET, _WAIT_S)
                report.taken += len(taken)
                before = {who for one in taken if one.id for who in reader.lost_by(one.id)}
                if before:
                    storage.settle(lambda owners=before: writer.fence(owners))  # type: ignore[misc]
                for item in taken:
                    storage.write(item)
                if reader.flush_wanted:
                    storage.settle(writer.flush)
            storage.settle(writer.close)
        except CxiWriteError as error:
            log.error("gave up: %s", error)
        report.given_back = reader.release()
    report.failures = reader.failures
    report.interrupted = not ended
    return report


class _Storage:
    """Writes results, and acknowledges them in the queue once they are safe."""

    def __init__(
        self,
        reader: Reader,
        writer: CxiWriter,
        report: ConsumeReport,
        stop: StopRequest,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._report = report
        self._stop = stop

    def write(self, item: Event | Result | Refusal) -> None:
        """Write one result, or refuse what is none."""
        if isinstance(item, Event):
            item = Refusal(item.id, "an event stands in a queue of results")
        if isinstance(item, Refusal):
            self._refuse(item)
            return
        result = item
        try:
            self.settle(lambda: self._writer.add(result))
        except ValueError as error:
            self._refuse(Refusal(result.id, str(error)))

    def settle(self, write: Callable[[], list[EventId]]) -> None:
        """Repeat until storage takes the file, and acknowledge what is in it.

        The events stay in memory and in the queue meanwhile. Who asks to stop is not kept waiting
        beyond the grace: the error is raised in the end.
        """
        while True:
            try:
                settled = write()
                break
            except CxiWriteError as error:
                # Before the try that would come too late.
                if self._stop.out_of_time(_RETRY_S):
                    raise
                log.error("%s; trying again in %.0f s", error, _RETRY_S)
                self._reader.touch()
                # Once it is set, waiting for the request would not wait at all.
                pause = time.sleep if self._stop.is_set() else self._stop.wait
                pause(_RETRY_S)
        if settled:
            self._reader.ack(settled)

    def _refuse(self, refusal: Refusal) -> None:
        self._report.refused += 1
        log.warning("refused %s", refusal)
        self._reader.reject([refusal])
