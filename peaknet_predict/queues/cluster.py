"""Joining a Ray cluster, or starting an embedded one, with errors that say what to do.

Ray is imported inside the functions: it reads its security settings from the environment once, on
import, and the embedded cluster needs them set before.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peaknet_predict.process.stopping import listen_again
from peaknet_predict.queues.admission import admits_strangers
from peaknet_predict.queues.clusters_here import (
    FoundCluster,
    NoClusterError,
    cluster_of_mine,
    clusters_here,
    why_silent,
)

log = logging.getLogger(__name__)

NAMESPACE = "peaknet"
"""Ray namespace of the queues unless a configuration names another one."""


_ASK_S = 10.0  # without an answer by then, nothing is known about the cluster

_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class ClusterError(RuntimeError):
    """The Ray cluster cannot be used; the message says why and what to do."""


def token_path() -> Path:
    """Return where Ray looks for the cluster's token: `RAY_AUTH_TOKEN_PATH` or Ray's default."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(named) if named else Path.home() / ".ray" / "auth_token"
    except RuntimeError as error:
        raise ClusterError(
            "Ray keeps a cluster's token in the home directory, and this account has none: set "
            "HOME, or RAY_AUTH_TOKEN_PATH to a file in a directory of yours"
        ) from error


def ensure_private_token() -> Path:
    """Create the cluster's token if there is none, readable by its owner only.

    Ray would create it too, but readable by everyone under the usual umask, and anyone who can read
    the token can run code as us.
    """
    path = token_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
            except OSError:
                path.unlink()  # half a token would be taken for a whole one
                raise
    except OSError as error:
        raise ClusterError(
            f"the token of the embedded Ray cluster cannot be kept in {path} ({error.strerror}): "
            "set RAY_AUTH_TOKEN_PATH to a file in a directory of yours, or HOME to one that can be "
            "written"
        ) from error
    if path.stat().st_mode & 0o077:
        log.warning("%s was readable by others; it is now readable by its owner only", path)
        path.chmod(0o600)
    return path


def keep_to_loopback() -> None:
    """Make the Ray of this process listen on 127.0.0.1 only; call it before Ray is imported.

    The switch is named for other systems, but it is what makes Ray on Linux bind to the loopback
    interface instead of to every one. Ray reads it once, on import.
    """
    if "ray" in sys.modules and _LOOPBACK_SWITCH not in os.environ:
        log.warning(
            "Ray was imported before: its embedded cluster listens on all interfaces (protected by "
            "the token). Set %s=0 before starting Python to keep it to loopback",
            _LOOPBACK_SWITCH,
        )
        return
    os.environ[_LOOPBACK_SWITCH] = "0"


def connect(address: str) -> str:
    """Join the cluster at ``address``, once per process, and return its full address.

    Parameters
    ----------
    address
        ``local`` starts a cluster inside this process: it listens on the loopback interface only,
        is protected by a token and ends with the process. ``auto`` joins the cluster that
        ``RAY_ADDRESS`` names, or else this user's cluster on this machine, and logs which one that
        is. ``host:port`` joins that one.

    Raises
    ------
    ClusterError
        If there is no such cluster, it is dead, its token is another one, or it runs another Ray or
        Python. A dead one is found out within 20 s.
    """
    if "ray" in sys.modules and _ray().is_initialized():
        return current_address()
    found, named = None, ""
    if address == "auto":
        named = os.environ.get("RAY_ADDRESS", "")
        found = _found_here() if named in ("", "auto") else None
        address = named if found is None else found.address
    if address == "local" or _is_loopback(address):
        keep_to_loopback()
    if address == "local":
        # Ray protects a cluster that it starts by a token unless told otherwise.
        if "RAY_AUTH_TOKEN" not in os.environ:
            ensure_private_token()
        # Ray warns that the token is in use, which is as it should be.
        token_log = logging.getLogger("ray._private.authentication.authentication_token_setup")
        token_log.setLevel(logging.ERROR)
        # A left-over RAY_ADDRESS must not turn "start one here" into "join that one".
        os.environ.pop("RAY_ADDRESS", None)
    elif "RAY_AUTH_TOKEN" in os.environ or token_path().exists():
        # Ray looks for a token by itself only for 'auto', not for a cluster named by its address.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN" not in os.environ and token_path().stat().st_mode & 0o077:
            # Left as it is, unlike that of a cluster of our own: it may be shared on purpose.
            log.warning("others can read %s, and so run code as you: chmod 600 it", token_path())
    ray = _ray()
    if address != "local":
        _check_answers(address, found)
    settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING, **settings)
    except Exception as error:
        raise ClusterError(_explain(address, error)) from error
    finally:
        listen_again()  # Ray's handler of SIGTERM would end the process
    if found is not None or named:
        log.info("joined the Ray cluster at %s", found or f"{named}, which RAY_ADDRESS names")
    if address != "local":
        _warn_if_open(current_address())
    return current_address()


def _warn_if_open(cluster: str) -> None:
    """Warn of a cluster that lets in everyone, which our having a token does not rule out."""
    shown = os.environ.get("RAY_AUTH_MODE") == "token"
    if not shown or admits_strangers(cluster):
        log.warning(
            "the Ray cluster at %s %s, and lets in everyone who reaches it, to run code as you: "
            "start it with RAY_AUTH_MODE=token (`peaknet-predict doctor --address %s` checks it)",
            cluster,
            "asks for no token" if shown else "let this process in without a token",
            cluster,
        )


def ask_without_token(address: str) -> str:
    """Ask a cluster for its nodes; run this where ``RAY_AUTH_MODE`` is ``disabled``.

    Returns
    -------
    str
        ``open`` if the cluster answers, ``closed`` if it wants a token, or what went wrong.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address).get_all_node_info(timeout=_ASK_S)
    except AuthenticationError:
        return "closed"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "open"


def current_address() -> str:
    """Return the address under which another process joins the cluster this one is in."""
    return str(_ray().get_runtime_context().gcs_address)


def vital_signs() -> dict[str, str]:
    """Return what answers while Ray lives: the head's address and this node's socket."""
    ray = _ray()
    here = ray.get_runtime_context().get_node_id()
    signs = {"head": current_address()}
    for node in ray.nodes():
        if node["NodeID"] == here:
            signs["node"] = node["RayletSocketName"]
    return signs


def known_actors() -> list[str]:
    """Return the named actors of the cluster, each with its namespace."""
    found = _ray().util.list_named_actors(all_namespaces=True)
    return [f"{actor['namespace']}/{actor['name']}" for actor in found]


def disconnect() -> None:
    """Leave the cluster; an embedded one ends with that."""
    _ray().shutdown()


class ProcessLostError(RuntimeError):
    """The process that ran a function in the cluster died."""


class ClusterTask:
    """A function that runs in another process of the cluster."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def done(self) -> bool:
        """Whether the function has returned or raised."""
        ready, _ = _ray().wait([self._reference], timeout=0)
        return bool(ready)

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the function and return what it returned, or raise what it raised.

        Raises
        ------
        TimeoutError
            If it still runs after ``timeout_s`` seconds.
        ProcessLostError
            If its process died.
        """
        ray = _ray()
        try:
            return ray.get(self._reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"still running after {timeout_s} s") from error
        except ray.exceptions.RayTaskError as error:
            # Ray's own error says the same with the traceback of the other process.
            raise error.cause from error
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise ProcessLostError(str(error).splitlines()[0]) from error


def run_in_cluster(function: Callable[..., Any], *args: Any, **kwargs: Any) -> ClusterTask:
    """Run a function of an importable module in another process on this node of the cluster.

    It runs on this node, because paths among the arguments are this node's.

    It claims no CPU from Ray: a feeder or a file writer must start even where Ray has given all
    cores away.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = _ray().get_runtime_context().get_node_id()
    task = _ray().remote(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )(function)
    return ClusterTask(task.remote(*args, **kwargs))


def _ray() -> Any:
    import ray

    return ray


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _found_here() -> FoundCluster:
    """Return the cluster behind ``auto``: this user's, on this machine."""
    try:
        return cluster_of_mine(clusters_here())
    except NoClusterError as error:
        raise ClusterError(str(error)) from error


def _check_answers(address: str, found: FoundCluster | None) -> None:
    """Find out in seconds that nothing answers there; Ray would retry for minutes."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address} names a Ray Client proxy, which is far too slow for detector images; "
            "give the cluster's own address, e.g. host:6379, or run inside the cluster with 'auto'"
        )
    why = why_silent(address)
    if why is None:
        return
    if found is not None:
        raise ClusterError(
            f"the Ray cluster at {found}, is dead: its head does not answer ({why}). End what is "
            "left of it (`ray stop` ends every Ray of yours on this machine, those of runs too), "
            "and start one with `ray start --head`"
        )
    raise ClusterError(
        f"nothing answers at {address} ({why}). Check host and port (`ray status` on the head node "
        "shows them), or start a cluster with `ray start --head`"
    )


def _explain(address: str, error: Exception) -> str:
    """Explain what a failed ``ray.init`` means, and what to do."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(chain)
    if "auth" in text.lower() and "token" in text.lower():
        return (
            f"the Ray cluster at {address!r} refused our token. Every process needs the token that "
            f"the cluster was started with: copy it to {token_path()} (readable by you only), or "
            "set RAY_AUTH_TOKEN_PATH, and leave RAY_AUTH_MODE=token"
        )
    if "ersion mismatch" in text:
        return (
            f"the Ray cluster at {address!r} runs another version of Ray or Python than this "
            f"environment: {_first_lines(text)}. Producer, predictor and writer need environments "
            "with the same Ray version and Python minor version"
        )
    if "Failed to connect to GCS" in text:
        return (
            f"what answers at {address!r} does not speak as a Ray head of our version: check host "
            "and port (`ray status` on the head node shows them) and the version of Ray there"
        )
    return f"cannot use the Ray cluster at {address!r}: {_first_lines(text)}"


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:6] if line.strip())
