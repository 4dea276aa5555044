"""A Ray cluster that may be killed, in a separate process that queries the queues on request.

A process that has joined a cluster dies with it, so the harness never joins one. It writes lines of
JSON to this process, ``{"id", "ask", ...}``, and reads the answers. The queues that are made here
have small segments, so that their spools rotate all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).parents[3]
SEGMENT_BYTES = 100_000
_HEAD_GONE_S = 8  # after so long without its head, a process of Ray ends; 60 by default
_PATIENCE_S = 60.0

Program = Literal["raylet", "gcs_server"]


def environment() -> dict[str, str]:
    """Return what every process of a run has in its environment, apart from a user's own."""
    own = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    return own | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONFAULTHANDLER": "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(_HEAD_GONE_S),
    }


class Cluster:
    """A cluster, and what can be asked of its queues."""

    def __init__(self, log: Path) -> None:
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                start_new_session=True,
            )
        self._answers: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._asked = 0
        self._queue_pids: dict[str, int] = {}
        assert self._process.stdout is not None
        self.address: str = json.loads(self._process.stdout.readline())["address"]
        threading.Thread(target=self._listen, daemon=True).start()

    def make(self, kind: str, address: Mapping[str, Any], foreign: bool = False) -> None:
        """Make a queue, or another program's."""
        request = {"kind": kind, "address": dict(address), "foreign": foreign}
        deadline = time.monotonic() + 2 * _PATIENCE_S
        # An earlier one may still hold the spool, for as long as it takes to die.
        while self.ask("make", **request, timeout_s=_PATIENCE_S) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"queue {address['name']} cannot be made; see the cluster's log")
            time.sleep(1.0)
        self.pid_of(str(address["name"]))

    def statistics(self, name: str) -> dict[str, Any] | None:
        """Return what a queue counts; None if it does not answer, or counts nothing."""
        found: dict[str, Any] | None = self.ask("statistics", name=name)
        return found

    def pid_of(self, name: str) -> int | None:
        """Return the process of a queue; None if it does not answer."""
        pid = self.ask("pid", name=name)
        if pid is not None:
            self._queue_pids[name] = int(pid)
        return pid if pid is None else int(pid)

    def first_missing(self, name: str, stream: str, rank: int) -> int | None:
        """Return the first idx that a queue has not had; None if it does not answer."""
        found: int | None = self.ask("first_missing", name=name, stream=stream, rank=rank)
        return found

    def ask(self, what: str, timeout_s: float = 2.0, **more: Any) -> Any:
        """Ask; None if there is no answer in time, or an error instead of one."""
        self._asked += 1
        number = self._asked
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": number, "ask": what, **more}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            return None
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers, timeout_s)
            return self._answers.pop(number, None)

    def kill(self, program: Program) -> None:
        """Kill a process of the cluster itself."""
        for child in children(self._process.pid):
            command = Path(f"/proc/{child}/cmdline").read_text().split("\0")[0]
            if Path(command).name == program:
                os.kill(child, signal.SIGKILL)
                return
        raise LookupError(f"no {program} among the children of {self._process.pid}")

    def end(self) -> None:
        """End all of it; what holds a spool too."""
        pids = [*self._queue_pids.values(), *children(self._process.pid), self._process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert stream is not None
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                answer = json.loads(line)
                with self._changed:
                    self._answers[answer["id"]] = answer["answer"]
                    self._changed.notify_all()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(word) for word in words]


def _rotating_actor() -> type[Any]:
    from peaknet_predict.queues import actor

    class RotatingQueueActor(actor.QueueActor):
        """A queue whose spool has small segments."""

        def __init__(self, kind: Any, address: Any) -> None:
            from peaknet_predict.queues import actor
            from peaknet_predict.queues.spool import Spool

            actor.Spool = partial(Spool, segment_bytes=SEGMENT_BYTES)  # type: ignore
            super().__init__(kind, address)

    return RotatingQueueActor


def _serve() -> None:
    from peaknet_predict.queues import client
    from peaknet_predict.queues.address import QueueAddress
    from peaknet_predict.queues.cluster import connect
    from tests.helpers.foreign import make_three_method_queue

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints what actors say: not among the answers
    address = connect("local")
    import ray  # which reads its security settings when it is imported

    client.QueueActor = _rotating_actor()  # type: ignore
    queues: dict[str, Any] = {}
    speaking = threading.Lock()

    def answer(ask: str, name: str = "", **more: Any) -> Any:
        if ask == "make":
            where = QueueAddress(**more["address"])
            if more["foreign"]:
                make_three_method_queue(where.name, where.namespace, where.max_events)
            queues[where.name] = where, client.connect_queue(where, more["kind"])
            return True
        where, queue = queues[name]
        if ask == "statistics":
            found = queue.admin.statistics()
            return None if found is None else asdict(found)
        if ask == "first_missing":
            return queue.producer.first_missing(more["stream"], more["rank"])
        handle = ray.get_actor(where.name, namespace=where.namespace)
        return ray.get(handle.__ray_call__.remote(lambda actor: os.getpid()), timeout=_PATIENCE_S)

    def reply(request: dict[str, Any]) -> None:
        number = request.pop("id")
        try:
            found = answer(**request)
        except Exception as error:
            print(f"{request}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            found = None
        with speaking:
            print(json.dumps({"id": number, "answer": found}), file=answers, flush=True)

    print(json.dumps({"address": address}), file=answers, flush=True)
    for line in sys.stdin:
        # Each in a thread of its own: a queue may be stopped.
        threading.Thread(target=reply, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    _serve()
