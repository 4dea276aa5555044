"""The commands as users start them: processes of their own on one Ray, files read back."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import ray
import yaml

from peaknet_predict import __version__
from peaknet_predict.callbacks.planted_score import score_files
from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.queues import QueueAddress, connect_queue
from peaknet_predict.sources import NpzSource, Simulator
from peaknet_predict.types import EventId, Result
from tests.helpers.commands import HANGS_S, finish, start, wait_until
from tests.helpers.foreign import make_three_method_queue
from tests.helpers.paths import CONFIGS, REAL_DATA
from tests.helpers.queues import statistics, take

SMALL = {"panels": 2, "height": 160, "width": 192, "hit_fraction": 1.0, "distance_m": 0.05}


@pytest.fixture
def queues(cluster: str, address: QueueAddress) -> tuple[str, str]:
    return f"{address.name}-in", f"{address.name}-out"


@pytest.fixture
def predict_yaml(cluster: str, queues: tuple[str, str], tmp_path: Path) -> Path:
    """The shipped configuration, on this test's queues and cluster."""
    config = yaml.safe_load((CONFIGS / "predict.yaml").read_text())
    data = config["data"]["init_args"]
    data["address"], data["queue"]["name"], data["batch_size"] = cluster, queues[0], 4
    data["queue"]["idle_timeout_s"] = 6.0
    config["trainer"]["callbacks"][0]["init_args"]["queue"]["name"] = queues[1]
    path = tmp_path / "predict.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def simulator_yaml(queues: tuple[str, str], tmp_path: Path) -> Path:
    path = tmp_path / "feed.yaml"
    source = {"class_path": "Simulator", "init_args": {"num_events": 21, "seed": 5, **SMALL}}
    path.write_text(yaml.safe_dump({"source": source, "queue": {"name": queues[0]}}))
    return path


def events(directory: Path) -> Iterator[Any]:
    for path in sorted(directory.glob("*.cxi")):
        yield from read_cxi(path)


def test_three_processes_on_one_ray(
    cluster: str,
    queues: tuple[str, str],
    predict_yaml: Path,
    simulator_yaml: Path,
    tmp_path: Path,
) -> None:
    snr, cpu = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "cpu.yaml"
    writer = start(
        *("write-cxi", "--address", cluster, "--queue.name", queues[1]),
        *("--directory", tmp_path / "cxi", "--events_per_file", 10),
        cwd=tmp_path,
    )
    mask = np.zeros((2, 160, 192), np.uint8)
    mask[1, 7, 9] = 1
    np.save(tmp_path / "mask.npy", mask)
    model = ("--model.init_args.threshold", 0.25, "--model.init_args.mask", "mask.npy")
    predict = start("predict", "-c", predict_yaml, "-c", snr, "-c", cpu, *model, cwd=tmp_path)
    feed = start("feed", "-c", simulator_yaml, "--address", cluster, cwd=tmp_path)
    assert "fed 21 events" in finish(feed)
    assert "received 21 = predicted 21 + refused 0" in finish(predict)
    said = finish(writer)
    assert "taken 21 = written 21 + filtered 0 + refused 0, in 3 files" in said
    record = json.loads((tmp_path / "predict_balance.json").read_text())
    network, stages = record["network"], record["stages"]
    assert (network["class"], network["weights_sha256"]) == ("LocalSnr", None)
    assert (network["threshold"], network["settings"]["threshold"]) == (0.25, 5.0)
    assert (network["mask"], network["bad_values"]) == ("mask.npy", "auto")
    assert network["version"] == __version__
    for path in (tmp_path / "cxi").glob("*.cxi"):
        with h5py.File(path) as file:
            own = file["entry_1/peaknet_predict"]
            assert set(own["threshold"][:]) == {0.25}
            assert all(json.loads(one) == network for one in own["provenance"].asstr()[:])
    assert stages["input"]["accepted"] == stages["input"]["acknowledged"] == 21
    assert stages["predict"]["predicted"] == stages["output"]["accepted"] == 21
    stages = json.loads((tmp_path / "cxi" / "peaks_balance.json").read_text())["stages"]
    assert stages["output"]["acknowledged"] == stages["files"]["cxi"]["written"] == 21

    simulator = Simulator(num_events=21, seed=5, **SMALL)  # type: ignore[arg-type]
    read = list(events(tmp_path / "cxi"))
    assert [event.id.idx for event in read] == list(range(21))
    for event in read:
        image, photon_energy = simulator.event(event.id.idx)
        np.testing.assert_array_equal(event.image, image)
        assert event.image.dtype == image.dtype
        assert event.photon_energy == photon_energy
    score = score_files(sorted((tmp_path / "cxi").glob("*.cxi")), simulator, 8.0, 2.0)
    assert score.planted > 20
    assert score.recall > 0.9
    assert score.precision > 0.9


@pytest.mark.slow
def test_two_ranks_share_one_queue_and_predict_every_event_once(
    cluster: str,
    queues: tuple[str, str],
    predict_yaml: Path,
    simulator_yaml: Path,
    tmp_path: Path,
) -> None:
    snr, two = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "two_cpus.yaml"
    predict = start("predict", "-c", predict_yaml, "-c", snr, "-c", two, cwd=tmp_path)
    feed = start("feed", "-c", simulator_yaml, "--address", cluster, "--rate_hz", 10, cwd=tmp_path)
    finish(feed)
    said = finish(predict)
    assert "rank 0: received" in said
    assert "rank 1: received" in said
    # An old-style reader of our output: tuples from both ranks, then one END, then nothing.
    handle = ray.get_actor(queues[1], namespace="peaknet")
    items = [ray.get(handle.get.remote()) for _ in range(23)]
    assert items[21:] == ["END", None]
    simulator = Simulator(num_events=21, seed=5, **SMALL)  # type: ignore[arg-type]
    wanted = {simulator.event(i)[0].tobytes() for i in range(21)}
    assert {image.tobytes() for ((image, _, _),) in items[:21]} == wanted


def test_foreign_queues_at_both_ends_with_a_pause_in_the_stream(
    queues: tuple[str, str], predict_yaml: Path, tmp_path: Path
) -> None:
    simulator = Simulator(num_events=14, seed=2, **SMALL)  # type: ignore[arg-type]
    source = make_three_method_queue(queues[0], "peaknet", 100, 6, 3.0)
    sink = make_three_method_queue(queues[1], "peaknet", 2)
    for i in range(14):
        image, photon_energy = simulator.event(i)
        assert ray.get(source.put.remote([1, i, image, photon_energy]))
    assert ray.get(source.put.remote(None)), "psana-ray's end: must not end the run early"

    items: list[Any] = []

    def read() -> None:
        while not items or items[-1] != "END":
            item = ray.get(sink.get.remote())
            if item is not None:
                items.append(item)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    snr, cpu = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "cpu.yaml"
    said = finish(start("predict", "-c", predict_yaml, "-c", snr, "-c", cpu, cwd=tmp_path))
    assert "input queue: may lose events: another program's queue" in said
    balance = json.loads((tmp_path / "predict_balance.json").read_text())
    assert "may lose events" in balance["stages"]["output"]["promise"]
    reader.join(HANGS_S)
    assert items.pop() == "END"
    tuples = [part for item in items for part in item]
    assert len(tuples) == 14
    for i, (image, peaks, photon_energy) in enumerate(tuples):
        np.testing.assert_array_equal(image, simulator.event(i)[0])
        assert photon_energy == simulator.event(i)[1]
        assert all(len(peak) == 3 for peak in peaks)


def test_bad_events_are_refused_by_name_and_the_stream_goes_on(
    queues: tuple[str, str], predict_yaml: Path, tmp_path: Path
) -> None:
    source = make_three_method_queue(queues[0], "peaknet", 100)
    image = Simulator(num_events=1, **SMALL).event(0)[0]  # type: ignore[arg-type]
    with_nan = image.copy()
    with_nan[0, 10, 10:20] = np.nan
    for idx, (bad, energy) in enumerate(
        [
            (image, 9500.0),
            ("no image", 9500.0),
            (image, float("nan")),
            (image, None),
            (image[:0], 9500.0),
            (np.zeros((2, 160, 192), complex), 9500.0),
            (with_nan, 9500.0),
            (image[0], 9500.0),
            (image.astype(np.uint16), 9500.0),
            (image[:, :40, :40], 9500.0),
        ]
    ):
        assert ray.get(source.put.remote([0, idx, bad, energy]))
    assert ray.get(source.put.remote({"what": "is this"}))
    model = yaml.safe_load((CONFIGS / "models" / "snr.yaml").read_text())
    crop = {"class_path": "peaknet_predict.preprocess.Crop"}
    crop["init_args"] = {"height": 64, "width": 64, "allow_crop": True}  # type: ignore[assignment]
    model["model"]["init_args"]["preprocess"].insert(0, crop)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    cpu = CONFIGS / "topology" / "cpu.yaml"
    predict = start(
        "predict", "-c", predict_yaml, "-c", tmp_path / "model.yaml", "-c", cpu, cwd=tmp_path
    )
    said = finish(predict)
    assert "received 11 = predicted 4 + refused 7" in said
    assert ":0:1: image is str" in said
    assert ":0:2: photon energy is nan" in said
    assert ":0:9: image of shape (2, 40, 40) does not fit" in said
    assert "Pad(" in said
    assert "expected [rank, idx, image, photon_energy], got dict" in said


def demo_without_network() -> Any:
    """The demo's configuration with a model that no trained weights have a say in."""
    config = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    return config | yaml.safe_load((CONFIGS / "models" / "snr.yaml").read_text())


def test_a_consumer_that_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    config = demo_without_network()
    frames = tmp_path / "frames.h5"
    with h5py.File(frames, "w") as file:
        file["data"] = np.zeros((3, 2, 64, 64), np.float32)
    config["data"]["init_args"]["source"] = {
        "class_path": "peaknet_predict.sources.Hdf5Source",
        "init_args": {
            "path": str(frames),
            "data": "data",
            "axes": ["events", "panels", "slow", "fast"],
            "photon_energy_ev": 9500.0,
        },
    }
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:3]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    (tmp_path / "demo_output").write_text("a file where the directory should be")
    said = finish(start("predict", "-c", path, cwd=tmp_path), expected=1)
    assert "demo_output" in said


def test_a_source_that_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    config = demo_without_network()
    config["data"]["init_args"]["source"] = {"class_path": "tests.helpers.failing.FailingSource"}
    config["trainer"]["callbacks"].pop()  # no planted peaks to compare with
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    said = finish(start("predict", "-c", path, cwd=tmp_path), expected=3)
    assert "the tape has been eaten" in said
    assert "received 9 = predicted 9 + refused 0" in said, "what was read before it goes out"
    assert "written 0 + filtered 9" in said


@pytest.mark.slow
def test_the_demo_on_two_ranks_from_a_clean_environment(tmp_path: Path) -> None:
    few = ("--data.init_args.source.init_args.num_events", 9)  # 4 hits, and one of few peaks
    said = finish(
        start(
            *("predict", "-c", CONFIGS / "demo.yaml", "-c", CONFIGS / "topology" / "two_cpus.yaml"),
            *few,
            cwd=tmp_path,
        )
    )
    score = re.search(r"recall ([\d.]+)\).*precision ([\d.]+)\)", said)
    assert score is not None, said
    assert float(score[1]) > 0.9
    assert float(score[2]) > 0.9
    assert "taken 9 = written" in said


@pytest.mark.slow
def test_two_ranks_and_a_foreign_output_end_once_after_the_last_result(
    cluster: str, queues: tuple[str, str], predict_yaml: Path, tmp_path: Path
) -> None:
    simulator = Simulator(num_events=24, seed=2, **SMALL)  # type: ignore[arg-type]
    source = make_three_method_queue(queues[0], "peaknet", 100)
    sink = make_three_method_queue(queues[1], "peaknet", 100)
    for i in range(24):
        assert ray.get(source.put.remote([1, i, *simulator.event(i)]))
    snr, two = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "two_cpus.yaml"
    finish(start("predict", "-c", predict_yaml, "-c", snr, "-c", two, cwd=tmp_path))
    items = [ray.get(sink.get.remote()) for _ in range(ray.get(sink.size.remote()))]
    assert items.pop() == "END"
    energies = sorted(energy for item in items for _, _, energy in item)
    assert energies == sorted(simulator.event(i)[1] for i in range(24))


def test_results_are_put_together_and_every_old_reader_gets_its_end(
    queues: tuple[str, str], predict_yaml: Path, simulator_yaml: Path, cluster: str, tmp_path: Path
) -> None:
    config = yaml.safe_load(predict_yaml.read_text())
    config["trainer"]["callbacks"][0]["init_args"].update(accumulation_steps=3, num_consumers=2)
    predict_yaml.write_text(yaml.safe_dump(config))
    sink = make_three_method_queue(queues[1], "peaknet", 100)
    finish(start("feed", "-c", simulator_yaml, "--address", cluster, cwd=tmp_path))
    snr, cpu = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "cpu.yaml"
    finish(start("predict", "-c", predict_yaml, "-c", snr, "-c", cpu, cwd=tmp_path))
    items = [ray.get(sink.get.remote()) for _ in range(ray.get(sink.size.remote()))]
    assert [len(item) for item in items[:-2]] == [12, 9]  # 21 events, 3 batches of 4 an item
    assert items[-2:] == ["END", "END"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_interrupted_write_cxi_writes_what_it_took(
    cluster: str, queues: tuple[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    queue = connect_queue(QueueAddress(queues[1]), "results")
    queue.producer.open("test")
    image = np.zeros((2, 160, 192), np.float32)
    writer = start(
        *("write-cxi", "--address", cluster, "--queue.name", queues[1]),
        *("--directory", tmp_path / "cxi", "--events_per_file", 7),
        cwd=tmp_path,
    )
    for idx in range(40):
        queue.producer.put("test", [Result(EventId("t", 0, idx), image, np.empty((0, 3)), 9500.0)])
    wait_until(lambda: statistics(queue).ready <= 20)
    writer.send_signal(number)
    said = finish(writer, expected=3)
    taken = statistics(queue).acknowledged
    assert taken >= 20
    assert statistics(queue).leased == 0
    assert f"taken {taken} = written {taken}" in said
    assert "interrupted" in said
    assert len(list(events(tmp_path / "cxi"))) == taken


def test_an_interrupted_feed_says_that_the_stream_is_incomplete(
    cluster: str, queues: tuple[str, str], simulator_yaml: Path, tmp_path: Path
) -> None:
    feed = start(
        *("feed", "-c", simulator_yaml, "--address", cluster, "--loop", "true"),
        *("--rate_hz", 50),
        cwd=tmp_path,
    )
    queue = connect_queue(QueueAddress(queues[0]), "events")
    wait_until(lambda: statistics(queue).accepted >= 30)
    feed.send_signal(signal.SIGTERM)
    said = finish(feed, expected=3)
    now = statistics(queue)
    assert f"fed {now.accepted} events" in said
    assert list(now.failures.values()) == ["interrupted"]
    idx, ended = [], False
    while not ended:
        taken, ended = take(queue.reader, "r", 16, 1.0)
        idx += [event.id.idx for event in taken if event.id is not None]
    assert idx == list(range(now.accepted)), "numbered on through every pass of the loop"


def test_a_feed_that_waits_for_room_can_be_interrupted(
    cluster: str, queues: tuple[str, str], simulator_yaml: Path, tmp_path: Path
) -> None:
    feed = start(
        *("feed", "-c", simulator_yaml, "--address", cluster, "--queue.max_events", 5),
        cwd=tmp_path,
    )
    queue = connect_queue(QueueAddress(queues[0], max_events=5), "events")
    wait_until(lambda: queue.admin.size() == 5)
    feed.send_signal(signal.SIGTERM)
    assert "fed 5 events" in finish(feed, expected=3)


def test_bad_values_are_one_line_not_a_traceback(tmp_path: Path) -> None:
    name = ("--queue.name", "q")
    model = ("-c", CONFIGS / "predict.yaml", "-c", CONFIGS / "models" / "snr.yaml")
    no_gpu = ("--trainer.accelerator", "gpu", "--trainer.devices", 99)
    for words, reason in [
        (("predict", *model, *no_gpu), "`peaknet-predict doctor` says what this machine has"),
        (("write-cxi", *name, "--directory", "x", "--queue.max_events", 0), "at least 1"),
        (("feed", *name, "--source", "NpzSource", "--source.path", "no.npz"), "no.npz"),
    ]:
        said = start(*words, cwd=tmp_path)
        out, _ = said.communicate(timeout=HANGS_S)
        assert said.returncode in (1, 2)
        assert reason in out
        assert "Traceback" not in out


def test_an_interrupted_prediction_delivers_what_it_took(
    cluster: str, queues: tuple[str, str], predict_yaml: Path, simulator_yaml: Path, tmp_path: Path
) -> None:
    feed = start(
        *("feed", "-c", simulator_yaml, "--address", cluster, "--loop", "true"),
        *("--rate_hz", 20),
        cwd=tmp_path,
    )
    snr, cpu = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "cpu.yaml"
    predict = start("predict", "-c", predict_yaml, "-c", snr, "-c", cpu, cwd=tmp_path)
    results = connect_queue(QueueAddress(queues[1]), "results")
    wait_until(lambda: statistics(results).accepted >= 8)
    predict.send_signal(signal.SIGTERM)
    said = finish(predict, expected=3)
    feed.send_signal(signal.SIGTERM)
    finish(feed, expected=3)
    inputs = connect_queue(QueueAddress(queues[0]), "events")
    taken = statistics(inputs).acknowledged
    assert f"received {taken} = predicted {taken} + refused 0" in said
    assert "left in the input queue" in said
    assert statistics(results).accepted == taken
    assert "interrupted" in next(iter(statistics(results).failures.values()))


def test_when_the_network_fails_finished_results_are_delivered_and_the_end_says_so(
    cluster: str, queues: tuple[str, str], predict_yaml: Path, simulator_yaml: Path, tmp_path: Path
) -> None:
    model = yaml.safe_load((CONFIGS / "models" / "snr.yaml").read_text())
    model["model"]["init_args"]["net"]["class_path"] = "tests.helpers.failing.FailingNet"
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    finish(start("feed", "-c", simulator_yaml, "--address", cluster, cwd=tmp_path))
    cpu = CONFIGS / "topology" / "cpu.yaml"
    predict = start(
        "predict", "-c", predict_yaml, "-c", tmp_path / "model.yaml", "-c", cpu, cwd=tmp_path
    )
    said = finish(predict, expected=1)
    assert "out of memory" in said
    assert re.search(r"predicted 8 \+ refused 0 \+ given back \d+", said), said
    writer = start(
        *("write-cxi", "--address", cluster, "--queue.name", queues[1]),
        *("--directory", tmp_path / "cxi"),
        cwd=tmp_path,
    )
    said = finish(writer, expected=3)
    assert "taken 8 = written 8" in said
    assert "out of memory" in said


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the CSPAD shots are not beside the checkout")
def test_real_cspad_shots(
    cluster: str, queues: tuple[str, str], predict_yaml: Path, tmp_path: Path
) -> None:
    snr, cpu = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / "cpu.yaml"
    model = yaml.safe_load(snr.read_text())
    pad = {"class_path": "peaknet_predict.preprocess.Pad"}
    pad["init_args"] = {"height": 192, "width": 416}  # type: ignore[assignment]
    model["model"]["init_args"]["preprocess"].insert(0, pad)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    feed = start(
        *("feed", "--address", cluster, "--queue.name", queues[0]),
        *("--source", "NpzSource", "--source.path", REAL_DATA / "idx-*.npz"),
        *("--source.photon_energy_ev", 9500),
        cwd=tmp_path,
    )
    finish(feed)
    model_yaml = tmp_path / "model.yaml"
    finish(start("predict", "-c", predict_yaml, "-c", model_yaml, "-c", cpu, cwd=tmp_path))
    writer = start(
        *("write-cxi", "--address", cluster, "--queue.name", queues[1]),
        *("--directory", tmp_path / "cxi"),
        cwd=tmp_path,
    )
    finish(writer)
    source = list(NpzSource(str(REAL_DATA / "idx-*.npz"), photon_energy_ev=9500.0).events())
    read = list(events(tmp_path / "cxi"))
    assert len(read) == len(source) == 2
    for event, (_, image, _) in zip(read, source, strict=True):
        np.testing.assert_array_equal(event.image, image)
        assert event.image.dtype == image.dtype
        assert 40 <= len(event.peaks) <= 400
        panel, y, x = event.peaks.T
        # Bragg spots do lie on edges and on the double-width columns, one here and one there;
        # artefacts are many on one of them.
        for on_line in (y < 2, y > 182, x < 2, x > 385, (x > 191.5) & (x < 195.5)):
            on_one_panel = np.bincount(panel[on_line].astype(int), minlength=32)
            assert on_one_panel.max() <= 2
            assert on_line.sum() <= 0.05 * len(event.peaks) + 2
