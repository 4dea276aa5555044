"""CXI files from within a prediction run: the same consumer as `peaknet-predict write-cxi`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Literal

import lightning as L

from peaknet_predict.callbacks.lookup import callback_of
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.consume import write_cxi
from peaknet_predict.cxi.account import ConsumeReport
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.queues import (
    ClusterTask,
    ProcessLostError,
    connect_queue,
    run_in_cluster,
)
from peaknet_predict.queues.cluster import current_address

log = logging.getLogger(__name__)

_MAX_RESTARTS = 5
_LOOK_S = 1.0  # between looks for rank 0 while the queue is full


class CxiOutput(L.Callback):
    """Run the consumer of the `QueueWriter`'s queue in another process of the cluster.

    If that process is killed it is started again, and goes on where the files end. It belongs to
    rank 0; if that is lost, a rank that finds the queue full starts another.

    List it behind the `QueueWriter`: the files are complete when that one has marked the end.

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
        self.directory = directory
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
        self._writer = callback_of(trainer, QueueWriter)
        if self._writer is None:
            raise ValueError("CxiOutput writes what a QueueWriter sends; add one to the callbacks")
        if not trainer.is_global_zero:
            self._writer.check_consumer = self._replace_rank_zero
            return
        self._writer.check_consumer = self._check
        self._consumer = self._start(self._writer)

    def _start(self, writer: QueueWriter) -> ClusterTask:
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
        )

    def on_predict_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """Stop the run if the consumer has failed: its results would pile up unread."""
        self._check()

    def _check(self) -> None:
        if self._consumer is not None and self._consumer.done():
            self._result()
            if self._consumer.done():
                raise RuntimeError("the CXI consumer ended before the run did")

    def _replace_rank_zero(self) -> None:
        """Start a consumer of this rank if rank 0, whose consumer writes the files, is lost."""
        assert self._writer is not None
        if self._consumer is None and time.monotonic() > self._look_again_at:
            self._look_again_at = time.monotonic() + _LOOK_S
            if self._writer.rank_zero_is_lost():
                log.error("rank 0, which wrote the CXI files, is lost: this rank writes them")
                self._consumer = self._start(self._writer)
        self._check()

    def _result(self, wait: bool = False) -> ConsumeReport | None:
        """Return the consumer's report; start it again if its process has died."""
        assert self._consumer is not None
        assert self._writer is not None
        while True:
            try:
                report: ConsumeReport = self._consumer.result()
                return report
            except ProcessLostError as error:
                self._restarts += 1
                if self._restarts > _MAX_RESTARTS:
                    raise
                log.error("the CXI consumer died (%s) and is started again", error)
                self._consumer = self._start(self._writer)
                if not wait:
                    return None

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last file and check that every result is in one, or was filtered."""
        if self._consumer is None:
            return
        self.report = self._result(wait=True)
        assert self.report is not None
        log.info("%s: %s", self.directory, self.report)
        assert self._writer is not None
        if not self.report.balanced:
            raise BalanceError(
                f"{self.directory}: {self.report}; predicted {self._writer.predicted}"
            )
        if self.report.failures:
            raise BalanceError(f"the stream of results is incomplete: {self.report.failures}")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let the consumer write what it was sent before the cluster ends with this process.

        Not after a second signal: what is not in a file by then stays in the queue.
        """
        if isinstance(exception, KeyboardInterrupt):
            return
        if self._writer is not None and self._writer.rank_zero_is_gone:
            self._take_over(self._writer)
        if self._consumer is None:
            return
        try:
            self.report = self._consumer.result(timeout_s=120)
            log.info("%s: %s", self.directory, self.report)
        except Exception:
            log.exception("the CXI consumer did not finish")

    def _take_over(self, writer: QueueWriter) -> None:
        """See that all results come into files although rank 0, whose consumer writes, is gone."""
        admin = connect_queue(writer.queue_address, "results").admin
        while (now := admin.statistics()) is not None:
            if now.ended and not now.ready and not now.leased:
                return
            if self._consumer is None or self._consumer.done():
                self._consumer = self._start(writer)
            time.sleep(0.5)
