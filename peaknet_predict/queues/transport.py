"""Calls to our own queue actor: repeated while it is out of reach, with errors that say why."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from peaknet_predict.queues.address import QueueAddress, QueueError

log = logging.getLogger(__name__)

_OUTAGE_S = 60.0  # how long a queue may be out of reach, or restarting, before a call fails
_GIVEN_UP_S = 5.0  # and how long after that one has failed so
_RETRY_S = 0.5
_ACKS_UNDER_WAY = 32  # beyond this many unanswered acknowledgements, wait for answers
_ACK_WAIT_S = 2.0


def call_again(
    handle: Any,
    name: str,
    method: str,
    *args: Any,
    patience_s: float = _OUTAGE_S,
    limit_s: float | None = None,
) -> Any:
    """Call a method of an actor, repeatedly while it is out of reach; return its answer.

    With ``limit_s``, an answer is waited for that many seconds only.

    Raises
    ------
    QueueError
        If it has been out of reach for ``patience_s`` seconds.
    ray.exceptions.RayActorError
        If it is gone.
    ray.exceptions.GetTimeoutError
        If there was no answer within ``limit_s``.
    """
    import ray

    deadline = time.monotonic() + patience_s
    while True:
        try:
            return ray.get(getattr(handle, method).remote(*args), timeout=limit_s)
        except ray.exceptions.ActorUnavailableError as error:
            # The call may have been carried out; repeating it changes nothing.
            if time.monotonic() > deadline:
                raise QueueError(
                    f"queue {name!r} did not answer a {method} for {patience_s:.0f} s. Look at the "
                    "network and at the Ray logs of the actor's node, then restart this run"
                ) from error
            time.sleep(_RETRY_S)


class ActorCalls:
    """The methods of one actor, called from here.

    A method whose answer is lost is called again; that changes nothing.

    Parameters
    ----------
    handle
        Ray's handle of the actor.
    settings
        Of the queue, as it was made.
    """

    def __init__(self, handle: Any, settings: QueueAddress) -> None:
        self.handle = handle
        self.settings = settings
        self._given_up = False

    def call(self, method: str, *args: Any, limit_s: float | None = None) -> Any:
        """Call a method and wait for its answer, for ``limit_s`` seconds at most.

        Raises
        ------
        QueueError
            If the actor is gone, or has not answered for a minute; after that, for some seconds:
            a process that has given up must not wait a minute for each thing it does at its end.
        ray.exceptions.GetTimeoutError
            If there was no answer within ``limit_s``.
        """
        import ray

        patience_s = _GIVEN_UP_S if self._given_up else _OUTAGE_S
        try:
            answer = call_again(
                self.handle,
                self.settings.name,
                method,
                *args,
                patience_s=patience_s,
                limit_s=limit_s,
            )
        except ray.exceptions.RayActorError as error:
            raise self.gone(error) from error
        except QueueError:
            self._given_up = True
            raise
        self._given_up = False
        return answer

    def heartbeat(self, holder: str, producers: list[str]) -> None:
        """Say that a holder of leases, and producers, are alive."""
        import ray

        ray.get(self.handle.heartbeat.remote(holder, producers), timeout=_OUTAGE_S)

    def gone(self, error: Exception) -> QueueError:
        """Return an error that says that the actor is gone, and what became of its records."""
        name, spool = self.settings.name, self.settings.spool
        kept = (
            f"what was still in it is in its spool {spool}: a queue made with that spool goes on"
            if spool is not None
            else "and what was still in it is lost; a queue with a spool would have kept it"
        )
        return QueueError(
            f"the actor of queue {name!r} is gone, {kept}. The Ray logs of its node say why "
            f"({str(error).splitlines()[0]}). Restart the producer and this run"
        )


class Acknowledgements:
    """Sends acknowledgements without waiting for answers.

    One whose answer is lost is sent again: its lease would otherwise last as long as this process.
    """

    def __init__(self, calls: ActorCalls) -> None:
        self._calls = calls
        self._lock = threading.Lock()
        self._unconfirmed: deque[tuple[Any, list[int]]] = deque()

    def send(self, tokens: list[int]) -> None:
        """Acknowledge the leases of these tokens."""
        with self._lock:
            self._unconfirmed.append((self._calls.handle.ack.remote(tokens), tokens))

    def confirm(self) -> None:
        """Collect answers; send again what was not answered."""
        import ray

        with self._lock:
            sent, self._unconfirmed = self._unconfirmed, deque()
        for reference, tokens in sent:
            wait_s = _ACK_WAIT_S if len(sent) > _ACKS_UNDER_WAY else 0
            answered, _ = ray.wait([reference], timeout=wait_s)
            if not answered:
                with self._lock:
                    self._unconfirmed.append((reference, tokens))
                continue
            try:
                ray.get(reference)
            except ray.exceptions.ActorUnavailableError:
                self.send(tokens)
            except ray.exceptions.RayActorError as error:
                raise self._calls.gone(error) from error


class Heartbeat:
    """A thread that calls a method regularly for as long as its object exists.

    Parameters
    ----------
    beat
        A bound method, whose object this does not keep alive.
    interval_s
        Seconds between two calls.
    """

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self._beat = weakref.WeakMethod(beat)
        self._interval_s = interval_s
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread unless it runs."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=_beat, args=(self._beat, self._interval_s), name="heartbeat", daemon=True
            )
            self._thread.start()


def _beat(method: weakref.WeakMethod[Callable[[], None]], interval_s: float) -> None:
    import ray

    while True:
        time.sleep(interval_s)
        beat = method()
        if beat is None or not ray.is_initialized():
            return
        try:
            beat()
        except (ray.exceptions.ActorDiedError, SystemExit):
            return  # the queue is gone, as its users will notice; or Ray ends with this process
        except Exception as error:
            log.debug("heartbeat: %s", error)
        del beat
