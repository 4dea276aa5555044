"""Results on their way into the output queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Full
from queue import Queue as BoundedQueue

from peaknet_predict.queues import Producer
from peaknet_predict.types import Result

_CHECK_S = 1.0  # how often a wait for room checks that somebody still makes room


class Outbox:
    """A thread that puts results into the output queue while the caller goes on.

    Putting a batch of images takes as long as copying them; the GPU must not wait for that. When
    two batches wait in the outbox, the caller waits: that is the program's back-pressure.

    Parameters
    ----------
    queue
        The output queue.
    name
        This process's name as its producer.
    accepted
        Called with results that the output queue has accepted. Even if it raises, because the input
        queue is gone, later results are delivered.

    Attributes
    ----------
    delivered
        How many results the output queue has accepted.
    """

    def __init__(
        self, queue: Producer, name: str, accepted: Callable[[list[Result]], None]
    ) -> None:
        self.delivered = 0
        self._queue = queue
        self._name = name
        self._accepted = accepted
        self._waiting: BoundedQueue[list[Result] | None] = BoundedQueue(maxsize=2)
        self._error: BaseException | None = None
        self._not_accepted: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, results: list[Result] | None, check: Callable[[], None]) -> None:
        """Hand over results; raise what went wrong with earlier ones.

        While there is no room, ``check`` is called regularly; it raises if there never will be.
        """
        while self._error is None:
            try:
                self._waiting.put(results, timeout=_CHECK_S)
                return
            except Full:
                check()
        raise self._error

    def close(self, check: Callable[[], None]) -> None:
        """Wait until everything handed over has been accepted; raise if that fails."""
        if self._thread.is_alive():
            self.put(None, check)
        while self._thread.is_alive():
            self._thread.join(timeout=_CHECK_S)
            check()
        error = self._error or self._not_accepted
        if error is not None:
            raise error

    def _work(self) -> None:
        while (results := self._waiting.get()) is not None:
            try:
                self._queue.put(self._name, results)
            except BaseException as error:
                self._error = error
                return
            self.delivered += len(results)
            try:
                self._accepted(results)
            except BaseException as error:
                self._not_accepted = error
