"""Small disks that can be full."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

_SIZE = "64m"
_BALLAST = "ballast"


class Disk:
    """A file system in memory at a directory; a plain directory where mounting is not allowed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=700", "chaos", str(directory)]
        self.can_be_full = os.getuid() == 0 and (
            subprocess.run(mount, capture_output=True, check=False).returncode == 0
        )

    def fill(self) -> None:
        """Leave no room."""
        with open(self.directory / _BALLAST, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**16))
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x")

    def free(self) -> None:
        """Make room again."""
        (self.directory / _BALLAST).unlink(missing_ok=True)

    def end(self, keep: bool = False) -> None:
        """Unmount it; what was on it is gone, or copied to beside it."""
        if keep and self.can_be_full:
            self.free()
            copy = self.directory.with_name(f"{self.directory.name}-kept")
            shutil.copytree(self.directory, copy)
        if self.can_be_full:
            subprocess.run(["umount", "-l", str(self.directory)], check=False)
