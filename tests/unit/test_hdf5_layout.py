"""What the HDF5 source takes datasets, axes and energies for, and what it refuses as ambiguous."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.photon_energy import HC_EV_ANGSTROM, JOULES_PER_EV
from peaknet_predict.sources import Hdf5Source
from peaknet_predict.sources.energies import to_ev
from tests.helpers.examples import examples

CXI = "/entry_1/data_1/data"
Array = npt.NDArray[Any]
Write = Callable[..., str]


def frames(*shape: int) -> Array:
    return np.random.default_rng(1).integers(0, 1000, size=shape).astype(np.int32)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write an HDF5 file: datasets, links and virtual layouts by path."""

    def write_file(items: dict[str, Any], name: str = "run.h5", **attributes: Any) -> str:
        with h5py.File(tmp_path / name, "w") as h5:
            for path, value in items.items():
                h5[path] = value
            for where, value in attributes.items():
                path, _, key = where.rpartition("__")
                h5[path.replace("_S_", "/") or "/"].attrs[key] = value
        return str(tmp_path / name)

    return write_file


def read(source: Hdf5Source) -> Array:
    return np.stack([image for _, image, _ in source.events()])


def energies(source: Hdf5Source) -> list[float]:
    return [energy for _, _, energy in source.events()]


# Several datasets


def test_paths_that_lead_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "circle.h5", "w") as h5:
        entry = h5.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        h5.attrs["default"] = entry.attrs["default"] = "/entry"
        entry["top"] = h5["/"]
        for name, target in (("self", "/entry"), ("a", "/entry/b"), ("b", "/entry/a")):
            entry[name] = h5py.SoftLink(target)
        entry["x"] = h5py.ExternalLink("circle.h5", "/entry/x")
        entry["counts"] = np.ones(3)
    with pytest.raises(ValueError, match=r"no frames at a usual place.*\n.*\n  /entry/b -> "):
        Hdf5Source(str(tmp_path / "circle.h5"), photon_energy_ev=9500.0)
    with pytest.raises(ValueError, match="leads in a circle"):
        Hdf5Source(str(tmp_path / "circle.h5"), data="/entry/a", photon_energy_ev=9500.0)


def test_a_list_of_datasets_needs_a_word_on_how_they_belong_together(write: Write) -> None:
    a, b = frames(3, 4, 8), frames(3, 4, 8) + 1
    path = write({"a": a, "b": b, "c": b[:2]})
    with pytest.raises(ValueError, match="join: events that their events follow.*join: panels"):
        Hdf5Source(path, data=["a", "b"], photon_energy_ev=9e3)
    one_after_the_other = Hdf5Source(path, data=["a", "c"], join="events", photon_energy_ev=9e3)
    np.testing.assert_array_equal(read(one_after_the_other), np.concatenate([a, b[:2]]))
    side_by_side = Hdf5Source(path, data=["a", "b"], join="panels", photon_energy_ev=9e3)
    np.testing.assert_array_equal(read(side_by_side), np.stack([a, b], axis=1))
    with pytest.raises(ValueError, match="as many events"):
        Hdf5Source(path, data=["a", "c"], join="panels", photon_energy_ev=9e3)


@pytest.fixture
def master(tmp_path: Path) -> Path:
    """A DECTRIS master without any class or signal, and its three data files."""
    with h5py.File(tmp_path / "m_master.h5", "w") as h5:
        for k in (1, 2, 3):
            with h5py.File(tmp_path / f"m_data_{k:06d}.h5", "w") as file:
                file["entry/data/data"] = np.full((3, 4, 8), k, "u4")
            link = h5py.ExternalLink(f"m_data_{k:06d}.h5", "/entry/data/data")
            h5[f"entry/data/data_{k:06d}"] = link
        h5["entry/instrument/detector/detectorSpecific/photon_energy"] = 12398.0
    return tmp_path / "m_master.h5"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, [1] * 3 + [2] * 3 + [3] * 3),
        ("/entry/data", [1] * 3 + [2] * 3 + [3] * 3),
        (["entry/data/data_000001", "/entry/data/data_000002"], [1] * 3 + [2] * 3),
        ("/entry/data/data_000002", [2] * 3),
    ],
)
def test_the_pieces_of_a_dectris_series_are_events(
    master: Path, data: Any, expected: list[int]
) -> None:
    source = Hdf5Source(str(master), data=data)
    assert [image.shape for _, image, _ in source.events()] == [(4, 8)] * len(expected)
    assert read(source)[:, 0, 0].tolist() == expected
    assert [int(image[0, 0]) for _, image, _ in source.events(2)] == expected[2:]
    assert set(energies(source)) == {12398.0}


def test_the_pieces_of_a_dectris_series_are_not_panels(master: Path) -> None:
    names = [f"/entry/data/data_{k:06d}" for k in (1, 2, 3)]
    with pytest.raises(ValueError, match="not panels"):
        Hdf5Source(str(master), data=names, join="panels")


def test_a_data_file_that_is_gone_is_named_and_left_out_only_on_request(master: Path) -> None:
    (master.parent / "m_data_000002.h5").unlink()
    with pytest.raises(ValueError, match=r"data_000002 is a link to .*m_data_000002\.h5 is not th"):
        Hdf5Source(str(master))
    source = Hdf5Source(str(master), skip_unreadable=True)
    assert read(source)[:, 0, 0].tolist() == [1] * 3 + [3] * 3
    (lost,) = source.skipped
    assert "m_data_000002.h5" in lost.reason
    assert lost.events is None
    with h5py.File(master, "r+") as h5:
        h5["entry/instrument/detector/detectorSpecific/nimages"] = 9
        h5["entry/instrument/detector/detectorSpecific/ntrigger"] = 1
    (lost,) = Hdf5Source(str(master), skip_unreadable=True).skipped
    assert lost.events == 3
    with h5py.File(master, "r+") as h5:
        del h5["entry/data/data_000002"]
    with pytest.raises(ValueError, match="has no /entry/data/data_000002"):
        Hdf5Source(str(master))


def test_a_master_that_announces_more_images_than_there_are(
    master: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(master, "r+") as h5:
        h5["entry/instrument/detector/detectorSpecific/nimages"] = 10
        h5["entry/instrument/detector/detectorSpecific/ntrigger"] = 2
    assert len(Hdf5Source(str(master))) == 9
    assert "m_master.h5 announces 20 images, and 9 are there" in caplog.text


def test_a_data_file_that_goes_during_the_run_takes_only_its_own_events(master: Path) -> None:
    source = Hdf5Source(str(master))
    (master.parent / "m_data_000002.h5").write_bytes(b"no more")
    got = [image for _, image, _ in source.events()]
    assert [image.ndim for image in got] == [2] * 3 + [0] * 3 + [2] * 3
    assert "m_data_000002.h5 cannot be opened as HDF5" in str(got[3])


def test_a_glob_of_masters_and_data_files_would_read_events_twice(master: Path) -> None:
    with pytest.raises(ValueError, match=r"m_data_000001\.h5 is named, and .* links to it"):
        Hdf5Source(str(master.parent / "*.h5"), data="/entry/data", photon_energy_ev=12398.0)
    with pytest.raises(ValueError, match="is named twice"):
        Hdf5Source([str(master), str(master.parent / "*_master.h5")])


# Axes of one dataset


def test_a_single_frame_is_an_event(write: Write) -> None:
    data = frames(6, 8)
    path = write({"d": data, "LCLS/photon_energy_eV": 9000.0})
    np.testing.assert_array_equal(read(Hdf5Source(path, data="d")), data[None])
    slab = read(Hdf5Source(path, data="d", panel_height=3))
    np.testing.assert_array_equal(slab, data.reshape(1, 2, 3, 8))


def test_four_axes_outside_cxi_are_ambiguous(write: Write) -> None:
    data = frames(3, 2, 4, 8)
    path = write({"entry/data/data": data, CXI: data})
    with pytest.raises(ValueError, match=r"axes: \[events, panels, slow, fast\].*threshold: 1"):
        Hdf5Source(path, data="entry/data/data", photon_energy_ev=9e3)
    options: dict[str, Any] = {"data": "entry/data/data", "photon_energy_ev": 9e3}
    for threshold in (1, 2):
        chosen = read(Hdf5Source(path, threshold=threshold, **options))
        np.testing.assert_array_equal(chosen, data[:, threshold - 1])
    panels = Hdf5Source(path, axes=["events", "panels", "slow", "fast"], **options)
    np.testing.assert_array_equal(read(panels), data)
    np.testing.assert_array_equal(read(Hdf5Source(path, photon_energy_ev=9e3)), data)


@examples(40)
@given(st.permutations(["events", "panels", "thresholds", "slow", "fast"]), st.data())
def test_axes_in_any_order(order: list[str], data: st.DataObject) -> None:
    import tempfile

    kept = [a for a in order if a in ("slow", "fast") or data.draw(st.booleans())]
    sizes = {"events": 3, "panels": 2, "thresholds": 2, "slow": 4, "fast": 5}
    stored = frames(*(sizes[axis] for axis in kept))
    chunks = tuple(data.draw(st.integers(1, n)) for n in stored.shape)
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(f"{folder}/a.h5", "w") as h5:
            h5.create_dataset("d", data=stored, chunks=chunks)
        threshold = 2 if "thresholds" in kept else None
        source = Hdf5Source(
            f"{folder}/a.h5", data="d", axes=kept, threshold=threshold, photon_energy_ev=9e3
        )
        got = read(source)
    if threshold is not None:
        stored = stored.take(1, axis=kept.index("thresholds"))
        kept.remove("thresholds")
    wanted = [axis for axis in ("events", "panels", "slow", "fast") if axis in kept]
    expected = stored.transpose([kept.index(axis) for axis in wanted])
    np.testing.assert_array_equal(got, expected if "events" in kept else expected[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ["events", "slow"]}, "needs slow and fast"),
        ({"axes": ["events", "rows", "slow", "fast"]}, "needs slow and fast, and may have"),
        ({"axes": ["slow", "fast"]}, "axes names 2"),
        ({"axes": ["events", "thresholds", "slow", "fast"]}, "choose one, e.g. threshold: 1"),
        ({"threshold": 3}, "has no threshold 3; it has 1 to 2"),
        ({"threshold": 0}, "has no threshold 0"),
        ({"threshold": 1, "data": "three"}, "no threshold to choose"),
        ({"data": "five"}, "Say with the option axes"),
    ],
)
def test_what_the_user_says_must_fit(write: Write, options: dict[str, Any], message: str) -> None:
    path = write({"d": frames(3, 2, 4, 8), "three": frames(3, 4, 8), "five": frames(1, 2, 3, 4, 5)})
    with pytest.raises(ValueError, match=message):
        Hdf5Source(path, **{"data": "d", "photon_energy_ev": 9e3, **options})


def test_thresholds_are_known_by_the_names_of_channels(write: Write) -> None:
    data = frames(3, 2, 4, 8)
    path = write(
        {"entry/data/data": data, "entry/data/channel": [b"threshold_2", b"difference"]},
        entry__NX_class=b"NXentry",
        entry_S_data__NX_class="NXdata",
        entry_S_data__signal="data",
        entry_S_data__axes=["image_id", "channel", ".", "."],
    )
    with pytest.raises(ValueError, match=r"2 thresholds \(threshold_2, difference\); choose one"):
        Hdf5Source(path, photon_energy_ev=9e3)
    with pytest.raises(ValueError, match="no threshold 1; it has threshold_2, difference"):
        Hdf5Source(path, photon_energy_ev=9e3, threshold=1)
    chosen = read(Hdf5Source(path, photon_energy_ev=9e3, threshold=2))
    np.testing.assert_array_equal(chosen, data[:, 0])


@pytest.mark.parametrize("said", ["experiment_identifier:module_identifier:y:x", None])
def test_the_axes_of_a_cxi_file(write: Write, said: str | None) -> None:
    data = frames(3, 2, 4, 8)
    attributes = {} if said is None else {"entry_1_S_data_1_S_data__axes": np.bytes_(said)}
    path = write({CXI: data}, **attributes)
    np.testing.assert_array_equal(read(Hdf5Source(path, photon_energy_ev=9e3)), data)


def test_panels_without_events_are_one_event(write: Write) -> None:
    data = frames(2, 4, 8)
    path = write({CXI: data}, entry_1_S_data_1_S_data__axes="module_identifier:y:x")
    np.testing.assert_array_equal(read(Hdf5Source(path, photon_energy_ev=9e3)), data[None])


# Where frames are found


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("way", ["default", "signal", "old"])
def test_the_signal_of_a_nexus_file(write: Write, as_bytes: bool, way: str) -> None:
    def word(text: str) -> Any:
        return np.bytes_(text) if as_bytes else text

    data = frames(3, 4, 8)
    attributes = {"scan__NX_class": word("NXentry"), "scan_S_plot__NX_class": word("NXdata")}
    if way == "default":
        attributes |= {"__default": word("scan"), "scan__default": word("plot")}
        # Another plot that could be meant, but for `default`.
        attributes |= {"scan_S_other__NX_class": word("NXdata"), "scan_S_other__signal": word("x")}
    if way == "old":
        attributes["scan_S_plot_S_images__signal"] = 1
    else:
        attributes["scan_S_plot__signal"] = word("images")
    items = {"scan/plot/images": data, "scan/other/x": frames(3, 4, 4)}
    source = Hdf5Source(write(items, **attributes), photon_energy_ev=9e3)
    np.testing.assert_array_equal(read(source), data)


def test_several_sets_of_frames_are_ambiguous(write: Write) -> None:
    path = write(
        {"entry/a/data": frames(3, 4, 8), "entry/b/data": frames(3, 4, 8)},
        entry_S_a__NX_class="NXdata",
        entry_S_b__NX_class="NXdata",
    )
    with pytest.raises(ValueError, match=r"several sets of frames \(/entry/a/data; /entry/b/data"):
        Hdf5Source(path, photon_energy_ev=9e3)
    with pytest.raises(ValueError, match="no frames at a usual place; name the dataset"):
        Hdf5Source(write({"d": frames(3, 4, 8)}, "other.h5"), photon_energy_ev=9e3)


# Photon energies

UNITS = ("eV", "EV", "ev", "keV", "KEV", "J", "joules", "Angstrom", "ANGSTROM", "Å", "nm", "m", "M")


@examples(100)
@given(st.floats(200, 150_000), st.sampled_from(UNITS))
def test_units_in_any_case(energy: float, unit: str) -> None:
    wavelength = HC_EV_ANGSTROM / energy
    value = {
        "ev": energy,
        "kev": energy / 1e3,
        "j": energy * JOULES_PER_EV,
        "joules": energy * JOULES_PER_EV,
        "angstrom": wavelength,
        "å": wavelength,
        "nm": wavelength / 10,
        "m": wavelength * 1e-10,
    }[unit.casefold()]
    assert to_ev(np.array([value]), unit, "here") == pytest.approx([energy])


@pytest.mark.parametrize("unit", ["angstrom", b"Angstrom", np.array([b"ANGSTROM"]), ["angstrom"]])
def test_a_unit_may_be_text_bytes_or_an_array_of_either(write: Write, unit: Any) -> None:
    path = write({CXI: frames(2, 4, 8), "w": [1.0, 1.25]}, w__units=unit)
    got = energies(Hdf5Source(path, photon_energy="w"))
    assert got == pytest.approx([HC_EV_ANGSTROM, HC_EV_ANGSTROM / 1.25])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (9000.0, [9000.0] * 3),
        ([[9000.0], [9001.0], [9002.0]], [9000.0, 9001.0, 9002.0]),
        ([[9000.0, 9001.0, 9002.0]], [9000.0, 9001.0, 9002.0]),
        ([9000.0, 9001.0, 9002.0, 0.0, np.nan], [9000.0, 9001.0, 9002.0]),
        ([9000.0] * 7, [9000.0] * 3),
        ([9000.0, 9001.0, 9002.0, 9003.0], None),
        ([9000.0, 9001.0], None),
        ([[9000.0, 1.0], [9001.0, 1.0], [9002.0, 1.0]], None),
    ],
)
def test_tables_of_photon_energies(write: Write, table: Any, expected: list[float] | None) -> None:
    path = write({CXI: frames(3, 4, 8), "LCLS/photon_energy_eV": table})
    if expected is not None:
        assert energies(Hdf5Source(path)) == expected
        return
    with pytest.raises(ValueError, match="not clear which event has which photon energy"):
        Hdf5Source(path)


@pytest.mark.parametrize(
    ("name", "value", "likely", "unit"),
    [
        ("LCLS/photon_energy_eV", 9.5, "likely keV (9500 eV)", "keV"),
        ("LCLS/photon_wavelength_A", 1.305, "wavelength in angstrom (9501 eV)", "angstrom"),
        ("entry_1/instrument_1/source_1/energy", 9500.0, "eV taken for joules (9500 eV)", "eV"),
        ("energy_joules", 1.52e-15, "likely joules (9487 eV)", "J"),
        ("wavelength_m", 1.3e-10, "likely a wavelength in metres (9537 eV)", "m"),
    ],
)
def test_an_energy_in_another_unit_is_refused_before_the_run(
    write: Write, name: str, value: float, likely: str, unit: str
) -> None:
    path = write({CXI: frames(2, 4, 8), name: value})
    source = Hdf5Source(path, photon_energy=name)
    with pytest.raises(ValueError, match="say with photon_energy_unit") as refusal:
        source.check()
    assert likely in str(refusal.value)
    fixed = Hdf5Source(path, photon_energy=name, photon_energy_unit=unit)
    fixed.check()
    assert 9000 < energies(fixed)[0] < 10_000


def test_an_unset_energy_gives_way_to_the_next_place(write: Write) -> None:
    path = write(
        {
            CXI: frames(2, 4, 8),
            "LCLS/photon_energy_eV": [0.0, 0.0],
            "entry_1/instrument_1/source_1/energy": 9500 * JOULES_PER_EV,
        }
    )
    assert energies(Hdf5Source(path)) == pytest.approx([9500.0, 9500.0])


def test_events_without_a_plausible_energy_among_others_are_left_to_be_refused(
    write: Write,
) -> None:
    path = write({CXI: frames(3, 4, 8), "LCLS/photon_energy_eV": [9000.0, 0.0, 9.0]})
    source = Hdf5Source(path)
    source.check()
    assert energies(source) == [9000.0, 0.0, 9.0]
