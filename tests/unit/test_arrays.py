"""`find_peaks` and `load_model`: what they find, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peaknet_predict
from peaknet_predict import FilesDataModule, RefusedEventsError, find_peaks, load_model
from peaknet_predict.arrays import PEAK
from peaknet_predict.module import PeakNetModule
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.sources import EventSource
from peaknet_predict.types import Image, PeakBatch
from tests.helpers.networks import Bright
from tests.helpers.prediction import batch, chain, predict, shot

DTYPES = ("u1", "i2", ">u2", "u2", "i4", "u4", "i8", "f4", ">f4", "f8")


def frames(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> npt.NDArray[Any]:
    """Poisson noise with a spot near the middle of each panel."""
    random = np.random.default_rng(seed)
    images = random.poisson(10.0, shape)
    y, x = shape[-2] // 2, shape[-1] // 2
    images[..., y - 1 : y + 2, x - 1 : x + 2] += 90
    return images.astype(dtype)


@pytest.fixture(scope="module")
def snr() -> PeakNetModule:
    return load_model("snr")


def test_a_table_has_the_peaks_of_the_module_and_their_intensities(snr: PeakNetModule) -> None:
    event = shot(0, [(0, 9, 9)], shape=(2, 40, 48))
    event.image[:] += frames((2, 40, 48))
    (expected,) = predict(snr, [batch([event], 1)])
    (table,) = find_peaks(event.image, snr)
    assert table.dtype == PEAK
    peaks = np.stack([table["panel"], table["y"], table["x"]], axis=1)
    assert np.array_equal(peaks, expected.results[0].peaks)
    assert {(0, 20.0, 24.0), (1, 20.0, 24.0)} <= set(table[["panel", "y", "x"]].tolist())
    assert np.allclose(table["intensity"][table["y"] == 20.0], 9 * 90, rtol=0.1)
    assert (table["snr"] > 10).all()


@settings(max_examples=4)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(24, 40), st.integers(24, 40)),
    dtype=st.sampled_from(DTYPES),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_event_has_its_own_peaks_however_it_comes(
    shape: tuple[int, int, int, int], dtype: str, batch_size: int, seed: int
) -> None:
    model = load_model("snr")
    images = frames(shape, dtype, seed)
    tables = find_peaks(images, model, batch_size=batch_size)
    assert len(tables) == shape[0]
    assert same(tables, find_peaks(np.asfortranarray(images), model))
    alone = images[-1, 0] if shape[1] == 1 else images[-1]
    assert same(tables[-1:], find_peaks(alone, model))


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def test_masks_and_the_operating_point(snr: PeakNetModule, tmp_path: Path) -> None:
    image = frames((2, 40, 48))
    mask = np.zeros((2, 40, 48), bool)
    mask[0, 15:25, 20:30] = True
    (table,) = find_peaks(image, snr, mask=mask)
    assert set(table["panel"]) == {1}
    np.save(tmp_path / "mask.npy", mask)
    (of_file,) = find_peaks(image, "snr", mask=str(tmp_path / "mask.npy"))
    assert np.array_equal(table, of_file)
    slab = mask.reshape(80, 48).astype(np.uint16)
    assert same([table], find_peaks(image, snr, mask=slab))
    assert same([table], find_peaks(np.ma.array(image, mask=mask), snr))
    # Both masks count.
    other = np.ma.array(image, mask=mask[::-1])
    assert [len(t) for t in find_peaks(other, snr, mask=mask)] == [0]

    assert [len(t) for t in find_peaks(image, snr, threshold=1000.0)] == [0]
    assert snr.provenance.threshold == 0.0, "only for that call"
    assert load_model("snr", threshold=np.float32(2)).provenance.threshold == 2.0


def test_events_that_cannot_be_processed_are_named_and_the_others_kept(snr: PeakNetModule) -> None:
    images = frames((3, 1, 40, 48))
    images[1] = np.nan
    with pytest.raises(RefusedEventsError, match="1 of 3 events are refused: event 1: no pixel of"):
        find_peaks(images, snr)
    with pytest.raises(RefusedEventsError) as refused:
        find_peaks(images, snr, batch_size=1)
    assert list(refused.value.reasons) == [1]
    assert refused.value.tables[1] is None
    assert same(find_peaks(images[::2], snr), refused.value.tables[::2])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros(5), r"images have the shape \(5,\); expected \(H, W\), \(panels, H, W\) or"),
        (np.zeros((1, 1, 1, 5, 5)), "images have the shape"),
        ([np.zeros((4, 4)), np.zeros((4, 5))], "call find_peaks once for each event"),
        (np.zeros((5, 5), bool), "event 0: image has dtype bool; expected integers"),
        (np.zeros((5, 5), complex), "event 0: image has dtype complex128"),
        (np.zeros((0, 5)), r"event 0: image is empty: shape \(0, 5\)"),
        (None, r"images have the shape \(\)"),
    ],
)
def test_what_is_no_image(images: Any, reason: str, snr: PeakNetModule) -> None:
    with pytest.raises(ValueError, match=reason):
        find_peaks(images, snr)


def test_no_events_have_no_tables(snr: PeakNetModule) -> None:
    assert find_peaks(np.zeros((0, 2, 40, 48)), snr) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "batch_size is 0; a batch needs at least one event"),
        ({"threshold": float("nan")}, "threshold is nan; give a finite number"),
        ({"device": "tpu"}, "device is 'tpu'; give auto, cpu, cuda or cuda:1"),
        ({"device": "cuda:99"}, "device is 'cuda:99', and torch sees"),
        ({"mask": "det.geom"}, "so det.geom comes too late: give it to load_model"),
        ({"mask": np.zeros((3, 40, 48), bool)}, r"the mask has the shape \(3, 40, 48\), and the"),
        ({"mask": np.ones((2, 40, 48), bool)}, "If its 1 marks good pixels, give `mask == 0`"),
        ({"mask": np.zeros((2, 40, 48))}, "the mask has dtype float64; expected integers or bool"),
    ],
)
def test_arguments_that_make_no_sense(
    settings: dict[str, Any], reason: str, snr: PeakNetModule
) -> None:
    with pytest.raises(ValueError, match=reason):
        find_peaks(frames((2, 40, 48)), snr, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("peaknet_smal", {}, "give one of peaknet, peaknet_small, snr, or the path of a config"),
        ("mine.safetensors", {}, "load_model.'peaknet_small', weights='mine.safetensors'"),
        ("snr", {"thresh": 1.0}, "does not accept option 'thresh'"),
        ("snr", {"threshold": "high"}, "model 'snr': (.|\n)*Given value: high"),
        ("snr", {"threshold": float("inf")}, "threshold is inf; give a finite number"),
    ],
)
def test_models_that_there_are_not(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_model(name, **settings)


def test_configurations_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    with pytest.raises(FileNotFoundError, match=r"no configuration .*own.yaml: check the path"):
        load_model(str(own))
    own.write_text("trainer: {}")
    with pytest.raises(ValueError, match="it has no model.init_args"):
        load_model(str(own))
    text = "{class_path: tests.helpers.networks.Bright}"
    steps = "[{class_path: peaknet_predict.preprocess.InstanceNorm}, "
    steps += "{class_path: peaknet_predict.preprocess.MergeBatchChannelDims}]"
    own.write_text(f"model: {{init_args: {{net: {text}, preprocess: {steps}}}}}")
    model = load_model(str(own), mask=None)
    assert isinstance(model.net, Bright)
    assert not model.training


def test_random_weights_are_refused() -> None:
    small = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    net = {"class_path": "peaknet_predict.models.PeakNet", "init_args": small}
    model = load_model("peaknet", net=net, compile=False)
    with pytest.raises(ValueError, match="PeakNet has no weights: its parameters are random"):
        find_peaks(frames((64, 64)), model)


class Shots(EventSource):
    """Images in memory; of `gone`, the last ones never come."""

    def __init__(self, images: list[Image], gone: int = 0, energy_ev: float = 9000.0) -> None:
        self._images, self._gone, self._energy_ev = images, gone, energy_ev

    def __len__(self) -> int:
        return len(self._images) + self._gone

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        for idx in range(first, len(self._images)):
            yield idx, self._images[idx], self._energy_ev


def through_trainer(model: PeakNetModule, data: FilesDataModule, **more: Any) -> list[PeakBatch]:
    import lightning as L

    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, **more)
    handles: Any = trainer.predict(model, data)
    return [handle.result() for handle in handles]


def test_files_without_a_queue(said: Any) -> None:
    images = list(frames((5, 2, 40, 48)))
    model = PeakNetModule(Bright(), chain())
    batches = through_trainer(model, FilesDataModule(Shots(images), batch_size=2))
    results = [result for found in batches for result in found.results]
    assert [result.id.idx for result in results] == list(range(5))
    for result, table in zip(results, find_peaks(np.stack(images), model), strict=True):
        assert np.array_equal(result.peaks[:, 1:].T, [table["y"], table["x"]])
        assert result.image.size == 0, "kept without its pixels"
    assert len({result.id.stream for result in results}) == 1
    assert "read 5 = predicted 5 + refused 0" in said.text


def test_files_with_bad_events(said: Any) -> None:
    images: list[Any] = [*frames((2, 2, 40, 48)), np.array("eaten"), np.zeros((1, 1), bool)]
    model = PeakNetModule(Bright(), chain())
    batches = through_trainer(model, FilesDataModule(Shots(images)))
    assert [len(found.results) for found in batches] == [2]
    assert [refusal.reason for refusal in batches[0].refused] == [
        "the frame could not be read: eaten",
        "image has dtype bool; expected integers or floating point",
    ]
    assert "read 4 = predicted 2 + refused 2" in said.text
    with pytest.raises(BalanceError, match="all 2 events were refused; the last one was event fil"):
        through_trainer(model, FilesDataModule(Shots(images[2:])))
    wrong_unit = FilesDataModule(Shots(images[:2], energy_ev=9.0))
    with pytest.raises(BalanceError, match="photon energy"):
        through_trainer(model, wrong_unit)


def test_files_that_end_early_and_runs_that_do(said: Any) -> None:
    images = list(frames((5, 2, 40, 48)))
    model = PeakNetModule(Bright(), chain())
    with pytest.raises(BalanceError, match="the source has 7 events, but gave 5"):
        through_trainer(model, FilesDataModule(Shots(images, gone=2)))
    data = FilesDataModule(Shots(images), batch_size=2)
    assert len(through_trainer(model, data, limit_predict_batches=1)) == 1
    assert "the Trainer stopped after 2 of 5 events" in said.text
    with pytest.raises(ValueError, match="batch_size is 0"):
        FilesDataModule(Shots(images), batch_size=0)


def test_ranks_share_the_files() -> None:
    class Rank:
        callbacks: list[Any]

        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size, self.callbacks = rank, 3, []
            self.strategy, self.root_device = self, torch.device("cpu")

        def broadcast(self, value: str) -> str:
            return value

    seen = []
    for rank in range(3):
        data = FilesDataModule(Shots(list(frames((7, 1, 8, 8)))), batch_size=2)
        data.trainer = Rank(rank)  # type: ignore[assignment]
        data.setup("predict")
        seen += [event.id.idx for one in data.predict_dataloader() for event in one.events]
    assert seen == list(range(7))


def test_what_the_package_offers() -> None:
    assert set(peaknet_predict.__all__) <= set(dir(peaknet_predict))
    assert all(getattr(peaknet_predict, name).__doc__ for name in peaknet_predict.__all__)
    with pytest.raises(AttributeError, match="no attribute 'find_peak'"):
        peaknet_predict.find_peak  # noqa: B018
