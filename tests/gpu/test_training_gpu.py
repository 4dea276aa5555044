"""Training on a GPU: what must not wait for it, and what compiling must not change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peaknet_predict.models import PeakNet
from peaknet_predict.preprocess import LocalNorm, MergeBatchChannelDims, PadToMultiple, Preprocess
from peaknet_predict.simulation.shots import LabelledShots
from peaknet_predict.training.loss import focal_loss
from peaknet_predict.training.metrics import Scores
from peaknet_predict.training.module import PeakNetTraining
from peaknet_predict.training.simulated_shots import SimulatedShots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images_BPHW = torch.poisson(torch.full(shape, 4.0), generator=generator) * 30 + 900
    images_BPHW[:, :, 30:33, 40:42] += 5000
    images_BPHW[0, 0, ::11, 7] = torch.nan
    images_BPHW[-1, -1] = 0
    return images_BPHW


def chain() -> Preprocess:
    return Preprocess([LocalNorm(), PadToMultiple(32), MergeBatchChannelDims()])


def test_scores_are_the_same_on_a_gpu_and_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(2, 3, 96, 90)
    labels = torch.zeros(pixels.shape, dtype=torch.uint8)
    places = torch.rand(40, 4, generator=generator) * torch.tensor([2.0, 3, 90, 80])
    peaks = torch.cat([places[:, :2].floor(), places[:, 2:]], dim=1)
    shots = LabelledShots(pixels, labels, peaks, torch.rand(40, generator=generator) * 9)
    odds = torch.randn(6, 96, 96, generator=generator) * 2
    valid = chain()(pixels).valid_N1HW[:, 0]
    expected, scores = Scores(), Scores()
    expected.add(odds, valid, shots, chain())
    on_gpu = LabelledShots(pixels.cuda(), labels.cuda(), shots.peaks_M4.cuda(), shots.snr_M.cuda())
    scores.add(odds.cuda(), valid.cuda(), on_gpu, chain())
    assert torch.equal(scores.counts_TK, expected.counts_TK)


@pytest.mark.parametrize("shape", [(2, 3, 185, 388), (1, 2, 512, 512)])
def test_local_norm_is_the_same_compiled_on_a_gpu_and_on_a_cpu(shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    expected = chain()(images(*shape))
    on_gpu = images(*shape).cuda()
    compiled = torch.compile(chain(), fullgraph=True, dynamic=False)
    for prepared in (chain()(on_gpu), compiled(on_gpu)):
        assert torch.equal(prepared.valid_N1HW.cpu(), expected.valid_N1HW)
        torch.testing.assert_close(
            prepared.images_N1HW.cpu(), expected.images_N1HW, atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize("shape", [(2, 2, 100, 120), (1, 1, 2000, 2100)])
@pytest.mark.parametrize("compile", [False, True])
def test_local_norm_does_not_wait_for_the_gpu(compile: bool, shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    preprocess = chain()
    run = torch.compile(preprocess, dynamic=False) if compile else preprocess
    on_gpu = images(*shape).cuda()
    run(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_does_not_wait_for_the_gpu() -> None:
    net = PeakNet((8, 16), (1, 1), 8, head_channels=8, head_groups=2, learned_upsample=True)
    module = PeakNetTraining(net, [LocalNorm(), PadToMultiple(32), MergeBatchChannelDims()]).cuda()
    module.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.on_fit_start()
    pixels = images(2, 2, 64, 64).cuda()
    labels = (pixels > 3000).to(torch.uint8)
    none = torch.empty(0, 4, device="cuda")
    shots = LabelledShots(pixels, labels, none, none[:, 0])

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits_NCHW, labels_NHW, _ = module._labelled_logits(shots)
            loss = focal_loss(logits_NCHW, labels_NHW)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(first, again, rtol=1e-2, atol=0)


def test_batches_made_ahead_are_those_of_their_numbers() -> None:
    """Whatever the device does meanwhile, and also after the series has started again."""
    device = torch.device("cuda", 0)
    data = SimulatedShots(batch_size=2, height=128, width=128)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=device), training=True, world_size=2, global_rank=1
    )
    data.trainer = trainer
    expected = [data._training_batch(index, device) for index in (1, 3, 5)]
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(2):
        for direct in expected:
            shots = data.on_after_batch_transfer(0, 0)
            # What is computed with them must find them whole.
            images_BPHW, labels_BPHW = shots.images_BPHW.clone(), shots.labels_BPHW.clone()
            del shots
            busy = busy @ busy * 1e-4
            same = torch.isclose(images_BPHW, direct.images_BPHW, rtol=1e-4, equal_nan=True)
            # Sums of floats in another order may turn a photon, here and there.
            assert (~same).float().mean() < 1e-3
            assert (labels_BPHW != direct.labels_BPHW).float().mean() < 1e-3
        data.load_state_dict({"batches_made": 0})
