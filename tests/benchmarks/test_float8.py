from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.accuracy.float8 import is_convolution, is_perceptron, round_factors, to_float8
from peaknet_predict.models import PeakNet


def test_rounding_keeps_four_digits_of_what_is_not_tiny_and_the_largest() -> None:
    values = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    rounded = to_float8(values * torch.tensor([[1e-9], [1e-3], [1.0], [1e3], [1e9]]))
    assert torch.equal(to_float8(rounded), rounded)
    largest = values.abs().amax(1, keepdim=True)
    off = (to_float8(values) - values).abs()
    assert bool((off <= values.abs() * 2**-4 + largest * 2**-15).all())
    torch.testing.assert_close(to_float8(values).abs().amax(1, keepdim=True), largest)
    assert to_float8(torch.zeros(2, 3)).abs().max() == 0


@pytest.mark.parametrize("is_one", [is_perceptron, is_convolution])
def test_layers_are_chosen_and_multiply_rounded_factors(is_one: object) -> None:
    torch.manual_seed(0)
    net = PeakNet((16, 32, 64, 128), (1, 1, 2, 1), 32, head_channels=32, head_groups=8).eval()
    images = torch.randn(1, 1, 64, 64)
    chosen = [module for module in net.modules() if is_one(module)]  # type: ignore[operator]
    assert chosen
    with torch.inference_mode():
        exact = net(images)
        for module in chosen:
            round_factors(module)
        rounded = net(images)
    assert not torch.equal(exact, rounded)
    relative = (rounded - exact).norm() / exact.norm()
    assert relative < 0.2, relative
    for module in chosen:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight = module.weight.detach()
        assert torch.equal(to_float8(weight), weight)
