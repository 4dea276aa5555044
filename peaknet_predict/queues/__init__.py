"""Queues between the processes of a run; the only package that imports Ray."""

from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.client import Queue, connect_queue
from peaknet_predict.queues.cluster import (
    ClusterError,
    ClusterTask,
    ProcessLostError,
    run_in_cluster,
)
from peaknet_predict.queues.foreign import ForeignQueue
from peaknet_predict.queues.native import NativeQueue, Taken

__all__ = [
    "ClusterError",
    "ClusterTask",
    "ForeignQueue",
    "NativeQueue",
    "ProcessLostError",
    "Queue",
    "QueueAddress",
    "QueueError",
    "Taken",
    "connect_queue",
    "run_in_cluster",
]
