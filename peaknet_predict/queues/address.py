"""Where a queue is, and what one that is made here promises."""

from __future__ import annotations

from dataclasses import dataclass

from peaknet_predict.queues.cluster import NAMESPACE


class QueueError(RuntimeError):
    """A queue cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class QueueAddress:
    """Where a queue is, and how to make it if it is not there.

    Attributes
    ----------
    name
        Name of the queue's actor in the cluster.
    namespace
        Ray namespace of the actor.
    create
        Make the queue if there is none of that name; otherwise a missing queue is an error.
    max_events, max_bytes
        Capacity of a queue made here; producers wait while it is full. What readers hold under
        lease is kept besides.
    lease_s
        A reader that is silent for so long loses what it holds to others.
    producer_timeout_s
        The part of a producer that is silent for so long is closed.
    max_losses
        An event that costs this many readers goes into quarantine.
    spool
        Directory for a copy of everything in the queue, synced before a put is confirmed: the queue
        then survives its process and its cluster. On the machine that makes the queue. By default
        what is in the queue lives as long as its process.
    quarantine
        Directory for events that cannot be processed, made when there is one; on the machine that
        makes the queue.
    quarantine_bytes
        Most bytes kept there; of further events only identity and reason are written down.
    idle_timeout_s
        A queue of another program cannot say that the stream has ended: reading it ends after this
        many seconds without an event. Our own queue says so and takes no notice of this.
    """

    name: str
    namespace: str = NAMESPACE
    create: bool = True
    max_events: int = 400
    max_bytes: int = 2 * 1024**3
    lease_s: float = 30.0
    producer_timeout_s: float = 60.0
    max_losses: int = 5
    spool: str | None = None
    quarantine: str = "quarantine"
    quarantine_bytes: int = 1024**3
    idle_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a queue needs a name")
        if self.max_events < 1 or self.max_bytes < 1 or self.idle_timeout_s <= 0:
            raise ValueError(
                f"queue {self.name!r}: max_events, max_bytes and idle_timeout_s must be positive; "
                f"got {self.max_events}, {self.max_bytes} and {self.idle_timeout_s}"
            )
        if self.lease_s <= 0 or self.producer_timeout_s <= 0 or self.max_losses < 1:
            raise ValueError(
                f"queue {self.name!r}: lease_s, producer_timeout_s and max_losses must be "
                f"positive; got {self.lease_s}, {self.producer_timeout_s} and {self.max_losses}"
            )
        if self.quarantine_bytes < 0:
            raise ValueError(f"queue {self.name!r}: quarantine_bytes is {self.quarantine_bytes}")
