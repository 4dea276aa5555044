"""HDF5 answers with fill values for what is not there; the source must not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.sources import Hdf5Source
from tests.helpers.examples import examples

DATA = "/entry_1/data_1/data"
EV = 9500.0


def frames(*shape: int, dtype: str = "int32", seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(1, 1000, size=shape).astype(dtype)


def read(source: Hdf5Source) -> list[npt.NDArray[Any] | str]:
    """Return each event's pixels, or why it has none."""
    got: list[npt.NDArray[Any] | str] = []
    for idx, image, energy in source.events():
        assert idx == len(got)
        assert np.isnan(energy) == (image.ndim == 0)
        got.append(str(image) if image.ndim == 0 else image)
    return got


def check(got: Sequence[Any], data: npt.NDArray[Any], missing: dict[int, str]) -> None:
    """Assert that the missing events say why, and the others have their pixels."""
    assert len(got) == len(data)
    for k, image in enumerate(got):
        if k in missing:
            assert isinstance(image, str), k
            assert f"frame {k} is unreadable" in image
            assert missing[k] in image
        else:
            np.testing.assert_array_equal(image, data[k])


# Chunks


@pytest.mark.parametrize("chunks", [(1, 6, 8), (2, 6, 8), (1, 3, 4)])
def test_a_chunk_that_was_never_written_is_no_frame_of_zeros(
    tmp_path: Path, chunks: tuple[int, ...]
) -> None:
    data = frames(6, 6, 8)
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        written = h5.create_dataset(DATA, data.shape, data.dtype, chunks=chunks)
        for k in (0, 1, 4, 5):
            written[k] = data[k]
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, dict.fromkeys((2, 3), "never written"))


def test_a_part_of_a_frame_that_was_never_written(tmp_path: Path) -> None:
    data = frames(3, 6, 8)
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        written = h5.create_dataset(DATA, data.shape, data.dtype, chunks=(1, 3, 8))
        written[0], written[2] = data[0], data[2]
        written[1, 3:] = data[1, 3:]
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, {1: "never written"})


@pytest.mark.parametrize("chunks", [None, (1, 6, 8)])
def test_a_dataset_to_which_nothing_was_written_is_refused(
    tmp_path: Path, chunks: tuple[int, ...] | None
) -> None:
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        h5.create_dataset(DATA, (3, 6, 8), "f4", chunks=chunks)
    with pytest.raises(ValueError, match="nothing was ever written"):
        Hdf5Source(path, photon_energy_ev=EV)


def bytes_read() -> int:
    """Return how many bytes this process has asked files for so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("virtual", [False, True])
def test_chunks_of_many_frames_are_read_once(tmp_path: Path, virtual: bool) -> None:
    """Frame by frame, HDF5 would read and decompress every chunk of 64 frames 64 times."""
    data = frames(256, 64, 128, dtype="uint16")
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        h5.create_dataset(DATA, data=data, chunks=(64, 64, 128), compression="gzip")
        stored = h5[DATA].id.get_storage_size()
    if virtual:
        with h5py.File(tmp_path / "v.h5", "w") as h5:
            layout = h5py.VirtualLayout((251, 64, 128), data.dtype)
            layout[:] = h5py.VirtualSource("run.h5", DATA, data.shape)[5:]
            h5.create_virtual_dataset(DATA, layout)
        path, data = str(tmp_path / "v.h5"), data[5:]
    source = Hdf5Source(path, photon_energy_ev=EV)
    before = bytes_read()
    for k, (_, image, _) in enumerate(source.events()):
        np.testing.assert_array_equal(image, data[k])
        kept = image if image.base is None else image.base
        assert kept.nbytes == image.nbytes, "an event keeps the memory of its neighbours"
    assert bytes_read() - before < 1.5 * stored


def test_one_damaged_chunk_costs_its_own_frames_only(tmp_path: Path) -> None:
    data = frames(12, 30, 40)
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        h5.create_dataset(DATA, data=data, chunks=(4, 30, 40), compression="gzip")
        chunk = h5[DATA].id.get_chunk_info(1)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    got = read(Hdf5Source(path, photon_energy_ev=EV))
    check(got, data, dict.fromkeys(range(4, 8), DATA))


# Virtual datasets


def virtual_run(folder: Path, data: npt.NDArray[Any], per_file: int) -> str:
    """Write frames into several files, and a file with a virtual dataset of them."""
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    for start in range(0, len(data), per_file):
        name, piece = f"part_{start // per_file}.h5", data[start : start + per_file]
        with h5py.File(folder / name, "w") as h5:
            h5.create_dataset("entry/data", data=piece, chunks=(1, *piece.shape[1:]))
        layout[start : start + per_file] = h5py.VirtualSource(name, "entry/data", piece.shape)
    with h5py.File(folder / "all.h5", "w") as h5:
        h5.create_virtual_dataset(DATA, layout)
    return str(folder / "all.h5")


def test_virtual_sources_that_are_gone_are_no_frames_of_zeros(tmp_path: Path) -> None:
    data = frames(7, 6, 8)
    path = virtual_run(tmp_path, data, 2)
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, {})
    source = Hdf5Source(path, photon_energy_ev=EV)
    (tmp_path / "part_1.h5").unlink()
    gone = dict.fromkeys((2, 3), "part_1.h5")
    check(read(source), data, gone)
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, gone)
    # A name that leads to something else.
    (tmp_path / "part_2.h5").write_bytes((tmp_path / "part_2.h5").read_bytes()[:3000])
    check(read(source), data, gone | dict.fromkeys((4, 5), "truncated"))
    with h5py.File(tmp_path / "part_3.h5", "w") as h5:
        h5["other"] = 1
    check(
        read(source),
        data,
        gone | dict.fromkeys((4, 5), "truncated") | {6: "has no such dataset"},
    )


def test_a_virtual_source_that_has_become_shorter(tmp_path: Path) -> None:
    data = frames(4, 6, 8)
    source = Hdf5Source(virtual_run(tmp_path, data, 2), photon_energy_ev=EV)
    with h5py.File(tmp_path / "part_1.h5", "w") as h5:
        h5["entry/data"] = data[2:3]
    check(read(source), data, {3: "insufficient elements"})


def test_a_virtual_source_with_frames_that_were_never_written(tmp_path: Path) -> None:
    data = frames(4, 6, 8)
    path = virtual_run(tmp_path, data, 2)
    with h5py.File(tmp_path / "part_1.h5", "w") as h5:
        h5.create_dataset("entry/data", (2, 6, 8), data.dtype, chunks=(1, 6, 8))[0] = data[2]
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, {3: "never written"})


def test_files_written_in_turns_and_panels_from_files_of_their_own(tmp_path: Path) -> None:
    """Frames 0, 2, 4... and 1, 3, 5... of two panels each come from their own files."""
    data = frames(6, 2, 4, 8)
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    for turn in range(2):
        for panel in range(2):
            name = f"t{turn}p{panel}.h5"
            with h5py.File(tmp_path / name, "w") as h5:
                h5["d"] = data[turn::2, panel]
            layout[turn::2, panel] = h5py.VirtualSource(name, "d", (3, 4, 8))
    with h5py.File(tmp_path / "all.h5", "w") as h5:
        h5.create_virtual_dataset(DATA, layout)
    path = str(tmp_path / "all.h5")
    check(read(Hdf5Source(path, photon_energy_ev=EV)), data, {})
    (tmp_path / "t1p0.h5").unlink()
    got = read(Hdf5Source(path, photon_energy_ev=EV))
    check(got, data, dict.fromkeys((1, 3, 5), "t1p0.h5"))


def test_pixels_of_a_virtual_frame_that_come_from_nowhere_are_bad(tmp_path: Path) -> None:
    """Gaps between the modules of an assembled image, as in EIGER's virtual datasets."""
    data = frames(3, 4, 8)
    with h5py.File(tmp_path / "m.h5", "w") as h5:
        h5["a"], h5["b"] = data[:, :, :3], data[:, :, 5:]
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    layout[:, :, :3] = h5py.VirtualSource("m.h5", "a", (3, 4, 3))
    layout[:2, :, 5:] = h5py.VirtualSource("m.h5", "b", (3, 4, 3))[:2]
    with h5py.File(tmp_path / "all.h5", "w") as h5:
        h5.create_virtual_dataset(DATA, layout, fillvalue=0)
    path = str(tmp_path / "all.h5")
    *first, last = (image for _, image, _ in Hdf5Source(path, photon_energy_ev=EV).events())
    for k, image in enumerate(first):
        assert isinstance(image, np.ma.MaskedArray)
        np.testing.assert_array_equal(
            np.ma.getmaskarray(image), np.broadcast_to([0, 0, 0, 1, 1, 0, 0, 0], (4, 8))
        )
        np.testing.assert_array_equal(image.compressed(), np.delete(data[k], (3, 4), 1).ravel())
    np.testing.assert_array_equal(
        np.ma.getmaskarray(last), np.broadcast_to([0, 0, 0, 1, 1, 1, 1, 1], (4, 8))
    )


def test_virtual_frames_without_any_source(tmp_path: Path) -> None:
    data = frames(2, 4, 8)
    with h5py.File(tmp_path / "m.h5", "w") as h5:
        h5["a"] = data
    layout = h5py.VirtualLayout((4, 4, 8), data.dtype)
    layout[:2] = h5py.VirtualSource("m.h5", "a", data.shape)
    with h5py.File(tmp_path / "all.h5", "w") as h5:
        h5.create_virtual_dataset(DATA, layout)
    got = read(Hdf5Source(str(tmp_path / "all.h5"), photon_energy_ev=EV))
    check(got, np.concatenate([data, data]), dict.fromkeys((2, 3), "no source is mapped"))


@examples(30)
@given(st.data())
def test_any_virtual_mapping_gives_the_frame_or_the_reason(data: st.DataObject) -> None:
    """Frames in any order, each from a file of its own, some of which have gone."""
    import tempfile

    num = data.draw(st.integers(1, 6))
    sources = data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
    order = {k: data.draw(st.permutations(range(sources.count(k)))) for k in set(sources)}
    gone = data.draw(st.sets(st.integers(0, 3)))
    images = frames(num, 3, 5)
    with tempfile.TemporaryDirectory() as folder:
        layout = h5py.VirtualLayout(images.shape, images.dtype)
        for k in set(sources):
            mine = [i for i, one in enumerate(sources) if one == k]
            stored = np.empty((len(mine), 3, 5), images.dtype)
            for place, i in zip(order[k], mine, strict=True):
                stored[place] = images[i]
                layout[i] = h5py.VirtualSource(f"{k}.h5", "d", stored.shape)[place]
            with h5py.File(f"{folder}/{k}.h5", "w") as h5:
                h5["d"] = stored
        with h5py.File(f"{folder}/all.h5", "w") as h5:
            h5.create_virtual_dataset(DATA, layout)
        for k in gone & set(sources):
            os.unlink(f"{folder}/{k}.h5")
        if set(sources) <= gone:
            with pytest.raises(ValueError, match="none of its sources can be read"):
                Hdf5Source(f"{folder}/all.h5", photon_energy_ev=EV)
            return
        got = read(Hdf5Source(f"{folder}/all.h5", photon_energy_ev=EV))
        check(got, images, {i: f"{k}.h5" for i, k in enumerate(sources) if k in gone})


# Links and raw files


def test_a_link_into_the_void_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "run.h5")
    with h5py.File(path, "w") as h5:
        h5["entry/data"] = h5py.ExternalLink("gone.h5", "/x")
        h5["entry/soft"] = h5py.SoftLink("/nothing/here")
        h5["entry/ring"] = h5py.SoftLink("/entry/ring")
        h5["entry/good"] = h5py.SoftLink("/frames")
        h5["frames"] = frames(2, 4, 8)
    for name, message in (
        ("/entry/data", r"a link to /x in gone\.h5: .*gone\.h5 is not there"),
        ("/entry/soft", "a link to /nothing/here, which is not there"),
        ("/entry/ring", "leads in a circle"),
        ("/entry/none", r"/entry/data -> gone\.h5:/x \(broken\)\n.*/frames \(2, 4, 8\) int32"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            Hdf5Source(path, data=name, photon_energy_ev=EV)
    check(read(Hdf5Source(path, data="/entry/good", photon_energy_ev=EV)), frames(2, 4, 8), {})


def test_links_out_of_the_folder_need_permission(tmp_path: Path) -> None:
    data = frames(2, 4, 8)
    (tmp_path / "run" / "deeper").mkdir(parents=True)
    outside, inside = tmp_path / "outside.h5", tmp_path / "run" / "deeper" / "inside.h5"
    for file in (outside, inside):
        with h5py.File(file, "w") as h5:
            h5["d"] = data
    path = str(tmp_path / "run" / "run.h5")
    with h5py.File(path, "w") as h5:
        h5["up"] = h5py.ExternalLink("../outside.h5", "d")
        h5["absolute"] = h5py.ExternalLink(str(outside), "d")
        h5["down"] = h5py.ExternalLink("deeper/inside.h5", "d")
        layout = h5py.VirtualLayout(data.shape, data.dtype)
        layout[:] = h5py.VirtualSource("../outside.h5", "d", data.shape)
        h5.create_virtual_dataset("virtual", layout)
    check(read(Hdf5Source(path, data="down", photon_energy_ev=EV)), data, {})
    for name in ("up", "absolute", "virtual"):
        with pytest.raises(ValueError, match="outside the folder of .*allow_external: true"):
            Hdf5Source(path, data=name, photon_energy_ev=EV)
    for name in ("up", "absolute", "virtual"):
        allowed = Hdf5Source(path, data=name, photon_energy_ev=EV, allow_external=True)
        check(read(allowed), data, {})


def test_raw_files_need_permission_and_must_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = frames(2, 4, 8)
    path, raw = str(tmp_path / "run.h5"), tmp_path / "raw.bin"
    raw.write_bytes(data.tobytes())
    with h5py.File(path, "w") as h5:
        h5.create_dataset(DATA, data.shape, data.dtype, external=[("raw.bin", 0, data.nbytes)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="raw.bin; if you trust this file"):
        Hdf5Source(path, photon_energy_ev=EV)
    source = Hdf5Source(path, photon_energy_ev=EV, allow_external=True)
    check(read(source), data, {})
    raw.write_bytes(data.tobytes()[:-1])
    with pytest.raises(ValueError, match="too short"):
        Hdf5Source(path, photon_energy_ev=EV, allow_external=True)


# Files that cannot be opened


WRITER = """
import h5py, sys
swmr, path = sys.argv[1] == "swmr", sys.argv[2]
h5 = h5py.File(path, "w", libver="latest")
data = h5.create_dataset("entry_1/data_1/data", (3, 4, 8), "f4", maxshape=(None, 4, 8),
                         chunks=(1, 4, 8))
data[:2] = 5
if swmr:
    h5.swmr_mode = True
h5.flush()
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("locking", ["TRUE", "FALSE"])
def test_a_file_that_is_still_being_written(tmp_path: Path, locking: str) -> None:
    """Without locks, as on many cluster file systems, only flags in the file tell."""
    path = str(tmp_path / "live.h5")
    for mode in ("swmr", "plain"):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, mode, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HDF5_USE_FILE_LOCKING": locking},
        )
        assert writer.stdin is not None
        assert writer.stdout is not None
        with writer, writer.stdin:
            assert writer.stdout.readline() == b"ready\n"
            if mode == "swmr":
                got = read(Hdf5Source(path, photon_energy_ev=EV))
                check(got, np.full((3, 4, 8), 5, "f4"), {2: "never written"})
                continue
            with pytest.raises(ValueError, match="still being written.*; wait") as refusal:
                Hdf5Source(path, photon_energy_ev=EV)
            assert "h5clear" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it is empty"), (None, "is truncated: only 3000 bytes"), (b"hello", "cannot be opened")],
)
def test_unreadable_files_are_named_and_left_out_only_on_request(
    tmp_path: Path, content: bytes | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = frames(4, 6, 8)
    for k, name in enumerate(("a", "b")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as h5:
            h5.create_dataset(DATA, data=data[2 * k : 2 * k + 2], chunks=(1, 6, 8))
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "aa.h5").write_bytes(whole[:3000] if content is None else content)
    pattern = str(tmp_path / "*.h5")
    with pytest.raises(ValueError, match=rf"aa\.h5 .*{message}.*skip_unreadable: true"):
        Hdf5Source(pattern, photon_energy_ev=EV)
    source = Hdf5Source(pattern, photon_energy_ev=EV, skip_unreadable=True)
    check(read(source), data, {})
    (lost,) = source.skipped
    assert (lost.path.name, lost.events) == ("aa.h5", None)
    assert message in lost.reason
    assert "aa.h5 is left out" in caplog.text
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        Hdf5Source(str(tmp_path / "aa.h5"), photon_energy_ev=EV, skip_unreadable=True)


# Where files are read


def test_a_source_reads_in_another_process_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hdf5plugin

    data = frames(3, 6, 8)
    monkeypatch.chdir(tmp_path)
    with h5py.File("run.h5", "w") as h5:
        h5.create_dataset(DATA, data=data, chunks=(1, 6, 8), **hdf5plugin.Bitshuffle())
    import pickle

    (tmp_path / "source.pickle").write_bytes(
        pickle.dumps(Hdf5Source("run.h5", photon_energy_ev=EV))
    )
    code = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb')); source.check(); "
        "print([int(image.sum()) for _, image, _ in source.events()])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HDF5_PLUGIN_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "source.pickle")],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([int(image.sum()) for image in data])


def test_the_check_says_what_is_missing_where_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = frames(3, 6, 8)
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as h5:
            h5[DATA] = data
    source = Hdf5Source(str(tmp_path / "*.h5"), photon_energy_ev=EV)
    source.check()
    assert (
        f"a.h5 and 1 more: events 6 in {DATA} (panels 1, slow 6, fast 8; int32); "
        "photon energy from photon_energy_ev, 9500.0 eV; no mask of bad pixels"
    ) in caplog.text
    (tmp_path / "b.h5").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 files are not there on .*b\.h5"):
        source.check()
