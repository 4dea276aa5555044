"""``peaknet-predict`` on a machine that may be as slow as it likes.

What ends a process that hangs must not end one that is only slow: a test that wants to see a
command end by itself starts it here. Ranks are started here too.
"""

from __future__ import annotations

import os
import sys

from peaknet_predict import __main__ as commands
from peaknet_predict.process import stopping, supervise
from tests.helpers.commands import HANGS_S

ONE_REQUEST = "ONE_REQUEST_S"  # in the environment: signals so close together are one


def main() -> None:
    stopping._AT_ONCE_S = HANGS_S
    stopping._ONE_REQUEST_S = float(os.environ.get(ONE_REQUEST, stopping._ONE_REQUEST_S))
    supervise._COMMAND = (sys.executable, "-P", "-m", "tests.helpers.patient")
    commands.main()


if __name__ == "__main__":
    main()
