"""Stands for a rank in tests of the supervisor: a process that does what it is told at once.

Its words are the directory where it notes its process id, and what each rank does: ``start`` to be
at work, an exit code, ``kill``, ``term`` or ``stop`` for itself, ``end`` to wait for SIGTERM and
leave as an interrupted rank does, ``ignore`` to be deaf to it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from peaknet_predict.process.supervise import note_started, stay_with_supervisor


def main() -> None:
    stay_with_supervisor()
    rank = int(os.environ["LOCAL_RANK"])
    directory, *plans = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(3))
    if "ignore" in plans[rank]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    name = Path(directory) / str(rank)
    name.with_suffix(".tmp").write_text(str(os.getpid()))
    name.with_suffix(".tmp").rename(name)
    for word in plans[rank].split("+"):
        if word == "start":
            note_started(rank)
            while len(list(Path(os.environ["PEAKNET_PREDICT_STARTED"]).iterdir())) < len(plans):
                time.sleep(0.01)
        elif word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "term":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif word == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif word in ("end", "ignore"):
            time.sleep(600)
        else:
            sys.exit(int(word))


if __name__ == "__main__":
    main()
