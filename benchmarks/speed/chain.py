"""The whole chain of real processes: events a second, and how busy each stage is.

`feed` (one or several), `predict` and `write-cxi` run as commands, against queues in an embedded
Ray. The table names the bottleneck: the stage whose busiest thread has no time left::

    python -m benchmarks.speed.chain [--model free] [--topology cpu] [--producers 4]
        [--dtype float32] [--shape 4 512 512] [--events 4000] [--file] [--write]

Without ``--file``, producers repeat images in memory; with it they read an HDF5 file. Without
``--write``, the writer filters every event, so that no disk is measured. The model ``free`` is a
network that costs nothing; others are the names of configurations in ``models/``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks.reliability.chaos.cluster import REPOSITORY
from benchmarks.reliability.soak import actor_pid
from peaknet_predict.queues import Admin, QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect
from peaknet_predict.sources import EventSource
from peaknet_predict.types import Image

_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.25
_FRAMES = 64  # of the file; every producer reads it in a loop


class Repeated(EventSource):
    """A few random images over and over: a producer that costs nothing but its puts.

    Parameters
    ----------
    num_events
        How many.
    shape
        (panels, rows, columns) of an image.
    dtype
        Of the pixels.
    """

    def __init__(self, num_events: int, shape: list[int], dtype: str) -> None:
        self.num_events = num_events
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        images = frames(8, self.shape, self.dtype)
        for idx in range(first, self.num_events):
            yield idx, images[idx % len(images)], 9500.0


class Free(nn.Module):
    """A network that costs nothing and finds nothing."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 2, H, W) that say "no peak" everywhere."""
        number, _, height, width = images.shape
        logits = images.new_zeros(1, 2, 1, 1)
        logits[:, 1] = -4.0
        return logits.expand(number, 2, height, width)


def frames(number: int, shape: list[int], dtype: str) -> np.ndarray[Any, Any]:
    """Return random counts, (number, *shape)."""
    random = np.random.default_rng(0)
    return random.poisson(10.0, (number, *shape)).astype(dtype)


def busy_s(pid: int) -> tuple[float, float]:
    """Return the CPU time of a process and of its busiest thread, in seconds."""
    threads = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            fields = stat.read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue  # that thread has ended
        threads.append((int(fields[11]) + int(fields[12])) / _TICKS)
    return sum(threads), max(threads, default=0.0)


def start(directory: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key[:4] != "RAY_"}
    with open(directory / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "peaknet_predict", *words],
            cwd=directory,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )


def predict_words(directory: Path, arguments: argparse.Namespace, cluster: str) -> list[str]:
    words = ["predict", "-c", "predict"]
    if arguments.model == "free":
        merge = {"class_path": "peaknet_predict.preprocess.MergeBatchChannelDims"}
        free = {"net": {"class_path": "benchmarks.speed.chain.Free"}, "preprocess": [merge]}
        (directory / "free.yaml").write_text(yaml.safe_dump({"model": {"init_args": free}}))
        words += ["-c", "free.yaml"]
    else:
        words += ["-c", f"models/{arguments.model}"]
    words += ["-c", f"topology/{arguments.topology}", "--data.init_args.address", cluster]
    words += ["--data.init_args.batch_size", str(arguments.batch)]
    return words


def feed_words(directory: Path, arguments: argparse.Namespace, cluster: str) -> list[str]:
    each = arguments.events // arguments.producers
    words = ["feed", "--address", cluster, "--queue.name", "detector_events"]
    words += ["--producers", str(arguments.producers), "--num_events", str(each)]
    if not arguments.file:
        shape = ",".join(map(str, arguments.shape))
        words += ["--source", "benchmarks.speed.chain.Repeated"]
        words += ["--source.num_events", str(each), "--source.dtype", arguments.dtype]
        return [*words, "--source.shape", f"[{shape}]"]
    path = directory / "frames.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            data = frames(_FRAMES, arguments.shape, arguments.dtype)
            file.create_dataset("entry/data", data=data, chunks=(1, *arguments.shape))
    words += ["--loop", "true", "--source", "peaknet_predict.sources.HDF5Source"]
    words += ["--source.path", str(path), "--source.data", "entry/data"]
    return [*words, "--source.photon_energy", "9500"]


def ranks(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of the ranks, or of the one process that there is."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    named = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    found = [
        pid for pid, line in named.items() if b"peaknet_predict" in line and b"predict" in line
    ]
    return found if len(found) > 1 else [process.pid]


def done(admin: Admin) -> int:
    now = admin.statistics()
    assert now is not None
    return now.acknowledged


def measure(directory: Path, arguments: argparse.Namespace, cluster: str) -> list[list[str]]:
    """Run the chain; return the rows of the table."""
    connect_queue(QueueAddress("detector_events"), "events")
    out = connect_queue(QueueAddress("peak_results"), "results").admin
    few = "0" if arguments.write else "1000000"
    to = ("--address", cluster, "--queue.name", "peak_results", "--min_peaks", few)
    writer = start(directory, "write-cxi", "write-cxi", *to, "--directory", "cxi")
    predict = start(directory, "predict", *predict_words(directory, arguments, cluster))
    words = feed_words(directory, arguments, cluster)
    feeds = [
        start(directory, f"feed{rank}", *words, "--rank", str(rank))
        for rank in range(arguments.producers)
    ]
    processes = [writer, predict, *feeds]
    first, last = arguments.events // 4, arguments.events * 9 // 10

    def wait_for(number: int) -> float:
        while done(out) < number:
            if any(process.poll() for process in processes):
                logs = "\n".join(
                    path.read_text()[-2000:] for path in sorted(directory.glob("*.log"))
                )
                raise RuntimeError(f"a process of the chain has failed:\n{logs}")
            time.sleep(_LOOK_S)
        return time.perf_counter()

    wait_for(first)
    stages = {"feed": [one.pid for one in feeds], "input queue": [actor_pid("detector_events")]}
    stages |= {"predict": ranks(predict), "output queue": [actor_pid("peak_results")]}
    stages |= {"write-cxi": [writer.pid]}
    before = {pid: busy_s(pid) for pids in stages.values() for pid in pids}
    counted, began = done(out), time.perf_counter()
    wait_for(last)
    seconds, number = time.perf_counter() - began, done(out) - counted
    rows = [["events/s", f"{number / seconds:.0f}", ""]]
    megabytes = np.prod(arguments.shape) * np.dtype(arguments.dtype).itemsize / 1e6
    rows.append(["MB/s", f"{number / seconds * megabytes:.0f}", ""])
    for stage, pids in stages.items():
        for pid in pids:
            whole, busiest = busy_s(pid)
            cores, thread = (whole - before[pid][0]), (busiest - before[pid][1])
            share = f"busiest thread {thread / seconds:.0%}"
            rows.append([stage, f"{cores / seconds:.2f} cores", share])
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes of write-cxi, predict and feed: {codes}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="free")
    parser.add_argument("--topology", default="one_gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--producers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 512, 512])
    parser.add_argument("--events", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--file", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    cluster = connect("local")
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), arguments, cluster)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}, {os.cpu_count()} cores, {arguments}")
    for name, figure, note in rows:
        print(f"{name:14} {figure:>14}  {note}")


if __name__ == "__main__":
    main()
