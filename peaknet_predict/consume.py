"""The consumer: results from an output queue into CXI files."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from peaknet_predict.cxi import CxiStatistics, CxiWriteError, CxiWriter
from peaknet_predict.queues import NativeQueue, Queue, QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect
from peaknet_predict.stopping import stop_requests
from peaknet_predict.types import Event, Refusal, Result

log = logging.getLogger(__name__)

_WAIT_S = 1.0
_EVENTS_PER_GET = 16  # bounds what is taken from the queue beyond what the writer holds
_RETRY_S = 5.0
_TRIES_AFTER_STOP = 6


@dataclass(slots=True)
class ConsumeReport:
    """What became of every result that was taken.

    Attributes
    ----------
    taken
        Items taken from the queue.
    refused
        Items that cannot be written, each named in the log.
    cxi
        The file writer's own counts.
    failures
        Producers that ended their part of the stream early, and why.
    interrupted
        Whether Ctrl-C or SIGTERM ended it before the stream did.
    """

    taken: int = 0
    refused: int = 0
    cxi: CxiStatistics = field(default_factory=CxiStatistics)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def balanced(self) -> bool:
        """Whether every result taken was written, filtered or refused."""
        return self.taken == self.cxi.written + self.cxi.filtered + self.refused

    def __str__(self) -> str:
        text = (
            f"taken {self.taken} = written {self.cxi.written} + filtered {self.cxi.filtered} + "
            f"refused {self.refused}, in {len(self.cxi.files)} files"
        )
        lost = self.taken - self.cxi.written - self.cxi.filtered - self.refused
        if lost:
            text += f"; LOST {lost} that could not be written"
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
) -> ConsumeReport:
    """Write results from an output queue to CXI files until the stream ends.

    While files cannot be written (disk full, directory gone) nothing more is taken from the queue,
    and writing is tried again every few seconds. Ctrl-C and SIGTERM end it after what was taken has
    been written, or has failed to be for half a minute.

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
    """
    connect(address)
    writer = CxiWriter(
        directory,
        prefix,
        events_per_file=events_per_file,
        min_peaks=min_peaks,
        max_peaks=max_peaks,
        compression=compression,
    )
    return drain(connect_queue(queue, "results"), writer)


def drain(queue: Queue, writer: CxiWriter) -> ConsumeReport:
    """Write everything that comes out of a connected queue until its stream ends."""
    report = ConsumeReport(cxi=writer.statistics)
    if isinstance(queue, NativeQueue):
        queue.mention_leftovers()
    reader = f"write-cxi:{secrets.token_hex(4)}"
    ended = False
    with stop_requests() as stop:
        try:
            while not ended and not stop.is_set():
                taken, ended = queue.get(reader, _EVENTS_PER_GET, _WAIT_S)
                report.taken += len(taken)
                for item in taken:
                    _write_one(writer, item, report, stop)
            _until_written(writer.close, stop)
        except CxiWriteError as error:
            log.error("gave up: %s", error)
    report.failures = queue.failures
    report.interrupted = not ended
    return report


def _write_one(
    writer: CxiWriter,
    item: Event | Result | Refusal,
    report: ConsumeReport,
    stop: threading.Event,
) -> None:
    if isinstance(item, Event):
        item = Refusal(item.id, "an event stands in a queue of results")
    if isinstance(item, Refusal):
        report.refused += 1
        log.warning("refused %s", item)
        return
    result = item
    try:
        _until_written(lambda: writer.add(result), stop)
    except ValueError as error:
        report.refused += 1
        log.warning("refused %s", Refusal(result.id, str(error)))


def _until_written(write: Callable[[], object], stop: threading.Event) -> None:
    """Repeat until storage takes the file; the events stay in memory meanwhile.

    Who asks to stop is not kept waiting for ever: the error is raised in the end.
    """
    tries_left = _TRIES_AFTER_STOP
    while True:
        try:
            write()
            return
        except CxiWriteError as error:
            tries_left -= stop.is_set()
            if tries_left == 0:
                raise
            log.error("%s; trying again in %.0f s", error, _RETRY_S)
            # Once it is set, waiting for the request would not wait at all.
            pause = time.sleep if stop.is_set() else stop.wait
            pause(_RETRY_S)
