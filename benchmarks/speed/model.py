"""A model configuration as users run it: events a second from memory, and whether peaks agree.

Every detector is fed from memory under `Trainer.predict`, with the network as the configuration
sets it and, beside it, without the fast PeakNet::

    python -m benchmarks.speed.model [--config configs/models/peaknet_small.yaml] [--batches 12]
        [--compile]

Then the peaks of the network in float32, in bfloat16 and in its fast form are compared on simulated
shots. Needs a CUDA GPU with some 30 GB.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.accuracy.data_sets import DATA_SETS
from benchmarks.accuracy.finders import make_module
from benchmarks.speed.agreement import GATES, HEADER, compare
from benchmarks.speed.forward import medians, print_table
from benchmarks.speed.pipeline import Sink, make_trainer, windows_of
from peaknet_predict.models import PeakNet
from peaknet_predict.models.fast import FastPeakNet, support
from peaknet_predict.module import PeakNetModule
from peaknet_predict.types import Event, EventBatch, EventId

COUNTS = 20  # a pixel, on average


class Detector(NamedTuple):
    """Events as a detector sends them, and how many make a batch."""

    name: str
    events: int
    shape_PHW: tuple[int, int, int]
    dtype: torch.dtype


DETECTORS = [
    Detector("4 x 512 x 512", 32, (4, 512, 512), torch.float32),
    Detector("4 x 512 x 512", 32, (4, 512, 512), torch.uint16),
    Detector("CSPAD", 16, (32, 185, 388), torch.int32),
    Detector("ePix10k2M", 16, (16, 352, 384), torch.float32),
    Detector("Jungfrau 4M", 8, (8, 512, 1024), torch.float32),
    Detector("Rayonix 1920", 16, (1, 1920, 1920), torch.uint16),
]


class Memory(IterableDataset[EventBatch]):
    """A few pinned batches of counts, over and over."""

    def __init__(self, detector: Detector, num_batches: int, kept: int = 3) -> None:
        self.num_batches = num_batches
        self.batches = []
        for k in range(kept):
            shape = (detector.events, *detector.shape_PHW)
            counts = torch.poisson(torch.full(shape, float(COUNTS)))
            pixels = counts.to(detector.dtype).pin_memory()
            events = [
                Event(EventId("memory", 0, k * detector.events + i), image, 9500.0)
                for i, image in enumerate(pixels.numpy())
            ]
            self.batches.append(EventBatch(pixels, events, []))

    def __iter__(self) -> Iterator[EventBatch]:
        for i in range(self.num_batches):
            yield self.batches[i % len(self.batches)]


def seconds_per_batch(module: PeakNetModule, memory: Memory, windows: int, batches: int) -> float:
    """Median seconds a batch under `Trainer.predict`, the first window left out."""
    sink = Sink()
    memory.num_batches = batches * (windows + 2)
    trainer: L.Trainer = make_trainer(sink, precision="bf16-mixed")
    trainer.predict(module, DataLoader(memory, batch_size=None), return_predictions=False)
    return statistics.median(windows_of(sink.fetched_at, batches))


def module_of(config: str, fast: bool, compile: bool) -> PeakNetModule:
    """Make the module of a configuration, with or without the fast PeakNet."""
    return make_module(config, fast=fast, compile=compile, num_overlap=3)


def speed(config: str, windows: int, batches: int, compile: bool) -> None:
    """Print events and megapixels a second for every detector."""
    rows = [["detector", "dtype", "events", "ms/batch", "events/s", "Mpx/s", "of network", "plain"]]
    for detector in DETECTORS:
        memory = Memory(detector, 0)
        module = module_of(config, True, False)
        seconds = seconds_per_batch(module, memory, windows, batches)
        alone = network_alone(module, memory)
        plain_batches = batches if compile else max(2, batches // 4)
        plain = seconds_per_batch(
            module_of(config, False, compile), memory, min(windows, 2), plain_batches
        )
        pixels = detector.events * int(np.prod(detector.shape_PHW))
        rows.append(
            [
                detector.name,
                str(detector.dtype).removeprefix("torch."),
                str(detector.events),
                f"{1000 * seconds:.2f}",
                f"{detector.events / seconds:.0f}",
                f"{pixels / seconds / 1e6:.0f}",
                f"{alone / seconds:.3f}",
                f"{1000 * plain:.1f} ms",
            ]
        )
        print_table([rows[0], rows[-1]])
    print()
    print_table(rows)
    print(f"plain: without the fast PeakNet, {'compiled' if compile else 'eager'}", flush=True)


def network_alone(module: PeakNetModule, memory: Memory) -> float:
    """Median seconds of the network on resident, prepared input."""
    network = module._forward_pass.network
    pixels_BPHW = memory.batches[0].images_BPHW.cuda()
    with torch.inference_mode():
        images_N1HW = module.preprocess(pixels_BPHW).images_N1HW.bfloat16()
        (seconds,) = medians([lambda: network(images_N1HW)], 3, 5)
    return seconds


def agreement(config: str, events: int) -> bool:
    """Print whether the fast PeakNet finds the peaks of the network in float32."""
    module = make_module(config)
    net = module.net.cuda().eval()
    if not isinstance(net, PeakNet):
        raise SystemExit(f"{config}: the network is not a PeakNet")
    support.load_kernels()
    fast = FastPeakNet(net).cuda().eval()
    rounded = copy.deepcopy(net).bfloat16()
    rows = [["shots", "network", *HEADER]]
    passed = True
    for name in ("default", "cspad"):
        images = [shot.image_PHW for shot in DATA_SETS[name](events, 0, "cpu").hits]
        counts_BPHW = torch.from_numpy(np.stack(images)).cuda()
        with torch.inference_mode():
            prepared = module.preprocess.cuda()(counts_BPHW)
            parts = prepared.images_N1HW.split(16)
            valid_NHW = prepared.valid_N1HW[:, 0]
            exact = torch.cat([net(part).argmax(1) for part in parts]) * valid_NHW
            for label, network in (("plain, bfloat16", rounded), ("fast", fast)):
                maps = [network(part.bfloat16()).argmax(1) for part in parts]
                columns, ok = compare(exact, torch.cat(maps) * valid_NHW)
                rows.append([name, label, *columns])
                passed &= ok or label != "fast"
    print()
    print_table(rows)
    print(GATES, flush=True)
    return passed


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/models/peaknet_small.yaml")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument(
        "--events", type=int, default=12, help="simulated shots to compare peaks on"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network beside it")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.config}", flush=True)
    passed = agreement(given.config, given.events)
    speed(given.config, given.windows, given.batches, given.compile)
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
