"""A line in the log every few seconds: how fast, how many hits, how much is waiting."""

from __future__ import annotations

import logging
import time

import lightning as L

from peaknet_predict.callbacks.find_callback import find_callback
from peaknet_predict.callbacks.ledger import Ledger
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.data import QueueDataModule

log = logging.getLogger(__name__)


class RateLog(L.Callback):
    """Log events, hits and rate of this rank while the run goes on, and once at its end.

    List it behind the `QueueWriter`, whose counts it shows.

    Parameters
    ----------
    interval_s
        Seconds between lines.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}; give a positive number of seconds")
        self.interval_s = interval_s
        self._started: float | None = None
        self._shown_at = self._last_at = 0.0
        self._shown_events = self._first_events = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin a new run."""
        self._started = None

    def on_predict_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """Show a line if it is time for one."""
        now = self._last_at = time.monotonic()
        if self._started is None:
            # Measured from the first result on: start-up and compilation do not count.
            self._started = self._shown_at = now
            self._first_events = self._shown_events = _ledger(trainer).predicted
        if now - self._shown_at >= self.interval_s:
            events = _ledger(trainer).predicted
            self._show(trainer, (events - self._shown_events) / (now - self._shown_at))
            self._shown_at, self._shown_events = now, events

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the rate over the whole run."""
        if self._started is None:
            log.info("rank %d: no events", trainer.global_rank)
            return
        # Measured to the last batch: waiting for other ranks and for files does not count.
        seconds = max(self._last_at - self._started, 1e-9)
        self._show(trainer, (_ledger(trainer).predicted - self._first_events) / seconds)

    def _show(self, trainer: L.Trainer, rate_hz: float) -> None:
        ledger = _ledger(trainer)
        datamodule = getattr(trainer, "datamodule", None)
        waiting = ""
        if isinstance(datamodule, QueueDataModule) and datamodule.dataset is not None:
            waiting = f", {datamodule.dataset.size()} waiting"
        p50_ms, p99_ms = ledger.latency_ms(50, 99)
        log.info(
            "rank %d: %d events, %d hits, %d peaks, %d refused, %.1f events/s, "
            "latency p50 %.0f ms, p99 %.0f ms%s",
            trainer.global_rank,
            ledger.predicted,
            ledger.hits,
            ledger.peaks,
            ledger.refused,
            rate_hz,
            p50_ms,
            p99_ms,
            waiting,
        )


def _ledger(trainer: L.Trainer) -> Ledger:
    writer = find_callback(trainer, QueueWriter)
    if writer is None:
        raise ValueError("RateLog shows the counts of a QueueWriter; add one to the callbacks")
    return writer.ledger
