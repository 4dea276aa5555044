"""PeakNet's forward pass alone: plain against fast, what is left where, and whether they agree.

Prints tables; every ratio compares figures of this one run. Needs a CUDA GPU with some 60 GB, and
takes about three minutes, half of which is compilation::

    python -m benchmarks.speed.forward [--windows 7] [--panels 128] [--no-startup]

``--tiny`` tries the program itself out, with a small network on a few small panels, on a CPU too.

Agreement says nothing of random weights: their logits are noise, of which every pixel is close to
the threshold. So the network is trained here, for some seconds, to mark planted peaks: Gaussian
spots of random width and height on Poisson noise, normalised per panel. That makes it the detector
that trained weights make it, with logits far from the threshold nearly everywhere, and moves every
parameter off its initial value. What is compared is its float32 result with what the same weights
give in bfloat16, in the plain network and in the fast one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.agreement import GATES, HEADER, centres, compare, matched
from peaknet_predict.models import PeakNet
from peaknet_predict.models.fast import FastPeakNet, support
from peaknet_predict.peaks import find_peaks
from tests.helpers.networks import ATTO, TINY

Network = Callable[[Tensor], Tensor]

STRIDE = 4
PEAKS_PER_PANEL = 50
MARGIN = 4  # pixels at a panel's border without centres

_BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {text}", flush=True)


# --- planted peaks ---


def planted_images(
    panels: int, side: int, peaks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 1, H, W), masks (N, H, W) bool and centres (N, M, 2), by a seed."""
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(panels, peaks, generator=generator, device=device)

    y, x = uniform(MARGIN, side - MARGIN), uniform(MARGIN, side - MARGIN)
    sigma, height = uniform(0.9, 1.6), torch.exp(uniform(3.0, 5.5))
    spots = torch.zeros(panels, side * side, device=device)
    mask = torch.zeros(panels, side * side, device=device)
    reach = torch.arange(-7, 8, device=device)
    dy, dx = (d.flatten() for d in torch.meshgrid(reach, reach, indexing="ij"))
    rows, columns = y.round().long()[..., None] + dy, x.round().long()[..., None] + dx
    square = (rows - y[..., None]) ** 2 + (columns - x[..., None]) ** 2
    values = height[..., None] * torch.exp(-square / (2 * sigma[..., None] ** 2))
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    index = (rows.clamp(0, side - 1) * side + columns.clamp(0, side - 1)).flatten(1)
    spots.scatter_add_(1, index, (values * inside).flatten(1))
    # A pixel belongs to a peak within two sigma of its centre.
    near = inside & (square < (2 * sigma[..., None]) ** 2)
    mask.scatter_add_(1, index, near.float().flatten(1))
    counts = torch.poisson(10.0 + spots, generator=generator).view(panels, 1, side, side)
    variance, mean = torch.var_mean(counts, (1, 2, 3), correction=0, keepdim=True)
    images_N1HW = (counts - mean) / (variance + 1e-6).sqrt()
    return images_N1HW, mask.view(panels, side, side) > 0, torch.stack([y, x], 2)


def trained(net: PeakNet, steps: int, side: int, panels: int, device: torch.device) -> PeakNet:
    """Train to mark planted peaks, for a while."""
    generator = torch.Generator(device).manual_seed(1)
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    weights = torch.tensor([1.0, 4.0], device=device)  # peaks are a hundredth of the pixels
    for step in range(steps):
        peaks = max(1, PEAKS_PER_PANEL * side * side // 512**2)
        images_N1HW, mask_NHW, _ = planted_images(panels, side, peaks, generator)
        with torch.autocast(device.type, torch.bfloat16):
            logits_NCHW = net(images_N1HW)
        loss = F.cross_entropy(logits_NCHW.float(), mask_NHW.long(), weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            say(f"training step {step}: loss {loss.item():.4f}")
    return net.eval()


# --- agreement ---


def class_map(coarse_NCHW: Tensor) -> Tensor:
    full_NCHW = F.interpolate(coarse_NCHW.float(), scale_factor=STRIDE, mode="bilinear")
    return full_NCHW.argmax(1)


def in_parts(network: Network, images_N1HW: Tensor) -> Tensor:
    return torch.cat([network(part_N1HW) for part_N1HW in torch.split(images_N1HW, 16)])


def logits_off(exact_NCHW: Tensor, other_NCHW: Tensor) -> float:
    """Root mean square error of the margin between the classes, relative to the margin's."""
    margin_NCHW = exact_NCHW.float().diff(dim=1)
    error = (other_NCHW.float().diff(dim=1) - margin_NCHW).square().mean().sqrt()
    return float(error / margin_NCHW.square().mean().sqrt())


def agreement(net: PeakNet, fast: FastPeakNet, panels: int, side: int) -> bool:
    device = next(net.parameters()).device
    generator = torch.Generator(device).manual_seed(2)
    peaks = max(1, PEAKS_PER_PANEL * side * side // 512**2)
    images_N1HW, _, planted_NM2 = planted_images(panels, side, peaks, generator)
    exact_NCHW = in_parts(net.coarse_logits, images_N1HW)
    fast_NCHW = in_parts(fast.coarse_logits, images_N1HW.bfloat16())
    rounded = PeakNet(**_sizes(net)).to(device).eval()
    rounded.load_state_dict(net.state_dict())
    rounded.bfloat16()
    plain_NCHW = in_parts(rounded.coarse_logits, images_N1HW.bfloat16())
    exact_NHW = class_map(exact_NCHW)
    exact = centres(find_peaks(exact_NHW), panels)
    planted = list(planted_NM2.cpu().double())
    print()
    print(f"Agreement: {panels} panels with {peaks} planted peaks each; in float32 the network")
    print(f"finds {sum(map(len, exact))} peaks: {matched(planted, exact, 2.0):.3f} of the planted,")
    print(f"and {matched(exact, planted, 2.0):.3f} of them are planted (within 2 pixels).")
    rows = [["against plain float32", "logits off", *HEADER]]
    for name, other_NCHW in (("plain, bfloat16, eager", plain_NCHW), ("fast", fast_NCHW)):
        columns, passed = compare(exact_NHW, class_map(other_NCHW))
        rows.append([name, f"{logits_off(exact_NCHW, other_NCHW):.2e}", *columns])
    print_table(rows)
    print(GATES, flush=True)
    return passed  # the fast one, which came last


def _sizes(net: PeakNet) -> dict[str, Any]:
    return TINY if net.backbone_to_bifpn[0].out_channels == 32 else {}


# --- speed ---


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(works: Sequence[Callable[[], object]], windows: int, repeats: int) -> list[float]:
    """Median seconds a call of each, windows of all in turn, so that they share the clocks."""
    for work in works:
        for _ in range(2):
            work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(windows):
        for work, own in zip(works, seconds, strict=True):
            synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            synchronize()
            own.append((time.perf_counter() - began) / repeats)
    return [statistics.median(own) for own in seconds]


def gigaflop(height: int, width: int, **sizes: Any) -> float:
    """Operations of one panel in the plain network: products and convolutions, as torch counts."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        PeakNet(**sizes).eval().coarse_logits(torch.empty(1, 1, height, width))
    return float(counter.get_total_flops()) / 1e9


def matrix_product(device: torch.device, size: int, windows: int) -> float:
    """TFLOP/s of a square bfloat16 matrix product of random values."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    (seconds,) = medians([lambda: a @ b], windows, 10)
    return 2 * size**3 / seconds / 1e12


def first_call(name: str, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    synchronize()
    say(f"{name}: first batch after {time.perf_counter() - began:.1f} s")


def where_the_time_goes(work: Callable[[], object], seconds: float, repeats: int = 5) -> None:
    """Print GPU time by operator and by kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            work()
        synchronize()
    by_operator: defaultdict[str, float] = defaultdict(float)
    by_kernel: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1000 / repeats
        if event.device_type == DeviceType.CUDA:
            by_kernel.append((ms, event.count // repeats, event.key))
        elif ms:
            by_operator[event.key] += ms
    total = sum(by_operator.values())
    print()
    print(f"GPU time of the fast network, eager, by operator (profiled; {1000 * seconds:.2f} ms")
    print("by the clock)")
    rows = [["operator", "ms", "share"]]
    for name, ms in sorted(by_operator.items(), key=lambda item: -item[1]):
        rows.append([name, f"{ms:.3f}", f"{ms / total:.1%}"])
    print_table([*rows, ["all", f"{total:.3f}", ""]])
    print("by kernel, the longest")
    rows = [["kernel", "ms", "calls"]]
    for ms, count, name in sorted(by_kernel, reverse=True)[:20]:
        rows.append([name[:80], f"{ms:.3f}", str(count)])
    print_table(rows)


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = row
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print(first.ljust(widths[0]), *cells, sep="  ")
    sys.stdout.flush()


def made(net: PeakNet, device: torch.device) -> FastPeakNet:
    """Return the fast PeakNet, as the module makes it."""
    reason = support.obstacle(net, device, "bf16-true")
    if device.type == "cuda":
        if reason is not None:
            raise SystemExit(f"the fast PeakNet does not run here: {reason}")
        support.load_kernels()
    return FastPeakNet(net).to(device).eval()  # on a CPU, to try the program out


# --- starting ---


def startup() -> None:
    """Measure a start in this process and print it as JSON; see `startups`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = json.loads(os.environ["FORWARD_STARTUP"])
    seconds = {"Python, imports": time.time() - request["began"]}
    sizes, shape = request["sizes"], request["shape"]

    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        synchronize()
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    net = PeakNet(**sizes, weights=request["weights"]).eval()
    lap("network with weights")
    images_N1HW = torch.randn(shape).to(device).bfloat16()
    lap("GPU")
    with torch.inference_mode():
        fast = made(net, device)
        lap("rewriting, loading of kernels")
        fast.coarse_logits(images_N1HW)
        lap("first batch")
        fast.coarse_logits(images_N1HW)
        lap("second batch")
    print(json.dumps(seconds))


def startups(net: PeakNet, shape: tuple[int, int, int, int]) -> None:
    """Print how long a process takes from its start to its batches, twice: caches empty, full."""
    columns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file({name: t.cpu().contiguous() for name, t in net.state_dict().items()}, weights)
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUPY_CACHE_DIR")
        caches = {name: str(Path(folder) / name.lower()) for name in names}
        for state in ("empty", "full"):
            request = {
                "began": time.time(),
                "sizes": _sizes(net),
                "shape": shape,
                "weights": str(weights),
            }
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.speed.forward", "--startup"],
                env=os.environ | caches | {"FORWARD_STARTUP": json.dumps(request)},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=200,
            )
            columns.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"start with {state} caches: {sum(columns[-1].values()):.1f} s in all")
    print()
    print("Start of a process, seconds (caches: Triton's, Inductor's and CuPy's)")
    rows = [["", "caches empty", "caches full"]]
    for name in columns[0]:
        rows.append([name, *(f"{column[name]:.2f}" for column in columns)])
    print_table(rows)


# --- all ---


def sizes_table(device: torch.device, product: float, windows: int) -> None:
    rows = [["fast, eager", "panels", "ms", "panels/s", "TFLOP/s", "of the product"]]
    default: dict[str, Any] = {}
    for name, sizes, panels, height, width in (
        ("default, 352x384", default, 128, 352, 384),
        ("default, 512x1024", default, 64, 512, 1024),
        ("default, 1920x1920", default, 8, 1920, 1920),
        ("default, 512x512", default, 1, 512, 512),
        ("atto with 2 BiFPN blocks, 512x512", ATTO, 128, 512, 512),
        ("atto with 2 BiFPN blocks, 352x384", ATTO, 128, 352, 384),
    ):
        torch.manual_seed(0)
        fast = made(PeakNet(**sizes).eval(), device)
        images_N1HW = torch.randn(panels, 1, height, width, device=device).bfloat16()
        work = _calling(fast.coarse_logits, images_N1HW)
        first_call(name, work)
        (seconds,) = medians([work], windows, 5)
        teraflops = gigaflop(height, width, **sizes) * panels / seconds / 1e3
        rows.append(
            [
                name,
                str(panels),
                f"{1000 * seconds:.2f}",
                f"{panels / seconds:.0f}",
                f"{teraflops:.0f}",
                f"{teraflops / product:.1%}",
            ]
        )
    print()
    print_table(rows)


def _calling(network: Network, images_N1HW: Tensor) -> Callable[[], Tensor]:
    return lambda: network(images_N1HW)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--panels", type=int, default=128)
    parser.add_argument("--no-startup", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--startup", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.startup:
        startup()
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tiny, windows = arguments.tiny, arguments.windows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, panels, side = (TINY, 4, 128) if tiny else ({}, arguments.panels, 512)
    # The float32 result is what the others are compared with.
    torch.backends.cudnn.allow_tf32 = False

    torch.manual_seed(0)
    steps, training_panels = (60, 16) if tiny else (200, 32)
    net = trained(PeakNet(**sizes), steps, 128, training_panels, device)
    with torch.inference_mode():
        fast = made(net, device)
        images_N1HW = planted_images(
            panels, side, PEAKS_PER_PANEL, torch.Generator(device).manual_seed(3)
        )[0].bfloat16()
        first_call("fast, eager", lambda: fast.coarse_logits(images_N1HW))
        passed = agreement(net, fast, min(panels, 64), side)

        plain = PeakNet(**sizes).to(device).eval()
        plain.load_state_dict(net.state_dict())
        plain.bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plain_compiled: Network = torch.compile(plain.coarse_logits, dynamic=False)
        first_call("plain, compiled", lambda: plain_compiled(images_N1HW))
        networks: list[Network] = [plain_compiled, fast.coarse_logits]
        works = [_calling(network, images_N1HW) for network in networks]
        seconds = medians(works, windows, 2 if tiny else 10)
        say("timed")
        product = matrix_product(device, 256 if tiny else 8192, windows)
        per_panel = gigaflop(side, side, **sizes)
        print()
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}; {panels} panels of {side}x{side}, medians of")
        print(f"{windows} windows; {per_panel:.2f} GFLOP a panel; a bf16 matrix product of")
        print(f"{256 if tiny else 8192}^3 runs at {product:.0f} TFLOP/s")
        rows = [["", "ms", "panels/s", "TFLOP/s", "of the product", "of plain"]]
        labels = ["plain, compiled, bf16, channels_last", "fast"]
        for label, own in zip(labels, seconds, strict=True):
            teraflops = per_panel * panels / own / 1e3
            rows.append(
                [
                    label,
                    f"{1000 * own:.2f}",
                    f"{panels / own:.0f}",
                    f"{teraflops:.1f}",
                    f"{teraflops / product:.1%}",
                    f"{seconds[0] / own:.2f}",
                ]
            )
        print_table(rows)
        if device.type == "cuda":
            where_the_time_goes(works[1], seconds[1])
        if not tiny:
            sizes_table(device, product, windows)
    if not arguments.no_startup:
        startups(net, (panels, 1, side, side))
    say("done")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
