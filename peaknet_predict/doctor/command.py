"""The command: which checks are made, and a line for each finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peaknet_predict.doctor.cluster import check_cluster
from peaknet_predict.doctor.configuration import check_configuration
from peaknet_predict.doctor.finding import Finding
from peaknet_predict.doctor.machine import check_directory, check_gpu, check_packages, check_token
from peaknet_predict.process.files import expanded
from peaknet_predict.queues.cluster import NAMESPACE


def doctor(
    configs: list[str] | None = None,
    address: str | None = None,
    queues: list[str] | None = None,
    namespace: str = NAMESPACE,
    directory: str | None = None,
) -> int:
    """Check installation, GPU, Ray's security and the given items; print a line for each.

    Parameters
    ----------
    configs
        Configurations of `predict` or `fit`, by name or path as for ``-c``: parsed together,
        and everything in them is made (weights are loaded), but nothing runs.
    address
        A Ray cluster to join: ``auto`` or ``host:port``.
    queues
        Names of queues that must be in that cluster.
    namespace
        Ray namespace of the queues.
    directory
        Where CXI files are to go: must be writable and have room.

    Returns
    -------
    int
        The number of failed checks.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [check_packages, check_gpu, check_token]
    if address is not None:
        checks.append(lambda: check_cluster(address, queues or [], namespace))
    elif queues:
        raise ValueError("to look for queues, give the cluster's address too, e.g. --address auto")
    if directory is not None:
        checks.append(lambda: check_directory(expanded(directory)))
    if configs:
        checks.append(lambda: check_configuration(configs))
    failed = 0
    for check in checks:
        for finding in check():
            print(f"{finding.verdict:4}  {finding.text}", flush=True)
            failed += finding.verdict == "FAIL"
    print(f"{failed} failed" if failed else "nothing failed")
    return failed
