"""``run``: the peaks of files in one command, which is `predict` with the configuration ``files``.

Nothing runs here. The options become words for `predict`: the kind of files, the machine, the
number of events in a batch, and where everything goes.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
from jsonargparse import ArgumentParser

from peaknet_predict.process.files import expanded
from peaknet_predict.sources import EventSource, Hdf5Source, ImageFileSource, NpzSource
from peaknet_predict.sources.base import resolve_paths

log = logging.getLogger(__name__)

_GPU_BATCH_PIXELS = 2**25  # 32 events of 4 x 512 x 512, with which GPUs were measured
_MAX_GPU_BATCH = 32


def add_run_options(parser: ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument(
        "files", nargs="+", help="files or quoted patterns: HDF5 (NeXus, CXI, DECTRIS), npz, CBF"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="where CXI files and records go"
    )
    parser.add_argument(
        "--geometry", metavar="FILE", help="CrystFEL's .geom of the detector: its bad pixels"
    )
    parser.add_argument(
        "--threshold", type=float | None, metavar="X", help="higher: fewer peaks (default: 0)"
    )
    parser.add_argument(
        "--min-peaks",
        "--min_peaks",
        type=int | None,
        metavar="N",
        help="events with fewer peaks are counted, not written (default: 10)",
    )
    parser.add_argument(
        "--source",
        type=dict[str, Any],
        default={},
        help="options of the files' source, as --source.panel_height 185 (docs/input-data.md)",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="CONFIG",
        help="configurations on top, by name or path: -c models/snr, -c topology/two_gpus",
    )


def predict_words(
    files: Sequence[str],
    output: str,
    geometry: str | None = None,
    threshold: float | None = None,
    min_peaks: int | None = None,
    source: Mapping[str, Any] | None = None,
    config: Sequence[str] = (),
) -> list[str]:
    """Return the words of the command line of `predict` that does the work.

    Parameters
    ----------
    files
        Paths and glob patterns, of files of one kind.
    output
        Folder for everything that the run writes.
    geometry
        CrystFEL geometry whose bad regions and masks apply to every event.
    threshold
        The operating point, in log odds.
    min_peaks
        Events with fewer peaks are not written.
    source
        Options of the source, by name.
    config
        Names and paths of configurations that override the rest.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the files are of several kinds, or the first one cannot be read.
    """
    paths = resolve_paths(list(files))
    kind = _kind_of_all(paths)
    options = dict(source or {})
    directory = expanded(output)
    model: dict[str, Any] = {}
    if geometry is not None:
        model["mask"] = geometry
    if threshold is not None:
        model["threshold"] = threshold
    quarantine = str(directory / "quarantine")
    results: dict[str, Any] = {
        "directory": str(directory),
        "balance": str(directory / "predict_balance.json"),
        "queue": {"quarantine": quarantine},
    }
    if min_peaks is not None:
        results["min_peaks"] = min_peaks
    data: dict[str, Any] = {
        "queue": {"quarantine": quarantine},
        "source": {
            "class_path": f"peaknet_predict.sources.{kind.__name__}",
            "init_args": {"path": list(files), **options},
        },
    }
    settings = {"output": results, "model": {"init_args": model}, "data": {"init_args": data}}
    # The options come behind the user's configurations, because a network's may say `mask: null`.
    names = [*_machine(kind, paths[0], options), *config, json.dumps(settings)]
    return ["predict", *(word for name in ["files", *names] for word in ("-c", name))]


def _kind_of_all(paths: Sequence[Path]) -> type[EventSource]:
    """Return the source that reads the files, by what they hold and not by their names."""
    kinds = {_kind(path): path for path in reversed(paths)}
    if len(kinds) > 1:
        listed = "; ".join(f"{kind.__name__} would read {path}" for kind, path in kinds.items())
        raise ValueError(f"files of several kinds cannot be one run: {listed}")
    return next(iter(kinds))


def _kind(path: Path) -> type[EventSource]:
    if h5py.is_hdf5(path):
        return Hdf5Source
    return NpzSource if zipfile.is_zipfile(path) else ImageFileSource


def _machine(kind: type[EventSource], path: Path, options: Mapping[str, Any]) -> list[str]:
    """Return the configurations for this machine."""
    from torch import cuda  # takes seconds

    if not cuda.is_available():
        return ["topology/cpu"]
    size = _gpu_batch_size(kind, path, options)
    return ["topology/one_gpu", json.dumps({"data": {"init_args": {"batch_size": size}}})]


def _gpu_batch_size(kind: Any, path: Path, options: Mapping[str, Any]) -> int:
    """Return how many events make a batch, from the size of a file's first one."""
    _, image, _ = next(iter(kind(str(path), **options).events()))
    pixels: int = max(image.size, 1)
    return min(max(_GPU_BATCH_PIXELS // pixels, 1), _MAX_GPU_BATCH)
