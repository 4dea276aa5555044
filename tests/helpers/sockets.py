"""At which addresses processes listen."""

from __future__ import annotations

import os
from pathlib import Path

LOOPBACK = {
    "0100007F",  # 127.0.0.1, as the kernel prints it
    "0000000000000000FFFF00000100007F",  # the same, of an IPv6 socket
    "00000000000000000000000001000000",  # ::1
}


def listening(pids: list[int]) -> set[str]:
    """Return the addresses at which these processes listen, as /proc has them."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor))
            except OSError:
                continue  # closed meanwhile
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.partition(":")[0])
    return found
