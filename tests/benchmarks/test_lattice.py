from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.accuracy import real_shots
from benchmarks.accuracy.detector_geometry import Geometry, read_geometry, simulator_geometry
from benchmarks.accuracy.finders import find, local_snr
from benchmarks.accuracy.lattice import (
    LatticeSearch,
    misorientation_deg,
    symmetry_rotations,
    turned_about_beam,
)
from benchmarks.accuracy.pictures import Assembled, Sheet, draw_circles, stamps, write_png
from peaknet_predict.sources.detector import DetectorReadout, TiledDetector
from peaknet_predict.sources.diffraction import Cell, Crystal, random_rotation
from peaknet_predict.sources.gaussian_spots import GaussianSpots
from peaknet_predict.types import Peaks
from tests.helpers.paths import REAL_DATA

Floats = npt.NDArray[np.float64]

HEXAGONAL: Cell = (93.0, 93.0, 131.0, 90.0, 90.0, 120.0)
TRICLINIC: Cell = (41.0, 52.0, 63.0, 80.0, 100.0, 110.0)
ENERGY_EV = 9500.0
SHAPE_PHW = (4, 256, 256)
PIXEL_M, DISTANCE_M = 150e-6, 0.12
DETECTOR = TiledDetector(*SHAPE_PHW, PIXEL_M, DISTANCE_M)
GEOMETRY = simulator_geometry(*SHAPE_PHW, PIXEL_M, DISTANCE_M)

needs_real_shots = pytest.mark.skipif(
    not list(REAL_DATA.glob("idx-*.npz")), reason=f"no measured shots in {REAL_DATA}"
)


def diffract(cell: Cell, seed: int) -> tuple[Floats, GaussianSpots]:
    """A rotation and the spots of a crystal in it."""
    rng = np.random.default_rng(seed)
    crystal = Crystal(cell, 0.32, 2e-4, 20.0, rng)
    rotation = random_rotation(rng)
    reflections = crystal.diffract(rotation, ENERGY_EV)
    y_M, x_M = DETECTOR.project(reflections.k_out_M3)
    spot, panel, y, x = DETECTOR.to_panels(y_M, x_M, margin=-1.0)
    photons = 400.0 * reflections.intensity_M[spot]
    return rotation, GaussianSpots(panel, y, x, np.full(len(spot), 1.0), photons)


def strong_peaks(spots: GaussianSpots, photons: float = 10.0) -> Peaks:
    strong_M = spots.photons_M > photons
    peaks_M3 = np.stack([spots.panel_M, spots.y_M, spots.x_M], axis=1)[strong_M]
    return np.asarray(peaks_M3, dtype=np.float64)


def search(cell: Cell) -> LatticeSearch:
    return LatticeSearch(cell, max_q=0.2)


def test_vectors_of_planted_peaks_are_lattice_vectors() -> None:
    rotation, spots = diffract(HEXAGONAL, seed=1)
    q_M3 = GEOMETRY.scattering_vectors(strong_peaks(spots), ENERGY_EV)
    hkl_M3 = search(HEXAGONAL).orientation(rotation, q_M3).hkl_M3
    # Off by no more than the excitation error, and all on the Ewald sphere.
    assert np.abs(hkl_M3 - np.rint(hkl_M3)).max() < 0.1
    k_out_M3 = q_M3 + np.array([0, 0, ENERGY_EV / 12398.42])
    np.testing.assert_allclose(np.linalg.norm(k_out_M3, axis=1), ENERGY_EV / 12398.42, rtol=1e-5)


@pytest.mark.parametrize(("cell", "seed"), [(HEXAGONAL, 1), (HEXAGONAL, 2), (TRICLINIC, 3)])
def test_a_known_orientation_is_found_from_planted_peaks(cell: Cell, seed: int) -> None:
    rotation, spots = diffract(cell, seed)
    q_M3 = GEOMETRY.scattering_vectors(strong_peaks(spots), ENERGY_EV)
    found = search(cell).find(q_M3)
    assert len(q_M3) > 20
    assert found.num_indexed > 0.95 * len(q_M3)
    assert misorientation_deg(found.rotation, rotation, cell) < 0.3


def test_a_known_orientation_is_found_from_found_peaks_of_which_a_fifth_are_false() -> None:
    rotation, spots = diffract(HEXAGONAL, seed=5)
    rng = np.random.default_rng(6)
    photons_PHW = np.full(SHAPE_PHW, 1.0)
    spots.add_to(photons_PHW)
    image_PHW = DetectorReadout(SHAPE_PHW, 30.0, 9.0, 1e-4, 1e-4, "float32", rng).read(
        photons_PHW, rng
    )
    (found_M3,) = find(local_snr(), [image_PHW])
    assert found_M3 is not None
    num_false = len(found_M3) // 4
    false_M3 = rng.uniform(0, 1, (num_false, 3)) * np.array([4, 255, 255])
    false_M3[:, 0] = np.floor(false_M3[:, 0])
    q_M3 = GEOMETRY.scattering_vectors(np.concatenate([found_M3, false_M3]), ENERGY_EV)
    verdict = search(HEXAGONAL).judge(q_M3, random_lists=4)
    assert misorientation_deg(verdict.orientation.rotation, rotation, HEXAGONAL) < 0.3
    assert verdict.is_indexed
    # What the lattice says of the peaks is true.
    estimated = real_shots.estimate(verdict.num_peaks, verdict.num_indexed)
    assert estimated == pytest.approx(len(found_M3), abs=0.06 * len(q_M3))


def test_random_peaks_have_no_lattice() -> None:
    _, spots = diffract(HEXAGONAL, seed=7)
    q_M3 = GEOMETRY.scattering_vectors(strong_peaks(spots), ENERGY_EV)
    rng = np.random.default_rng(8)
    turned_M3 = turned_about_beam(q_M3, rng)
    np.testing.assert_allclose(
        np.linalg.norm(turned_M3, axis=1), np.linalg.norm(q_M3, axis=1), rtol=1e-12
    )
    assert not search(HEXAGONAL).judge(turned_M3, random_lists=4).is_indexed


@pytest.mark.parametrize("num", [0, 2])
def test_too_few_peaks_are_not_indexed(num: int) -> None:
    q_M3 = np.full((num, 3), 0.1)
    assert not search(HEXAGONAL).judge(q_M3, random_lists=2).is_indexed


@pytest.mark.parametrize(
    ("cell", "order"),
    [
        (HEXAGONAL, 12),
        ((50.0, 50.0, 50.0, 90.0, 90.0, 90.0), 24),
        ((50.0, 50.0, 80.0, 90.0, 90.0, 90.0), 8),
        ((40.0, 50.0, 80.0, 90.0, 90.0, 90.0), 4),
        ((40.0, 50.0, 80.0, 90.0, 105.0, 90.0), 2),
        (TRICLINIC, 1),
    ],
)
def test_symmetry_of_lattices(cell: Cell, order: int) -> None:
    rotations_R33 = symmetry_rotations(cell)
    assert len(rotations_R33) == order
    product = rotations_R33 @ rotations_R33.transpose(0, 2, 1)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-9)
    rotation = random_rotation(np.random.default_rng(1))
    for symmetry in rotations_R33:
        assert misorientation_deg(rotation, rotation @ symmetry, cell) < 1e-4


def test_an_angle_is_measured() -> None:
    rotation = random_rotation(np.random.default_rng(2))
    turn = np.radians(2.0)
    tilt = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    assert misorientation_deg(rotation, tilt @ rotation, HEXAGONAL) == pytest.approx(2.0)


GEOM = """; two sensors on one image panel, and one on the next
photon_energy = 9800 eV
res = 10000   ; pixels per metre
clen = 0.1
bad_edge/min_fs = 3
a/min_fs = 0
a/max_fs = 9
a/min_ss = 0
a/max_ss = 19
a/fs = +1.0x +0.0y
a/ss = -0.0x +1.0y
a/corner_x = 5
a/corner_y = -7
b/min_fs = 10
b/max_fs = 19
b/min_ss = 0
b/max_ss = 19
b/fs = y
b/ss = -x
b/corner_x = 100
b/corner_y = 0
b/coffset = 0.01
c/min_fs = 0
c/max_fs = 19
c/min_ss = 20
c/max_ss = 39
c/corner_x = 0
c/corner_y = 50
"""


def small_geometry(folder: Path, text: str = GEOM) -> Geometry:
    path = folder / "small.geom"
    path.write_text(text)
    return read_geometry(path, height=20)


def test_a_geometry_file_is_read(tmp_path: Path) -> None:
    geometry = small_geometry(tmp_path)
    assert geometry.photon_energy_ev == 9800.0
    peaks_M3 = np.array([[0, 0, 0], [0, 3, 2], [0, 0, 10], [0, 4, 12], [1, 1, 0], [2, 0, 0.0]])
    expected_px = np.array(
        [
            [5.5, -6.5, 1000],
            [7.5, -3.5, 1000],
            [99.5, 0.5, 1100],
            [95.5, 2.5, 1100],
            [0.5, 51.5, 1000],
            [np.nan] * 3,
        ]
    )
    np.testing.assert_allclose(geometry.positions(peaks_M3) * 1e4, expected_px, rtol=1e-9)


def test_edges_are_those_of_sensors(tmp_path: Path) -> None:
    geometry = small_geometry(tmp_path)
    peaks_M3 = np.array([[0, 10, 9], [0, 10, 10.4], [0, 1, 5], [1, 10, 10.0]])
    np.testing.assert_allclose(geometry.edge_distances_px(peaks_M3), [0, 0.4, 1, 9])
    # Without two pixels on each side, 10x20 becomes 6x16 and 20x20 becomes 16x16.
    assert real_shots.edge_share(geometry) == pytest.approx(1 - (2 * 6 * 16 + 16 * 16) / 800)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a/corner_x = 5\n", "", "a has no corner_x"),
        ("clen = 0.1", "clen = /LCLS/distance", "not a number"),
        ("c/max_ss = 39", "c/max_ss = 45", "spans image panels 1 and 2"),
    ],
)
def test_geometry_files_that_are_not_understood(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        small_geometry(tmp_path, GEOM.replace(old, new))


def test_cell_files(tmp_path: Path) -> None:
    path = tmp_path / "some.cell"
    path.write_text("a = 9.3 nm\nb = 93 A\nc = 131 A\nal = 90 deg\nbe = 90.0 deg\nga = 120 deg\n")
    assert real_shots.read_cell(path) == HEXAGONAL
    path.write_text("a = 93 A\n")
    with pytest.raises(ValueError, match="no line 'b ="):
        real_shots.read_cell(path)


def test_the_photon_energy_is_found() -> None:
    _, spots = diffract(TRICLINIC, seed=9)
    energies = [9100.0, 9300.0, 9500.0, 9700.0]
    peaks_M3 = strong_peaks(spots)
    assert real_shots.best_energy(search(TRICLINIC), GEOMETRY, peaks_M3, energies) == ENERGY_EV


def test_estimated_precision() -> None:
    assert real_shots.estimate(100, 100) == 100
    assert real_shots.estimate(800, 100) == 0
    # 60 on the lattice, and 5 of the 40 others by chance.
    assert real_shots.estimate(100, 65) == pytest.approx(60)


def test_same_places_are_on_the_same_panel() -> None:
    first_M3 = np.array([[0.0, 10, 10], [1, 20, 20]])
    assert real_shots.same_places(first_M3, np.array([[0.0, 11, 10], [0, 20, 20]])) == 1
    assert real_shots.same_places(first_M3, np.empty((0, 3))) == 0


def decoded(path: Path) -> npt.NDArray[np.uint8]:
    """A PNG of filter 0 and one data chunk, as `write_png` makes it."""
    content = path.read_bytes()
    width, height = (int.from_bytes(content[k : k + 4], "big") for k in (16, 20))
    start = content.index(b"IDAT")
    size = int.from_bytes(content[start - 4 : start], "big")
    data = content[start + 4 : start + 4 + size]
    assert zlib.crc32(b"IDAT" + data) == int.from_bytes(content[start + 4 + size :][:4], "big")
    rows = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, 1 + 3 * width)
    return rows[:, 1:].reshape(height, width, 3)


def test_pictures_are_png_files(tmp_path: Path) -> None:
    picture_HW3 = np.zeros((20, 30, 3), dtype=np.uint8)
    draw_circles(picture_HW3, np.array([10.0]), np.array([15.0]), 4.0, (9, 8, 7))
    write_png(tmp_path / "circle.png", picture_HW3)
    read_HW3 = decoded(tmp_path / "circle.png")
    np.testing.assert_array_equal(read_HW3, picture_HW3)
    assert read_HW3[10, 19].tolist() == [9, 8, 7]
    assert not read_HW3[10, 15].any()


def test_circles_lie_about_their_peaks_wherever_the_panel_is(tmp_path: Path) -> None:
    geometry = small_geometry(tmp_path)
    image_PHW = np.zeros((2, 20, 20))
    image_PHW[0, 4, 12] = image_PHW[1, 10, 10] = 100.0
    peaks_M3 = np.array([[0.0, 4, 12], [1, 10, 10]])
    for picture in (Assembled(image_PHW, geometry), Sheet(image_PHW, columns=1)):
        bright = np.argwhere(picture.picture_HW3[..., 0] > 100)
        assert len(bright) == 2
        picture.draw(peaks_M3, 0.0, (0, 255, 1))
        drawn = np.argwhere(picture.picture_HW3[..., 2] == 1)
        np.testing.assert_array_equal(drawn, bright)
    tiles_HW3 = stamps(image_PHW, peaks_M3, columns=2, radius_px=2, zoom=1)
    assert tiles_HW3.shape == (9, 18, 3)
    assert tiles_HW3[2, 2, 0] > 100
    assert tiles_HW3[2, 11, 0] > 100


@needs_real_shots
def test_the_panels_of_the_measured_shots_are_the_geometrys() -> None:
    geometry = read_geometry(REAL_DATA / "thermolysin_cspad.geom", height=185)
    grid = np.indices((32, 185, 388)).reshape(3, -1).T.astype(np.float64)
    assert (geometry.piece_of(grid) >= 0).all()
    assert len(geometry.pieces) == 64


@needs_real_shots
def test_local_snrs_peaks_of_a_measured_shot_are_indexed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A coarser search than usual, which the 49 peaks do not mind.
    monkeypatch.setattr(real_shots, "LatticeSearch", lambda cell, device: LatticeSearch(cell, 0.22))
    words = ["--shots", str(REAL_DATA / "idx-*801.npz"), "--random-lists", "3"]
    words += ["--geometry", str(REAL_DATA / "thermolysin_cspad.geom")]
    words += ["--cell", str(REAL_DATA / "thermolysin.cell"), "--photon-energy-ev", "9790"]
    assert real_shots.main([*words, "--pictures", str(tmp_path / "pictures")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "| LocalSnr |" in line)
    assert row.endswith("| yes |")
    assert {path.name.partition("_")[2] for path in (tmp_path / "pictures").iterdir()} == {
        "assembled.png",
        "panels.png",
        "0_on_lattice.png",
        "0_off_lattice.png",
    }


def test_shots_and_their_geometry_are_chosen_where_a_folder_has_several(tmp_path: Path) -> None:
    for name, shape in (("a-1", (2, 4, 5)), ("a-2", (2, 4, 5)), ("b", (6, 7))):
        np.savez(tmp_path / f"{name}.npz", data=np.zeros(shape))
    with pytest.raises(ValueError, match="choose some by a pattern"):
        real_shots.read_shots(tmp_path)
    assert list(real_shots.read_shots(tmp_path / "a-*.npz")) == ["a-1", "a-2"]
    assert real_shots.read_shots(tmp_path / "b.npz")["b"].shape == (1, 6, 7)
    with pytest.raises(FileNotFoundError, match="has none; name one .* with --geometry"):
        real_shots.only(tmp_path, "*.geom", "--geometry")
    (tmp_path / "one.geom").touch()
    assert real_shots.only(tmp_path / "a-*.npz", "*.geom", "--geometry").name == "one.geom"
    (tmp_path / "two.geom").touch()
    with pytest.raises(FileNotFoundError, match="has one.geom, two.geom; name one"):
        real_shots.only(tmp_path, "*.geom", "--geometry")
