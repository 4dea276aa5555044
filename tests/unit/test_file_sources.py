from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.sources import EventSource, Hdf5Source, NpzSource
from peaknet_predict.sources.base import resolve_paths
from peaknet_predict.sources.hdf5 import CXI_ENERGY, LCLS_ENERGY
from tests.helpers.examples import examples
from tests.helpers.paths import REAL_DATA

DATA = "/entry_1/data_1/data"

Array = npt.NDArray[Any]
Write = Callable[..., str]


def frames(*shape: int, dtype: str = "int16", seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(0, 1000, size=shape)
    return values.astype(dtype)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an HDF5 file: datasets by path."""

    def write_file(datasets: dict[str, Any], name: str = "run.h5", **options: Any) -> str:
        with h5py.File(tmp_path / name, "w") as h5:
            for path, values in datasets.items():
                h5.create_dataset(path, data=values, **(options if np.ndim(values) > 1 else {}))
        return str(tmp_path / name)

    return write_file


def check_pass(source: EventSource, images: Array | list[Array], energies: Any) -> None:
    assert len(source) == len(images)
    events = list(source.events())
    assert [idx for idx, _, _ in events] == list(range(len(images)))
    np.testing.assert_allclose([energy for _, _, energy in events], energies)
    for (_, image, energy), expected in zip(events, images, strict=True):
        assert isinstance(energy, float)
        assert image.dtype == expected.dtype
        np.testing.assert_array_equal(image, expected)
    # Any start gives the same tail.
    for first in range(len(images) + 1):
        assert [idx for idx, _, _ in source.events(first)] == list(range(first, len(images)))
    if events:
        np.testing.assert_array_equal(next(source.events(len(images) - 1))[1], images[-1])


# HDF5 layouts


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", ">i2"])
def test_stacked_panels(write: Write, dtype: str) -> None:
    data = frames(5, 3, 4, 6, dtype=dtype)
    path = write({DATA: data, LCLS_ENERGY: np.arange(5) + 9000.0})
    check_pass(Hdf5Source(path), data, np.arange(5) + 9000.0)


def test_single_panel(write: Write) -> None:
    data = frames(4, 7, 6)
    check_pass(Hdf5Source(write({DATA: data}), photon_energy_ev=8000.0), data, [8000.0] * 4)


def test_slab(write: Write) -> None:
    data = frames(3, 2, 4, 6)
    path = write({DATA: data.reshape(3, 8, 6)}, chunks=(1, 8, 6), compression="gzip")
    check_pass(Hdf5Source(path, photon_energy_ev=8000.0, panel_height=4), data, [8000.0] * 3)


def test_one_dataset_for_each_panel(write: Write) -> None:
    data = frames(3, 2, 4, 6)
    path = write({"/p/b": data[:, 0], "/p/a": data[:, 1]})
    source = Hdf5Source(path, data=["/p/b", "/p/a"], join="panels", photon_energy_ev=8000.0)
    check_pass(source, data, [8000.0] * 3)
    single = Hdf5Source(path, data=["/p/b"], photon_energy_ev=8000.0)
    check_pass(single, data[:, 0], [8000.0] * 3)


@examples(25)
@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))),
    dtype=st.sampled_from(["uint8", "uint16", "int32", "float32", "float64"]),
)
def test_a_slab_gives_the_panels_back(shape: tuple[int, int, int, int], dtype: str) -> None:
    num, panels, height, width = shape
    data = frames(*shape, dtype=dtype)
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "slab.h5")
        with h5py.File(path, "w") as h5:
            h5[DATA] = data.reshape(num, panels * height, width)
        source = Hdf5Source(path, photon_energy_ev=9000.0, panel_height=height)
        check_pass(source, data, [9000.0] * num)


def test_files_follow_each_other(write: Write, tmp_path: Path) -> None:
    data = frames(5, 2, 3, 4)
    write({DATA: data[3:], LCLS_ENERGY: [4.0, 5.0]}, "b.h5")
    write({DATA: data[:3], LCLS_ENERGY: [1.0, 2.0, 3.0]}, "a.h5")
    write({DATA: data[:0], LCLS_ENERGY: np.empty(0)}, "aa.h5")
    check_pass(Hdf5Source(str(tmp_path / "*.h5")), data, [1, 2, 3, 4, 5])
    listed = Hdf5Source([str(tmp_path / "b.h5"), str(tmp_path / "a.h5")])
    check_pass(listed, np.concatenate([data[3:], data[:3]]), [4, 5, 1, 2, 3])


# Photon energies in HDF5


def test_cxi_energy_is_in_joules(write: Write) -> None:
    path = write({DATA: frames(2, 3, 4), CXI_ENERGY: [1.602176634e-15, 1.4e-15]})
    energies = [energy for _, _, energy in Hdf5Source(path).events()]
    assert energies == pytest.approx([10_000.0, 1.4e-15 / 1.602176634e-19])


def test_energy_in_ev_is_preferred_to_cxi_and_may_be_one_number(write: Write) -> None:
    path = write({DATA: frames(2, 3, 4), CXI_ENERGY: 1.0, LCLS_ENERGY: [9000.0]})
    assert [energy for _, _, energy in Hdf5Source(path).events()] == [9000.0, 9000.0]


def test_energy_dataset_by_name_and_unit(write: Write) -> None:
    path = write({DATA: frames(2, 3, 4), "/e": 9.5})
    source = Hdf5Source(path, photon_energy="/e")
    assert [energy for _, _, energy in source.events()] == [9.5, 9.5]
    with h5py.File(path, "a") as h5:
        h5["e"].attrs["units"] = "keV"
    source = Hdf5Source(path, photon_energy="e")
    assert [energy for _, _, energy in source.events()] == [9500.0, 9500.0]
    with h5py.File(path, "a") as h5:
        h5["e"].attrs["units"] = np.bytes_("furlong")
    with pytest.raises(ValueError, match="'furlong'; known units are eV, keV, J"):
        Hdf5Source(path, photon_energy="/e")


def test_an_event_without_energy_is_nan(write: Write, tmp_path: Path) -> None:
    write({DATA: frames(2, 3, 4), LCLS_ENERGY: [9000.0, np.nan]}, "a.h5")
    write({DATA: frames(1, 3, 4)}, "b.h5")
    energies = [energy for _, _, energy in Hdf5Source(str(tmp_path / "*.h5")).events()]
    np.testing.assert_array_equal(energies, [9000.0, np.nan, np.nan])


# What is wrong with an HDF5 configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "/entry/data"},
            r"no dataset '/entry/data'.*\n  /entry_1/data_1/data \(2, 6, 4\)",
        ),
        ({"data": "/entry_1"}, "the group /entry_1 has no frames"),
        ({"data": "/entry_2"}, "no dataset '/entry_2'"),
        ({}, r"no photon energy.*photon_energy_ev.*datasets:\n"),
        ({"photon_energy": "/e"}, r"no dataset '/e'"),
        ({"photon_energy": "/three"}, r"shape \(3,\) for 2 events"),
        ({"photon_energy": "/text"}, "should hold photon energies but has dtype"),
        ({"photon_energy": "/three", "photon_energy_ev": 9000.0}, "not both"),
        ({"photon_energy_ev": -1.0}, "photon energy is -1 eV"),
        ({"photon_energy_ev": 9.5}, r"likely keV \(9500 eV\)"),
        (
            {"photon_energy_ev": 9000.0, "panel_height": 4},
            "6 rows are not a multiple of panel_height=4",
        ),
        ({"photon_energy_ev": 9000.0, "panel_height": 0}, "at least 1"),
        ({"photon_energy_ev": 9000.0, "panel_height": 3, "join": "panels"}, "does not go with"),
        ({"photon_energy_ev": 9000.0, "data": []}, "empty list"),
        (
            {"photon_energy_ev": 9000.0, "data": "/three"},
            r"shape \(3,\); expected \(events, slow, fast\)",
        ),
        ({"photon_energy_ev": 9000.0, "data": "/stack"}, "nothing in the file says"),
        ({"photon_energy_ev": 9000.0, "data": [DATA, "/three"]}, "say with join: events"),
        (
            {"photon_energy_ev": 9000.0, "data": [DATA, "/wide"], "join": "events"},
            "different shapes",
        ),
        ({"photon_energy_ev": 9000.0, "data": [DATA, "/wide"], "join": "panels"}, "different"),
        ({"photon_energy_ev": 9000.0, "data": "/text"}, "expected"),
    ],
)
def test_wrong_configurations_name_the_cause(
    write: Write, options: dict[str, Any], message: str
) -> None:
    path = write(
        {
            DATA: frames(2, 6, 4),
            "/three": [9e3, 8e3, 7e3],
            "/text": [b"a", b"b"],
            "/stack": frames(2, 2, 3, 4),
            "/wide": frames(2, 6, 5),
        }
    )
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Hdf5Source(path, **options)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.h5' is not a file"):
        Hdf5Source(str(tmp_path / "none.h5"))
    with pytest.raises(FileNotFoundError, match=r"\*\.npz' matches no file"):
        NpzSource(str(tmp_path / "*.npz"))
    with pytest.raises(ValueError, match="empty list"):
        NpzSource([])


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be opened as HDF5"):
        Hdf5Source(str(path))
    with pytest.raises(ValueError, match=r"notes\.txt cannot be opened as npz"):
        NpzSource(str(path))


def test_a_file_with_magic_characters_in_its_name_is_meant_literally(tmp_path: Path) -> None:
    path = tmp_path / "run[1].h5"
    path.touch()
    assert resolve_paths(str(path)) == [path]


def test_a_missing_filter_is_named_before_the_run(tmp_path: Path) -> None:
    path = str(tmp_path / "filtered.h5")
    with h5py.File(path, "w") as h5:
        space = h5py.h5s.create_simple((2, 3, 4))
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 3, 4))
        # A number of the range that is left for private use, so nothing can have it installed.
        properties.set_filter(300, h5py.h5z.FLAG_OPTIONAL)
        h5py.h5d.create(h5.id, b"data", h5py.h5t.NATIVE_INT32, space, properties)
    with pytest.raises(ValueError, match=r"filter 300 .*HDF5_PLUGIN_PATH"):
        Hdf5Source(path, data="/data", photon_energy_ev=9000.0)


# Bad records do not end the stream


def test_a_damaged_frame_is_an_image_without_pixels(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    data = frames(4, 2, 30, 40)
    path = write({DATA: data, LCLS_ENERGY: 9000.0}, chunks=(1, 2, 30, 40), compression="gzip")
    with h5py.File(path, "r") as h5:
        chunk = h5[DATA].id.get_chunk_info(1)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    events = list(Hdf5Source(path).events())
    assert [idx for idx, _, _ in events] == [0, 1, 2, 3]
    assert "run.h5: frame 1 is unreadable" in str(events[1][1])
    assert np.isnan(events[1][2])
    assert "frame 1 is unreadable" in caplog.text
    for idx in (0, 2, 3):
        np.testing.assert_array_equal(events[idx][1], data[idx])
        assert events[idx][2] == 9000.0


def test_files_that_vanish_or_shrink_during_the_run(write: Write, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5", "c.h5"):
        write({DATA: frames(3, 4, 6)}, name)
    source = Hdf5Source(str(tmp_path / "*.h5"), photon_energy_ev=8000.0)
    (tmp_path / "a.h5").unlink()
    write({DATA: frames(1, 4, 6)}, "b.h5")
    shapes = [image.shape for _, image, _ in source.events()]
    assert shapes == [()] * 3 + [(4, 6)] + [()] * 2 + [(4, 6)] * 3
    assert [idx for idx, _, _ in source.events(2)] == [2, 3, 4, 5, 6, 7, 8]


# npz


def test_npz_a_file_an_event(tmp_path: Path) -> None:
    data = frames(3, 2, 4, 5, dtype="int32")
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", data=data[i], photon_energy=9000.0 + i)
    check_pass(NpzSource(str(tmp_path / "*.npz")), data, [9000, 9001, 9002])
    check_pass(NpzSource(str(tmp_path / "*.npz"), photon_energy_ev=8500.0), data, [8500.0] * 3)
    check_pass(NpzSource([str(tmp_path / "2.npz")]), data[2:], [9002])


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 4, 5)])
def test_npz_stacked(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = frames(*shape, dtype="uint16")
    energies = np.array([1.0, np.nan, 3.0])
    np.savez_compressed(tmp_path / "a.npz", x=data, photon_energy=energies)
    np.savez(tmp_path / "b.npz", x=data[:2], photon_energy=[4])
    source = NpzSource(str(tmp_path / "?.npz"), key="x", stacked=True)
    expected = np.concatenate([data, data[:2]])
    check_pass(source, expected, [1.0, np.nan, 3.0, 4.0, 4.0])


def test_npz_without_energy_is_nan_if_another_file_has_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=frames(4, 5))
    np.savez(tmp_path / "b.npz", data=frames(4, 5), photon_energy=9000.0)
    energies = [energy for _, _, energy in NpzSource(str(tmp_path / "*.npz")).events()]
    np.testing.assert_array_equal(energies, [np.nan, 9000.0])


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": np.ones((3, 4))}, {}, r"no array 'data'.*arrays:\n  x \(3, 4\) float64"),
        ({"data": np.ones((3, 4))}, {}, "no array 'photon_energy': give photon_energy_ev"),
        ({"data": np.ones((2, 2, 3, 4))}, {"photon_energy_ev": 9000.0}, "set stacked"),
        ({"data": np.ones((3, 4))}, {"stacked": True}, r"expected \(N, P, H, W\)"),
        ({"data": np.array([{}, {}])}, {}, "dtype object"),
        ({"data": np.ones((2, 3, 4)), "photon_energy": [9e3, 8e3]}, {}, r"\(2,\) for 1 events"),
        ({"data": np.ones((3, 4)), "photon_energy": np.array({})}, {}, "unreadable"),
        ({}, {}, "no arrays at all"),
    ],
)
def test_wrong_npz_configurations_name_the_cause(
    tmp_path: Path, arrays: dict[str, Array], options: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        NpzSource(str(tmp_path / "a.npz"), **options)


def test_npz_files_damaged_during_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = frames(4, 30, 40)
    for i in range(4):
        np.savez(tmp_path / f"{i}.npz", data=data[i])
    source = NpzSource(str(tmp_path / "*.npz"), photon_energy_ev=8000.0)
    (tmp_path / "0.npz").unlink()
    raw = (tmp_path / "1.npz").read_bytes()
    (tmp_path / "1.npz").write_bytes(raw[:1000] + b"\x00" * 200 + raw[1200:])
    np.savez(tmp_path / "2.npz", data=data[2][:5])
    events = list(source.events())
    assert [image.shape for _, image, _ in events] == [()] * 3 + [(30, 40)]
    np.testing.assert_array_equal([energy for _, _, energy in events], [np.nan] * 3 + [8000.0])
    assert "1.npz: frame 0 is unreadable: Bad CRC-32" in caplog.text


def test_first_must_lie_in_the_pass(write: Write, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=frames(4, 5))
    for source in (
        Hdf5Source(write({DATA: frames(1, 4, 5)}), photon_energy_ev=9000.0),
        NpzSource(str(tmp_path / "a.npz"), photon_energy_ev=9000.0),
    ):
        for first in (-1, 2):
            with pytest.raises(ValueError, match=r"0 \.\.\. 1"):
                source.events(first)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the example images")
def test_real_images_load() -> None:
    source = NpzSource(str(REAL_DATA / "idx-*.npz"), photon_energy_ev=9763.0)
    assert len(source) >= 2
    for _, image, energy in source.events():
        assert image.shape == (32, 185, 388)
        assert image.dtype == np.int32
        assert energy == 9763.0
