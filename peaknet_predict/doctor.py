"""Checks of what a run needs, with what to do about each finding."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peaknet_predict import __version__
from peaknet_predict.process.files import expanded
from peaknet_predict.queues import ClusterError, QueueAddress, QueueError, connect_queue
from peaknet_predict.queues.cluster import NAMESPACE, connect, token_path
from peaknet_predict.sources import EventSource

_MALICIOUS_LIGHTNING = {"2.6.2", "2.6.3"}
_LITTLE_SPACE_GIB = 50
_STRANGER_S = 120.0  # most of it for importing Ray on a busy machine
_QUARANTINE_SHOWN = 5
_OURS = {"peaknet_predict"}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    verdict: Literal["ok", "warn", "FAIL"]
    text: str


def doctor(
    configs: list[str] | None = None,
    address: str | None = None,
    queues: list[str] | None = None,
    namespace: str = NAMESPACE,
    directory: str | None = None,
) -> int:
    """Check installation, GPU and Ray's security, and what is named; print a line for each.

    Parameters
    ----------
    configs
        Configurations of `predict` or `fit`, as they would be given with ``-c``: parsed together,
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
    checks: list[Callable[[], Iterator[Finding]]] = [_check_packages, _check_gpu, _check_token]
    if address is not None:
        checks.append(lambda: _check_cluster(address, queues or [], namespace))
    elif queues:
        raise ValueError("to look for queues, give the cluster's address too, e.g. --address auto")
    if directory is not None:
        checks.append(lambda: _check_directory(expanded(directory)))
    if configs:
        checks.append(lambda: _check_configuration(configs))
    failed = 0
    for check in checks:
        for finding in check():
            print(f"{finding.verdict:4}  {finding.text}", flush=True)
            failed += finding.verdict == "FAIL"
    print(f"{failed} failed" if failed else "nothing failed")
    return failed


def _check_packages() -> Iterator[Finding]:
    names = (
        "torch",
        "lightning",
        "ray",
        "numpy",
        "scipy",
        "h5py",
        "hdf5plugin",
        "jsonargparse",
        "safetensors",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{name} is not installed; install this package again with pip")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Finding(
        "ok", f"peaknet-predict {__version__}; Python {platform.python_version()}; {listed}"
    )
    if versions.get("lightning") in _MALICIOUS_LIGHTNING:
        yield Finding(
            "FAIL",
            f"lightning {versions['lightning']} is a malicious release that steals credentials: "
            "remove it, change every password and key this account had, install >=2.6.4",
        )


def _check_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield Finding("warn", f"no GPU: torch {torch.__version__} ({built}) sees none; runs on CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 1024**3
        yield Finding("ok", f"GPU {index}: {properties.name}, {memory:.0f} GiB")
    major = str(torch.version.cuda).split(".")[0]
    try:
        import cupy

        total = int(cupy.arange(4, dtype=cupy.int32).sum())
    except Exception as error:
        yield Finding(
            "FAIL",
            f"CuPy does not work on this GPU ({type(error).__name__}: {error}); torch uses CUDA "
            f"{major}: pip install 'peaknet-predict[cuda{major}]'",
        )
        return
    yield Finding("ok" if total == 6 else "FAIL", f"CuPy {cupy.__version__} computes on the GPU")


def _check_token() -> Iterator[Finding]:
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        yield Finding(
            "FAIL",
            "RAY_AUTH_MODE=disabled: a cluster started here lets everyone who reaches it run code "
            "as you; unset it, or set it to token",
        )
    path = token_path()
    if not path.exists():
        yield Finding("ok", f"no Ray token at {path} yet; an embedded cluster will make one")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield Finding(
            "FAIL",
            f"{path} has mode {mode:04o}: who can read it can run code as you; chmod 600 {path}",
        )
    else:
        yield Finding("ok", f"Ray token {path} is readable by its owner only")


def _check_cluster(address: str, queues: list[str], namespace: str) -> Iterator[Finding]:
    try:
        cluster = connect(address)
    except ClusterError as error:
        yield Finding("FAIL", str(error))
        return
    import ray  # not before: it reads its settings when it is imported

    alive = [node for node in ray.nodes() if node["Alive"]]
    gpus = ray.cluster_resources().get("GPU", 0)
    yield Finding(
        "ok", f"Ray {ray.__version__} cluster {cluster}: {len(alive)} nodes, {gpus:g} GPUs"
    )
    yield _check_admission(cluster)
    for name in queues:
        yield from _check_queue(QueueAddress(name, namespace=namespace, create=False))


def _check_admission(cluster: str) -> Finding:
    """Ask the cluster something without a token, as a stranger would, in a process of its own.

    What is not known is not called safe: only an answer, or a refusal for want of a token, counts.
    """
    program = (
        "from peaknet_predict.queues.cluster import ask_without_token; "
        f"print(ask_without_token({cluster!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as home:
        try:
            stranger = subprocess.run(
                [sys.executable, "-P", "-c", program],
                env=environment | {"HOME": home, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=_STRANGER_S,
            )
        except subprocess.TimeoutExpired:
            answer = f"no answer in {_STRANGER_S:.0f} s"
        else:
            lines = (stranger.stdout or stranger.stderr).splitlines()
            answer = lines[-1] if lines else f"the probe ended with {stranger.returncode}"
    if answer == "open":
        return Finding(
            "FAIL",
            f"{cluster} admits processes without a token: everyone who reaches it can run code as "
            "you. Start it with RAY_AUTH_MODE=token",
        )
    if answer == "closed":
        return Finding("ok", f"{cluster} admits nobody without its token")
    return Finding(
        "warn", f"whether {cluster} admits strangers could not be checked ({answer}); try again"
    )


def _check_queue(address: QueueAddress) -> Iterator[Finding]:
    problem = ""
    for kind in ("events", "results"):
        try:
            admin = connect_queue(address, kind).admin
        except QueueError as error:
            problem = str(error)
            continue
        now = admin.statistics()
        if now is None:
            yield Finding(
                "warn",
                f"queue {address.name!r}: {admin.size()} waiting; three methods only, as "
                f"psana-ray's. {admin.promise}",
            )
            return
        yield Finding(
            "warn" if now.problem else "ok",
            f"queue {address.name!r}: {now.ready} waiting, {now.leased} leased, "
            f"{now.acknowledged} acknowledged, {now.quarantined} in quarantine; {admin.promise}; "
            f"open producers: {', '.join(now.open_producers) or 'none'}"
            + (f"; {now.problem}" if now.problem else ""),
        )
        for line in now.quarantine[-_QUARANTINE_SHOWN:]:
            yield Finding("warn", f"queue {address.name!r}, in quarantine: {line}")
        return
    yield Finding("FAIL", problem)


def _check_directory(directory: Path) -> Iterator[Finding]:
    probe = directory / ".peaknet-predict-doctor"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding("FAIL", f"cannot write to {directory}: {error.strerror}")
        return
    free = shutil.disk_usage(directory).free / 1024**3
    yield Finding(
        "ok" if free >= _LITTLE_SPACE_GIB else "warn", f"{directory}: {free:.0f} GiB free"
    )


def _check_code(config: list[str]) -> Iterator[Finding]:
    """Name the code that configurations bring along: it runs as the user."""
    import yaml

    def class_paths(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("class_path"), str):
                yield value["class_path"]
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from class_paths(part)

    named = {
        name for path in config for name in class_paths(yaml.safe_load(Path(path).read_text()))
    }
    foreign = sorted(name for name in named if name.partition(".")[0] not in _OURS and "." in name)
    if foreign:
        yield Finding(
            "warn",
            f"the configuration runs code that is not this program's: {', '.join(foreign)}; it "
            "runs as you, so know where it comes from",
        )


def _trains(config: list[str]) -> bool:
    """Whether configurations are of `fit`: their data can be trained on."""
    import yaml
    from lightning import LightningDataModule

    name = ""
    for path in config:
        data = (yaml.safe_load(Path(path).read_text()) or {}).get("data") or {}
        name = data.get("class_path", name)
    module, _, class_name = name.rpartition(".")
    if not module:
        return False
    kind = getattr(importlib.import_module(module), class_name)
    loader = getattr(kind, "train_dataloader", LightningDataModule.train_dataloader)
    return loader is not LightningDataModule.train_dataloader


def _check_source(source: EventSource | None) -> Iterator[Finding]:
    if source is None:
        return
    try:
        source.check()
    except ValueError as error:
        yield Finding("FAIL", f"source: {error}")
    else:
        yield Finding("ok", f"source: {len(source)} events, readable from here")


def _check_configuration(config: list[str]) -> Iterator[Finding]:
    from peaknet_predict.lightning_cli import FitCLI, PredictCLI
    from peaknet_predict.module import PeakNetModule

    class Prediction(PredictCLI):
        """Everything is made; nothing runs."""

        def predict(self, **kwargs: object) -> None:
            pass

    class Training(FitCLI):
        """The same."""

        def fit(self, **kwargs: object) -> None:
            pass

    words = [word for path in config for word in ("-c", path)]
    said = io.StringIO()
    trains = False
    try:
        trains = _trains(config)
        with contextlib.redirect_stderr(said):
            cli = Training(["fit", *words]) if trains else Prediction(["predict", *words])
            model = cli.model
    except SystemExit:
        problem = next(
            (line for line in reversed(said.getvalue().splitlines()) if line.strip()), "see above"
        )
        yield Finding("FAIL", f"{' + '.join(config)}: {problem.strip()}")
    except Exception as error:
        yield Finding("FAIL", f"{' + '.join(config)}: {type(error).__name__}: {error}")
    else:
        yield Finding("ok", f"{' + '.join(config)}: parsed, network and data could be made")
        yield from _check_code(config)
        yield from _check_source(getattr(cli.datamodule, "source", None))
        if not trains and isinstance(model, PeakNetModule) and model.provenance.is_random:
            yield Finding(
                "warn",
                f"{type(model.net).__name__} predicts with random parameters (random_weights: "
                "true): its peaks will be random",
            )
