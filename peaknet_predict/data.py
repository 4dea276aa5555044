"""Lightning's data module for a queue of events, and the producer of a run that feeds itself."""

from __future__ import annotations

import secrets

import lightning as L
from torch.utils.data import DataLoader

from peaknet_predict.acknowledger import Acknowledger
from peaknet_predict.batching import MAX_EVENT_BYTES
from peaknet_predict.dataset import QueueDataset
from peaknet_predict.feed import feed
from peaknet_predict.process.settings import check_rate, check_seconds
from peaknet_predict.process.stopping import GRACE_S
from peaknet_predict.queues import (
    ClusterError,
    ClusterTask,
    QueueAddress,
    QueueError,
    connect_queue,
    run_in_cluster,
    warn_of_leftovers,
)
from peaknet_predict.queues.cluster import connect
from peaknet_predict.sources import EventSource
from peaknet_predict.types import EventBatch


class QueueDataModule(L.LightningDataModule):
    """Events from a Ray queue; with a ``source``, also the producer that fills it.

    Parameters
    ----------
    queue
        The input queue.
    batch_size, partial_sizes, max_latency_ms
        As for `QueueDataset`.
    address
        The Ray cluster: ``local`` starts an embedded one on this machine, ``auto`` joins the one
        that runs here or that RAY_ADDRESS names, ``host:port`` joins that one.
    source
        Where events come from if this run feeds its own queue, as the demo does. By default other
        processes feed it.
    source_rate_hz
        Events per second from ``source``; as fast as possible by default.
    max_event_bytes, grace_s
        As for `QueueDataset`.
    resume
        Replace a run that died: if the stream has been read to its end meanwhile, end, instead of
        waiting for the next one.
    """

    def __init__(
        self,
        queue: QueueAddress,
        batch_size: int = 32,
        partial_sizes: tuple[int, ...] = (),
        max_latency_ms: float | None = None,
        address: str = "auto",
        source: EventSource | None = None,
        source_rate_hz: float | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        grace_s: float = GRACE_S,
        resume: bool = False,
    ) -> None:
        super().__init__()
        check_seconds("grace_s", grace_s, zero=True)
        if source_rate_hz is not None:
            check_rate("source_rate_hz", source_rate_hz)
        self.queue_address = queue
        self.batch_size = batch_size
        self.partial_sizes = partial_sizes
        self.max_latency_ms = max_latency_ms
        self.address = address
        self.source = source
        self.source_rate_hz = source_rate_hz
        self.max_event_bytes = max_event_bytes
        self.grace_s = grace_s
        self.resume = resume
        self.dataset: QueueDataset | None = None
        self._feeder: ClusterTask | None = None

    def setup(self, stage: str) -> None:
        """Join one cluster with all ranks and open the queue."""
        if self.trainer is None:
            raise RuntimeError("a QueueDataModule is set up by the Trainer that runs it")
        strategy = self.trainer.strategy
        if self.address == "local" and self.trainer.num_nodes > 1:
            raise ValueError(
                "address 'local' embeds Ray in this process, out of reach of other nodes; start a "
                "cluster (`ray start`) and use 'auto' or host:port"
            )
        # Rank 0 first: with 'local' it starts the cluster that the others join. Its failure is
        # broadcast, because the others would wait for the broadcast.
        cluster, problem = "", None
        if self.trainer.is_global_zero:
            try:
                if self.source is not None:
                    self.source.check()
                cluster = connect(self.address)
                found = connect_queue(self.queue_address, "events")
                warn_of_leftovers(found.admin, self.queue_address.name)
            except (ClusterError, QueueError, ValueError) as error:
                problem = error
        group = f"predict:{secrets.token_hex(4)}"
        cluster, group, problem = strategy.broadcast((cluster, group, problem))
        if problem is not None:
            raise problem
        connect(cluster)
        self.dataset = QueueDataset(
            connect_queue(self.queue_address, "events", resumes=self.resume),
            group,
            self.batch_size,
            self.partial_sizes,
            self.max_latency_ms,
            pin_memory=strategy.root_device.type == "cuda",
            check_producer=None if self.source is None else self._check_feeder,
            max_event_bytes=self.max_event_bytes,
            grace_s=self.grace_s,
        )
        self._acknowledge(self.trainer, self.dataset)
        if self.source is not None and self.trainer.is_global_zero:
            # It has its own working directory, and this run's record says what was fed.
            self._feeder = run_in_cluster(
                feed,
                self.source,
                self.queue_address,
                cluster,
                self.source_rate_hz,
                balance=None,
            )

    def _acknowledge(self, trainer: L.Trainer, dataset: QueueDataset) -> None:
        """Make sure that events are acknowledged even without a `QueueWriter`."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Its hooks come last: a user's callback finds the results unchanged.
        callbacks[:] = [one for one in callbacks if not isinstance(one, Acknowledger)]
        callbacks.append(Acknowledger(dataset))

    def predict_dataloader(self) -> DataLoader[EventBatch]:
        """Return a loader that passes on the dataset's finished batches."""
        assert self.dataset is not None
        return DataLoader(self.dataset, batch_size=None)

    def _check_feeder(self) -> None:
        """Raise what the producer raised; the run would wait for ever at an empty queue."""
        if self._feeder is not None and self._feeder.done():
            self._feeder.result()
