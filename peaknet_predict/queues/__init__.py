"""Queues between the processes of a run; the only package that imports Ray."""

from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.client import connect_queue, warn_of_leftovers
from peaknet_predict.queues.cluster import (
    ClusterError,
    ClusterTask,
    ProcessLostError,
    run_in_cluster,
)
from peaknet_predict.queues.roles import Admin, Producer, Queue, Reader, Taken

__all__ = [
    "Admin",
    "ClusterError",
    "ClusterTask",
    "ProcessLostError",
    "Producer",
    "Queue",
    "QueueAddress",
    "QueueError",
    "Reader",
    "Taken",
    "connect_queue",
    "run_in_cluster",
    "warn_of_leftovers",
]
