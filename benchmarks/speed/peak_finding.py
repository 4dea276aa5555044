"""Times peak finding on a GPU: `PeakFinder`, one call of CuPy's label, and a loop over panels.

    python benchmarks/peak_finding.py [--panels 128] [--side 512] [--repeats 100]

Prints one table of milliseconds for a batch: medians of device time between CUDA events for
`PeakFinder`, of time on the host's clock for the others, whose host waits. Logits hold Gaussian
blobs, as a trained network gives, or white noise, the worst there is; inputs rotate among several,
so that no cache holds one from call to call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peaknet_predict.peaks.finder import PeakFinder
from peaknet_predict.peaks.table import STRUCTURE_333

ROTATION = 4
BLOB_REACH = 7
"""Pixels around its centre in which a blob is drawn."""


def planted_logits(panels: int, side: int, blobs: int, sigma: tuple[float, float]) -> Tensor:
    """Return (N, 2, H, W) bfloat16 logits on the GPU with Gaussian blobs in a flat background.

    Parameters
    ----------
    panels, side
        N, and H = W.
    blobs
        How many a panel, at random places, possibly overlapping.
    sigma
        Smallest and largest standard deviation of a blob, pixels.
    """
    lead = torch.full((panels, side * side), -4.0, device="cuda")
    if blobs:
        offset = torch.arange(-BLOB_REACH, BLOB_REACH + 1, device="cuda")
        center = torch.rand((2, panels, blobs, 1, 1), device="cuda") * side
        spread = torch.empty((panels, blobs, 1, 1), device="cuda").uniform_(*sigma)
        y = (center[0].floor() + offset[:, None]).clamp(0, side - 1)
        x = (center[1].floor() + offset[None, :]).clamp(0, side - 1)
        square = ((y - center[0]) ** 2 + (x - center[1]) ** 2) / spread**2
        height = 8.0 * torch.exp(-square / 2) - 4.0
        at = (y * side + x).long().expand_as(height)
        lead.scatter_reduce_(1, at.flatten(1), height.flatten(1), "amax")
    lead = lead.reshape(panels, 1, side, side)
    noise = torch.randn((panels, 2, side, side), device="cuda") * 0.2
    return torch.cat([noise[:, :1] - lead / 2, noise[:, 1:] + lead / 2], dim=1).bfloat16()


def device_ms(
    enqueue: Callable[[int], object], finish: Callable[[], object], repeats: int
) -> float:
    """Return the median device time of one call, events on the current stream around it."""
    times = []
    for k in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The host is ahead: what is timed is the device's work, not how fast Python launches it.
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        start.record()
        enqueue(k)
        end.record()
        finish()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times[5:])


def host_ms(call: Callable[[int], object], repeats: int) -> float:
    """Return the median time of one call that waits for the device itself."""
    times = []
    for k in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call(k)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def loop_over_panels(class_map_NHW: Tensor) -> list[list[float]]:
    """Find peaks as a program without `PeakFinder` does: label and centre panel by panel."""
    import cupy
    from cupyx.scipy import ndimage

    structure = cupy.ones((3, 3))
    peaks = []
    for panel, class_map_HW in enumerate(cupy.from_dlpack(class_map_NHW)):
        labels, num_peaks = ndimage.label(class_map_HW, structure)
        if num_peaks:
            index = cupy.arange(1, num_peaks + 1)
            centers = ndimage.center_of_mass(class_map_HW, labels, index)
            peaks += [[panel, *center.tolist()] for center in centers]
    return peaks


def one_label_call(class_map_NHW: Tensor) -> Any:
    """Find peaks with CuPy's own operations and no loop: label the batch, add up by label."""
    import cupy
    from cupyx.scipy import ndimage

    labels, num_peaks = ndimage.label(cupy.from_dlpack(class_map_NHW), structure=STRUCTURE_333)
    where = cupy.flatnonzero(labels)
    peak = labels.ravel()[where]
    _, height, width = class_map_NHW.shape
    sums = [
        cupy.bincount(peak, weights=weights, minlength=num_peaks + 1)
        for weights in (where // width % height, where % width)
    ]
    return cupy.stack([*sums, cupy.bincount(peak, minlength=num_peaks + 1)]).get()


class Bench:
    """Times everything on one kind of input and prints one row."""

    def __init__(self, panels: int, side: int, repeats: int, max_peaks: int = 256) -> None:
        self.panels, self.side, self.repeats = panels, side, repeats
        self.finder = PeakFinder(panels, side, side, max_peaks)

    def finder_ms(self, batches: list[Tensor], **options: Any) -> float:
        """Device time of `PeakFinder.enqueue` on logits or class maps."""

        def enqueue(k: int) -> None:
            name = "logits" if batches[0].ndim == 4 else "class_map"
            arguments: dict[str, Any] = {name: batches[k % len(batches)], **options}
            self.finder.enqueue(**arguments)

        def forget() -> None:
            # The table is not made: with noise, recovering peaks would take the time.
            self.finder._pending = None

        return device_ms(enqueue, forget, self.repeats)

    def row(self, name: str, full: list[Tensor], low: list[Tensor], with_loop: bool) -> None:
        """Time everything on the same images and print the medians."""
        pixels = torch.randint(0, 4000, (self.panels, self.side, self.side), device="cuda").short()
        valid = torch.ones_like(pixels, dtype=torch.bool)
        maps = [(logits.softmax(1).argmax(1) != 0).byte() for logits in full]
        interleaved = [logits.contiguous(memory_format=torch.channels_last) for logits in full]
        peaks = self.finder.enqueue(class_map=maps[0])
        cells = [
            f"{len(peaks.table()) / self.panels:.1f}",
            f"{self.finder_ms(full):.4f}",
            f"{self.finder_ms(interleaved):.4f}",
            f"{self.finder_ms(full, valid=valid, pixels=pixels):.4f}",
            f"{self.finder_ms(low, upsampling=4):.4f}",
            f"{self.finder_ms(maps):.4f}",
            f"{self.table_ms(maps):.3f}",
            f"{host_ms(lambda k: full[k % len(full)].softmax(1).argmax(1), 10):.3f}",
            f"{host_ms(lambda k: one_label_call(maps[k % len(maps)]), 10):.3f}",
            f"{host_ms(lambda k: loop_over_panels(maps[k % len(maps)]), 2):.1f}"
            if with_loop
            else "-",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    def table_ms(self, maps: list[Tensor]) -> float:
        """Host time of a whole round, from the map to the table in host memory."""
        return host_ms(
            lambda k: self.finder.enqueue(class_map=maps[k % len(maps)]).table(), self.repeats // 5
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panels", type=int, default=128)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    panels, side = arguments.panels, arguments.side
    torch.manual_seed(0)
    bench = Bench(panels, side, arguments.repeats)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {panels} panels of "
        f"{side} x {side}, bfloat16 logits of two classes; ms for the batch, medians\n"
    )
    print(
        "| peaks planted a panel | found | PeakFinder, full logits | same, channels_last | same, "
        "with valid and int16 pixels | low-resolution logits | class map | class map to table on "
        "the host | torch softmax + argmax | one CuPy label call on the class map | loop over "
        "panels (cupyx) of the class map |"
    )
    print("| --- " * 11 + "|")
    for blobs in (0, 10, 50, 200):
        full = [planted_logits(panels, side, blobs, (0.8, 2.5)) for _ in range(ROTATION)]
        low = [planted_logits(panels, side // 4, blobs, (0.4, 0.8)) for _ in range(ROTATION)]
        bench.row(str(blobs), full, low, with_loop=True)
    noise = [
        torch.randn((panels, 2, side, side), device="cuda").bfloat16() for _ in range(ROTATION)
    ]
    low = [x[:, :, ::4, ::4].contiguous() for x in noise]
    bench.row("white noise", noise, low, with_loop=False)
    # A panel with more peaks than room is only counted at first; with room, their sums are made.
    roomy = Bench(panels, side, arguments.repeats, max_peaks=2048)
    roomy.row("white noise, room for 2048 peaks a panel", noise, low, with_loop=False)
    coarse = [F.interpolate(x.float(), scale_factor=4, mode="bilinear").bfloat16() for x in low]
    bench.row("white noise at a quarter of the resolution", coarse, low, with_loop=False)


if __name__ == "__main__":
    main()
