"""What becomes of objects that cannot be unpickled where a queue's process is handed them."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.wire import cannot_unpickle

log = logging.getLogger(__name__)


def contain_unpickling() -> None:
    """Have an `Opaque` in place of each object that this process cannot unpickle, from now on.

    Ray unpickles what an actor is handed before any method of the actor is called. An object that
    raises `SystemExit` or `KeyboardInterrupt` there ends the actor's event loop without a word:
    nobody is answered any more. One that raises something else fails a call of its producer, who
    puts it again, or ends.
    """
    if "ray" not in sys.modules:
        return  # nobody hands this process anything
    from ray._private.serialization import SerializationContext
    from ray.exceptions import RayError

    # No interface of Ray's; of another Ray, whose insides are others, nothing is changed.
    unpickle = getattr(SerializationContext, "_deserialize_msgpack_data", None)
    if unpickle is None:
        log.warning("this Ray has no place where objects that cannot be unpickled can be caught")
        return
    if hasattr(unpickle, "__wrapped__"):
        return  # done before

    @functools.wraps(unpickle)
    def contained(*args: Any, **options: Any) -> Any:
        try:
            found = unpickle(*args, **options)
        except BaseException as error:
            log.warning("an object that was put cannot be unpickled: %s", type(error).__name__)
            return cannot_unpickle(error)
        # Ray would raise it, in place of handing it on.
        return sanitized(found) if isinstance(found, RayError) else found

    SerializationContext._deserialize_msgpack_data = contained
