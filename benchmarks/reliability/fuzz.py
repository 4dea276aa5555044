"""Items of every kind among good ones, through real processes: none is lost, and none ends.

Bad items of every kind in `benchmarks.reliability.fuzz_kinds` and good ones are put into an input
queue, half of them by a producer of ours, half by a program that knows only ``put``; bad results,
into the output queue. `predict` and `write-cxi` do their work. In the end every good item is in a
file, with its pixels and peaks, and every other one in the quarantine with a reason, or was refused
where it was put; and the processes say so themselves::

    python -m benchmarks.reliability.fuzz --items 5000 --good 2000 [--spool] [--seed 1]

Prints a table of what became of each kind. Fails if anything is missing, or is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.reliability.fuzz_kinds import AT_PUT, GOOD, WRITTEN, Image, Kind, kinds
from benchmarks.reliability.soak import REPOSITORY, start
from peaknet_predict.cxi.file import read_cxi, read_ids
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect, keep_to_loopback
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.sources import Simulator
from peaknet_predict.types import Event, EventId, Result

_SHAPE = (1, 64, 64)
_IMAGES = 16  # different ones
_LARGEST = 2_000_000  # bytes of an image
_LIMIT_S = 1800.0
_NEVER_LEGAL = "no image of its kind is legal"


@dataclass
class Fate:
    """What became of the items of one kind."""

    put: int = 0
    written: int = 0
    quarantined: int = 0
    at_put: int = 0
    reasons: set[str] = field(default_factory=set)


class Fuzz:
    """One run.

    Parameters
    ----------
    directory
        Where everything goes.
    cluster
        Address of the Ray cluster.
    seed
        Decides on the order of the items.
    spool
        Whether the queues have one.
    """

    def __init__(self, directory: Path, cluster: str, seed: int, spool: bool) -> None:
        self.directory = directory
        self.problems: list[str] = []
        self.fates: dict[str, Fate] = collections.defaultdict(Fate)
        self._random = random.Random(seed)
        self._cluster = cluster
        name = f"fuzz-{seed}-{os.getpid()}"
        self._addresses = {
            end: QueueAddress(
                f"{name}-{end}",
                spool=str(directory / f"spool-{end}") if spool else None,
                quarantine=str(directory / f"quarantine-{end}"),
                quarantine_bytes=10 * 2**30,
            )
            for end in ("in", "out")
        }
        self._input = connect_queue(self._addresses["in"], "events")
        self._output = connect_queue(self._addresses["out"], "results")
        simulator = Simulator(_IMAGES, *_SHAPE, seed=seed)
        self._images = [simulator.event(k)[0].astype(np.float32) for k in range(_IMAGES)]
        # By (stream of ours or not, idx) where an item states its own; the pixels that were put.
        self._sent: dict[tuple[bool, int], tuple[Kind, Any]] = {}

    def run(self, items: int, good: int) -> None:
        """Put everything, and let the processes come to their end."""
        names = {end: address.name for end, address in self._addresses.items()}
        to = ("--address", self._cluster, "--queue.name", names["out"])
        files = ("--directory", str(self.directory / "cxi"), "--events_per_file", "50")
        processes = {
            "predict": start(self.directory, "predict", "predict", "-c", str(self._configuration())),
            "write-cxi": start(self.directory, "write-cxi", "write-cxi", *to, *files),
        }
        self._put_all(items, good)
        deadline = time.monotonic() + _LIMIT_S
        while any(process.poll() is None for process in processes.values()):
            if time.monotonic() > deadline:
                self.problems.append("the chain does not end")
                for process in processes.values():
                    process.kill()
            time.sleep(0.5)
        for name, process in processes.items():
            if process.wait() != 0:
                self.problems.append(f"{name} ended with {process.returncode}")

    def _configuration(self) -> Path:
        config = yaml.safe_load((REPOSITORY / "configs" / "predict.yaml").read_text())
        data, writer = config["data"]["init_args"], config["trainer"]["callbacks"][0]["init_args"]
        data |= {"address": self._cluster, "batch_size": 16, "max_event_bytes": _LARGEST}
        data["queue"] = {"name": self._addresses["in"].name}
        writer["queue"] = {"name": self._addresses["out"].name}
        model = yaml.safe_load((REPOSITORY / "configs" / "models" / "snr.yaml").read_text())
        topology = yaml.safe_load((REPOSITORY / "configs" / "topology" / "cpu.yaml").read_text())
        config["trainer"] |= topology["trainer"]
        path = self.directory / "predict.yaml"
        path.write_text(yaml.safe_dump(config | model))
        return path

    def _put_all(self, items: int, good: int) -> None:
        import ray

        every = kinds()
        order = [every[k % len(every)] for k in range(items)] + [GOOD] * good
        self._random.shuffle(order)
        foreign: Any = ray.get_actor(self._addresses["in"].name, namespace="peaknet")
        self._input.producer.open("fuzz")
        began = time.monotonic()
        for idx, kind in enumerate(order):
            image = self._images[idx % _IMAGES]
            item = kind.make(idx, image)
            self.fates[kind.name].put += 1
            ours = self._random.random() < 0.5
            try:
                if ours:
                    self._put_ours(item)
                else:
                    while not ray.get(foreign.put.remote(item), timeout=_LIMIT_S):
                        time.sleep(0.01)
            except Exception as error:
                self._refused(kind, ours, error)
                continue
            self._sent[ours, idx] = kind, item
            if idx % 1000 == 999:
                print(f"{idx + 1} items in {time.monotonic() - began:.0f} s", flush=True)
        self._input.producer.close("fuzz")
        ray.get(foreign.put.remote(None))
