"""A sentence and a record for a process that can no longer write them itself.

Ray ends a process from C++, without a word, when its node's Ray has died; so does the kernel when
memory is short. So a small process beside it, which needs neither torch nor Ray, is told what to
write, and writes it if the other one ends without reporting that it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peaknet_predict.process.balance import write_balance

_CONNECT_S = 3.0


class LastWords:
    """Keeps ready what must be written if this process ends without writing it.

    Parameters
    ----------
    who
        The command, for the sentence.
    path
        Where its record goes; None for no record.
    next_step
        What the user can do next.
    vital_signs
        Addresses that answer for as long as Ray lives: the head's ``host:port`` under ``head``, and
        the path of this node's socket under ``node``.
    """

    def __init__(
        self,
        who: str,
        path: str | Path | None,
        next_step: str,
        vital_signs: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "peaknet_predict.process.last_words"],
            stdin=subprocess.PIPE,
            # Ctrl-C and a batch system's signal are for the other one.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._tell(
            {
                "who": who,
                "path": None if path is None else str(Path(path).absolute()),
                "next_step": next_step,
                "vital_signs": dict(vital_signs or {}),
            }
        )

    def note(self, record: Mapping[str, Any]) -> None:
        """Replace the record that is kept ready; takes a few microseconds."""
        self._tell({"record": record})

    def done(self) -> None:
        """Report that this process has written everything itself."""
        if self._process.poll() is None:
            self._tell({"done": True})
        stream = self._process.stdin
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):
                stream.close()
            self._process.wait()

    def _tell(self, what: Mapping[str, Any]) -> None:
        stream = self._process.stdin
        if stream is None or stream.closed:
            return
        # The pipe is full or broken; the next record says as much.
        with contextlib.suppress(OSError):
            # An incomplete line must not spoil the next one.
            os.write(stream.fileno(), f"\n{json.dumps(what, default=str)}\n".encode())


def main() -> None:
    """Listen until the other process reports that it is done, or ends."""
    known: dict[str, Any] = {}
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # an incomplete line
            known |= json.loads(line)
    if "who" in known and not known.get("done"):
        speak(known)


def speak(known: Mapping[str, Any]) -> None:
    """Say the sentence, and write the record."""
    problem = (
        f"{known['who']} ended without a word: {_cause(known['vital_signs'])}. What it held goes "
        "back when its leases end"
    )
    where = ""
    if known["path"] is not None and "record" in known:
        if _is_in_balance(known["path"], known["record"]):
            where = f"; the balance of its run, {known['path']}, has what it had brought to an end"
        else:
            where = _write(known["path"], known["record"] | {"problem": problem})
    stamp = time.strftime("%H:%M:%S")
    print(f"{stamp} ERROR {problem}{where}. {known['next_step']}", file=sys.stderr, flush=True)


def _is_in_balance(path: str, record: Mapping[str, Any]) -> bool:
    """Whether another process of the same run has struck a balance of all of its writers."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return "run" in record and found["run"] == record["run"] and bool(found["writers"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(path: str, record: Mapping[str, Any]) -> str:
    try:
        write_balance(path, record)
    except OSError as error:
        return f"; its record could not be written: {error}"
    return f"; what it had counted is in {path}"


def _cause(vital_signs: Mapping[str, str]) -> str:
    head, node = vital_signs.get("head"), vital_signs.get("node")
    if head is not None and not _answers(socket.AF_INET, _host_and_port(head)):
        return f"the head of its Ray cluster, {head}, does not answer, and Ray ends its processes"
    if node is not None and not _answers(socket.AF_UNIX, node):
        return "the Ray processes of this machine have died, and Ray ends those that used them"
    return "killed (SIGKILL), perhaps because memory was short: see `dmesg`"


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _answers(family: int, address: Any) -> bool:
    with socket.socket(family) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


if __name__ == "__main__":
    main()
