"""Where ranks find each other: a store of torch's that listens at one address, and no other.

The store asks for no token. Torch itself would have it listen on every address of the machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""In a rank's environment: the store is there, and no rank makes one of its own."""

_LONGEST_WAIT = timedelta(minutes=5)


def meeting_variables(address: str, port: int) -> dict[str, str]:
    """Return what the environment of every rank must say, so that the ranks meet there."""
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        AGENT_STORE: "True",
    }
    if address == LOOPBACK:
        # The ranks' own sockets too, which no token protects either.
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


@contextlib.contextmanager
def hosted_store(address: str, port: int) -> Iterator[None]:
    """Keep the store, at one address of this machine, while the block runs.

    Raises
    ------
    OSError
        If this machine cannot listen there.
    """
    from torch import distributed

    store = distributed.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_LONGEST_WAIT,
        master_listen_fd=_listen(address, port).detach(),
    )
    yield
    del store


@contextlib.contextmanager
def meeting_of_ranks(address: str, port: int, nodes: int, is_first: bool) -> Iterator[None]:
    """Let this process, one of the ranks, find the others; the first rank keeps the store.

    For ranks that somebody else has started, such as `srun`.

    Parameters
    ----------
    address, port
        Where several machines meet; ranks of one machine meet on its loopback interface.
    nodes
        How many machines there are.
    is_first
        Whether this is rank 0.
    """
    if nodes == 1:
        address = LOOPBACK
    os.environ.update(meeting_variables(address, port))
    if not is_first:
        yield
        return
    if nodes > 1 and _is_loopback(address):
        log.warning(
            "%s is an address of this machine alone: ranks on other machines cannot reach it. If "
            "there are any, set MASTER_ADDR to an address of this machine in their network",
            address,
        )
    with hosted_store(address, port):
        yield


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(OSError):
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    return False


def _listen(address: str, port: int) -> socket.socket:
    """Listen at one address of this machine, and at no other."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise OSError(
            f"the ranks cannot meet at {address}:{port} ({error.strerror}): set MASTER_ADDR to an "
            "address of the first machine and MASTER_PORT to a free port there"
        ) from error
