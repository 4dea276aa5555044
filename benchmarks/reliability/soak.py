"""Many small events through the whole chain: the memory of every process must stay flat.

Prints a table of the resident memory of each process over time. Fails if one of them grows by more
than a fifth and 64 MB between the first third of the run and its end, or if an event is missing::

    python -m benchmarks.reliability.soak [--events 200000] [--directory DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.reliability.chaos.cluster import REPOSITORY
from peaknet_predict.cxi.file import read_ids
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect

EVERY_S = 5.0
_MAY_GROW = 64 * 2**20


def resident(pid: int) -> int | None:
    """Return a process's resident memory without what it shares, in bytes."""
    try:
        size = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return (int(size[1]) - int(size[2])) * os.sysconf("SC_PAGE_SIZE")


def configuration(directory: Path, cluster: str, name: str) -> Path:
    model = yaml.safe_load((REPOSITORY / "configs" / "models" / "snr.yaml").read_text())
    writer = {
        "class_path": "peaknet_predict.callbacks.queue_writer.QueueWriter",
        "init_args": {"queue": {"name": f"{name}-out"}},
    }
    data = {"address": cluster, "queue": {"name": f"{name}-in"}, "batch_size": 64}
    path = directory / "predict.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **model,
                "trainer": {"accelerator": "cpu", "devices": 1, "callbacks": [writer]},
                "data": {"class_path": "peaknet_predict.data.QueueDataModule", "init_args": data},
            }
        )
    )
    return path


def start(directory: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key[:4] != "RAY_"}
    with open(directory / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "peaknet_predict", *words],
            cwd=directory,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )


def actor_pid(name: str) -> int:
    import ray

    handle = ray.get_actor(name, namespace="peaknet")
    return int(ray.get(handle.__ray_call__.remote(lambda actor: os.getpid())))


def soak(directory: Path, cluster: str, num_events: int) -> dict[str, list[int]]:
    """Run the chain; return the memory of every process, in order of time."""
    name = f"soak-{os.getpid()}"
    inputs = connect_queue(QueueAddress(f"{name}-in"), "events").admin
    connect_queue(QueueAddress(f"{name}-out"), "results")
    source = (
        "--source",
        "benchmarks.reliability.soak_source.Small",
        "--source.num_events",
        str(num_events),
    )
    to = ("--address", cluster, "--queue.name")
    processes = {
        "write-cxi": start(
            directory,
            "write-cxi",
            *("write-cxi", *to, f"{name}-out", "--directory", str(directory / "cxi")),
            *("--max_peaks", "16", "--events_per_file", "1000"),
        ),
        "predict": start(
            directory, "predict", "predict", "-c", str(configuration(directory, cluster, name))
        ),
        "feed": start(directory, "feed", "feed", *to, f"{name}-in", *source),
    }
    pids = {key: process.pid for key, process in processes.items()}
    pids |= {"input queue": actor_pid(f"{name}-in"), "output queue": actor_pid(f"{name}-out")}
    memory: dict[str, list[int]] = {key: [] for key in pids}
    while any(process.poll() is None for process in processes.values()):
        time.sleep(EVERY_S)
        for key, pid in pids.items():
            size = resident(pid)
            if size is not None and (key not in processes or processes[key].poll() is None):
                memory[key].append(size)
        statistics = inputs.statistics()
        done = 0 if statistics is None else statistics.acknowledged
        sizes = ", ".join(
            f"{key} {sizes[-1] / 2**20:.0f}" for key, sizes in memory.items() if sizes
        )
        print(f"{done:8} events; MB: {sizes}", flush=True)
        if any(process.poll() for process in processes.values()):
            break
    codes = {key: process.wait() for key, process in processes.items()}
    if any(codes.values()):
        raise RuntimeError(f"the chain failed: {codes}; its logs are in {directory}")
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    cluster = connect("local")
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="soak-"))
    directory.mkdir(exist_ok=True)
    began = time.monotonic()
    memory = soak(directory, cluster, arguments.events)
    seconds = time.monotonic() - began
    keys = [key for path in (directory / "cxi").glob("*.cxi") for key in read_ids(path)]
    failed = len(keys) != arguments.events or len(set(keys)) != arguments.events
    print(f"{len(keys)} events in files, {len(set(keys))} of them different; {seconds:.0f} s")
    for name, sizes in memory.items():
        third = max(1, len(sizes) // 3)
        early = statistics.median(sizes[third - 1 : 2 * third] or sizes)
        late = statistics.median(sizes[-third:])
        grows = late - early > max(_MAY_GROW, 0.2 * early)
        failed |= grows
        print(
            f"{name:14} {early / 2**20:6.0f} MB early, {late / 2**20:6.0f} MB late"
            f"{'  GROWS' if grows else ''}"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
