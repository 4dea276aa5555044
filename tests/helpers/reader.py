"""A reader of a queue in this process: `QueueState` without an actor, for the consumer's tests."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from peaknet_predict.queues.roles import Taken
from peaknet_predict.queues.state import QueueState
from peaknet_predict.types import EventId, Refusal

F = TypeVar("F", bound=Callable[..., Any])

_ONE_LOOP = threading.RLock()


def _one_at_a_time(method: F) -> F:
    """Let no two readers call the state at the same time, as in the actor's one event loop."""

    @functools.wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _ONE_LOOP:
            return method(*args, **kwargs)

    return locked  # type: ignore[return-value]


class StateReader:
    """Leases records of a `QueueState` under the name ``holder``, as `NativeReader` does.

    Attributes
    ----------
    before_get
        Called before every `get`, with how many there were: the place for what happens meanwhile.
    """

    def __init__(self, state: QueueState, holder: str, resumes: bool = False) -> None:
        self.failures: dict[str, str] = {}
        self.flush_wanted = False
        self.holder = holder
        self.before_get: Callable[[int], None] = lambda count: None
        self.acknowledged: list[EventId] = []
        self._state = state
        self._resumes = resumes
        self._sequence = 0
        self._tokens: dict[EventId, int] = {}
        self._lost_by: dict[EventId, tuple[str, ...]] = {}

    @property
    def unsettled(self) -> int:
        """How many leases are held here."""
        return len(self._tokens)

    @_one_at_a_time
    def join(self, group: str) -> str:
        """Join a stream as a consumer group."""
        name: str = self._state.streams.join(group, self._resumes)
        return name

    def get(self, group: str, max_records: int, timeout_s: float) -> tuple[list[Taken], bool]:
        """Lease up to ``max_records``, without waiting for them."""
        self.before_get(self._sequence)
        taken, ended = self._get(group, max_records)
        if not taken and not ended:
            time.sleep(0.001)  # for the other readers
        return taken, ended

    @_one_at_a_time
    def _get(self, group: str, max_records: int) -> tuple[list[Taken], bool]:
        self._sequence += 1
        at = self.holder, self._sequence
        delivery = self._state.ask(group, *at, self._resumes)
        delivery = delivery or self._state.take(group, *at, max_records)
        self.flush_wanted, self.failures = delivery.flush, delivery.failures
        taken: list[Taken] = []
        for token, record in zip(delivery.tokens, delivery.records, strict=True):
            assert isinstance(record, Taken)
            assert record.id is not None
            self._tokens[record.id] = token
            self._lost_by[record.id] = tuple(delivery.lost_by.get(token, ()))
            taken.append(record)
        return taken, delivery.ended

    @_one_at_a_time
    def ack(self, ids: Iterable[EventId]) -> None:
        """Acknowledge records."""
        keys = list(ids)
        self.acknowledged += keys
        self._state.ack([self._tokens.pop(key) for key in keys if key in self._tokens])

    @_one_at_a_time
    def reject(self, refusals: Iterable[Refusal]) -> None:
        """Have records put into quarantine."""
        reasons = {self._tokens.pop(r.id): r.reason for r in refusals if r.id in self._tokens}
        self._state.reject(reasons)

    @_one_at_a_time
    def release(self, failure: str | None = None) -> int:
        """Give back all that is held."""
        tokens = list(self._tokens.values())
        self._tokens.clear()
        self._state.release(tokens, failure)
        return len(tokens)

    @_one_at_a_time
    def still_held(self, ids: Iterable[EventId]) -> set[EventId]:
        """Return which of these are leased to this reader."""
        keys = [key for key in ids if key in self._tokens]
        held = set(self._state.held([self._tokens[key] for key in keys]))
        return {key for key in keys if self._tokens[key] in held}

    def lost_by(self, key: EventId) -> tuple[str, ...]:
        """Return the holders that had a record before."""
        return self._lost_by.get(key, ())

    def touch(self) -> None:
        """Do nothing: nobody asks whether the work goes on."""

    def die(self) -> None:
        """Be lost: what is held goes to other readers, who are told whose it was."""
        self._state.release(list(self._tokens.values()), "silent")
