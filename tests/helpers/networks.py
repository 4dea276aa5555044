"""Networks for tests: small ones, and the reference's numbers for one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peaknet_predict.models import PeakNet

GOLDEN = Path(__file__).parents[1] / "golden"

TINY: dict[str, Any] = {
    "hidden_sizes": (16, 32, 48, 64),
    "depths": (1, 2, 1, 1),
    "bifpn_features": 32,
    "head_channels": 32,
    "head_groups": 8,
}
THREE_STAGES: dict[str, Any] = {
    "hidden_sizes": (16, 24, 40),
    "depths": (1, 1, 2),
    "bifpn_features": 24,
    "head_channels": 32,
    "head_groups": 4,
}
TWO_STAGES: dict[str, Any] = {
    "hidden_sizes": (8, 16),
    "depths": (1, 1),
    "bifpn_features": 16,
    "bifpn_base_level": 2,
    "head_channels": 16,
    "head_groups": 1,
}
ATTO: dict[str, Any] = {
    "hidden_sizes": (40, 80, 160, 320),
    "depths": (2, 2, 6, 2),
    "bifpn_features": 64,
    "bifpn_blocks": 2,
    "head_channels": 64,
}


class Plain(nn.Module):
    """Peak where a pixel stands 3 standard deviations above the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return (images_N1HW - 3) * self.weight.reshape(1, 2, 1, 1)


class Bright(nn.Module):
    """The same; remembers what it was given, and takes widths that are multiples of 4 only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.seen_shapes: list[tuple[int, ...]] = []
        self.seen_dtypes: list[torch.dtype] = []

    def check_shape(self, height: int, width: int) -> None:
        if width % 4:
            raise ValueError("width must be a multiple of 4; use Pad")

    def forward(self, images_N1HW: Tensor) -> Tensor:
        self.seen_shapes.append(tuple(images_N1HW.shape))
        self.seen_dtypes.append(images_N1HW.dtype)
        return (images_N1HW - 3) * self.weight.reshape(1, 2, 1, 1)


def small_peaknet(name: str = "peaknet_small") -> PeakNet:
    """Return the network of golden files, with their weights."""
    sizes = json.loads((GOLDEN / f"{name}.json").read_text())
    return PeakNet(
        hidden_sizes=sizes["hidden_sizes"],
        depths=sizes["depths"],
        bifpn_features=sizes["num_features"],
        bifpn_blocks=sizes["num_blocks"],
        bifpn_base_level=sizes["base_level"],
        head_channels=sizes["out_channels"],
        head_groups=sizes["num_groups"],
        num_classes=sizes["num_classes"],
        learned_upsample=sizes["uses_learned_upsample"],
        weights=str(GOLDEN / f"{name}.safetensors"),
    ).eval()


def golden(name: str = "peaknet_small") -> tuple[Tensor, Tensor]:
    """Return an input of that network, and the logits that the reference computed from it."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["logits"])


def perturbed(seed: int = 0, **sizes: Any) -> PeakNet:
    """Return a network of which no parameter has a special value."""
    torch.manual_seed(seed)
    net = PeakNet(**sizes).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("w_m", "w_q")):
                parameter.uniform_(-0.3, 2.0)  # some below zero: their ReLU must not be lost
            elif parameter.ndim == 1 or "grn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)
    return net
