"""The consumer: results from an output queue into CXI files."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from peaknet_predict.cxi.account import ConsumeReport
from peaknet_predict.cxi.writer import CxiWriteError, CxiWriter
from peaknet_predict.process.balance import queue_balance
from peaknet_predict.process.files import expanded
from peaknet_predict.process.last_words import LastWords
from peaknet_predict.process.settings import check_seconds
from peaknet_predict.process.stopping import GRACE_S, StopRequest, stop_requests, uninterrupted
from peaknet_predict.queues import (
    QueueAddress,
    QueueError,
    Reader,
    connect_queue,
    warn_of_leftovers,
)
from peaknet_predict.queues.cluster import connect, vital_signs
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)

_WAIT_S = 1.0
_EVENTS_PER_GET = 16  # limits what is taken from the queue beyond what the writer holds
_RETRY_S = 5.0
_NEXT_STEP = (
    "Look at the cluster (`ray status`), and start again with --resume true: the balance then "
    "counts the files of both"
)


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
    (disk full, directory gone), it takes nothing more from the queue and tries again every few
    seconds. After Ctrl-C or SIGTERM it writes what it has taken and ends; what it cannot write
    within the grace period goes back into the queue. Started again, it knows from the finished
    files which events it has.

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
        Most peaks listed per event; the strongest are kept, and an event with more is marked.
    compression
        Of the pixels.
    resume
        Replace a `write-cxi` that died. The directory must exist: a missing one (a file system that
        is not mounted) is not an empty one to start over in. If others have read the stream to its
        end meanwhile, end too, instead of waiting for the next stream.
    grace_s
        How long it may take to its end after Ctrl-C or SIGTERM.
    """
    check_seconds("grace_s", grace_s, zero=True)
    directory = str(expanded(directory))
    connect(address)
    results = connect_queue(queue, "results", resumes=resume)
    warn_of_leftovers(results.admin, queue.name)
    group = _new_group()
    run = results.reader.join(group)
    writer = CxiWriter(
        directory,
        prefix,
        events_per_file=events_per_file,
        min_peaks=min_peaks,
        max_peaks=max_peaks,
        compression=compression,
        create=not resume,
        run=run,
        owner=results.reader.holder,
        still_ours=results.reader.still_held,
    )
    report = ConsumeReport(cxi=writer.statistics)
    last_words = LastWords(
        f"write-cxi ({prefix})",
        Path(directory) / f"{prefix}_balance.json",
        _NEXT_STEP,
        vital_signs(),
    )

    def note() -> None:
        # The lists of files grow, and are in the same directory.
        counts = replace(report, cxi=replace(report.cxi, files=[]), run_files=[])
        stages = {"output": {"promise": results.admin.promise}, "files": asdict(counts)}
        last_words.note({"run": run, "stages": stages, "writers": {}})

    note()
    try:
        return drain(results.reader, writer, grace_s, group, report, note)
    except BaseException as error:
        report.problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        is_there = True
        try:
            output = queue_balance(results.admin)
        except QueueError as error:
            output = {"problem": str(error)}
            is_there = queue.spool is not None
        if report.problem is not None and results.admin.leases and is_there:
            # What an error has left in hand goes back, at the latest when its leases end.
            report.given_back += max(0, report.unaccounted)
        try:
            writer.account.write_balance(report, {"output": output})
        except OSError as error:
            log.error("the balance could not be written: %s", error)
        last_words.done()


def drain(
    reader: Reader,
    writer: CxiWriter,
    grace_s: float = GRACE_S,
    group: str | None = None,
    report: ConsumeReport | None = None,
    note: Callable[[], None] = lambda: None,
) -> ConsumeReport:
    """Write everything that comes out of a connected queue until its stream ends.

    Parameters
    ----------
    reader
        Of the queue.
    writer
        Writes the files; closed at the end unless they cannot be written.
    grace_s
        How long it may take to end after Ctrl-C or SIGTERM. A second signal ends it at once.
    group
        The consumer group, if the reader has joined the stream already.
    report
        Where to count, for a caller that wants the counts even if this raises.
    note
        Called from time to time when something has been counted.
    """
    report = report or ConsumeReport(cxi=writer.statistics)
    report.interrupted = True  # until the end has been seen
    group = group or _new_group()
    ended = cut_off = gave_up = False
    with stop_requests(grace_s) as stop:
        storage = _Storage(reader, writer, report, stop)
        try:
            while not ended and not stop.is_set():
                taken, ended = reader.get(group, _EVENTS_PER_GET, _WAIT_S)
                report.taken += len(taken)
                note()
                before = {holder for one in taken if one.id for holder in reader.lost_by(one.id)}
                if before:
                    storage.settle(partial(writer.take_over_from, before))
                for item in taken:
                    storage.write(item)
                if reader.flush_wanted:
                    storage.settle(writer.flush)
                else:
                    storage.settle(partial(writer.record_filtered, at_once=not taken))
            storage.settle(writer.close)
        except CxiWriteError as error:
            log.error("gave up: %s", error)
            gave_up = True
        except KeyboardInterrupt:
            log.error("stopped at once: what is in no file goes back into the queue")
            cut_off, ended = True, False
        report.given_back = reader.release()
    if (gave_up or cut_off) and report.given_back:
        # An event that came again while its first copy was in hand is one lease.
        report.given_back += max(0, report.unaccounted)
    if cut_off:
        report.taken += max(0, -report.unaccounted)  # leased, and no longer counted
    report.failures = reader.failures
    report.interrupted = gave_up or not ended
    return report


def _new_group() -> str:
    return f"write-cxi:{secrets.token_hex(4)}"


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
        """Write one result, or refuse an item that is not one."""
        if isinstance(item, Event):
            item = Refusal(item.id, "an event stands in a queue of results")
        if isinstance(item, Refusal):
            self._refuse(item)
            return
        try:
            self.settle(partial(self._writer.add, item))
        except ValueError as error:
            self._refuse(Refusal(item.id, str(error)))

    def settle(self, write: Callable[[], list[EventId]]) -> None:
        """Repeat until storage takes the file, and acknowledge what is in it.

        The events stay in memory and in the queue meanwhile. After a request to stop this goes on
        for the grace; the error is raised in the end.
        """
        while True:
            try:
                with uninterrupted():  # what is in a file is acknowledged
                    settled = write()
                    if settled:
                        self._reader.ack(settled)
                return
            except CxiWriteError as error:
                # Stop before the attempt that would come too late.
                if self._stop.out_of_time(_RETRY_S):
                    raise
                log.error("%s; trying again in %.0f s", error, _RETRY_S)
                self._reader.touch()
                # Once the request is set, waiting for it would not wait at all.
                pause = time.sleep if self._stop.is_set() else self._stop.wait
                pause(_RETRY_S)

    def _refuse(self, refusal: Refusal) -> None:
        self._report.refused += 1
        log.warning("refused %s", refusal)
        self._reader.reject([refusal])
