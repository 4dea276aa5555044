"""Static masks: from NumPy's files, HDF5, and CrystFEL geometry files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict.batching import Batcher
from peaknet_predict.module import PeakNetModule
from peaknet_predict.preprocess import read_mask
from peaknet_predict.preprocess.validity import StaticMask
from peaknet_predict.sources import Hdf5Source
from peaknet_predict.types import Event, EventId
from tests.helpers.networks import Bright
from tests.helpers.prediction import chain

MASK = np.zeros((2, 6, 8), np.uint16)
MASK[0, 1, 2], MASK[1, 5, 7] = 1, 4
BAD = MASK != 0


def test_files_of_numpy_and_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "bool.npy", BAD)
    np.save(tmp_path / "float.npy", BAD.astype(np.float32))
    np.savez(tmp_path / "one.npz", anything=MASK)
    np.savez(tmp_path / "two.npz", mask=MASK, gain=np.ones(3))
    with h5py.File(tmp_path / "a.cxi", "w") as file:
        file["entry_1/data_1/mask"] = MASK.reshape(1, 2, 6, 8)
    monkeypatch.setenv("MASKS", str(tmp_path))
    for name in ("bool.npy", "float.npy", "one.npz", "two.npz", "a.cxi:/entry_1/data_1/mask"):
        mask = read_mask(f"$MASKS/{name}")
        assert mask.bad.dtype == np.bool_
        np.testing.assert_array_equal(mask.bad, BAD)
    np.testing.assert_array_equal(read_mask(f"{tmp_path}/one.npz", bad=4).bad, MASK == 4)
    np.testing.assert_array_equal(read_mask(f"{tmp_path}/one.npz", good=1).bad, MASK != 1)


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", ~BAD)
    with pytest.raises(ValueError, match=r"94 of 96 pixels.*mask_good: 1"):
        read_mask(f"{tmp_path}/good.npy")
    np.testing.assert_array_equal(read_mask(f"{tmp_path}/good.npy", good=1).bad, BAD)
    np.save(tmp_path / "half.npy", np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="expected integers or bool"):
        read_mask(f"{tmp_path}/half.npy")
    np.save(tmp_path / "line.npy", np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        read_mask(f"{tmp_path}/line.npy")
    np.savez(tmp_path / "two.npz", a=MASK, b=MASK)
    with pytest.raises(ValueError, match="holds a, b; name the mask 'mask'"):
        read_mask(f"{tmp_path}/two.npz")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["here/mask"] = MASK
    with pytest.raises(ValueError, match="add the dataset.*/here/mask"):
        read_mask(f"{tmp_path}/a.h5")
    with pytest.raises(ValueError, match="has no dataset /there; it has /here/mask"):
        read_mask(f"{tmp_path}/a.h5:/there")
    with pytest.raises(ValueError, match=r"expected a file \.npy"):
        read_mask("mask.tif")
    with pytest.raises(FileNotFoundError):
        read_mask("nowhere.npy")


PANELS = """
; Two panels on top of each other, with units where CrystFEL's examples have them.
clen = 95.3 mm
photon_energy = 4570eV
res = 13333.3
data = /entry_1/data_1/data
dim0 = %
dim1 = ss
dim2 = fs
p0/min_fs = 0.0
p0/max_fs = 7
p0/min_ss = 0
p0/max_ss = 5
p0/fs = +1.0x
p0/ss = y
p0/corner_x = -8
p0/corner_y = 2
p1/min_fs = 0
p1/max_fs = 7
p1/min_ss = 6
p1/max_ss = 11
p1/fs = -x +0.0y
p1/ss = -1.0e0y
p1/corner_x = 8
p1/corner_y = -2
"""


def geometry(tmp_path: Path, more: str = "", panels: str = PANELS) -> StaticMask:
    path = tmp_path / "detector.geom"
    path.write_text(more + panels)
    return read_mask(str(path))


def slab(*marked: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    bad = np.zeros((12, 8), np.bool_)
    for index in marked:
        bad[index] = True
    return bad


def test_a_geometry_without_bad_pixels_has_none(tmp_path: Path) -> None:
    mask = geometry(tmp_path)
    np.testing.assert_array_equal(mask.bad, slab())
    assert (mask.at_least, mask.at_most, mask.values) == (-np.inf, np.inf, ())


def test_regions_edges_and_panels(tmp_path: Path) -> None:
    region = "bad_a/panel = p1\nbad_a/min_fs = 2\nbad_a/max_fs = 3\nbad_a/min_ss = 7\n"
    mask = geometry(tmp_path, region + "bad_a/max_ss = 8 ; inclusive\n")
    np.testing.assert_array_equal(mask.bad, slab(np.s_[7:9, 2:4]))
    # In p0, x is fs - 8 and y is ss + 2; in p1, x is 8 - fs and y is -2 - ss.
    region = (
        "badbeam/min_x = -2.5\nbadbeam/max_x = 1.5\nbadbeam/min_y = -3.5\nbadbeam/max_y = 3.5\n"
    )
    mask = geometry(tmp_path, region)
    np.testing.assert_array_equal(mask.bad, slab(np.s_[0:2, 6:8], np.s_[6:8, 7:8]))
    mask = geometry(tmp_path, "", PANELS + "p0/no_index = 1\np1/mask_edge_pixels = 2\n")
    np.testing.assert_array_equal(
        mask.bad, slab(np.s_[:8, :], np.s_[10:, :], np.s_[:, :2], np.s_[:, 6:])
    )


def test_pixels_of_no_panel_are_bad(tmp_path: Path) -> None:
    mask = geometry(tmp_path, "", PANELS.replace("p1/min_fs = 0", "p1/min_fs = 3"))
    np.testing.assert_array_equal(mask.bad, slab(np.s_[6:, :3]))


def test_masks_in_files_of_their_own(tmp_path: Path) -> None:
    values = np.zeros((12, 8), np.uint16)
    values[1, 1], values[2, 2], values[9, 0] = 1, 2, 5
    with h5py.File(tmp_path / "map.h5", "w") as file:
        file["mask"] = values
        file["good"] = (values == 0)[None].astype(np.uint8)
    bits = "mask = /mask\nmask_file = map.h5\nmask_good = 0x0\nmask_bad = 0x1\n"
    np.testing.assert_array_equal(geometry(tmp_path, bits).bad, (values & 1) != 0)
    bits = f"mask3_data = /good\nmask3_file = {tmp_path}/map.h5\nmask3_goodbits = 1\n"
    np.testing.assert_array_equal(geometry(tmp_path, bits).bad, values != 0)
    bits = "mask = /good\nmask_file = map.h5\nmask_bad = 1\nmask_good = 2\n"
    with pytest.raises(ValueError, match="leaves no pixel: do its bits mean good or bad ones"):
        geometry(tmp_path, bits)
    # In the image files: for the source, not for a static mask.
    bits = "mask = /entry_1/data_1/mask\nmask_bad = 0xffff\n"
    mask = geometry(tmp_path, bits)
    np.testing.assert_array_equal(mask.bad, slab())
    assert mask.in_images == ("mask: /entry_1/data_1/mask, mask_good: 0x0, mask_bad: 0xffff",)


def test_a_mask_in_the_image_files_is_the_sources_and_missed_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("peaknet_predict"), "propagate", True)
    geom, bad = tmp_path / "detector.geom", slab(np.s_[3, 4])
    geom.write_text("mask = /entry_1/data_1/mask\nmask_bad = 0x4\n" + PANELS)
    with h5py.File(tmp_path / "run.cxi", "w") as file:
        file["entry_1/data_1/data"] = np.ones((2, 12, 8), np.int16)
        file["entry_1/data_1/mask"] = 5 * bad.astype(np.uint16) + 1
    options = {"photon_energy_ev": 9500.0, "panel_height": 6}
    given = Hdf5Source(str(tmp_path / "run.cxi"), mask_bad=4, **options)  # type: ignore[arg-type]
    without = Hdf5Source(str(tmp_path / "run.cxi"), mask="none", **options)  # type: ignore[arg-type]
    for source, num_bad, warned in ((given, 1, False), (without, 0, True)):
        caplog.clear()
        module = PeakNetModule(Bright(), chain(), mask=str(geom)).eval()
        batcher = Batcher(2)
        for idx, image, energy in source.events():
            assert not list(batcher.add([Event(EventId("s", 0, idx), image, energy)]))
        (result, _) = module.predict_step(batcher.take(), 0).result().results
        assert result.bad_pixels == num_bad
        for_source = "mask: /entry_1/data_1/mask, mask_good: 0x0, mask_bad: 0x4"
        assert (for_source in caplog.text) == warned


def test_panels_along_a_dimension(tmp_path: Path) -> None:
    panels = PANELS.replace("dim1 = ss\ndim2 = fs", "dim2 = ss\ndim3 = fs")
    panels = panels.replace("p1/min_ss = 6", "p1/min_ss = 0").replace("_ss = 11", "_ss = 5")
    mask = geometry(tmp_path, "", panels + "p0/dim1 = 0\np1/dim1 = 1\np1/no_index = true\n")
    np.testing.assert_array_equal(mask.bad, np.repeat([False, True], 48).reshape(2, 6, 8))


def test_values_that_a_geometry_flags(tmp_path: Path) -> None:
    mask = geometry(tmp_path, "flag_lessthan = -10\nflag_morethan = 65534\nflag_equal = 7\n")
    assert (mask.at_least, mask.at_most, mask.values) == (-10, 65534, (7,))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("bad_a/min_fs = 1\nbad_a/max_fs = 1\n", "bad_a needs min_ and max_ of fs and ss"),
        ("bad_a/min_fs = 1\nbad_a/min_ss = 1\nbad_a/max_ss = 1\n", "bad_a has no max_fs"),
        (
            "".join(f"bad_a/{end}_{scan} = 1\n" for end in ("min", "max") for scan in ("fs", "ss")),
            "bad_a does not say in which panel",
        ),
        (
            "bad_a/panel = p0\nbad_a/min_fs = 1\nbad_a/max_fs = 8\nbad_a/min_ss = 1\n"
            "bad_a/max_ss = 1\n",
            "bad_a reaches beyond panel p0",
        ),
        (
            "bad_a/panel = p7\nbad_a/min_fs = 1\nbad_a/max_fs = 1\nbad_a/min_ss = 1\n"
            "bad_a/max_ss = 1\n",
            "panel p7, which is not described",
        ),
        ("mask = /mask\nmask_file = map.h5\n", "neither good nor bad bits"),
        ("mask = /%/m\nmask_file = map.h5\nmask_bad = 1\n", "only static ones"),
        ("p0/flag_equal = 3\n", "must be those of all panels"),
        ("p0/data = /other\n", "several datasets"),
        ("res: 7\n", "not understood: 'res: 7'"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry(tmp_path, more)


def test_a_mask_of_other_panels_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "map.h5", "w") as file:
        file["mask"] = np.zeros((6, 8), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(6, 8\), and the panels \(12, 8\)"):
        geometry(tmp_path, "mask = /mask\nmask_file = map.h5\nmask_bad = 1\n")
    with pytest.raises(ValueError, match="has bits of its own"):
        read_mask(str(tmp_path / "detector.geom"), good=1)
