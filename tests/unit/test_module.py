from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Crop, Pad, Patchify, Transform
from peaknet_predict.types import EventBatch, Refusal
from tests.helpers.networks import Bright, Plain
from tests.helpers.prediction import batch, chain, predict, shot


def test_peaks_come_back_with_their_events_in_order() -> None:
    spots = [[(0, 3, 4), (1, 30, 39)], [], [(1, 0, 0)]]
    events = [shot(i, s) for i, s in enumerate(spots)]
    batches = [batch(events[:2], 2), batch(events[2:], 2)]
    first, last = predict(PeakNetModule(Bright(), chain()), batches)
    assert [r.id.idx for r in first.results + last.results] == [0, 1, 2]
    for result, planted in zip(first.results + last.results, spots, strict=True):
        assert result.peaks.tolist() == [list(map(float, spot)) for spot in planted]
        assert result.photon_energy == 9000.0 + result.id.idx
        assert result.image is events[result.id.idx].image, "the pixels as received, not a copy"


def test_a_short_batch_has_the_full_shape_and_no_results_for_its_padding() -> None:
    net = Bright()
    (only,) = predict(PeakNetModule(net, chain()), [batch([shot(0, [(0, 5, 5)])], 4)])
    assert len(only.results) == 1
    assert net.seen_shapes == [(8, 1, 32, 40)]


def test_an_image_without_panels_has_its_peaks_on_panel_0() -> None:
    event = shot(0, [(0, 7, 9)], shape=(32, 40))
    images_BPHW = torch.from_numpy(event.image)[None, None]
    one = EventBatch(images_BPHW, [event], [])
    (only,) = predict(PeakNetModule(Bright(), chain()), [one])
    assert only.results[0].peaks.tolist() == [[0.0, 7.0, 9.0]]
    assert only.results[0].image.shape == (32, 40)


@pytest.mark.parametrize(
    "first",
    [
        [Crop(24, 28, "center", allow_crop=True)],
        [Pad(48, 64, "center")],
        [Patchify(16, 20)],
        [Pad(40, 44, "bottom-right"), Crop(32, 36, "top-left", allow_crop=True)],
    ],
    ids=lambda transforms: "-".join(type(t).__name__ for t in transforms),
)
def test_peaks_are_in_the_original_frame(first: list[Transform]) -> None:
    spots = [(0, 12, 13), (1, 20, 22)]
    (only,) = predict(PeakNetModule(Bright(), chain(*first)), [batch([shot(0, spots)], 1)])
    assert only.results[0].peaks.tolist() == [list(map(float, spot)) for spot in spots]


def test_padding_and_bad_pixels_are_never_peaks() -> None:
    dark = shot(0, [(0, 5, 5)])
    dark.image[:] -= 1000.0  # zeros of the padding now stand far above the data
    dark.image[1, 8, 8:12] = np.nan
    dark.image[1, 9, 9] = np.inf
    (only,) = predict(PeakNetModule(Bright(), chain(Pad(64, 64))), [batch([dark], 1)])
    assert only.results[0].peaks.tolist() == []
    assert only.results[0].bad_pixels == 5


def test_shapes_that_do_not_fit_are_refused_and_the_stream_goes_on() -> None:
    small = [shot(i, [], shape=(2, 16, 16)) for i in range(2)]
    odd = [shot(2, [], shape=(2, 32, 42))]
    good = [shot(3, [(0, 3, 4)])]
    module = PeakNetModule(Bright(), chain(Crop(20, 20, allow_crop=True)))
    refused, fits = predict(module, [batch(small, 2), batch(good, 2)])
    assert [r.id.idx for r in refused.refused if r.id is not None] == [0, 1]
    assert "(2, 16, 16) does not fit" in refused.refused[0].reason
    assert "Pad(" in refused.refused[0].reason
    assert len(fits.results) == 1
    (by_network,) = predict(PeakNetModule(Bright(), chain()), [batch(odd, 1)])
    assert "multiple of 4" in by_network.refused[0].reason


def test_refusals_travel_with_a_batch_even_an_empty_one() -> None:
    refusal = Refusal(None, "nonsense")
    with_event, without = predict(
        PeakNetModule(Bright(), chain()),
        [batch([shot(0, [])], 1, [refusal]), batch([], 1, [refusal])],
    )
    assert with_event.refused == without.refused == [refusal]
    assert without.results == []


def test_no_more_batches_are_under_way_than_allowed() -> None:
    module = PeakNetModule(Bright(), chain(), num_overlap=2)
    module.eval()
    pending = [module.predict_step(batch([shot(i, [])], 1), i) for i in range(5)]
    finished = [p._result is not None for p in pending]
    assert finished == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("precision", "seen"),
    [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)],
)
def test_precision_is_the_trainers(precision: str, seen: torch.dtype) -> None:
    net = Bright()
    event = shot(0, [(0, 5, 5)])
    event.image[:] += 1000.25  # not a bfloat16: rounded counts would drown the spot
    (only,) = predict(PeakNetModule(net, chain()), [batch([event], 1)], precision=precision)
    assert net.seen_dtypes == [seen]
    assert only.results[0].peaks.tolist() == [[0.0, 5.0, 5.0]]


def test_compilation_and_warm_up_happen_before_the_first_batch() -> None:
    net = Plain()
    module = PeakNetModule(net, chain(), compile=True, warmup_shapes=[(2, 2, 32, 40)])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    events = [shot(i, [(1, 5, 5)]) for i in range(5)]
    batches = [batch(events[0:2], 2), batch(events[2:4], 2), batch(events[4:5], 2)]
    results = predict(module, batches)
    assert [r.id.idx for b in results for r in b.results] == [0, 1, 2, 3, 4]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2, (
        "one for preprocessing, one for the network: the loop compiled again after the warm-up"
    )
    assert list(net.state_dict()) == ["weight"]


def test_a_network_that_asks_for_the_mask_gets_it() -> None:
    class Masked(Bright):
        def forward(self, images_N1HW: Tensor, valid_N1HW: Tensor) -> Tensor:  # type: ignore[override]
            assert valid_N1HW.shape == images_N1HW.shape
            assert int(valid_N1HW.sum()) == 2 * 32 * 40
            return super().forward(images_N1HW)

    predict(PeakNetModule(Masked(), chain(Pad(48, 48))), [batch([shot(0, [])], 1)])


def test_a_network_that_does_not_compile_runs_eagerly_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    torch._dynamo.reset()
    module = PeakNetModule(Plain(), chain(), compile=True, warmup_shapes=[(1, 2, 32, 40)])
    (only,) = predict(module, [batch([shot(0, [(0, 5, 5)])], 1)])
    assert only.results[0].peaks.tolist() == [[0.0, 5.0, 5.0]]
    assert "does not compile and runs eagerly" in caplog.text
    assert module._forward_pass.mode == "eager"
    assert "not compiled: BackendCompilerFailed" in module._forward_pass.why()
