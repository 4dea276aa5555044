"""The real file system with faults, for whatever takes a `FileSystem`."""

from __future__ import annotations

import errno
import os
from typing import Any


class FailingDisk:
    """Forwards every call to `os`, but those that are named fail as on a full disk.

    Attributes
    ----------
    fails
        Names of calls that fail.
    done
        Names of all calls so far, in order.
    """

    def __init__(self, *fails: str) -> None:
        self.fails = set(fails)
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.done.append(name)
            if name in self.fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return getattr(os, name)(*args)

        return call
