"""How much of the compiled network's speed is left end to end, and against the predecessor's loop.

Prints one table; every ratio compares figures of this one run. Needs a CUDA GPU with
some 20 GB::

    python -m benchmarks.speed.pipeline [--plain] [--windows 7] [--batches 20] [--peaks 0 10 50 200]

The network is the fast PeakNet, as users get it; ``--plain`` takes the plain one. All rows, the
predecessor's loop among them, use the same one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import cupy
import lightning as L
import numpy as np
import torch
from cupyx.scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.speed.planted import PlantedModule, noise_logits, planted_logits
from peaknet_predict.in_flight import PendingPeaks
from peaknet_predict.models import PeakNet
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Crop, InstanceNorm, MergeBatchChannelDims
from peaknet_predict.types import Event, EventBatch, EventId

EVENTS, PANELS, SIDE = 32, 4, 512
SHAPE_BPHW = (EVENTS, PANELS, SIDE, SIDE)


class MemoryFed(IterableDataset[EventBatch]):
    """A few pinned batches over and over, as fast as they are asked for."""

    def __init__(self, num_batches: int, kept: int = 4) -> None:
        self.num_batches = num_batches
        self.batches = []
        for k in range(kept):
            pixels = torch.rand(SHAPE_BPHW).mul_(100).pin_memory()
            events = [
                Event(EventId("memory", 0, k * EVENTS + i), image, 9500.0)
                for i, image in enumerate(pixels.numpy())
            ]
            self.batches.append(EventBatch(pixels, events, []))

    def __iter__(self) -> Iterator[EventBatch]:
        for i in range(self.num_batches):
            yield self.batches[i % len(self.batches)]


class Sink(L.Callback):
    """Fetches results in order, as the `QueueWriter` does, and notes when."""

    def __init__(self) -> None:
        self.fetched_at: list[float] = []
        self.peaks = 0
        self._pending: deque[PendingPeaks] = deque()

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self._pending.append(outputs)
        while self._pending and self._pending[0].done():
            self._fetch()

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        while self._pending:
            self._fetch()

    def _fetch(self) -> None:
        batch = self._pending.popleft().result()
        self.peaks = sum(len(result.peaks) for result in batch.results)
        self.fetched_at.append(time.perf_counter())


def make_module(planted: Tensor, fast: bool = True) -> PlantedModule:
    torch.manual_seed(0)
    net = PeakNet()
    if not fast:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PlantedModule(
        planted,
        net,
        [Crop(SIDE, SIDE), InstanceNorm(), MergeBatchChannelDims()],
        compile=True,
        num_overlap=3,
        warmup_shapes=[SHAPE_BPHW],
        fast=fast,
        random_weights=True,  # planted logits take the place of what it computes
    )


def make_trainer(*callbacks: L.Callback, precision: Any = "bf16-true") -> L.Trainer:
    return L.Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        limit_predict_batches=10**9,
    )


def windows_of(moments: list[float], batches: int) -> list[float]:
    """Seconds per batch in each window of so many batches, the first window left out."""
    starts = moments[batches::batches]
    return [(b - a) / batches for a, b in pairwise(starts)]


def end_to_end(module: PeakNetModule, windows: int, batches: int) -> tuple[float, int]:
    """Median seconds per batch under Trainer.predict, and peaks of the last batch."""
    sink = Sink()
    trainer = make_trainer(sink)
    loader = DataLoader(MemoryFed(batches * (windows + 2)), batch_size=None)
    trainer.predict(module, loader, return_predictions=False)
    return statistics.median(windows_of(sink.fetched_at, batches)), sink.peaks


def timed(work: Callable[[], object], windows: int, repeats: int) -> float:
    """Median seconds per call on the device, over windows of so many calls."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(windows):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / repeats)
    return statistics.median(seconds)


def bare_loop(module: PeakNetModule, windows: int, batches: int) -> float:
    """The same steps in a loop of our own, without Lightning."""
    sink = Sink()
    for i, batch in enumerate(MemoryFed(batches * (windows + 2))):
        pending = module.predict_step(batch, i)
        sink.on_predict_batch_end(None, None, pending)
    sink.on_predict_end(None, None)
    return statistics.median(windows_of(sink.fetched_at, batches))


def predecessor(network: Callable[[Tensor], Tensor], batch: EventBatch) -> list[list[list[float]]]:
    """One batch as the predecessor does it, written anew from its description.

    ``network`` returns logits of full resolution.
    """
    images = batch.images_BPHW.to("cuda", non_blocking=True)[..., :SIDE, :SIDE]
    torch.isnan(images).any().item()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    variance = images.var(dim=(1, 2, 3), keepdim=True, correction=0)
    normalised = ((images - mean) / (variance + 1e-6).sqrt()).flatten(0, 1)[:, None]
    logits = network(normalised.bfloat16())
    maps = logits.softmax(dim=1).argmax(dim=1, keepdim=True)
    structure = cupy.ones((3, 3), dtype=cupy.float32)
    peaks: list[list[list[float]]] = [[] for _ in range(EVENTS)]
    for index, seg_map in enumerate(maps.flatten(0, 1)):
        panel_map = cupy.asarray(seg_map)
        labels, count = ndimage.label(panel_map, structure)
        centres = ndimage.center_of_mass(panel_map, labels, cupy.arange(1, int(count) + 1))
        for centre in centres:
            peaks[index // PANELS].append([index % PANELS, *cupy.asarray(centre).tolist()])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--peaks", type=int, nargs="*", default=[0, 10, 50, 200])
    parser.add_argument("--plain", action="store_true", help="the plain PeakNet")
    arguments = parser.parse_args()
    windows, batches = arguments.windows, arguments.batches

    rows: list[tuple[str, float, str]] = []
    logits = planted_logits(EVENTS * PANELS, SIDE, SIDE, 50, seed=0)
    module = make_module(logits, fast=not arguments.plain)
    end_to_end(module, 1, 5)  # compiles
    fast = module._forward_pass.fast_net
    if not arguments.plain and fast is None:
        raise SystemExit(f"the network runs slowly here: {module._forward_pass.why()}")
    net: nn.Module = module.net if fast is None else fast
    with torch.inference_mode():
        resident = torch.randn(EVENTS * PANELS, 1, SIDE, SIDE, device="cuda").bfloat16()
        module.to("cuda")
        coarse = module._forward_pass.network
        full = net.forward if fast is not None else torch.compile(net.forward, dynamic=False)
        forward_s = timed(lambda: coarse(resident), windows, batches)
        rows.append(("network alone, resident input", forward_s, ""))
        full_s = timed(lambda: full(resident), windows, batches)
        rows.append(("  the same with full-resolution logits", full_s, f"{forward_s / full_s:.3f}"))

    def network(images_N1HW: Tensor) -> Tensor:
        return module.planted_over(full(images_N1HW))

    for peaks in arguments.peaks:
        logits = planted_logits(EVENTS * PANELS, SIDE, SIDE, peaks, seed=1)
        module.plant(logits)
        seconds, found = end_to_end(module, windows, batches)
        name = f"Trainer.predict, memory-fed, {peaks} peaks planted a panel ({found} in all)"
        rows.append((name, seconds, f"{forward_s / seconds:.3f}"))
    module.plant(noise_logits(EVENTS * PANELS, SIDE, SIDE, seed=2))
    seconds, found = end_to_end(module, 2, 5)
    rows.append((f"  white noise ({found} peaks)", seconds, f"{forward_s / seconds:.3f}"))
    module.plant(planted_logits(EVENTS * PANELS, SIDE, SIDE, 50, seed=1))
    with torch.inference_mode():
        module.to("cuda")
        loop_s = bare_loop(module, windows, batches)
        rows.append(("  the same in a bare loop, 50 peaks", loop_s, f"{forward_s / loop_s:.3f}"))
        batch = MemoryFed(1, kept=1).batches[0]
        before_s = timed(lambda: predecessor(network, batch), 5, 1)
        rows.append(("predecessor's loop, 50 peaks", before_s, f"{forward_s / before_s:.3f}"))

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cupy {cupy.__version__}, ")
    print(f"numpy {np.__version__}; {EVENTS} events of {PANELS}x{SIDE}x{SIDE} float32 a batch, ")
    which = "plain" if arguments.plain else "fast"
    print(
        f"medians of {windows} windows of {batches} batches, {which} PeakNet, default sizes, bf16"
    )
    print(f"{'':66} {'ms/batch':>9} {'events/s':>9} {'of network':>10}")
    for name, seconds, ratio in rows:
        print(f"{name:66} {1000 * seconds:9.2f} {EVENTS / seconds:9.0f} {ratio:>10}")


if __name__ == "__main__":
    main()
