"""The whole step on a GPU: the same answer as on the CPU, without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import InstanceNorm, MergeBatchChannelDims, Pad
from peaknet_predict.types import PeakBatch
from tests.helpers.prediction import noisy_batches, predict, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """TF32, cuDNN's default for float32 convolutions, would round to 10 bits on the GPU alone."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class Steps(nn.Module):
    """Logits that are the images' own pixels, coarse or enlarged, through one convolution."""

    def __init__(self, coarse: bool) -> None:
        super().__init__()
        self.pool = nn.Conv2d(1, 2, 4, stride=4)
        with torch.no_grad():
            self.pool.weight.zero_()
            self.pool.weight[1] = 1 / 16
            # A threshold of one sigma, well away from the background's own values.
            self.pool.bias.copy_(torch.tensor([0.0, -1.0]))  # type: ignore[union-attr]
        self.coarse_stride = 4 if coarse else None

    def coarse_logits(self, images_N1HW: Tensor) -> Tensor:
        logits: Tensor = self.pool(images_N1HW)
        return logits

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return nn.functional.interpolate(
            self.coarse_logits(images_N1HW).float(), scale_factor=4, mode="bilinear"
        ).to(images_N1HW.dtype)


def module(net: nn.Module, **settings: Any) -> PeakNetModule:
    return PeakNetModule(
        net, [Pad(192, 256, "center"), InstanceNorm(), MergeBatchChannelDims()], **settings
    )


def assert_same(these: list[PeakBatch], those: list[PeakBatch]) -> None:
    assert len(these) == len(those)
    for this, that in zip(these, those, strict=True):
        assert [r.id for r in this.results] == [r.id for r in that.results]
        for a, b in zip(this.results, that.results, strict=True):
            np.testing.assert_array_equal(a.peaks, b.peaks)
            assert a.bad_pixels == b.bad_pixels
            assert a.photon_energy == b.photon_energy


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int32", "float64"])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_gpu_gives_the_cpus_peaks(coarse: bool, dtype: str) -> None:
    batches = noisy_batches([4, 4, 4, 4, 1], 4, (3, 185, 250), dtype)
    on_cpu = predict(module(Steps(False)), batches, accelerator="cpu")
    on_gpu = predict(module(Steps(coarse)), batches, accelerator="gpu")
    assert sum(len(r.peaks) for b in on_cpu for r in b.results) > 50
    assert_same(on_gpu, on_cpu)


def test_repeat_runs_are_equal_bit_for_bit_compiled_or_not() -> None:
    batches = noisy_batches([4] * 6 + [2], 4, (3, 185, 250))
    first = predict(module(LocalSnr()), batches, accelerator="gpu")
    assert_same(predict(module(LocalSnr()), batches, accelerator="gpu"), first)
    assert sum(len(r.peaks) for b in first for r in b.results) > 50


def test_a_steady_state_step_never_waits() -> None:
    batches = noisy_batches([4] * 12, 4, (3, 185, 250))

    class Strict(L.Callback):
        """From the fourth batch on, anything that waits for the device is an error."""

        def on_predict_batch_start(self, *args: Any) -> None:
            if args[3] >= 4:
                torch.cuda.set_sync_debug_mode("error")

        def on_predict_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    try:
        found = predict(
            module(Steps(True), compile=True, num_overlap=3),
            batches,
            [Strict()],
            accelerator="gpu",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [r.id.idx for b in found for r in b.results] == list(range(48))


def test_memory_is_flat_over_ten_thousand_batches() -> None:
    batches = noisy_batches([2] * 4, 2, (2, 60, 60)) * 2500
    on_device: list[int] = []
    on_host_kb: list[int] = []

    class Watch(L.Callback):
        def on_predict_batch_end(self, *args: Any) -> None:
            if args[4] % 1000 == 999:
                on_device.append(torch.cuda.memory_allocated())
                on_host_kb.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4)

    net = PeakNetModule(
        Steps(True), [Pad(64, 64), InstanceNorm(), MergeBatchChannelDims()], num_overlap=3
    )
    run(net, batches, [Watch()], accelerator="gpu")
    assert len(on_device) == 10
    assert len(set(on_device)) == 1, on_device
    assert on_host_kb[-1] - on_host_kb[1] < 20_000, on_host_kb
