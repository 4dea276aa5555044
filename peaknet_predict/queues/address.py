"""Where a queue is, and what a queue made here promises."""

from __future__ import annotations

from dataclasses import dataclass

from peaknet_predict.process.files import expanded
from peaknet_predict.process.settings import check_count, check_seconds
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
        Capacity of a queue made here; producers wait while it is full. Leased records do not count.
    lease_s
        A reader that is silent for this long loses what it holds to others.
    producer_timeout_s
        A producer that is silent for this long is closed.
    max_losses
        An event that costs this many readers goes into quarantine.
    spool
        Directory for a copy of everything in the queue, synced before a put is confirmed: the queue
        then survives its process and its cluster. It is on the machine that makes the queue. By
        default the queue's contents live as long as its process.
    quarantine
        Directory for events that cannot be processed, made when the first one comes; on the machine
        that makes the queue.
    quarantine_bytes
        Most bytes kept there; beyond them, only an event's identity and reason are written down.
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
        for what, text in (("name", self.name), ("namespace", self.namespace)):
            if not text or not text.isprintable():
                raise ValueError(f"a queue's {what} must be printable text, not {text!r}")
        for setting in ("max_events", "max_bytes", "max_losses"):
            check_count(f"queue {self.name!r}: {setting}", getattr(self, setting))
        for setting in ("lease_s", "producer_timeout_s", "idle_timeout_s"):
            check_seconds(f"queue {self.name!r}: {setting}", getattr(self, setting))
        check_count(f"queue {self.name!r}: quarantine_bytes", self.quarantine_bytes, least=0)
        # Checked here, so that a wrong path is refused before anything starts.
        object.__setattr__(self, "quarantine", str(expanded(self.quarantine)))
        if self.spool is not None:
            object.__setattr__(self, "spool", str(expanded(self.spool)))
