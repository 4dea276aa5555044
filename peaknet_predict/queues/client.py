"""Finding a queue by name, or making it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from peaknet_predict.queues.actor import PROTOCOL, Description, QueueActor
from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.cluster import known_actors
from peaknet_predict.queues.foreign import ForeignQueue
from peaknet_predict.queues.native import NativeQueue, Taken
from peaknet_predict.queues.records import Kind
from peaknet_predict.types import Event, EventId, Refusal, Result

log = logging.getLogger(__name__)


class Queue(Protocol):
    """What the rest of the program does with a queue, whichever actor is behind it."""

    failures: dict[str, str]
    """At the end of the stream: producers that ended early, and why."""

    native: bool
    """Whether it is our own actor: leases records, knows their identity and the stream's end."""

    flush_wanted: bool
    """Whether nothing more comes before what is held here has been brought to an end."""

    resumes: bool
    """Whether this reader takes the place of one that died, and waits for no other stream."""

    uid: str
    """Names the queue apart from every other."""

    holder: str
    """Names this client to the queue."""

    @property
    def promise(self) -> str:
        """What is promised of records in this queue, in words."""

    def open(self, producer: str, of: int = 1) -> None:
        """Announce a producer, one of ``of``."""

    def close(self, producer: str, failure: str | None = None, end_markers: int = 1) -> None:
        """End a producer's part of the stream."""

    def vouch(self, prefix: str, failure: str | None = None, end_markers: int = 1) -> None:
        """Close the parts of all producers of a name, whose work others have done."""

    def put(
        self,
        producer: str,
        records: Sequence[Event | Result],
        stop: threading.Event | None = None,
    ) -> int:
        """Put records, waiting for room until ``stop`` is set; return how many were accepted."""

    def get(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Lease up to ``max_records`` within ``timeout_s``; True at the end of the stream."""

    def take(self, reader: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """As `get`, but acknowledged at once: for readers that need no promise."""

    def ack(self, ids: Iterable[EventId]) -> None:
        """Say that the next stage has these."""

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        """Have these put into quarantine."""

    def release(self, failure: str | None = None) -> int:
        """Give back all that is held; return how many records that were."""

    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Ask which of these are leased to us at this moment."""

    @property
    def unsettled(self) -> int:
        """How many records are held here."""

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before us and were lost."""

    def touch(self) -> None:
        """Note that the work goes on."""

    def first_missing(self, stream: str, rank: int) -> int:
        """Return the first idx of a stream that was never accepted; 0 where that is not known."""

    def size(self) -> int:
        """Return how many items can be taken now."""


def connect_queue(
    address: QueueAddress, kind: Kind, outlives_us: bool = True
) -> NativeQueue | ForeignQueue:
    """Find a queue by name, or make it, in the cluster this process has joined.

    Parameters
    ----------
    address
        Where the queue is.
    kind
        What it holds.
    outlives_us
        Whether a queue made here stays when this process ends, for those who still read it.

    Raises
    ------
    QueueError
        If it is missing and may not be made, holds the other kind of record, cannot use its spool,
        or speaks another version of the protocol.
    """
    import ray

    try:
        handle = ray.get_actor(address.name, namespace=address.namespace)
    except ValueError as error:
        if not address.create:
            raise QueueError(_missing(address)) from error
        handle = _make(address, kind, outlives_us)
    if not hasattr(handle, "describe"):
        _check_three_methods(handle, address)
        return ForeignQueue(handle, address, kind)
    try:
        description = ray.get(handle.describe.remote())
    except ray.exceptions.ActorDiedError as error:
        # Most often what its constructor raised: a spool that cannot be used.
        causes = [line for line in str(error).splitlines() if "Error" in line]
        reason = causes[-1].strip() if causes else str(error).splitlines()[0]
        raise QueueError(f"queue {address.name!r} cannot be made: {reason}") from error
    if description.protocol != PROTOCOL:
        raise QueueError(
            f"queue {address.name!r} was made by another version of this program (protocol "
            f"{description.protocol}, ours is {PROTOCOL}); end that run, or use another name"
        )
    _check_description(description, address, kind)
    return NativeQueue(handle, address.name, kind, description)


def _make(address: QueueAddress, kind: Kind, outlives_us: bool) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Paths are this process's, and the actor has a working directory of its own.
    absolute = replace(
        address,
        quarantine=str(Path(address.quarantine).resolve()),
        spool=None if address.spool is None else str(Path(address.spool).resolve()),
    )
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(QueueActor)
        .options(
            name=address.name,
            namespace=address.namespace,
            lifetime="detached" if outlives_us else None,
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=1000,
            # Without a spool a restarted queue would be an empty one, and nobody would notice.
            max_restarts=-1 if address.spool is not None else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(kind, absolute)
    )


def _check_description(description: Description, address: QueueAddress, kind: Kind) -> None:
    name, there = address.name, description.address
    if description.kind != kind:
        raise QueueError(
            f"queue {name!r} holds {description.kind}, but {kind} are expected here; "
            "input and output need queues of different names"
        )
    if address.spool is not None and there.spool is None:
        raise QueueError(
            f"queue {name!r} is there already and has no spool, but one is configured here: what "
            "is in it would not survive. End that queue's runs, or use another name"
        )
    for setting in ("max_events", "max_bytes", "lease_s", "producer_timeout_s", "max_losses"):
        if getattr(there, setting) != getattr(address, setting):
            log.warning(
                "queue %r is there already with %s %s, whatever is configured here",
                name,
                setting,
                getattr(there, setting),
            )


def _missing(address: QueueAddress) -> str:
    return (
        f"there is no queue {address.name!r} in namespace {address.namespace!r}; named actors in "
        f"this cluster: {', '.join(sorted(known_actors())) or 'none'}. Start its producer first, "
        "correct the name, or set create to true"
    )


def _check_three_methods(handle: Any, address: QueueAddress) -> None:
    lacking = [name for name in ("put", "get", "size") if not hasattr(handle, name)]
    if lacking:
        raise QueueError(
            f"the actor {address.name!r} in namespace {address.namespace!r} is not a queue: it has "
            f"no method {' and no '.join(lacking)}. Check the name"
        )
