"""What products of float8 would do to a trained PeakNet's peaks.

The products that take most of the time, those of the backbone's perceptrons and the head's 3x3
convolutions, get factors rounded to float8 (e4m3): features by one scale for each panel, weights
by one for each output, so that the largest just fits. All else stays as it is, which is more than
kernels for a GPU's float8 products would leave of it. The peaks are compared with those of the
float32 network, by the gates that the fast PeakNet must pass, and with the planted ones. Nothing
is timed. Runs on a CPU::

    python -m benchmarks.accuracy.float8 [--config configs/models/peaknet_small.yaml] [--events 6]
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor, nn

from benchmarks.accuracy.data_sets import held_out
from benchmarks.accuracy.finders import find, make_module
from benchmarks.accuracy.matching import STRONG
from benchmarks.accuracy.simulated_shots import Candidate, score
from benchmarks.speed.agreement import COUNT_OFF, MATCH_RADIUS, MATCHED
from benchmarks.speed.forward import print_table
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.types import Peaks

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def to_float8(values: Tensor) -> Tensor:
    """Round to float8 with one scale for each element of the first axis, and back to float32."""
    scale = values.abs().flatten(1).amax(1).clamp_min(1e-30) / LARGEST
    scale = scale.view(-1, *[1] * (values.ndim - 1))
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def is_perceptron(module: nn.Module) -> bool:
    """Whether it is a product of the backbone's perceptrons."""
    return isinstance(module, nn.Linear)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a 3x3 convolution of all channels."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1


def round_factors(module: nn.Module) -> None:
    """Make a layer multiply float8, from now on."""

    def round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (to_float8(inputs[0]),)

    assert isinstance(module.weight, Tensor)
    module.weight.data = to_float8(module.weight.data)
    module.register_forward_pre_hook(round_input)


def same_peaks(exact: list[Peaks], other: list[Peaks]) -> float:
    """Share of the longer list's peaks that are in both, one to one, within `MATCH_RADIUS`."""
    pairs = zip(exact, other, strict=True)
    same = sum(int((match_peaks(*pair, MATCH_RADIUS)[0] >= 0).sum()) for pair in pairs)
    return same / max(sum(map(len, exact)), sum(map(len, other)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/models/peaknet_small.yaml")
    parser.add_argument("--events", type=int, default=6, help="of 4 panels of 512x512")
    arguments = parser.parse_args()
    data_set = held_out(arguments.events, seed=1912, device="cpu")
    data_set.blanks.clear()  # nothing is asked of them
    kinds = {
        "float32": ((), "32-true"),
        "bfloat16": ((), "bf16-mixed"),
        "float8 in perceptrons": ((is_perceptron,), "32-true"),
        "float8 in 3x3 convolutions": ((is_convolution,), "32-true"),
        "float8 in both": ((is_perceptron, is_convolution), "32-true"),
    }
    rows = [["", "recall >= 5", "precision", "matched", "peaks", "off", ""]]
    exact: list[Peaks] = []
    for name, (chosen, precision) in kinds.items():
        module = make_module(arguments.config)
        for layer in module.net.modules():
            if any(is_one(layer) for is_one in chosen):
                round_factors(layer)
        finder = functools.partial(find, precision=precision)
        its, found = score(data_set, Candidate(name, module, True), finder)
        exact = exact or found
        count, wanted = (sum(map(len, peaks)) for peaks in (found, exact))
        share, off = same_peaks(exact, found), abs(count - wanted) / max(wanted, 1)
        passed = share >= MATCHED and off <= COUNT_OFF
        recall, right = its.recall(STRONG).value, its.precision.value
        row = [name, f"{recall:.4f}", f"{right:.4f}", f"{share:.4f}", f"{count}", f"{off:.2%}"]
        rows.append([*row, "pass" if passed else "FAIL"])
    print_table(rows)
    print(f"gates: matched within {MATCH_RADIUS} px >= {MATCHED}, number off by <= {COUNT_OFF:.1%}")


if __name__ == "__main__":
    main()
