from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from peaknet_predict.first_refusals import BlamelessError, UnfitStreamError
from peaknet_predict.module import PeakNetModule
from peaknet_predict.network_output import NetworkOutputError
from peaknet_predict.preprocess import Crop, Pad, Patchify, Transform
from peaknet_predict.types import EventBatch, Refusal
from tests.helpers.examples import examples
from tests.helpers.networks import TWO_STAGES, Bright, Plain, perturbed, small_peaknet
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


@pytest.mark.parametrize(
    "cut",
    [
        chain(Patchify(16, 20)),
        chain(Pad(40, 44), Patchify(16, 20)),
        chain(Patchify(16, 20), Patchify(8, 12)),
    ],
    ids=["plain", "padded", "twice"],
)
def test_a_peak_on_a_seam_is_one_peak_at_its_place(cut: list[Transform]) -> None:
    event = shot(0, [])
    middles = [(0, 16, 20), (0, 5, 20), (1, 16, 8), (0, 31, 39), (1, 0, 20), (1, 24, 32)]
    for panel, y, x in middles:
        event.image[panel, max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 100.0
    (whole,) = predict(PeakNetModule(Bright(), chain()), [batch([event], 2)])
    assert len(whole.results[0].peaks) == len(middles)
    (only,) = predict(PeakNetModule(Bright(), cut), [batch([event], 2)])
    assert only.results[0].peaks.tolist() == whole.results[0].peaks.tolist()


def test_float64_logits_are_read_as_any_other() -> None:
    module = PeakNetModule(Returns(lambda logits: logits.double()), chain())
    output = module._logits(torch.from_numpy(shot(0, [(1, 3, 4)]).image)[None])
    assert output.logits_NCHW.dtype == torch.float32
    (only,) = predict(module, [batch([shot(0, [(1, 3, 4)])], 1)])
    assert only.results[0].peaks.tolist() == [[1, 3, 4]]


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
    _, by_network = predict(PeakNetModule(Bright(), chain()), [batch(good, 1), batch(odd, 1)])
    assert "multiple of 4" in by_network.refused[0].reason


def test_a_stream_in_which_no_event_fits_ends_with_its_first_events() -> None:
    crop = chain(Crop(20, 20))
    with pytest.raises(UnfitStreamError, match=r"first 1 were.*leaves out 69%.*allow_crop") as one:
        predict(PeakNetModule(Bright(), crop), [batch([shot(0, [])], 1), batch([], 1)])
    assert [refusal.id.idx for refusal in one.value.refusals if refusal.id] == [0]
    many = [batch([shot(2 * i, []), shot(2 * i + 1, [])], 2) for i in range(99)]
    with pytest.raises(UnfitStreamError, match="first 32 were"):
        predict(PeakNetModule(Bright(), crop), many)


@pytest.mark.parametrize("reminded", [False, True])
def test_a_stream_of_events_that_are_all_bad_the_same_way_ends(reminded: bool) -> None:
    def bad(reason: str) -> list[EventBatch]:
        reminder = [batch([], 1)] if reminded else []
        return [batch([], 1, [Refusal(None, reason)]), *reminder]

    keV = [one for i in range(99) for one in bad(f"photon energy is 9.{i} eV")]
    with pytest.raises(UnfitStreamError, match=r"latest 32 were.*photon energy is 9\.31 eV"):
        predict(PeakNetModule(Bright(), chain()), keV)
    mixed = [one for i in range(40) for one in bad(["energy", "image"][i % 2])]
    assert len(predict(PeakNetModule(Bright(), chain()), mixed)) == len(mixed)
    with_a_good_one = batch([shot(0, [])], 1, [Refusal(None, "energy")] * 40)
    (found,) = predict(PeakNetModule(Bright(), chain()), [with_a_good_one])
    assert (len(found.results), len(found.refused)) == (1, 40)
    after_a_good_one = [batch([shot(0, [])], 1), *keV]
    assert len(predict(PeakNetModule(Bright(), chain()), after_a_good_one)) == 1 + len(keV)


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


@pytest.mark.thorough
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
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    module = PeakNetModule(Plain(), chain(), compile=True, warmup_shapes=[(1, 2, 32, 40)])
    (only,) = predict(module, [batch([shot(0, [(0, 5, 5)])], 1)])
    assert only.results[0].peaks.tolist() == [[0.0, 5.0, 5.0]]
    assert "does not compile and runs eagerly" in said.text
    assert module._forward_pass.mode == "eager"
    assert "not compiled: BackendCompilerFailed" in module._forward_pass.why()


# --- weights ---


def test_random_parameters_predict_only_where_that_is_wanted(said: Any) -> None:
    net = perturbed(**TWO_STAGES)
    batches = [batch([shot(0, [], (2, 64, 64))], 1)]
    with pytest.raises(ValueError, match=r"PeakNet has no weights.*net\.init_args\.weights"):
        predict(PeakNetModule(net, chain()), batches)
    assert len(predict(PeakNetModule(net, chain(), random_weights=True), batches)) == 1
    assert "PeakNet has random parameters, as asked for" in said.text
    said.clear()
    assert len(predict(PeakNetModule(small_peaknet(), chain()), batches)) == 1
    assert not [record for record in said.records if record.levelno >= logging.WARNING]


def test_networks_that_do_not_say_where_their_parameters_are_from_are_warned_of(said: Any) -> None:
    batches = [batch([shot(0, [])], 1)]
    predict(PeakNetModule(Plain(), chain()), batches)
    assert "Plain does not say where its parameters are from" in said.text
    said.clear()
    loaded = Plain()
    loaded.weights_sha256 = "0" * 64  # type: ignore[assignment]
    predict(PeakNetModule(loaded, chain()), batches)
    assert "does not say" not in said.text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_any_networks_weights_load_by_configuration(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    state = {"weight": torch.tensor([0.0, 2.5])}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    module = PeakNetModule(Plain(), chain(), weights=str(path))
    assert torch.equal(module.net.state_dict()["weight"], state["weight"])
    assert module.provenance.weights_sha256 == module.provenance.record()["weights_sha256"]
    assert len(module.provenance.weights_sha256 or "") == 64
    save_file({"wait": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"missing from the file: 1: weight; unknown .* 1: wait"):
        PeakNetModule(Plain(), chain(), weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError, match="no weight file"):
        PeakNetModule(Plain(), chain(), weights="gone.pt")


def test_weights_given_to_the_module_count(tmp_path: Path) -> None:
    other = perturbed(1, **TWO_STAGES)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    net = perturbed(**TWO_STAGES)
    module = PeakNetModule(net, chain(), weights=str(tmp_path / "w.safetensors"))
    module.provenance.check()
    for name, tensor in other.state_dict().items():
        assert torch.equal(module.net.state_dict()[name], tensor)


# --- operating point ---


class Given(nn.Module):
    """Logits that are given, whatever the images."""

    def __init__(self, logits_NCHW: Tensor) -> None:
        super().__init__()
        self.logits_NCHW = logits_NCHW

    def forward(self, images_N1HW: Tensor) -> Tensor:
        return self.logits_NCHW


def centroids(is_peak_NHW: npt.NDArray[np.bool_]) -> list[list[float]]:
    """Peaks of a mask by SciPy, panel by panel."""
    found = []
    for panel, mask_HW in enumerate(is_peak_NHW):
        labels, number = ndimage.label(mask_HW, structure=np.ones((3, 3)))
        centres = ndimage.center_of_mass(mask_HW, labels, range(1, number + 1))
        found += [[panel, y, x] for y, x in centres]
    return found


@examples(40)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 4),
    threshold=st.sampled_from([-2.5, -0.1, 0.0, 1e-3, 0.7, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_pixel_is_peak_above_the_threshold(
    seed: int, classes: int, threshold: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NCHW = (torch.randn(2, classes, 16, 20, generator=generator) * 4).to(dtype)
    module = PeakNetModule(Given(logits_NCHW), chain(), threshold=threshold).eval()
    one = batch([shot(0, [], (2, 16, 20))], 1)
    (result,) = module.predict_step(one, 0).result().results
    if threshold == 0:
        is_peak_NHW = logits_NCHW.softmax(1).argmax(1) != 0  # in its own dtype, ties and all
    else:
        logits_NCHW = logits_NCHW.float()
        is_peak_NHW = logits_NCHW[:, 1:].amax(1) > logits_NCHW[:, 0] + threshold
    assert result.peaks.tolist() == centroids(is_peak_NHW.numpy())


def test_an_operating_point_comes_from_the_file_unless_it_is_given(
    tmp_path: Path, said: Any
) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"peaknet_predict": json.dumps({"threshold": 1.25})}
    save_file(Plain().state_dict(), path, metadata)
    module = PeakNetModule(Plain(), chain(), weights=str(path))
    assert module.provenance.threshold == 1.25
    predict(module, [batch([shot(0, [])], 1)])
    assert "operating point: a pixel is peak above log odds of 1.25" in said.text
    assert (
        PeakNetModule(Plain(), chain(), weights=str(path), threshold=0.0).provenance.threshold
        == 0.0
    )
    assert PeakNetModule(Plain(), chain()).provenance.threshold == 0.0
    with pytest.raises(ValueError, match="threshold is nan; give a finite number"):
        PeakNetModule(Plain(), chain(), threshold=float("nan"))


# --- what a network returns ---


class Returns(nn.Module):
    """Returns what it is told to make of good logits."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, images_N1HW: Tensor) -> Any:
        return self.change(torch.cat([-images_N1HW, images_N1HW - 6], dim=1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x: {"logits": x, "loss": 0},
            r"a dict with the keys 'logits', 'loss'.*logits alone",
        ),
        (lambda x: (x, x), r"a tuple\..*logits alone"),
        (lambda x: None, r"a NoneType\."),
        (lambda x: x[:, 1:], r"a single channel: \(2, 1, 32, 40\).*torch\.cat"),
        (lambda x: x[:, 1], r"shape \(2, 32, 40\)"),
        (lambda x: x[:1], r"shape \(1, 2, 32, 40\)"),
        (lambda x: x[..., ::2, ::2], r"shape \(2, 2, 16, 20\)"),
        (lambda x: x.argmax(1, keepdim=True), r"a tensor of torch\.int64.*not their argmax"),
    ],
    ids=["dict", "tuple", "none", "one-channel", "three-dims", "batch", "size", "class-map"],
)
@pytest.mark.parametrize("warm", [True, False])
def test_other_outputs_than_logits_are_refused_with_what_is_expected(
    change: Any, reason: str, warm: bool
) -> None:
    shapes = [(1, 2, 32, 40)] if warm else []
    module = PeakNetModule(Returns(change), chain(), warmup_shapes=shapes)
    with pytest.raises(NetworkOutputError, match=r"Returns returned .*" + reason) as raised:
        predict(module, [batch([shot(0, [])], 1)])
    assert "(2, C, 32, 40) of at least two classes" in str(raised.value)


class Overflows(nn.Module):
    """Logits of one panel of some calls are not finite."""

    def __init__(self, value: float, broken: set[int]) -> None:
        super().__init__()
        self.value, self.broken, self.calls = value, broken, 0

    def forward(self, images_N1HW: Tensor) -> Tensor:
        logits_NCHW = torch.cat([torch.full_like(images_N1HW, 6.0), images_N1HW], dim=1)
        for event in range(len(images_N1HW) // 2):
            if self.calls + event in self.broken:
                logits_NCHW[2 * event + 1, 1, 5, 7] = self.value
        self.calls += len(images_N1HW) // 2
        return logits_NCHW


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_events_whose_logits_overflow_are_refused_by_name(value: float) -> None:
    events = [shot(i, [(0, 3, 4)]) for i in range(6)]
    batches = [batch(events[:2], 2), batch(events[2:4], 2), batch(events[4:], 2)]
    module = PeakNetModule(Overflows(value, {1, 2, 3}), chain())
    found = predict(module, batches)
    assert [r.id.idx for b in found for r in b.results] == [0, 4, 5]
    assert all(r.peaks.tolist() == [[0, 3, 4]] for b in found for r in b.results)
    refused = [refusal for b in found for refusal in b.refused]
    assert [refusal.id.idx for refusal in refused if refusal.id is not None] == [1, 2, 3]
    assert {r.reason for r in refused} == {"the network's logits are NaN or infinite"}


def test_a_certainty_and_a_dead_panel_are_no_overflow() -> None:
    certain = PeakNetModule(Overflows(-torch.inf, {0}), chain())
    (found,) = predict(certain, [batch([shot(0, [(0, 3, 4)])], 1)])
    assert found.results[0].peaks.tolist() == [[0, 3, 4]]
    dead = shot(0, [(0, 3, 4)])
    dead.image[1] = np.nan
    (found,) = predict(PeakNetModule(Overflows(torch.nan, {0}), chain()), [batch([dead], 1)])
    assert found.results[0].peaks.tolist() == [[0, 3, 4]]


def test_peaks_everywhere_are_no_peaks() -> None:
    """The classes are swapped, the threshold is far too low, or the weights are another's."""
    events = [shot(i, [(0, 3, 4)]) for i in range(4)]
    batches = [batch(events[:2], 2), batch(events[2:], 2)]
    swapped = PeakNetModule(Returns(lambda logits: logits.flip(1)), chain())
    with pytest.raises(NetworkOutputError, match=r"all of its pixels peak.* is class 0 backgr"):
        predict(swapped, batches)
    with pytest.raises(NetworkOutputError, match="do threshold and"):
        predict(PeakNetModule(Bright(), chain(Patchify(16, 20)), threshold=-1e6), batches)
    calls = iter([False, True])
    sometimes = Returns(lambda logits: logits.flip(1) if next(calls) else logits)
    first, second = predict(PeakNetModule(sometimes, chain()), batches)
    assert [len(result.peaks) for result in first.results] == [1, 1]
    assert not second.results
    (reason,) = {one.reason for one in second.refused}
    assert reason == "the network calls nearly all of its pixels peak"


@pytest.mark.parametrize("size", [1, 2])
def test_a_network_that_gives_nothing_else_ends_the_run(size: int) -> None:
    events = [shot(i, []) for i in range(4)]
    batches = [batch(events[i : i + size], size) for i in range(0, 4, size)]
    module = PeakNetModule(Overflows(torch.nan, set(range(9))), chain(), num_overlap=1)
    with pytest.raises(NetworkOutputError, match="each of the first 2 events: are these the we"):
        predict(module, batches)


@pytest.mark.parametrize("good", [0, 1])
def test_masks_that_leave_nothing_of_any_event_end_the_run(good: int) -> None:
    """Good and bad the wrong way round would bring a whole beamtime into quarantine."""
    events = [shot(i, [(0, 9, 9)]) for i in range(40)]
    for event in events[good:]:
        event.image[:] = np.nan
    batches = [batch(events[i : i + 8], 8) for i in range(0, 40, 8)]
    module = PeakNetModule(Bright(), chain(), num_overlap=1)
    if good:
        found = predict(module, batches)
        assert sum(len(one.refused) for one in found) == 39
    else:
        with pytest.raises(BlamelessError, match=r"first 32 events: are good and bad the wrong"):
            predict(module, batches)


@pytest.mark.parametrize(
    ("low", "dtype", "warned"),
    [(-1, np.int32, True), (-2, np.int16, True), (-9, np.int16, False), (0, np.int32, False)],
)
def test_gaps_of_a_counter_that_nobody_calls_bad_are_pointed_out(
    low: int, dtype: Any, warned: bool, said: Any
) -> None:
    event = shot(0, [(0, 9, 9)])
    event.image = event.image.astype(dtype)
    event.image[:, 4:6] = low
    settings: list[Any] = ["auto", [-1, -2]]
    for bad_values in settings:
        module = PeakNetModule(Bright(), chain(), bad_values=bad_values)
        said.clear()
        predict(module, [EventBatch(torch.from_numpy(event.image[None]), [event], [])])
        assert ("set model.init_args.bad_values" in said.text) == (warned and bad_values == "auto")
