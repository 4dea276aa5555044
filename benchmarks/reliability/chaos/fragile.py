"""``peaknet-predict``, which may die at the moments that a fault from outside hardly ever hits."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path

from peaknet_predict.cli import run
from peaknet_predict.process import supervise
from peaknet_predict.queues.native import NativeReader
from peaknet_predict.types import EventId

CHANCE = "CHAOS_DIES_BEFORE_ACK"
"""In the environment: how likely that is, for each acknowledgement."""
DEATHS = "CHAOS_DEATHS"
"""In the environment: the directory where a process says that it dies so."""


def main() -> None:
    """Be `peaknet-predict`, but perhaps die between a file's name and its acknowledgement."""
    acknowledge = NativeReader.ack

    def ack(self: NativeReader, ids: Iterable[EventId]) -> None:
        if "LOCAL_RANK" not in os.environ:  # a rank may die a step earlier
            perhaps_die()
        acknowledge(self, ids)

    NativeReader.ack = ack  # type: ignore[method-assign]
    supervise._COMMAND = (*supervise._COMMAND[:2], "-m", __spec__.name)
    run()


def perhaps_die() -> None:
    """Be killed, with the chance that the environment gives."""
    if random.random() < float(os.environ.get(CHANCE, "0")):
        role = "rank-" if "LOCAL_RANK" in os.environ else ""
        (Path(os.environ[DEATHS]) / f"{role}{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
