"""Finding a queue by name, or making it."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from peaknet_predict.queues.actor import PROTOCOL, Description, QueueActor
from peaknet_predict.queues.address import QueueAddress, QueueError
from peaknet_predict.queues.cluster import known_actors
from peaknet_predict.queues.foreign import ForeignAdmin, ForeignProducer, ForeignReader
from peaknet_predict.queues.native import NativeAdmin, NativeProducer, NativeReader
from peaknet_predict.queues.records import Kind
from peaknet_predict.queues.roles import Admin, Queue
from peaknet_predict.queues.transport import ActorCalls, call_again

log = logging.getLogger(__name__)


def connect_queue(
    address: QueueAddress, kind: Kind, outlives_us: bool = True, resumes: bool = False
) -> Queue:
    """Find a queue by name, or make it, in the cluster this process has joined.

    Parameters
    ----------
    address
        Where the queue is.
    kind
        What it holds.
    outlives_us
        Whether a queue made here stays when this process ends, for readers that are not done.
    resumes
        Whether its reader replaces one that died. If the stream has been read to its end meanwhile,
        this reader ends too, instead of waiting for the next stream.

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
        return _foreign(handle, address, kind)
    try:
        # A queue with a spool may be on its way back after the death of its process.
        description = call_again(handle, address.name, "describe")
    except ray.exceptions.RayActorError as error:
        # Usually its constructor raised: the spool cannot be used.
        causes = [line for line in str(error).splitlines() if "Error" in line]
        reason = causes[-1].strip() if causes else str(error).splitlines()[0]
        raise QueueError(f"queue {address.name!r} cannot be made: {reason}") from error
    if description.protocol != PROTOCOL:
        raise QueueError(
            f"queue {address.name!r} was made by another version of this program (protocol "
            f"{description.protocol}, ours is {PROTOCOL}); end that run, or use another name"
        )
    _check_description(description, address, kind)
    calls = ActorCalls(handle, description.address)
    return Queue(
        NativeProducer(calls),
        NativeReader(calls, kind, resumes),
        NativeAdmin(calls, description.uid),
    )


def warn_of_leftovers(admin: Admin, name: str) -> None:
    """Log a warning if a queue holds records of a run that has already ended."""
    now = admin.statistics()
    if now is not None and now.ended and now.ready:
        log.warning(
            "queue %r still holds %d events of a stream that has ended; they come first",
            name,
            now.ready,
        )


def _foreign(handle: Any, address: QueueAddress, kind: Kind) -> Queue:
    _check_three_methods(handle, address)
    uid = f"{address.name}@{secrets.token_hex(4)}"
    return Queue(
        ForeignProducer(handle, address, kind),
        ForeignReader(handle, address, kind, uid),
        ForeignAdmin(handle, address, uid),
    )


def _make(address: QueueAddress, kind: Kind, outlives_us: bool) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Relative paths are relative to this process; the actor has its own working directory.
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
