"""Checks of the machine: packages, GPU, Ray's token, room for files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from peaknet_predict import __version__
from peaknet_predict.doctor.finding import Finding
from peaknet_predict.queues.cluster import token_path

_MALICIOUS_LIGHTNING = {"2.6.2", "2.6.3"}
_LITTLE_SPACE_GIB = 50


def check_packages() -> Iterator[Finding]:
    """Name the versions of what is installed, and what is missing."""
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


def check_gpu() -> Iterator[Finding]:
    """See whether torch and CuPy compute on the GPUs of this machine."""
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


def check_token() -> Iterator[Finding]:
    """See whether Ray asks for a token, and whether only its owner can read it."""
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
            f"{path} has mode {mode:04o}: its readers can run code as you; chmod 600 {path}",
        )
    else:
        yield Finding("ok", f"Ray token {path} is readable by its owner only")


def check_directory(directory: Path) -> Iterator[Finding]:
    """See whether files can be written to a directory, and how much room it has."""
    parent = directory.parent
    if not directory.exists() and parent.is_dir() and os.access(parent, os.W_OK):
        yield Finding("ok", f"{directory} is not there yet; it will be made")
        return
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
