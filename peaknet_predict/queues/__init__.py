"""Queues between the processes of a run; the only package that imports Ray."""

from peaknet_predict.queues.client import (
    ForeignQueue,
    NativeQueue,
    Queue,
    QueueAddress,
    QueueError,
    Taken,
    connect_queue,
)
from peaknet_predict.queues.cluster import ClusterError, ClusterTask, run_in_cluster

__all__ = [
    "ClusterError",
    "ClusterTask",
    "ForeignQueue",
    "NativeQueue",
    "Queue",
    "QueueAddress",
    "QueueError",
    "Taken",
    "connect_queue",
    "run_in_cluster",
]
