"""A line in the log every few seconds: how far, how fast, how many hits, how much is waiting."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import NamedTuple

import lightning as L

from peaknet_predict.callbacks.find_callback import find_callback
from peaknet_predict.callbacks.ledger import Counts
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.data import QueueDataModule
from peaknet_predict.process.settings import check_seconds

log = logging.getLogger(__name__)

_WINDOW_S = 60.0  # over which rate and hits are taken


class _Seen(NamedTuple):
    at: float
    counts: Counts


class RateLog(L.Callback):
    """Log how the run is getting on, in one line for all ranks, and once at its end.

    List it behind the `QueueWriter`, whose counts it shows. Rate and hits are those of the last
    minute. How far the run is, and how long it still takes, is shown where the number of events is
    known: in a run with a source of its own.

    Parameters
    ----------
    interval_s
        Seconds between lines.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        check_seconds("interval_s", interval_s)
        self.interval_s = interval_s
        self._seen: deque[_Seen] = deque()
        self._first: _Seen | None = None
        self._last_at = self._shown_at = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin a new run."""
        self._first = None
        self._seen.clear()

    def on_predict_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        """Show a line if it is time for one."""
        now = self._last_at = time.monotonic()
        if self._first is None:
            # Measured from the first result on: start-up and compilation do not count.
            self._first = _Seen(now, _counts(trainer) or Counts(0, 0, 0, 0))
            self._seen.append(self._first)
            self._shown_at = now
        if now - self._shown_at < self.interval_s:
            return
        self._shown_at = now
        counts = _counts(trainer)
        if counts is None:
            return  # another rank shows it
        self._seen.append(_Seen(now, counts))
        while len(self._seen) > 2 and now - self._seen[1].at >= _WINDOW_S:
            self._seen.popleft()
        self._show(trainer, self._seen[0], self._seen[-1])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what the whole run came to."""
        counts = _counts(trainer)
        if counts is None:
            return
        if self._first is None or not counts.predicted:
            log.info("no events were predicted")
            return
        # Measured to the last batch: waiting for other ranks and for files does not count.
        seconds = self._last_at - self._first.at
        events = counts.predicted - self._first.counts.predicted
        rate = f", {events / seconds:.1f} events/s" if events > 0 and seconds > 0 else ""
        log.info(
            "%d events%s; %s, %d peaks, %d refused",
            counts.predicted,
            rate,
            _share_of_hits(counts.hits, counts.predicted),
            counts.peaks,
            counts.refused,
        )

    def _show(self, trainer: L.Trainer, before: _Seen, now: _Seen) -> None:
        counts = now.counts
        # A rank that is lost takes what it has not reported along, so this may seem to go back.
        events = max(counts.predicted - before.counts.predicted, 0)
        hits = max(counts.hits - before.counts.hits, 0)
        rate_hz = events / max(now.at - before.at, 1e-9)
        parts = [_progress(_length(trainer), counts, rate_hz), f"{rate_hz:.1f} events/s"]
        if events:
            parts.append(f"{_share_of_hits(hits, events)} lately")
        parts += [f"{counts.hits} hits, {counts.peaks} peaks, {counts.refused} refused in all"]
        delays_s = _writer(trainer).ledger.waited_worked_s()
        if delays_s is not None:
            waited_s, worked_s = delays_s
            parts.append(f"latency {_duration(worked_s)} after {_duration(waited_s)} in the queue")
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, QueueDataModule) and datamodule.dataset is not None:
            parts.append(f"{datamodule.dataset.size()} waiting")
        log.info("%s", "; ".join(parts))


def _progress(length: int | None, counts: Counts, rate_hz: float) -> str:
    """Say how far a run is and how long it still takes."""
    done = counts.predicted + counts.refused
    if not length:
        return f"{done} events"
    done = min(done, length)  # events of a rank that died are predicted twice
    eta = f", {_duration((length - done) / rate_hz)} left" if rate_hz > 0 and done < length else ""
    return f"{done} of {length} events ({100 * done // length} %{eta})"


def _share_of_hits(hits: int, events: int) -> str:
    return f"{100 * hits / events:.0f} % hits"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _length(trainer: L.Trainer) -> int | None:
    datamodule = getattr(trainer, "datamodule", None)
    source = datamodule.source if isinstance(datamodule, QueueDataModule) else None
    return None if source is None else len(source)


def _counts(trainer: L.Trainer) -> Counts | None:
    """Return the counts of all ranks; None if another rank shows them."""
    writer = _writer(trainer)
    return writer.sign_off.counts_of_all(writer.ledger.counts)


def _writer(trainer: L.Trainer) -> QueueWriter:
    writer = find_callback(trainer, QueueWriter)
    if writer is None:
        raise ValueError("RateLog shows the counts of a QueueWriter; add one to the callbacks")
    return writer
