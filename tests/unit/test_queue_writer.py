"""Whole runs between queues in this process: results, records, and what faults leave behind."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peaknet_predict.callbacks.cxi_output import CxiOutput
from peaknet_predict.callbacks.planted_score import PlantedPeakScore
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.callbacks.rate_log import RateLog
from peaknet_predict.data import QueueDataModule
from peaknet_predict.dataset import QueueDataset
from peaknet_predict.first_refusals import UnfitStreamError
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import Crop, InstanceNorm, MergeBatchChannelDims
from peaknet_predict.process.balance import BalanceError
from peaknet_predict.queues import QueueAddress, QueueError
from peaknet_predict.sources import EventSource, Simulator, SkippedFile
from peaknet_predict.types import Image
from tests.helpers.chain import written
from tests.helpers.commands import wait_until
from tests.helpers.memory_cluster import MemoryCluster, install
from tests.helpers.prediction import shot

EVENTS = 7

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`"),
    pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices"),
]


class Dots(EventSource):
    """Events with one bright pixel, and with none at all where ``blind``."""

    def __init__(self, num_events: int = EVENTS, blind: tuple[int, ...] = ()) -> None:
        self.num_events = num_events
        self.blind = blind

    def __len__(self) -> int:
        return self.num_events

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        for idx in range(first, self.num_events):
            image = np.zeros((1, 32, 32), np.float32)
            image[0, 10, 1 + idx % 31] = 100.0
            if idx in self.blind:
                image[:] = np.nan
            yield idx, image, 9000.0


class Bright(nn.Module):
    """Peak where a pixel is bright; does something else before some batch."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, Any] = {}
        self.calls = 0

    def forward(self, images_N1HW: Tensor) -> Tensor:
        self.calls += 1
        self.before.get(self.calls, lambda: None)()
        return torch.cat([torch.zeros_like(images_N1HW), images_N1HW - 3], dim=1)


def fail() -> None:
    raise RuntimeError("boom")


class Rig:
    """A run and everything around it."""

    def __init__(self, cluster: MemoryCluster, tmp_path: Path, **settings: Any) -> None:
        self.cluster = cluster
        self.tmp_path = tmp_path
        self.net = Bright()
        self.writer = QueueWriter(
            QueueAddress("out", max_events=settings.pop("room", 400)),
            min_hit_peaks=1,
            balance=str(tmp_path / "balance.json"),
            accumulation_steps=settings.pop("accumulation_steps", 1),
        )
        self.callbacks: list[L.Callback] = [self.writer, *settings.pop("callbacks", [])]
        self.data = QueueDataModule(
            QueueAddress("in"), batch_size=2, source=settings.pop("source", Dots()), **settings
        )
        self.trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=self.callbacks,
            limit_predict_batches=10**9,
        )
        self.module = PeakNetModule(self.net, [MergeBatchChannelDims()])

    def predict(self) -> None:
        self.trainer.predict(self.module, self.data, return_predictions=False)

    def balance(self) -> Any:
        return json.loads((self.tmp_path / "balance.json").read_text())

    def counts(self, queue: str) -> tuple[int, int, int, int]:
        """Return what is acknowledged, quarantined, ready and leased."""
        now = self.cluster.queues[queue].state.statistics()
        return now.acknowledged, now.quarantined, now.ready, now.leased


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> MemoryCluster:
    return install(monkeypatch)


def test_every_event_becomes_a_result_and_the_record_says_so(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rig = Rig(cluster, tmp_path, callbacks=[RateLog(1e-6)], accumulation_steps=3)
    rig.predict()
    assert rig.counts("in") == (EVENTS, 0, 0, 0)
    assert rig.counts("out") == (0, 0, EVENTS, 0)
    record = rig.balance()
    assert (record["problem"], record["other_ranks"]) == (None, None)
    assert list(record["stages"]) == ["input", "predict", "output"]
    assert record["stages"]["predict"] == {
        "rank": 0,
        "received": EVENTS,
        "predicted": EVENTS,
        "quarantined": 0,
        "given_back": 0,
    }
    assert record["stages"]["input"]["acknowledged"] == EVENTS
    assert record["stages"]["output"]["accepted"] == EVENTS
    ledger = rig.writer.ledger
    assert (ledger.hits, ledger.peaks) == (EVENTS, EVENTS)
    assert 0 <= ledger.latency_ms(50)[0] < 600_000
    assert (
        f"rank 0: received {EVENTS} = predicted {EVENTS} + refused 0; {EVENTS} peaks" in said.text
    )
    assert f"{EVENTS} of {EVENTS} events (100 %); " in said.text
    assert f"{EVENTS} hits, {EVENTS} peaks, 0 refused in all; latency " in said.text
    assert re.search(rf"{EVENTS} events, [\d.]+ events/s; 100 % hits, {EVENTS} peaks", said.text)
    assert not re.search(r"\bnan\b", said.text)
    waited_s, worked_s = ledger.waited_worked_s() or (-1, -1)
    assert waited_s >= 0
    assert worked_s > 0
    assert record["left_over"] == f"{EVENTS} results wait in the output queue", "nobody reads them"
    reader = cluster.queues["out"].connect().reader
    taken, _ = reader.get("r", 99, 1.0)
    assert [one.id.idx for one in taken if one.id is not None] == list(range(EVENTS))
    reader.ack([one.id for one in taken if one.id is not None])
    assert reader.get("r", 99, 1.0) == ([], True)
    assert reader.failures == {}


def test_a_run_that_fails_gives_back_what_it_holds_and_says_why(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    rig = Rig(cluster, tmp_path)
    rig.net.before[3] = fail
    with pytest.raises(RuntimeError, match="boom"):
        rig.predict()
    assert rig.counts("in")[0] == rig.counts("out")[2] == 4, "what was finished is delivered"
    assert rig.counts("in")[3] == 0
    record = rig.balance()
    assert record["problem"] == "RuntimeError: boom"
    assert record["stages"]["predict"]["given_back"] > 0
    (failure,) = cluster.queues["out"].state.statistics().failures.values()
    assert failure == "RuntimeError: boom"


def test_the_same_objects_run_again_and_again_and_fail_as_well_as_ever(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    files = CxiOutput(str(tmp_path / "cxi"), events_per_file=2)
    rig = Rig(cluster, tmp_path, callbacks=[files, RateLog(1e-6)])
    for run in (1, 2):
        rig.predict()
        assert rig.balance()["stages"]["predict"]["predicted"] == EVENTS
        assert rig.writer.ledger.predicted == EVENTS
        assert files.report is not None
        assert files.report.taken == EVENTS
        assert rig.counts("out") == (run * EVENTS, 0, 0, 0)
    rig.net.before[rig.net.calls + 2] = fail
    with pytest.raises(RuntimeError, match="boom"):
        rig.predict()
    assert rig.counts("in")[3] == 0, "given back"
    now = cluster.queues["out"].state.statistics()
    assert now.open_producers == []
    assert list(now.failures.values()) == ["RuntimeError: boom"]
    assert rig.balance()["problem"] == "RuntimeError: boom"


def test_a_run_without_any_peak_says_so(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rig = Rig(cluster, tmp_path, source=Dots(32))
    rig.module = PeakNetModule(rig.net, [MergeBatchChannelDims()], threshold=1e9)
    rig.predict()
    assert "no peak in any of 32 events: do weights, threshold" in said.text


def test_files_that_a_runs_own_source_leaves_out_are_in_its_record(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    source = Dots()
    source.skipped = [SkippedFile(Path("run_7.h5"), "it is truncated", 12)]
    rig = Rig(cluster, tmp_path, source=source)
    rig.predict()
    assert rig.balance()["stages"]["feed"] == {
        "skipped_files": [{"path": "run_7.h5", "reason": "it is truncated", "events": 12}]
    }


def test_images_without_a_finite_pixel_are_refused(cluster: MemoryCluster, tmp_path: Path) -> None:
    rig = Rig(cluster, tmp_path, source=Dots(blind=(2, 5)))
    rig.predict()
    assert rig.counts("in") == (EVENTS - 2, 2, 0, 0)
    assert set(cluster.queues["in"].quarantine.values()) == {"no pixel of the image is finite"}
    assert rig.balance()["stages"]["predict"]["quarantined"] == 2


def test_a_run_in_which_nothing_is_good_has_failed(cluster: MemoryCluster, tmp_path: Path) -> None:
    rig = Rig(cluster, tmp_path, source=Dots(30, blind=tuple(range(30))))
    with pytest.raises(BalanceError, match="all 30 events were refused; the last one was event"):
        rig.predict()
    assert rig.writer.ledger.latency_ms(50, 99) == pytest.approx([np.nan] * 2, nan_ok=True)
    assert "all 30" in rig.balance()["problem"]


@pytest.mark.parametrize("writes", [True, False])
def test_events_of_which_none_fits_go_back_and_the_run_ends_with_one_sentence(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture, writes: bool
) -> None:
    rig = Rig(cluster, tmp_path)
    rig.module = PeakNetModule(rig.net, [Crop(16, 16), MergeBatchChannelDims()])
    if not writes:
        rig.trainer.callbacks.remove(rig.writer)  # type: ignore[attr-defined]
    with pytest.raises(UnfitStreamError, match="leaves out 75% of a panel of 32x32"):
        rig.predict()
    acknowledged, quarantined, _, leased = rig.counts("in")
    assert (acknowledged, quarantined, leased) == (0, 0, 0)
    assert "refused event" not in said.text
    assert "could not be delivered" not in said.text
    if writes:
        assert "no event fits this configuration" in rig.balance()["problem"]
        assert rig.balance()["stages"]["predict"]["quarantined"] == 0
        rig.module = PeakNetModule(rig.net, [MergeBatchChannelDims()])
        rig.data.source = None
        rig.data.resume = True
        rig.predict()
        assert rig.counts("in")[:2] == (rig.counts("out")[2], 0), "nothing was counted against them"


def test_results_come_into_files_and_are_compared_with_what_was_planted(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    source = Simulator(num_events=3, panels=1, height=64, width=64, hit_fraction=1.0, seed=3)
    files = CxiOutput(str(tmp_path / "cxi"), events_per_file=2)
    score = PlantedPeakScore()
    rig = Rig(cluster, tmp_path, source=source, callbacks=[files, score])
    mask = str(tmp_path / "mask.npy")
    np.save(mask, np.eye(64, dtype=np.uint8))
    rig.module = PeakNetModule(
        rig.net,
        [InstanceNorm(), MergeBatchChannelDims()],
        threshold=0.5,
        bad_values=[-2],
        saturation=900.0,
        mask=mask,
        mask_bad=2,
    )
    rig.predict()
    assert written(tmp_path / "cxi") == [0, 1, 2]
    with h5py.File(tmp_path / "cxi" / "peaks_0000.cxi") as file:
        own = file["entry_1/peaknet_predict"]
        assert own["threshold"][:].tolist() == [0.5, 0.5]
        provenance = json.loads(own["provenance"].asstr()[1])
    assert provenance == rig.module.provenance.record() == rig.balance()["network"]
    assert {key: provenance[key] for key in ("class", "bad_values", "mask_bad", "saturation")} == {
        "class": "Bright",
        "bad_values": [-2],
        "mask_bad": 2,
        "saturation": 900.0,
    }
    steps = [step["class"] for step in provenance["preprocess"]]
    assert steps == ["InstanceNorm", "MergeBatchChannelDims"]
    assert (provenance["mask"], len(provenance["mask_sha256"])) == (mask, 64)
    assert score.score is not None
    assert score.score.planted >= score.score.found


def test_a_consumer_that_dies_is_started_again(cluster: MemoryCluster, tmp_path: Path) -> None:
    cluster.lost = 0
    files = CxiOutput(str(tmp_path / "cxi"))
    rig = Rig(cluster, tmp_path, callbacks=[files])
    rig.net.before[2] = lambda: None

    class Lose(L.Callback):
        def setup(self, *args: Any, **more: Any) -> None:
            cluster.lost = 3  # from now on: the feeder has begun

    rig.trainer.callbacks.insert(1, Lose())  # type: ignore[attr-defined]
    rig.predict()
    assert files.report is not None
    assert files.report.cxi.written == EVENTS


def test_a_consumer_that_dies_again_and_again_ends_the_run(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    files = CxiOutput(str(tmp_path / "cxi"))
    rig = Rig(cluster, tmp_path, callbacks=[files])

    class Lose(L.Callback):
        def setup(self, *args: Any, **more: Any) -> None:
            cluster.lost = 99

    rig.trainer.callbacks.insert(1, Lose())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the worker died"):
        rig.predict()
    assert "the worker died" in rig.balance()["problem"]


def test_a_full_output_makes_the_run_wait_until_its_grace_is_over(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    rig = Rig(cluster, tmp_path, room=2, grace_s=0.0)

    def stop_when_it_is_full() -> None:
        wait_until(lambda: "out" in cluster.queues and rig.counts("out")[2] == 2)
        wait_until(lambda: rig.writer.ledger.predicted >= 4)  # of which two have no room
        assert rig.data.dataset is not None
        rig.data.dataset.stop.set()

    threading.Thread(target=stop_when_it_is_full).start()
    with pytest.raises(BalanceError, match="interrupted while the output queue is full: 2 results"):
        rig.predict()
    assert rig.counts("in")[0] == rig.counts("out")[2]
    assert rig.counts("in")[3] == 0


def test_an_input_that_dies_ends_the_run_with_its_record_and_everything_delivered(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rig = Rig(cluster, tmp_path, source=Dots(100))
    rig.net.before[3] = lambda: cluster.queues["in"].die()
    with pytest.raises(QueueError, match="queue 'in' is gone"):
        rig.predict()
    delivered = rig.counts("out")[2]
    assert delivered == rig.writer.ledger.predicted >= 4
    record = rig.balance()
    assert "queue 'in' is gone" in record["problem"]
    assert "queue 'in' is gone" in record["stages"]["input"]["problem"]
    assert record["stages"]["output"]["accepted"] == delivered
    now = cluster.queues["out"].state.statistics()
    assert now.ended
    assert ["queue 'in' is gone" in failure for failure in now.failures.values()] == [True]


def test_an_output_that_dies_ends_the_run_with_its_record_and_everything_given_back(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    rig = Rig(cluster, tmp_path, source=Dots(100))
    rig.net.before[3] = lambda: cluster.queues["out"].die()
    with pytest.raises(QueueError, match="queue 'out' is gone"):
        rig.predict()
    assert rig.counts("in")[3] == 0
    record = rig.balance()
    assert "queue 'out' is gone" in record["problem"]
    assert "queue 'out' is gone" in record["stages"]["output"]["problem"]
    assert record["stages"]["input"]["acknowledged"] == rig.counts("in")[0]


def test_after_what_is_held_was_given_back_nothing_more_is_taken(cluster: MemoryCluster) -> None:
    queue = cluster.connect_queue(QueueAddress("in"), "events")
    queue.producer.open("p")
    dataset = QueueDataset(queue, "predict", batch_size=2)
    queue.producer.put("p", [shot(idx, []) for idx in range(9)])
    batches = iter(dataset)
    next(batches)
    assert dataset.release("RuntimeError: boom") > 0
    # The iterator is still open, as after an error in Lightning's loop.
    assert dataset._ingesting is not None
    assert not dataset._ingesting.is_alive()
    now = queue.admin.statistics()
    assert now is not None
    assert (now.ready, now.leased) == (9, 0)


def without_writer(cluster: MemoryCluster, tmp_path: Path, **settings: Any) -> Rig:
    rig = Rig(cluster, tmp_path, **settings)
    rig.trainer.callbacks.remove(rig.writer)  # type: ignore[attr-defined]
    return rig


def test_a_prediction_from_python_without_a_writer_ends_and_returns_peaks_without_pixels(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rig = without_writer(cluster, tmp_path, source=Dots(blind=(2,)))
    for run in (1, 2):
        found: Any = rig.trainer.predict(rig.module, rig.data)
        assert rig.counts("in") == (run * (EVENTS - 1), run, 0, 0)
        results = [result for handle in found for result in handle.result().results]
        assert [result.id.idx for result in results] == [0, 1, 3, 4, 5, 6]
        assert [result.peaks.tolist() for result in results][:2] == [[[0, 10, 1]], [[0, 10, 2]]]
        assert sum(result.image.nbytes for result in results) == 0
    assert "its result is with this process alone" in said.text
    assert f"received {EVENTS} = predicted {EVENTS - 1} + refused 1" in said.text


def test_a_callback_of_the_users_finds_pixels_and_peaks(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    seen: list[Any] = []

    class Mine(L.Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *more: Any) -> None:
            seen.extend((r.image.max(), len(r.peaks)) for r in outputs.result().results)

    without_writer(cluster, tmp_path, callbacks=[Mine()]).predict()
    assert seen == [(100.0, 1)] * EVENTS


def test_a_prediction_without_a_writer_that_fails_gives_back_what_it_holds(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    rig = without_writer(cluster, tmp_path)
    rig.net.before[3] = fail
    with pytest.raises(RuntimeError, match="boom"):
        rig.predict()
    acknowledged, quarantined, ready, leased = rig.counts("in")
    assert (acknowledged, quarantined, leased) == (4, 0, 0)
    assert ready > 0


def test_a_prediction_without_a_writer_says_when_its_stream_is_incomplete(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    producer = cluster.connect_queue(QueueAddress("in"), "events").producer
    producer.open("p")
    producer.put("p", [shot(0, [], (1, 32, 32))])
    producer.close("p", "the tape has been eaten")
    rig = without_writer(cluster, tmp_path, source=None)
    with pytest.raises(BalanceError, match="incomplete: .*the tape has been eaten"):
        rig.predict()


def test_batches_may_be_limited_where_nothing_is_written(
    cluster: MemoryCluster, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    rig = without_writer(cluster, tmp_path)
    rig.trainer.limit_predict_batches = 2
    assert len(rig.trainer.predict(rig.module, rig.data) or []) == 2
    assert rig.counts("in")[0] == 4
    assert rig.counts("in")[3] == 0
    assert "limit_predict_batches" in said.text


def test_a_caller_that_does_not_come_back_hangs(
    cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = cluster.connect_queue(QueueAddress("in"), "events")
    queue.producer.open("p")
    queue.producer.put("p", [shot(idx, []) for idx in range(2)])
    dataset = QueueDataset(queue, "predict", batch_size=2)
    assert not dataset.stalled
    batches = iter(dataset)
    next(batches)
    assert not dataset.stalled, "it works on the batch"
    monkeypatch.setattr("peaknet_predict.dataset._STALL_S", -1.0)
    assert dataset.stalled
    monkeypatch.setattr("peaknet_predict.dataset._STALL_S", 600.0)
    dataset.touch()
    assert not dataset.stalled
    dataset.release()
