"""Which Ray clusters run on this machine: where, whose, since when, and whether they answer."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ADDRESS_FLAG = "--gcs-address="
_CONNECT_S = 5.0
_ANSWER_S = 10.0

# What an HTTP/2 client says first, with empty settings (RFC 9113, section 3.4). A Ray head speaks
# gRPC, so HTTP/2, and answers at once.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@dataclass(frozen=True, slots=True)
class FoundCluster:
    """A cluster that has a node on this machine.

    Attributes
    ----------
    address
        host:port of its head.
    user
        Whose it is.
    mine
        Whether it is this user's.
    started_at
        When this machine's node was started, seconds since 1970.
    embedded
        Whether it was started within another program and ends with it, as with the address
        ``local``.
    stopped
        Whether its node is suspended, so that it answers nobody.
    """

    address: str
    user: str
    mine: bool
    started_at: float
    embedded: bool = False
    stopped: bool = False

    def __str__(self) -> str:
        age = _age(time.time() - self.started_at)
        return f"{self.address} of {self.user}, started {age} ago"


class NoClusterError(RuntimeError):
    """No cluster here can be joined without naming it; says why, and what to do."""


def cluster_of_mine(clusters: Iterable[FoundCluster]) -> FoundCluster:
    """Return the only cluster of this user among those found.

    Parameters
    ----------
    clusters
        What `clusters_here` gives.

    Raises
    ------
    NoClusterError
        If there is none, or if there are several.
    """
    found = list(clusters)
    standing = [one for one in found if one.mine and not one.embedded]
    answering = [one for one in standing if not one.stopped]
    if len(answering) == 1:
        return answering[0]
    if answering:
        several = f"several Ray clusters of yours run here: {_listed(answering)}"
        raise NoClusterError(f"{several}. Name one as host:port, or in RAY_ADDRESS")
    why = "no Ray cluster of yours runs on this machine"
    if standing:
        why = f"the Ray cluster at {_listed(standing)}, is suspended and answers nobody"
    if embedded := [one for one in found if one.mine and one.embedded]:
        why += f"; a run's own, which ends with it, is at {_listed(embedded)}"
    if others := [one for one in found if not one.mine]:
        why += f"; others' do: {_listed(others)}"
    raise NoClusterError(
        f"{why}. Start one with `ray start --head`, set RAY_ADDRESS=host:port, or use the address "
        "'local' for an embedded one"
    )


def clusters_here() -> Iterator[FoundCluster]:
    """Find the nodes of Ray clusters on this machine, one for each cluster and user."""
    import psutil

    names = ["pid", "cmdline", "uids", "username", "create_time", "status", "ppid"]
    seen: set[tuple[str, str]] = set()
    for process in sorted(psutil.process_iter(names), key=lambda one: one.info["create_time"] or 0):
        said: dict[str, Any] = process.info
        words = said["cmdline"] or []
        if not words or Path(words[0]).name != "raylet" or said["status"] == psutil.STATUS_ZOMBIE:
            continue
        address = next((word for word in words if word.startswith(_ADDRESS_FLAG)), "")
        address = address.removeprefix(_ADDRESS_FLAG)
        user = str(said["username"])
        if not address or (address, user) in seen:
            continue
        seen.add((address, user))
        yield FoundCluster(
            address,
            user,
            said["uids"] is not None and said["uids"].real == os.getuid(),
            float(said["create_time"]),
            _is_embedded(psutil, said["ppid"]),
            said["status"] == psutil.STATUS_STOPPED,
        )


def _is_embedded(psutil: Any, parent: int) -> bool:
    """Whether a node belongs to a program: its parent is Python, and not `ray start --block`."""
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return False
    return bool(words) and "python" in Path(words[0]).name and "start" not in words


def why_silent(address: str) -> str | None:
    """Return why no Ray head answers at an address, within 15 seconds; None if one does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return None  # it would wait for a handshake
            connection.settimeout(_ANSWER_S)
            connection.sendall(_GREETING)
            return None if connection.recv(1) else "the connection is closed at once"
    except TimeoutError:
        return f"no answer within {_ANSWER_S:g} s"
    except (OSError, ValueError) as error:
        return str(error)


def _listed(clusters: Iterable[FoundCluster]) -> str:
    return "; ".join(map(str, clusters))


def _age(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"
