"""Items of every kind among good ones, through real processes: none is lost, and no process ends.

Bad items of every kind in `benchmarks.reliability.fuzz_kinds` and good ones are put into an input
queue, half of them by a producer of ours, half by a program that knows only ``put``. `predict` and
`write-cxi` do their work. In the end every good item is in a file, with its pixels and peaks; every
other one is in the quarantine with a reason, or was refused where it was put; and the processes end
by themselves, with balances that say so::

    python -m benchmarks.reliability.fuzz --items 5000 --good 2000 [--spool] [--seed 1]

Prints what became of each kind. Fails if anything is missing, or is not as it should be.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.reliability.chaos.cluster import REPOSITORY
from benchmarks.reliability.fuzz_kinds import GOOD, WRITTEN, Kind, kinds
from benchmarks.reliability.soak import start
from peaknet_predict.cxi.file import CxiEvent, read_cxi
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.queues.cluster import connect, keep_to_loopback
from peaknet_predict.queues.plain_data import sanitized
from peaknet_predict.queues.quarantine import read_index
from peaknet_predict.types import Event, EventBatch, EventId, Image

_SHAPE = (1, 64, 64)
_IMAGES = 16  # different ones
_LARGEST = 2_000_000  # bytes of an image
_SPOTS = 8
_LIMIT_S = 1800.0


@dataclass
class Fate:
    """What became of the items of one kind."""

    put: int = 0
    at_put: int = 0
    written: int = 0
    quarantined: int = 0
    reasons: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Sent:
    """An item that a queue has accepted."""

    kind: Kind
    ours: bool
    image: Any


def _picture(seed: int, number: int) -> Image:
    """Return an image of noise with spots."""
    rng = np.random.default_rng([seed, number])
    image = rng.poisson(20.0, _SHAPE).astype(np.float32)
    for y, x in rng.integers(4, min(_SHAPE[1:]) - 4, (_SPOTS, 2)):
        image[0, y - 1 : y + 2, x - 1 : x + 2] += 500
    return image


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
        self._images = [_picture(seed, k) for k in range(_IMAGES)]
        # By the name that the item has then: its own number, its place, or that of its stream.
        self._by_idx: dict[int, Sent] = {}
        self._by_place: dict[int, Sent] = {}
        self._by_stream: dict[str, Sent] = {}
        self._nameless: list[Sent] = []
        self._places = 0

    def run(self, items: int, good: int) -> None:
        """Put everything, and let the processes come to their end."""
        to = ("--address", self._cluster, "--queue.name", self._addresses["out"].name)
        files = ("--directory", str(self.directory / "cxi"), "--events_per_file", "50")
        config = str(self._configuration())
        processes = {
            "predict": start(self.directory, "predict", "predict", "-c", config),
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
            item = kind.make(idx, self._images[idx % _IMAGES])
            self.fates[kind.name].put += 1
            ours = self._random.random() < 0.5
            try:
                if ours:
                    self._put_ours(kind, idx, item)
                else:
                    reference = ray.put(item)
                    while not ray.get(foreign.put.remote(reference), timeout=_LIMIT_S):
                        time.sleep(0.01)
                    self._note_foreign(kind, idx, item)
            except Exception as error:
                self._note_refused(kind, ours, error)
            if idx % 500 == 499:
                print(f"{idx + 1} items in {time.monotonic() - began:.0f} s", flush=True)
        self._input.producer.close("fuzz")
        ray.get(foreign.put.remote(None))

    def _put_ours(self, kind: Kind, idx: int, item: Any) -> None:
        parts = list(list.__iter__(item)) if isinstance(item, list) else item
        if not isinstance(parts, list | tuple) or len(parts) != 4:
            self._input.producer.put("fuzz", [item])
            raise AssertionError(f"{kind.name}: was put")
        rank, number, image, energy = parts
        stream = f"ours-{idx}"
        self._input.producer.put("fuzz", [Event(EventId(stream, rank, number), image, energy)])
        sent = Sent(kind, True, image)
        self._by_stream[stream] = sent
        if kind.name.startswith(("idx:", "rank:")) and not kind.is_written_of_ours:
            self._nameless.append(self._by_stream.pop(stream))

    def _note_foreign(self, kind: Kind, idx: int, item: Any) -> None:
        parts = list(list.__iter__(item)) if isinstance(item, list) else item
        image = parts[2] if isinstance(parts, list | tuple) and len(parts) == 4 else None
        self._by_idx[idx] = self._by_place[self._places] = Sent(kind, False, image)
        self._places += 1

    def _note_refused(self, kind: Kind, ours: bool, error: Exception) -> None:
        fate = self.fates[kind.name]
        fate.at_put += 1
        fate.reasons.add(f"{type(error).__name__}: {str(error).splitlines()[0]:.100}")
        is_none = isinstance(error, TypeError) and kind.name.startswith("item:")
        if not (is_none if ours else kind.is_refused_at_put):
            self.problems.append(f"{kind.name}: refused at put: {error!r:.300}")

    def check(self) -> None:
        """Look for every item, in the files and in the quarantine."""
        peaks = _Peaks()
        for path in sorted((self.directory / "cxi").glob("*.cxi")):
            for event in read_cxi(path):
                sent = self._by_stream.pop(event.id.stream, None) or self._take_idx(event.id.idx)
                if sent is None:
                    self.problems.append(f"written and never put: {event.id}")
                    continue
                self.fates[sent.kind.name].written += 1
                if not (sent.kind.is_written_of_ours if sent.ours else sent.kind.fate == WRITTEN):
                    self.problems.append(f"{sent.kind.name}: written")
                    continue
                self.problems += peaks.compare(event, sent)
        for line in read_index(self.directory / "quarantine-in"):
            sent = self._sent_of(line)
            if sent is None:
                self.problems.append(f"in quarantine and never put: {line}")
                continue
            fate = self.fates[sent.kind.name]
            fate.quarantined += 1
            fate.reasons.add(line["reason"])
            if sent.kind.fate == WRITTEN:
                self.problems.append(f"{sent.kind.name}: in quarantine: {line['reason']}")
            elif not sent.ours and not {
                part for part in (sent.kind.fate, "cannot be unpickled") if part in line["reason"]
            }:
                self.problems.append(f"{sent.kind.name}: reason: {line['reason']}")
        lost = [*self._by_stream.values(), *self._by_idx.values(), *self._nameless]
        self.problems += [f"{sent.kind.name}: lost" for sent in lost]
        self.problems += [
            f"output: {line}" for line in read_index(self.directory / "quarantine-out")
        ]
        self._check_balances()

    def _take_idx(self, idx: int) -> Sent | None:
        sent = self._by_idx.pop(idx, None)
        if sent is not None:
            place = next(place for place, one in self._by_place.items() if one is sent)
            del self._by_place[place]
        return sent

    def _sent_of(self, line: dict[str, Any]) -> Sent | None:
        if line["stream"] in self._by_stream:
            return self._by_stream.pop(line["stream"])
        if line["stream"].endswith("#refused") and self._nameless:
            return self._nameless.pop()
        if line["rank"] != -1:
            return self._take_idx(line["idx"])
        sent = self._by_place.pop(line["idx"], None)
        if sent is not None:
            idx = next(idx for idx, one in self._by_idx.items() if one is sent)
            del self._by_idx[idx]
        return sent

    def _check_balances(self) -> None:
        written = sum(fate.written for fate in self.fates.values())
        quarantined = sum(fate.quarantined for fate in self.fates.values())
        stages = json.loads((self.directory / "predict_balance.json").read_text())["stages"]
        for stage, key, count in (
            ("input", "accepted", written + quarantined),
            ("input", "acknowledged", written),
            ("input", "quarantined", quarantined),
            ("input", "duplicates", 0),
            ("predict", "predicted", written),
            ("output", "accepted", written),
        ):
            if stages[stage][key] != count:
                self.problems.append(f"{stage}.{key} is {stages[stage][key]}, not {count}")
        files = json.loads((self.directory / "cxi" / "peaks_balance.json").read_text())
        if files["stages"]["files"]["taken"] != written:
            self.problems.append(f"write-cxi has taken {files['stages']['files']['taken']}")


class _Peaks:
    """What the network finds in an image that has been in no queue."""

    def __init__(self) -> None:
        self._module = PeakNetModule(LocalSnr(), [InstanceNorm(), MergeBatchChannelDims()])
        self._found: dict[bytes, Any] = {}

    def compare(self, event: CxiEvent, sent: Sent) -> list[str]:
        """Say what is wrong with an event of a file."""
        whole = sanitized(sent.image)
        pixels = np.ma.getdata(whole)
        if not np.array_equal(event.image, pixels.reshape(event.image.shape)):
            return [f"{sent.kind.name}: other pixels in {event.id}"]
        if not 9499 < event.photon_energy < 9505:
            return [f"{sent.kind.name}: {event.photon_energy} eV in {event.id}"]
        if isinstance(whole, np.ma.MaskedArray) and not np.array_equal(
            event.mask, np.ma.getmaskarray(whole).reshape(event.mask.shape)
        ):
            return [f"{sent.kind.name}: another mask in {event.id}"]
        key = pixels.tobytes() + bytes(isinstance(whole, np.ma.MaskedArray))
        if key not in self._found:
            self._found[key] = self._peaks_of(whole)
        wanted = self._found[key]
        got = event.peaks[np.lexsort(event.peaks.T)]
        if got.shape != wanted.shape or not np.allclose(got, wanted, atol=1e-4):
            return [f"{sent.kind.name}: other peaks in {event.id}"]
        return []

    def _peaks_of(self, image: Any) -> Any:
        event = Event(EventId("s", 0, 0), image, 9500.0)
        pixels = np.ascontiguousarray(event.image).astype(event.image.dtype.newbyteorder("="))
        pixels = pixels.reshape(1, -1, *pixels.shape[-2:])
        batch = EventBatch(torch.from_numpy(pixels), [event], [])
        with torch.inference_mode():
            (result,) = self._module.predict_step(batch, 0).result().results
        return result.peaks[np.lexsort(result.peaks.T)]


def show(fates: dict[str, Fate]) -> None:
    """Print what became of each kind, with one of the reasons."""
    print(f"{'':44} {'put':>6} {'at put':>6} {'written':>7} {'kept':>6}")
    for name, fate in sorted(fates.items()):
        counts = f"{fate.put:6} {fate.at_put:6} {fate.written:7} {fate.quarantined:6}"
        print(f"{name!a:44.44} {counts}  {min(fate.reasons, default=''):.100}")
    totals = [
        sum(getattr(fate, part) for fate in fates.values())
        for part in ("put", "at_put", "written", "quarantined")
    ]
    print(f"{'all':44} {totals[0]:6} {totals[1]:6} {totals[2]:7} {totals[3]:6}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--good", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spool", action="store_true")
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    keep_to_loopback()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="fuzz-"))
    directory.mkdir(exist_ok=True)
    fuzz = Fuzz(directory, connect("local"), arguments.seed, arguments.spool)
    began = time.monotonic()
    fuzz.run(arguments.items, arguments.good)
    fuzz.check()
    show(fuzz.fates)
    for problem in fuzz.problems[:50]:
        print("PROBLEM", problem)
    seconds = time.monotonic() - began
    print(f"{len(fuzz.fates)} kinds, {len(fuzz.problems)} problems, {seconds:.0f} s; {directory}")
    sys.exit(1 if fuzz.problems else 0)


if __name__ == "__main__":
    main()
