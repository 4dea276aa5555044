"""Lots in Ray's object store as a queue's clients use them: written by one, mapped by others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from peaknet_predict.queues.claim_check import (
    OUT_OF_REACH,
    Checked,
    Claims,
    check_in,
    check_out,
)
from peaknet_predict.queues.records import ForeignItem, Record
from peaknet_predict.queues.transport import ActorCalls
from peaknet_predict.types import Event, Result

log = logging.getLogger(__name__)

_MAP_S = 10.0  # after so many seconds a lot is taken to be out of reach

_MAPPED = Claims()
"""Where the arrays lie that this process has mapped: out of one queue, and on into another."""


class Parcel:
    """Records on their way into a queue: their pixels lie in lots, and stay there between tries.

    Pixels that came out of a queue stay where they are, so that nothing is copied. If that place is
    out of reach of the queue that they go to, because its owner has died, they are written anew.

    Parameters
    ----------
    records
        Events or results, left as they are.

    Attributes
    ----------
    problem
        Why the last offer was not taken, or not as a whole; None if that is not known.
    """

    def __init__(self, records: Sequence[Event | Result]) -> None:
        self.problem: str | None = None
        self._left = list(records)
        self._claims = _MAPPED
        self._checked: Checked | None = None

    def __len__(self) -> int:
        return len(self._left)

    def offer(self, calls: ActorCalls, producer: str, timeout_s: float) -> int:
        """Offer what is left to a queue, for so many seconds; return how many it took.

        Raises
        ------
        QueueError
            If the queue's actor is gone.
        """
        import ray

        try:
            if self._checked is None:
                self._checked = check_in(self._left, self._claims, ray.put)
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            self.problem = f"Ray's object store is full ({str(error).splitlines()[0]})"
            return 0
        light, places, lots = self._checked
        # The queue answers as late as it likes; only a lot of somebody else's can be out of reach.
        limit_s = timeout_s + _MAP_S if self._claims is _MAPPED and len(_MAPPED) else None
        call = producer, light, timeout_s
        # The lots twice: within a list as references, and as arguments, which Ray maps.
        pixels = ((places, lots), *lots) if lots else ()
        try:
            taken, self.problem = calls.call("put_many", call, *pixels, limit_s=limit_s)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            taken, self.problem = 0, OUT_OF_REACH
        if self.problem == OUT_OF_REACH:
            self._claims, self._checked = Claims(), None
            return 0
        self._left = self._left[taken:]
        self._checked = self._checked.after(taken)
        return int(taken)


def unpack(calls: ActorCalls, tokens: Sequence[int], checked: Checked) -> dict[int, Record]:
    """Give leased records their pixels: mapped, or if they are out of reach, asked of the queue.

    Parameters
    ----------
    calls
        The queue's actor.
    tokens
        Of the leases.
    checked
        The records, in the same order.

    Returns
    -------
    dict of int to Event, Result or ForeignItem
        The records by their tokens; without those whose lease is over, if that has come out.

    Raises
    ------
    QueueError
        If the queue's actor is gone.
    """
    import ray

    try:
        contents = ray.get(checked.lots, timeout=_MAP_S)
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError) as error:
        log.debug("pixels are asked of the queue: %s", error)
    else:
        return dict(zip(tokens, check_out(checked, contents, _MAPPED), strict=True))
    elsewhere = [token for token, places in zip(tokens, checked.places, strict=True) if places]
    arrays: dict[int, tuple[Any, Any]] = calls.call("pixels", elsewhere)
    whole = {}
    for token, record, places in zip(tokens, checked.records, checked.places, strict=True):
        if places and not isinstance(record, ForeignItem):
            if token not in arrays:
                continue
            record.image, record.bad_bits = arrays[token]
        whole[token] = record
    return whole
