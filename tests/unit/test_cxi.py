"""CXI files: every promise of the writer, checked in the file with h5py."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peaknet_predict.cxi import directory as cxi_directory
from peaknet_predict.cxi.file import read_cxi, read_ids
from peaknet_predict.cxi.writer import CxiWriteError, CxiWriter
from peaknet_predict.pixels import pack_mask
from peaknet_predict.types import ANYONE, EventId, Result, identity_problem
from tests.helpers.examples import examples


def make_result(
    idx: int = 0,
    shape: tuple[int, ...] = (2, 24, 32),
    dtype: npt.DTypeLike = np.float32,
    num_peaks: int = 3,
    energy: float = 9500.0,
) -> Result:
    rng = np.random.default_rng(idx)
    panels, height, width = shape if len(shape) == 3 else (1, *shape)
    peaks = np.stack(
        [
            rng.integers(0, panels, num_peaks),
            rng.uniform(0, height - 1, num_peaks),
            rng.uniform(0, width - 1, num_peaks),
        ],
        axis=1,
    )
    image = rng.integers(0, 5000, shape).astype(dtype)
    return Result(EventId("röntgen/run 7", 3, idx), image, peaks, energy + idx, bad_pixels=idx)


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow above `limit` bytes: real failures of real writes, at any place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what is in a file ---------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "u2", "i4", "i2", "u1", ">f4", ">u2"])
def test_pixels_bit_for_bit(tmp_path: Path, dtype: str, compression: Any) -> None:
    results = [make_result(i, dtype=dtype) for i in range(3)]
    with CxiWriter(tmp_path, compression=compression) as writer:
        for result in results:
            writer.add(result)
    with h5py.File(tmp_path / "peaks_0000.cxi") as file:
        data = file["entry_1/data_1/data"]
        assert data.dtype == np.dtype(dtype)
        assert (data.shape, data.chunks) == ((3, 48, 32), (1, 48, 32))
        assert data.compression == (None if compression == "none" else "gzip")
        for i, result in enumerate(results):
            assert data[i].tobytes() == result.image.tobytes()


def test_layout(tmp_path: Path) -> None:
    results = [make_result(i, num_peaks=i) for i in range(4)]
    with CxiWriter(tmp_path, "run7", max_peaks=16) as writer:
        for result in results:
            writer.add(result)
    with h5py.File(tmp_path / "run7_0000.cxi") as file:
        assert file["cxi_version"][()] == 160
        assert file[f"{file.attrs['default']}"].attrs["NX_class"] == "NXentry"
        assert file["entry_1"][file["entry_1"].attrs["default"]].attrs["signal"] == "data"
        mask = file["entry_1/data_1/mask"]
        assert (mask.dtype, mask.shape) == (np.uint32, (48, 32)), "one for all events"
        assert not mask[()].any()
        assert file["LCLS/photon_energy_eV"].dtype == np.float64
        assert file["LCLS/photon_energy_eV"][:].tolist() == [9500, 9501, 9502, 9503]
        joules = file["entry_1/instrument_1/source_1/energy"][:]
        assert joules == pytest.approx([e.photon_energy * 1.602176634e-19 for e in results])
        own = file["entry_1/peaknet_predict"]
        assert own["stream"].asstr()[:].tolist() == ["röntgen/run 7"] * 4
        assert own["rank"][:].tolist() == [3] * 4
        assert own["idx"][:].tolist() == own["badPixels"][:].tolist() == [0, 1, 2, 3]
        assert own["numPeaksFound"][:].tolist() == [0, 1, 2, 3]
        assert own["truncated"][:].tolist() == [0] * 4
        assert own["provenance"].asstr()[:].tolist() == [""] * 4, "not known"
        assert np.isnan(own["threshold"][:]).all()


def test_peak_lists_as_crystfel_reads_them(tmp_path: Path) -> None:
    # CrystFEL drops all peaks of an event if nPeaks is above the width, if the intensities are
    # missing, and those whose X (fast scan) and Y (slow scan) are outside of the slab.
    image = np.zeros((3, 24, 32), dtype=np.float32)
    peaks = np.array([[0, 2.5, 7.25], [2, 10.0, 20.0], [1, 23.0, 31.0]])
    for strength, (panel, y, x) in zip((100, 300, 200), peaks.tolist(), strict=True):
        image[int(panel), round(y), round(x)] = strength
    with CxiWriter(tmp_path, max_peaks=8) as writer:
        writer.add(Result(EventId("s", 0, 0), image, peaks, 9500.0))
    with h5py.File(tmp_path / "peaks_0000.cxi") as file:
        lists = file["entry_1/result_1"]
        assert lists["nPeaks"].dtype == np.int32
        assert lists["nPeaks"][:].tolist() == [3]
        assert lists["peakXPosRaw"][0].tolist() == [20.0, 31.0, 7.25, 0, 0, 0, 0, 0]
        assert lists["peakYPosRaw"][0].tolist() == [58.0, 47.0, 2.5, 0, 0, 0, 0, 0]
        assert lists["peakTotalIntensity"][0].tolist() == [300, 200, 100, 0, 0, 0, 0, 0]
        assert lists["peakMaximumValue"][0].tolist() == [300, 200, 100, 0, 0, 0, 0, 0]
        assert lists["peakSNR"].shape == (1, 8)
        slab = file["entry_1/data_1/data"][0]
        assert slab[58, 20] == 300  # the coordinates address the slab


def test_max_peaks_keeps_the_strongest_and_says_so(tmp_path: Path) -> None:
    results = [make_result(0, num_peaks=40), make_result(1, num_peaks=10)]
    with CxiWriter(tmp_path, "all") as everything, CxiWriter(tmp_path, "cut", max_peaks=10) as cut:
        for result in results:
            everything.add(result)
            cut.add(result)
    with h5py.File(tmp_path / "cut_0000.cxi") as file:
        assert file["entry_1/result_1/nPeaks"][:].tolist() == [10, 10]
        assert file["entry_1/result_1/peakXPosRaw"].shape == (2, 10)
    assert (everything.statistics.truncated, cut.statistics.truncated) == (0, 1)
    (full, _), (kept, whole) = (
        list(read_cxi(tmp_path / name)) for name in ("all_0000.cxi", "cut_0000.cxi")
    )
    assert (kept.truncated, kept.num_peaks_found, whole.truncated) == (True, 40, False)
    assert kept.intensity.tolist() == sorted(full.intensity.tolist(), reverse=True)[:10]
    assert np.array_equal(kept.peaks, full.peaks[:10])


def test_a_mask_that_changes_is_written_per_event(tmp_path: Path) -> None:
    good, bad = make_result(0), make_result(1)
    bad.image[1, 5, 6], bad.image[0, 0, 0] = np.nan, np.inf
    with CxiWriter(tmp_path) as writer:
        writer.add(good)
        writer.add(bad)
    with h5py.File(tmp_path / "peaks_0000.cxi") as file:
        mask = file["entry_1/data_1/mask"]
        assert (mask.dtype, mask.shape, mask.chunks) == (np.uint32, (2, 48, 32), (1, 48, 32))
        assert np.argwhere(mask[:]).tolist() == [[1, 0, 0], [1, 29, 6]]
    events = list(read_cxi(tmp_path / "peaks_0000.cxi"))
    assert events[1].image.tobytes() == bad.image.tobytes()
    assert np.array_equal(events[1].mask, ~np.isfinite(bad.image))
    assert not events[0].mask.any()


@pytest.mark.parametrize("shape", [(2, 24, 32), (24, 32)])
def test_a_mask_that_stays_is_written_once_and_keeps_its_pixels_out_of_the_intensities(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    bad = np.zeros(shape, np.bool_)
    bad[..., 10, 12] = True
    results = []
    for idx in range(3):
        image = np.full(shape, 100, np.uint16)
        image[..., 10, 12], image[..., 10, 13], image[..., 20, 20] = 40_000, 300, 1000
        peaks = np.array([[0, 10.0, 12.5], [0, 20.0, 20.0]])
        key = EventId("s", 0, idx)
        results.append(Result(key, image, peaks, 9e3, bad_bits=pack_mask(bad), saturation=900.0))
    with CxiWriter(tmp_path) as writer:
        for result in results:
            writer.add(result)
    with h5py.File(tmp_path / "peaks_0000.cxi") as file:
        mask = file["entry_1/data_1/mask"]
        assert np.array_equal(mask[()], bad.reshape(-1, 32)), "(P*H, W), as CrystFEL takes it"
        assert file["entry_1/peaknet_predict/saturation"][:].tolist() == [900.0] * 3
    for event in read_cxi(tmp_path / "peaks_0000.cxi"):
        assert np.array_equal(event.mask.reshape(bad.shape), bad)
        assert event.peaks.tolist() == [[0, 20.0, 20.0], [0, 10.0, 12.5]]
        assert event.intensity.tolist() == [900, 200], "the bad pixel counts for nothing"
        assert event.saturated.tolist() == [True, False]


def test_values_that_mark_dead_pixels_are_masked_where_a_result_has_no_mask(
    tmp_path: Path,
) -> None:
    image = np.full((1, 24, 32), 7, np.uint32)
    image[0, 3, 4] = 2**32 - 1
    with CxiWriter(tmp_path) as writer:
        writer.add(Result(EventId("s", 0, 0), image, np.array([[0, 4.0, 4.0]]), 9500.0))
    (event,) = read_cxi(tmp_path / "peaks_0000.cxi")
    assert np.argwhere(event.mask).tolist() == [[0, 3, 4]]
    assert event.intensity.tolist() == [0.0]
    assert event.saturated.tolist() == [False], "not known"


def test_a_provenance_that_cannot_be_read_goes_into_no_file(tmp_path: Path) -> None:
    with CxiWriter(tmp_path) as writer:
        for wrong in ("{", "{}", "[]", '{"threshold": "high"}', '{"threshold": 0}\0', "\udc80"):
            result = make_result(0)
            result.provenance = wrong
            with pytest.raises(ValueError, match="its provenance is no JSON with a threshold"):
                writer.add(result)


@pytest.mark.parametrize("energy", [9.5, 1.305, 1.5e-15, 5.9e22])
def test_an_energy_in_another_unit_goes_into_no_file(tmp_path: Path, energy: float) -> None:
    """Another program's results have not been through the checks of events."""
    image, peaks = np.zeros((1, 4, 4), np.float32), np.empty((0, 3))
    result = Result(EventId("s", 0, 0), image, peaks, energy)
    with CxiWriter(tmp_path) as writer, pytest.raises(ValueError, match="event s:0:0: .*likely"):
        writer.add(result)


@examples(40)
@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["f4", "f2", "u2", "i4"]))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    results = []
    for idx in range(data.draw(st.integers(1, 4))):
        image = data.draw(hnp.arrays(dtype, shape))
        places = hnp.arrays("i4", (data.draw(st.integers(0, 5)), 3), elements=st.integers(0, 1000))
        # Sevenths: centroids with endless binary fractions, yet never too close to be told apart.
        last = np.array(shape) - 1
        peaks = data.draw(places) % (last * [1, 7, 7] + 1) / [1, 7, 7]
        identity = EventId(data.draw(st.text("aü/ 1")), data.draw(st.integers(0, 2**40)), idx)
        energy = data.draw(st.just(0.0) | st.floats(100, 200_000))
        results.append(Result(identity, image, peaks, energy, bad_pixels=idx))
    with tempfile.TemporaryDirectory() as directory:
        with CxiWriter(directory) as writer:
            for result in results:
                writer.add(result)
        (path,) = writer.statistics.files
        events = list(read_cxi(path))
    assert [event.id for event in events] == [result.id for result in results]
    for event, result in zip(events, results, strict=True):
        assert event.image.dtype == result.image.dtype
        assert event.image.tobytes() == result.image.tobytes()
        assert event.photon_energy == result.photon_energy
        assert event.bad_pixels == result.bad_pixels
        assert event.peaks.shape == result.peaks.shape
        found, given = (sorted(p.round(12).tolist()) for p in (event.peaks, result.peaks))
        assert found == given
        assert (np.diff(event.intensity) <= 0).all()


# --- which events go to which file ---------------------------------------------------------------


def test_files_of_n_events_and_what_is_settled(tmp_path: Path) -> None:
    writer = CxiWriter(tmp_path, events_per_file=3, min_peaks=2)
    results = [make_result(i, num_peaks=0 if i == 1 else 2) for i in range(9)]
    settled = [[identity.idx for identity in writer.add(result)] for result in results]
    assert settled == [[], [], [], [0, 2, 3], [], [], [4, 5, 6], [], []]
    assert len(writer) == 2
    assert [identity.idx for identity in writer.flush()] == [7, 8, 1]
    assert writer.close() == writer.close() == []
    statistics = writer.statistics
    assert (statistics.taken, statistics.written, statistics.filtered) == (9, 8, 1)
    assert [path.name for path in statistics.files] == [f"peaks_{i:04d}.cxi" for i in range(3)]
    # The energies of a file are those of its own events.
    assert [event.photon_energy for event in read_cxi(statistics.files[1])] == [9504, 9505, 9506]
    with pytest.raises(ValueError, match="closed"):
        writer.add(results[0])


def test_another_shape_or_dtype_starts_another_file(tmp_path: Path) -> None:
    with CxiWriter(tmp_path) as writer:
        writer.add(make_result(0, (24, 32)))
        writer.add(make_result(1, (1, 24, 32)))  # the same panel, written differently
        writer.add(make_result(2, (2, 24, 32)))
        writer.add(make_result(3, (4, 12, 32)))  # the same slab, other panels
        writer.add(make_result(4, (4, 12, 32), dtype=np.uint16))
        writer.add(make_result(5, (4, 12, 32), dtype=np.uint16))
    contents = [[event.id.idx for event in read_cxi(path)] for path in writer.statistics.files]
    assert contents == [[0, 1], [2], [3], [4, 5]]


def test_memory_is_bounded_by_bytes(tmp_path: Path) -> None:
    size = make_result().image.nbytes
    with CxiWriter(tmp_path, max_file_bytes=2 * size) as writer:
        for i in range(5):
            writer.add(make_result(i))
            assert len(writer) <= 2
        writer.add(make_result(5, (9, 24, 32)))  # larger than the bound: a file of its own
    assert [len(list(read_cxi(path))) for path in writer.statistics.files] == [2, 2, 1, 1]


def test_nothing_written_for_no_events(tmp_path: Path) -> None:
    CxiWriter(tmp_path).close()
    assert files_in(tmp_path) == []


def test_without_photon_energy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CxiWriter(tmp_path) as writer, caplog.at_level(logging.WARNING):
        writer.add(make_result(0, energy=0.0))
        writer.add(make_result(1, energy=float("nan")))
        writer.add(make_result(2))
        writer.flush()
    assert writer.statistics.without_energy == 2
    assert "photon energy" in caplog.text


def test_events_that_cannot_be_written_are_refused_alone(tmp_path: Path) -> None:
    with CxiWriter(tmp_path) as writer:
        writer.add(make_result(0))
        outside = make_result(1)
        outside.peaks[0, 1] = 24
        with pytest.raises(ValueError, match=r"röntgen/run 7:3:1.*outside"):
            writer.add(outside)
        with pytest.raises(ValueError, match="complex"):
            writer.add(make_result(2, dtype=np.complex64))
        imaginary, between, too_short = (make_result(2) for _ in range(3))
        imaginary.peaks = imaginary.peaks.astype(np.complex128)
        between.peaks[0, 0] = 0.5
        too_short.bad_bits = np.zeros(3, np.uint8)
        for strange, why in (
            (imaginary, "its peaks are of dtype complex128"),
            (between, "a peak is in panel 0.5"),
            (too_short, "its mask has 3 bytes"),
        ):
            with pytest.raises(ValueError, match=why):
                writer.add(strange)
        with pytest.raises(ValueError, match="shape"):
            writer.add(make_result(3, (0, 24, 32), num_peaks=0))
        writer.add(make_result(4))
    assert (writer.statistics.taken, writer.statistics.written) == (2, 2)


# --- names, lists, failures ----------------------------------------------------------------------


def test_restart_and_second_writer_never_overwrite(tmp_path: Path) -> None:
    (tmp_path / "peaks_0007.cxi").write_bytes(b"precious")
    writers = [CxiWriter(tmp_path, events_per_file=1) for _ in range(2)]
    for i in range(3):
        for k, writer in enumerate(writers):
            writer.add(make_result(2 * i + k))
    names = [f"peaks_{number:04d}.cxi" for number in range(7, 14)]
    assert files_in(tmp_path) == ["files.lst", *names]
    assert (tmp_path / names[0]).read_bytes() == b"precious"
    listed = (tmp_path / "files.lst").read_text().splitlines()
    assert listed == [str(tmp_path.resolve() / name) for name in names[1:]], "what can be indexed"


def test_name_taken_between_look_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peaks_0000.cxi").write_bytes(b"precious")
    monkeypatch.setattr(os, "listdir", lambda _: [])
    with CxiWriter(tmp_path) as writer:
        writer.add(make_result())
    assert [path.name for path in writer.statistics.files] == ["peaks_0001.cxi"]
    assert (tmp_path / "peaks_0000.cxi").read_bytes() == b"precious"


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("limit", [0, 50, 3000, 20_000, 60_000])
def test_full_disk_loses_nothing(tmp_path: Path, limit: int, compression: Any) -> None:
    results = [make_result(i, (2, 48, 64)) for i in range(4)]
    writer = CxiWriter(tmp_path, events_per_file=4, compression=compression)
    for result in results[:3]:
        writer.add(result)
    with full_disk(limit):
        with pytest.raises(CxiWriteError, match="Free space") as caught:
            writer.flush()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path.resolve())
        with pytest.raises(CxiWriteError, match="stay in memory"):
            writer.add(results[3])
        with pytest.raises(CxiWriteError):
            writer.close()
        assert files_in(tmp_path) == []
    assert (writer.statistics.taken, writer.statistics.written, len(writer)) == (3, 0, 3)
    assert [identity.idx for identity in writer.add(results[3])] == [0, 1, 2, 3]
    events = list(read_cxi(writer.statistics.files[0]))
    assert [e.image.tobytes() for e in events] == [r.image.tobytes() for r in results]
    assert writer.statistics.taken == writer.statistics.written == 4
    writer.close()


def test_full_disk_does_not_crash_the_process(tmp_path: Path) -> None:
    # HDF5 2.0 left alone with a full disk hides the error and crashes when the process ends.
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tests.unit.test_cxi import CxiWriteError, CxiWriter, full_disk, make_result
writer = CxiWriter({str(tmp_path)!r})
writer.add(make_result(0, (4, 200, 256)))
with full_disk(300_000):
    try:
        writer.flush()
    except CxiWriteError:
        sys.exit(17)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 17


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_failing_system_call_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    writer = CxiWriter(tmp_path)
    writer.add(make_result())
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(CxiWriteError, match="writable"):
            writer.close()
    assert files_in(tmp_path) == []
    assert len(writer.close()) == 1
    assert files_in(tmp_path) == ["files.lst", "peaks_0000.cxi"]


def test_directory_that_does_not_sync_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = os.fsync, [True]

    def fail_once(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and fails:
            fails.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    writer = CxiWriter(tmp_path)
    monkeypatch.setattr(os, "fsync", fail_once)
    writer.add(make_result())
    with pytest.raises(CxiWriteError):
        writer.flush()
    assert files_in(tmp_path) == []
    writer.close()
    assert [path.name for path in writer.statistics.files] == ["peaks_0000.cxi"]


def test_killed_in_the_middle_leaves_no_final_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tests.unit.test_cxi import CxiWriter, make_result
writer = CxiWriter({str(tmp_path)!r})
os.fsync = lambda _: os._exit(9)
writer.add(make_result())
writer.flush()
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    (leftover,) = files_in(tmp_path)
    assert leftover.startswith(".peaks.")
    with caplog.at_level(logging.WARNING), CxiWriter(tmp_path) as writer:
        writer.add(make_result())
    assert leftover in caplog.text
    assert (tmp_path / "files.lst").read_text().count("\n") == 1


def test_list_that_cannot_be_written_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = CxiWriter(tmp_path, events_per_file=1)
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(os, "replace", fail)
        assert len(writer.add(make_result())) == 1
        assert "files.lst" in caplog.text
        with pytest.raises(CxiWriteError, match="CXI files are complete"):
            writer.close()
    writer.close()
    assert files_in(tmp_path) == ["files.lst", "peaks_0000.cxi"]


def test_a_restarted_writer_knows_what_finished_files_have(tmp_path: Path) -> None:
    with CxiWriter(tmp_path, events_per_file=2) as first:
        for idx in range(5):
            first.add(make_result(idx))
    with CxiWriter(tmp_path, events_per_file=2) as again:
        settled = [key.idx for idx in range(3, 7) for key in again.add(make_result(idx))]
    assert settled == [3, 4, 5, 6], "what is there already is settled at once"
    assert (again.statistics.duplicates, again.statistics.written) == (2, 2)
    written = [event.id.idx for path in sorted(tmp_path.glob("*.cxi")) for event in read_cxi(path)]
    assert written == list(range(7))


def test_the_same_event_twice_in_memory_is_written_once(tmp_path: Path) -> None:
    with CxiWriter(tmp_path) as writer:
        assert writer.add(make_result(0)) == []
        assert writer.add(make_result(0)) == [], "not settled: it is in no file yet"
        assert len(writer.flush()) == 1
    assert (writer.statistics.written, writer.statistics.duplicates) == (1, 1)


def test_a_writer_that_only_slept_cannot_write_what_another_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {make_result(idx).id for idx in range(4)}
    sleeper = CxiWriter(tmp_path, owner="sleeper", still_ours=lambda ids: ours & set(ids))
    for idx in range(4):
        sleeper.add(make_result(idx))
    link = os.link

    def sleep_before(*names: Any) -> None:
        # The file is complete and the leases were good; then it is stopped for too long.
        monkeypatch.setattr(os, "link", link)
        ours.discard(make_result(1).id)
        other = CxiWriter(tmp_path, owner="other")
        other.take_over_from(["sleeper"])
        other.add(make_result(1))
        other.close()
        link(*names)

    monkeypatch.setattr(os, "link", sleep_before)
    with pytest.raises(CxiWriteError):
        sleeper.flush()
    assert [key.idx for key in sleeper.flush()] == [0, 2, 3]
    assert sleeper.statistics.handed_over == 1
    written = [event.id.idx for path in sorted(tmp_path.glob("*.cxi")) for event in read_cxi(path)]
    assert sorted(written) == [0, 1, 2, 3]


@pytest.mark.parametrize("owner", ["first", ANYONE])
def test_a_writer_that_takes_over_finds_what_the_other_had_finished(
    tmp_path: Path, owner: str
) -> None:
    other = CxiWriter(tmp_path, owner="other")
    first = CxiWriter(tmp_path, owner="first", events_per_file=1)
    first.add(make_result(0))  # and is killed before it can say so
    (tmp_path / ".peaks.first.1234.tmp").touch()
    other.take_over_from([owner])
    assert not list(tmp_path.glob(".*.tmp"))
    assert [key.idx for key in other.add(make_result(0))] == [0]
    assert other.statistics.duplicates == 1


def test_a_writer_that_is_taken_over_behind_the_name_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = (CxiWriter(tmp_path, owner=owner) for owner in ("slow", "other"))
    link = os.link

    def link_and_sleep(source: Any, target: Any) -> None:
        link(source, target)
        other.take_over_from(["slow"])  # deletes the temporary name, and counts on the final one

    with monkeypatch.context() as slept:
        slept.setattr(os, "link", link_and_sleep)
        slow.add(make_result(0))
        assert slow.close() == [make_result(0).id]
    assert other.add(make_result(0)) == [make_result(0).id]
    assert [event.id.idx for event in read_cxi(tmp_path / "peaks_0000.cxi")] == [0]


def test_a_finished_file_that_cannot_be_read_for_a_moment_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = CxiWriter(tmp_path, owner="other")
    writer = CxiWriter(tmp_path, owner="this")
    other.add(make_result(0))
    other.close()
    (tmp_path / "peaks_0007.cxi").write_text("not ours")

    def fails(path: Path) -> list[EventId]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(cxi_directory, "read_summary", fails)
        with pytest.raises(CxiWriteError, match="Input/output error"):
            writer.take_over_from(["other"])
        with pytest.raises(CxiWriteError, match="Input/output error"):
            CxiWriter(tmp_path)
    writer.take_over_from(["other"])
    assert "peaks_0007.cxi does not say which events are in it" in caplog.text
    assert writer.add(make_result(0)) == [make_result(0).id]
    assert writer.statistics.duplicates == 1


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CxiWriter(tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(CxiWriteError, match="Create the directory"):
        CxiWriter(tmp_path / "not mounted", create=False)
    assert not (tmp_path / "not mounted").exists()
    with pytest.raises(CxiWriteError, match="Create the directory") as caught:
        CxiWriter(tmp_path / "missing" / "new")
    assert str(tmp_path / "missing" / "new") in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(CxiWriteError):
        CxiWriter(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CxiWriteError, match="writable"):
        CxiWriter(tmp_path)


def test_directory_that_vanishes(tmp_path: Path) -> None:
    writer = CxiWriter(tmp_path / "out")
    writer.add(make_result())
    (tmp_path / "out").rmdir()
    with pytest.raises(CxiWriteError, match="Create the directory"):
        CxiWriter(tmp_path / "not mounted", create=False)
    assert not (tmp_path / "not mounted").exists()
    with pytest.raises(CxiWriteError, match="Create the directory") as caught:
        writer.flush()
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), CxiWriteError)
    (tmp_path / "out").mkdir()
    assert len(writer.flush()) == 1


def test_parameters(tmp_path: Path) -> None:
    for wrong in ({"events_per_file": 0}, {"max_peaks": 0}, {"min_peaks": -1}, {"prefix": "a/b"}):
        with pytest.raises(ValueError, match="start"):
            CxiWriter(tmp_path, **wrong)
    with pytest.raises(ValueError, match="compression"):
        CxiWriter(tmp_path, compression="lz4")  # type: ignore[arg-type]


def test_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys, peaknet_predict.cxi.writer;"
        "print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert output.stdout.strip() == b"[]"


identities = st.builds(
    EventId,
    st.text(st.characters(exclude_categories=()), max_size=5) | st.sampled_from(["a\0b", "\udcff"]),
    st.integers(),
    st.integers() | st.sampled_from([2**63 - 1, 2**63, -(2**63) - 1]),
)


@examples(25)
@given(strange=st.lists(identities, max_size=6, unique=True))
def test_what_no_file_can_hold_is_refused_alone_and_by_name(strange: list[EventId]) -> None:
    good = [make_result(idx) for idx in range(3)]
    image, peaks = good[0].image, good[0].peaks
    offered = [Result(key, image, peaks, 9500.0) for key in strange]
    reasons: dict[EventId, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        writer = CxiWriter(directory)
        for result in [good[0], *offered, *good[1:]]:
            try:
                writer.add(result)
            except ValueError as error:
                reasons[result.id] = str(error)
        writer.close()
        written = {key for path in writer.statistics.files for key in read_ids(path)}
    assert written == {result.id for result in [*good, *offered]} - reasons.keys()
    assert set(reasons) == {key for key in strange if identity_problem(key)}
    for reason in reasons.values():
        assert "event of stream" in reason.encode().decode(), "fit for a log"
