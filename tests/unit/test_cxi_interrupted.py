"""No signal, wherever it strikes, and no swallowed error makes a damaged CXI file."""

from __future__ import annotations

import collections
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict.cxi import file as cxi_file
from peaknet_predict.cxi import publisher
from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.cxi.writer import CxiWriteError, CxiWriter
from peaknet_predict.process.stopping import StopRequest, stop_requests, uninterrupted
from peaknet_predict.types import EventId, Result

EVENTS = 6
METHODS = ("seek", "tell", "truncate", "readinto", "write")


def results() -> list[Result]:
    rng = np.random.default_rng(0)
    return [
        Result(
            EventId("s", 0, idx),
            rng.normal(10, 1, (1, 64, 64)).astype(np.float32),
            np.array([[0, y, x] for y, x in rng.integers(8, 56, (30, 2))], float),
            9500.0 + idx,
        )
        for idx in range(EVENTS)
    ]


RESULTS = results()


def write(directory: Path) -> tuple[list[EventId], BaseException | None]:
    """Write one file; return what may be acknowledged, and what was raised."""
    writer = CxiWriter(directory, events_per_file=EVENTS)
    settled = []
    try:
        for result in RESULTS:
            settled += writer.add(result)
    except BaseException as error:
        return settled, error
    return settled, None


def check_whole(directory: Path) -> None:
    (path,) = directory.glob("*.cxi")
    events = list(read_cxi(path))
    assert [event.id for event in events] == [result.id for result in RESULTS]
    for event, result in zip(events, RESULTS, strict=True):
        assert event.image.tobytes() == result.image.tobytes()
        assert event.photon_energy == result.photon_energy
        assert sorted(event.peaks.tolist()) == sorted(result.peaks.tolist())


class Striking:
    """Lets something happen in the k-th call of a method of the file object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.place: tuple[str, int] | None = None
        self.strike: Callable[[], None] = lambda: None
        for name in METHODS:
            monkeypatch.setattr(cxi_file._CarefulFile, name, self._wrap(name))

    def _wrap(self, name: str) -> Any:
        original = getattr(cxi_file._CarefulFile, name)

        def method(file: Any, *args: Any) -> Any:
            self.calls[name] += 1
            if self.place == (name, self.calls[name]):
                self.strike()
            return original(file, *args)

        return method

    def places(self, each: int) -> Iterator[tuple[str, int]]:
        """Yield about as many places for each method as are asked for, the first and last among."""
        for name, count in self.calls.items():
            for k in sorted(set(np.linspace(1, count, each, dtype=int).tolist())):
                yield name, k


@pytest.fixture
def striking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Striking:
    striking = Striking(monkeypatch)
    assert write(tmp_path / "undisturbed")[1] is None
    check_whole(tmp_path / "undisturbed")
    assert striking.calls["write"] > 10
    return striking


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(5, "EIO")])
def test_what_is_raised_inside_hdf5_leaves_no_file(
    tmp_path: Path, striking: Striking, error: BaseException
) -> None:
    def strike() -> None:
        raise error

    striking.strike = strike
    for place in list(striking.places(each=8)):
        striking.calls.clear()
        striking.place = place
        directory = tmp_path / f"{place[0]}{place[1]}"
        settled, raised = write(directory)
        assert isinstance(raised, type(error) | CxiWriteError), place
        assert settled == []
        assert list(directory.iterdir()) == [], place
    striking.place = None


def test_a_signal_inside_hdf5_is_raised_behind_a_whole_file(
    tmp_path: Path, striking: Striking
) -> None:
    striking.strike = lambda: signal.raise_signal(signal.SIGINT)
    for place in list(striking.places(each=4)):
        striking.calls.clear()
        striking.place = place
        directory = tmp_path / f"{place[0]}{place[1]}"
        settled, raised = write(directory)
        assert isinstance(raised, KeyboardInterrupt), place
        assert settled == []
        check_whole(directory)


def test_an_interrupted_writer_writes_nothing_twice(tmp_path: Path, striking: Striking) -> None:
    striking.strike = lambda: signal.raise_signal(signal.SIGINT)
    striking.calls.clear()
    striking.place = ("write", 5)
    writer = CxiWriter(tmp_path / "out", events_per_file=EVENTS)
    for result in RESULTS[:-1]:
        writer.add(result)
    with pytest.raises(KeyboardInterrupt):
        writer.add(RESULTS[-1])
    assert len(writer) == 0, "the file is there"
    assert [key for result in RESULTS for key in writer.add(result)] == [r.id for r in RESULTS]
    writer.close()
    check_whole(tmp_path / "out")


def damage(name: str) -> Callable[..., None]:
    """Write a file and then change one thing in it, as a disk or a library with a fault might."""

    def write_damaged(raw: Any, rows: Any, *args: Any) -> None:
        cxi_file.write_cxi_file(raw, rows, *args)
        raw.flush()
        with h5py.File(raw.name, "a") as file:
            if name == "attribute":
                file["entry_1/data_1"].attrs["panels"] = 2
            elif name == "missing":
                del file["entry_1/result_1/peakSNR"]
            elif name == "chunk":
                data = file["entry_1/data_1/data"][:-1]
                del file["entry_1/data_1/data"]
                file.create_dataset(
                    "entry_1/data_1/data", (EVENTS, 64, 64), "f4", chunks=(1, 64, 64)
                )[:-1] = data
            else:
                value = file[name][()]
                value.reshape(-1).view(np.uint8)[-1] ^= 1
                file[name][...] = value

    return write_damaged


@pytest.mark.parametrize(
    "what",
    [
        *("attribute", "missing", "chunk", "entry_1/data_1/data", "LCLS/photon_energy_eV"),
        *("entry_1/result_1/nPeaks", "entry_1/result_1/peakXPosRaw", "entry_1/peaknet_predict/idx"),
    ],
)
def test_a_file_that_reads_back_otherwise_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(publisher, "write_cxi_file", damage(what))
        writer = CxiWriter(tmp_path, events_per_file=EVENTS)
        for result in RESULTS[:-1]:
            writer.add(result)
        with pytest.raises(CxiWriteError, match="is not what was written"):
            writer.add(RESULTS[-1])
        assert list(tmp_path.iterdir()) == []
    assert len(writer.add(RESULTS[-1])) == EVENTS
    check_whole(tmp_path)


def test_a_truncated_file_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_short(raw: Any, *args: Any) -> None:
        cxi_file.write_cxi_file(raw, *args)
        raw.truncate(raw.seek(0, os.SEEK_END) - 1000)

    monkeypatch.setattr(publisher, "write_cxi_file", write_short)
    settled, error = write(tmp_path)
    assert (settled, type(error)) == ([], CxiWriteError)
    assert list(tmp_path.iterdir()) == []


def test_signals_wait_for_the_end_of_what_is_uninterrupted() -> None:
    steps = []

    @uninterrupted()
    def work(raised: Exception | None) -> None:
        signal.raise_signal(signal.SIGINT)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        steps.append("all of it")
        if raised is not None:
            raise raised

    with pytest.raises(KeyboardInterrupt):
        work(None)
    with pytest.raises(KeyboardInterrupt):
        work(ValueError("does not hide the signal"))
    assert steps == ["all of it"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_waits_too() -> None:
    steps = []

    @uninterrupted()
    def work(stop: StopRequest) -> None:
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(30.0)
        steps.append("all of it")

    with stop_requests(begun=False) as stop:
        with pytest.raises(KeyboardInterrupt):
            work(stop)
        assert stop.at_once
    assert steps == ["all of it"]


def test_outside_the_main_thread_there_is_nothing_to_hold_back() -> None:
    ran = []
    thread = threading.Thread(target=uninterrupted()(lambda: ran.append(True)))
    thread.start()
    thread.join()
    assert ran
