"""CXI files from within a prediction run: the same consumer as `peaknet-predict write-cxi`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Literal

import lightning as L

from peaknet_predict.callbacks.find_callback import find_callback
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.consume import write_cxi
from peaknet_predict.cxi.account import ConsumeReport
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.process.files import expanded
from peaknet_predict.queues import (
    ClusterTask,
    ProcessLostError,
    connect_queue,
    run_in_cluster,
)
from peaknet_predict.queues.cluster import current_address
from peaknet_predict.queues.roster import Standing

log = logging.getLogger(__name__)

_MAX_RESTARTS = 5
_LOOK_S = 1.0  # between checks of rank 0 while the queue is full
_AFTER_FAILURE_S = 120.0  # how long the consumer may take to finish when the run has failed


class CxiOutput(L.Callback):
    """Run the consumer of the `QueueWriter`'s queue in another process of the cluster.

    If that process is killed, it is started again and goes on where the files end. It belongs to
    rank 0. If rank 0 is lost, a rank that finds the queue full, or closes the run, starts another
    one.

    List it behind the `QueueWriter`, whose run ends when the files are complete.

    Parameters
    ----------
    directory
        Where the files go.
    prefix, events_per_file, min_peaks, max_peaks, compression
        As for `peaknet_predict.consume.write_cxi`.

    Attributes
    ----------
    report
        What became of every result, once the run has ended.
    """

    def __init__(
        self,
        directory: str,
        prefix: str = "peaks",
        events_per_file: int = 100,
        min_peaks: int = 0,
        max_peaks: int = 2048,
        compression: Literal["none", "gzip"] = "none",
    ) -> None:
        self.directory = str(expanded(directory))
        self.prefix = prefix
        self.events_per_file = events_per_file
        self.min_peaks = min_peaks
        self.max_peaks = max_peaks
        self.compression = compression
        self.report: ConsumeReport | None = None
        self._writer: QueueWriter | None = None
        self._consumer: ClusterTask | None = None
        self._restarts = 0
        self._look_again_at = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the consumer, once per run."""
        self.report = self._consumer = None
        self._restarts = 0
        self._writer = find_callback(trainer, QueueWriter)
        if self._writer is None:
            raise ValueError("CxiOutput writes what a QueueWriter sends; add one to the callbacks")
        self._writer.sign_off.consumer = self
        if trainer.is_global_zero:
            self._consumer = self._start(self._writer)

    def on_predict_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """Stop the run if the consumer has failed: its results would pile up unread."""
        self._check_own()

    def check(self) -> None:
        """Raise if the consumer has failed; start one if rank 0, which has one, is lost."""
        if self._consumer is None and time.monotonic() > self._look_again_at:
            self._look_again_at = time.monotonic() + _LOOK_S
            writer = self._set_up()
            if writer.sign_off.rank_zero() in (Standing.LOST, Standing.GONE):
                log.error("rank 0, which wrote the CXI files, is lost: this rank writes them")
                self._consumer = self._start(writer, again=True)
        self._check_own()

    def finish(self, take_over: bool, failed: bool) -> None:
        """Wait for the last file and check that every result is in one, or was filtered.

        Parameters
        ----------
        take_over
            Whether this rank is responsible for all results, even if rank 0 has begun to write
            them.
        failed
            Whether the run has failed; the wait for the consumer is then limited.

        Raises
        ------
        BalanceError
            If not every result is in a file or was filtered.
        """
        if take_over and self._consumer is None:
            self._consume_the_rest()
        if self._consumer is None:
            return
        self.report = self._result(_AFTER_FAILURE_S if failed else None)
        log.info("%s: %s", self.directory, self.report)
        if not self.report.balanced:
            predicted = self._set_up().ledger.predicted
            raise BalanceError(f"{self.directory}: {self.report}; predicted {predicted}")
        if self.report.failures and not failed:
            raise BalanceError(f"the stream of results is incomplete: {self.report.failures}")

    def _set_up(self) -> QueueWriter:
        assert self._writer is not None, "found in setup"
        return self._writer

    def _start(self, writer: QueueWriter, again: bool = False) -> ClusterTask:
        """Start a consumer; ``again`` if an earlier one may have read the stream to its end."""
        if again:
            # A consumer that resumes expects its directory to exist, but the earlier one may have
            # died before it made it.
            Path(self.directory).mkdir(exist_ok=True)
        return run_in_cluster(
            write_cxi,
            writer.queue_address,
            # The consumer's working directory is its own.
            str(Path(self.directory).resolve()),
            current_address(),
            prefix=self.prefix,
            events_per_file=self.events_per_file,
            min_peaks=self.min_peaks,
            max_peaks=self.max_peaks,
            compression=self.compression,
            resume=again,
        )

    def _check_own(self) -> None:
        if self._consumer is None or not self._consumer.done():
            return
        try:
            self._consumer.result()
        except ProcessLostError as error:
            self._start_again(error)
            return
        raise RuntimeError("the CXI consumer ended before the run did")

    def _start_again(self, error: ProcessLostError) -> None:
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise error
        log.error("the CXI consumer died (%s) and is started again", error)
        self._consumer = self._start(self._set_up(), again=True)

    def _result(self, timeout_s: float | None = None) -> ConsumeReport:
        """Return the consumer's report; start it again if its process dies."""
        while True:
            assert self._consumer is not None
            try:
                report: ConsumeReport = self._consumer.result(timeout_s)
                return report
            except ProcessLostError as error:
                self._start_again(error)

    def _consume_the_rest(self) -> None:
        """Have all results written although rank 0, whose consumer wrote them, is lost.

        Its consumer may still be at work, and one started here may find nothing to do.
        """
        writer = self._set_up()
        admin = connect_queue(writer.queue_address, "results").admin
        while (now := admin.statistics()) is not None:
            if now.ended and not now.ready and not now.leased:
                return
            if self._consumer is None or self._consumer.done():
                self._consumer = self._start(writer, again=True)
            time.sleep(_LOOK_S)
