from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peaknet_predict.photon_energy import HC_EV_ANGSTROM
from peaknet_predict.sources import EventSource, Simulator, simulator
from peaknet_predict.sources.detector import (
    PANEL_GAP_PX,
    WATER_RING_Q,
    TiledDetector,
    smooth_scattering,
)
from peaknet_predict.sources.diffraction import (
    Cell,
    Crystal,
    random_rotation,
    reciprocal_basis,
)
from peaknet_predict.sources.gaussian_spots import GaussianSpots

THERMOLYSIN: Cell = (93.0, 93.0, 131.0, 90.0, 90.0, 120.0)
TRICLINIC: Cell = (31.0, 47.0, 58.0, 81.0, 97.0, 104.0)
ENERGY = 9500.0
K = ENERGY / HC_EV_ANGSTROM
K_IN = np.array([0.0, 0.0, K])


def small(**settings: Any) -> Simulator:
    defaults: dict[str, Any] = {"num_events": 40, "panels": 4, "height": 128, "width": 96}
    # A short distance, so that a small detector still sees many reflections.
    defaults |= {"distance_m": 0.02, "cell": TRICLINIC, "peak_width": 5e-4, "hit_fraction": 1.0}
    return Simulator(**(defaults | settings))


def real_axes(cell: Cell) -> npt.NDArray[np.float64]:
    """Rows a, b, c from the metric tensor alone (its Cholesky factor): a along x, b in x-y."""
    a, b, c = cell[:3]
    ca, cb, cg = np.cos(np.radians(cell[3:]))
    metric = np.array(
        [
            [a * a, a * b * cg, a * c * cb],
            [a * b * cg, b * b, b * c * ca],
            [a * c * cb, b * c * ca, c * c],
        ]
    )
    return np.linalg.cholesky(metric)


@pytest.mark.parametrize("cell", [THERMOLYSIN, TRICLINIC])
def test_reciprocal_basis_is_dual_to_the_real_axes(cell: Cell) -> None:
    np.testing.assert_allclose(real_axes(cell) @ reciprocal_basis(cell).T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize(
    "cell", [(93, 93, 131, 90, 90, 200), (1, 1, 1, 30, 30, 90), (0, 1, 1, 90, 90, 90), (1, 2, 3)]
)
def test_impossible_cells_are_refused(cell: Any) -> None:
    with pytest.raises(ValueError, match="cell"):
        Simulator(cell=cell)


def test_a_cell_too_large_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="is it in Angstrom"):
        Simulator(cell=(930, 930, 1310, 90, 90, 120))


def test_rotations_are_proper_and_uniform() -> None:
    rng = np.random.default_rng(1)
    rotations = np.array([random_rotation(rng) for _ in range(4000)])
    products = rotations @ rotations.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0)
    # Each entry of a uniform rotation has mean 0 and mean square 1/3, and so has each rotated axis;
    # the rotation angle has the mean pi/2 + 2/pi.
    np.testing.assert_allclose(rotations.mean(axis=0), 0.0, atol=0.04)
    np.testing.assert_allclose((rotations**2).mean(axis=0), 1 / 3, atol=0.025)
    angles = np.arccos(np.clip((np.trace(rotations, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert angles.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=0.04)


def test_reflections_are_exactly_those_near_the_ewald_sphere() -> None:
    width, max_q = 1e-3, 0.25
    rng = np.random.default_rng(2)
    crystal = Crystal(TRICLINIC, max_q, width, 20.0, rng)
    rotation = random_rotation(rng)
    found = crystal.diffract(rotation, ENERGY)
    np.testing.assert_allclose(np.linalg.norm(found.k_out_M3, axis=1), K)

    expected = set()
    basis = np.linalg.inv(real_axes(TRICLINIC))  # columns a*, b*, c*
    for hkl in np.ndindex(17, 25, 31):
        miller = np.array(hkl) - (8, 12, 15)
        q = rotation @ basis @ miller
        distance = np.linalg.norm(q + K_IN) - K
        if 0 < np.linalg.norm(q) <= max_q and abs(distance) <= 3 * width:
            expected.add(tuple(miller))
    assert len(expected) > 30
    assert {tuple(hkl) for hkl in found.hkl_M3} == expected

    q_M3 = found.hkl_M3 @ basis.T @ rotation.T
    distance_M = np.linalg.norm(q_M3 + K_IN, axis=1) - K
    np.testing.assert_allclose(found.excitation_M, distance_M, atol=1e-12)
    # The ray goes to the point of the sphere that is nearest to the lattice point.
    np.testing.assert_allclose(
        np.linalg.norm(found.k_out_M3 - q_M3 - K_IN, axis=1), np.abs(distance_M), atol=1e-12
    )


def test_structure_factors_belong_to_the_crystal_and_follow_wilson_and_friedel() -> None:
    rng = np.random.default_rng(3)
    crystal = Crystal(TRICLINIC, 0.3, 2e-3, 20.0, rng)
    full: dict[tuple[int, ...], float] = {}
    for _ in range(40):
        found = crystal.diffract(random_rotation(rng), ENERGY)
        q2_M = ((found.hkl_M3 @ reciprocal_basis(TRICLINIC)) ** 2).sum(axis=1)
        partiality_M = np.exp(-0.5 * (found.excitation_M / 2e-3) ** 2)
        # Undo the falloff exp(-2 B (sin(theta) / wavelength)^2) = exp(-B / 2 d^2).
        intensity_M = found.intensity_M / partiality_M * np.exp(20.0 * q2_M / 2)
        for hkl, intensity in zip(found.hkl_M3.tolist(), intensity_M.tolist(), strict=True):
            assert full.setdefault(tuple(hkl), intensity) == pytest.approx(intensity)
    mates = [(i, full[-h, -k, -m]) for (h, k, m), i in full.items() if (-h, -k, -m) in full]
    assert len(mates) > 1000
    np.testing.assert_allclose(*np.array(mates).T)
    values = np.array(list(full.values()))
    assert values.mean() == pytest.approx(1.0, abs=0.05)
    # The acentric distribution's second moment <I^2> / <I>^2.
    assert (values**2).mean() == pytest.approx(2.0, abs=0.2)


def test_planted_peaks_index_in_the_known_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the pixels back to Miller indices, with geometry that is worked out here anew."""
    rotation = random_rotation(np.random.default_rng(4))
    monkeypatch.setattr(simulator, "random_rotation", lambda rng: rotation)
    sim = small(spot_photons=1e5)
    _, energy = sim.event(0)
    peaks = sim.planted_peaks(0).peaks
    assert len(peaks) > 40
    assert set(peaks[:, 0]) == {0, 1, 2, 3}
    k = energy / HC_EV_ANGSTROM
    for panel, y, x in peaks:
        # 2 x 2 panels; their inner edges lie half a gap from the beam, edges half a pixel from
        # the centres of the outermost pixels.
        half_gap = PANEL_GAP_PX / 2
        down = half_gap + 0.5 + y if panel >= 2 else -half_gap - 0.5 - (127 - y)
        right = half_gap + 0.5 + x if panel % 2 else -half_gap - 0.5 - (95 - x)
        ray = np.array([right * 75e-6, down * 75e-6, 0.02])
        q = k * ray / np.linalg.norm(ray) - (0, 0, k)
        hkl = real_axes(TRICLINIC) @ rotation.T @ q
        # A lattice point may be 3 widths off the sphere: as much, times the axis, off an integer.
        np.testing.assert_allclose(hkl, np.rint(hkl), atol=58 * 3 * 5e-4 * 1.01)
        assert np.rint(hkl).any()


def test_events_depend_on_seed_and_number_alone() -> None:
    sim: EventSource = small(num_events=5)
    passes = list(sim.events())
    assert [idx for idx, _, _ in passes] == [0, 1, 2, 3, 4]
    again = small(num_events=30)
    for idx in (3, 0, 4):
        image, energy = again.event(idx)
        np.testing.assert_array_equal(image, passes[idx][1])
        assert energy == passes[idx][2]
    resumed = list(sim.events(first=3))
    assert [idx for idx, _, _ in resumed] == [3, 4]
    np.testing.assert_array_equal(resumed[0][1], passes[3][1])
    np.testing.assert_array_equal(again.planted_peaks(2).peaks, small().planted_peaks(2).peaks)
    assert not np.array_equal(passes[0][1], passes[1][1])
    assert not np.array_equal(small(seed=1).event(0)[0], passes[0][1])


def test_a_simulator_travels_to_another_process() -> None:
    sim = small()
    copy = pickle.loads(pickle.dumps(sim))
    np.testing.assert_array_equal(copy.event(3)[0], sim.event(3)[0])


def test_events_outside_a_pass_are_refused() -> None:
    sim = small(num_events=2)
    assert list(sim.events(first=2)) == []
    with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
        sim.events(first=3)
    with pytest.raises(IndexError, match="event 2"):
        sim.event(2)
    with pytest.raises(IndexError, match="event -1"):
        sim.planted_peaks(-1)


def test_blank_shots_have_no_peaks_and_hits_have_the_asked_share() -> None:
    sim = small(num_events=200, hit_fraction=0.3)
    found = [len(sim.planted_peaks(idx).peaks) for idx in range(len(sim))]
    assert 40 <= np.count_nonzero(found) <= 80
    blank = found.index(0)
    np.testing.assert_array_equal(sim.expected_photons(blank), sim.background_photons)
    assert sim.planted_peaks(blank).peaks.shape == (0, 3)
    assert sim.planted_peaks(blank).snr.shape == (0,)


def test_photon_energy_jitters() -> None:
    sim = small(num_events=400, hit_fraction=0.0, height=4, width=4, photon_energy_jitter=0.01)
    energies = np.array([energy for _, _, energy in sim.events()])
    assert energies.mean() == pytest.approx(9500, abs=20)
    assert energies.std() == pytest.approx(95, rel=0.15)
    assert small(photon_energy_jitter=0.0).event(0)[1] == 9500.0


@pytest.mark.thorough
def test_image_statistics_of_blank_shots() -> None:
    sim = small(num_events=200, hit_fraction=0.0, hot_pixels=0.001, dead_pixels=0.004)
    images = np.stack([image for _, image, _ in sim.events()]).reshape(200, -1)
    assert images.dtype == np.float32
    dead = (images == 0).all(axis=0)
    assert dead.sum() == round(0.004 * dead.size)
    hot = images.mean(axis=0) > 50 * 30
    assert hot.sum() == round(0.001 * hot.size)
    good = ~dead & ~hot
    background = sim.background_photons.reshape(-1)
    residual = (images / 30.0 - background)[:, good]
    sigma = np.sqrt(background + (9 / 30) ** 2)[good]
    assert residual.mean() == pytest.approx(0.0, abs=5 * sigma.mean() / np.sqrt(residual.size))
    pulls = residual / sigma
    assert pulls.var() == pytest.approx(1.0, abs=0.01)
    # Neither neighbouring pixels nor consecutive events are correlated.
    assert abs((pulls[1:] * pulls[:-1]).mean()) < 0.003
    assert abs((pulls[:, 1:] * pulls[:, :-1]).mean()) < 0.003


def test_snr_and_centres_agree_with_the_noise_free_image() -> None:
    sim = small(spot_photons=2000.0, panels=2, gain_adu_per_photon=10.0, readout_noise_adu=4.0)
    compared = 0
    for idx in range(12):
        planted = sim.planted_peaks(idx)
        background = sim.background_photons
        signal = sim.expected_photons(idx) - background
        noise = np.sqrt(background + 0.4**2)
        for (panel, y, x), snr in zip(planted.peaks, planted.snr, strict=True):
            p, iy, ix = int(panel), round(y), round(x)
            others = planted.peaks[planted.peaks[:, 0] == panel]
            apart = np.abs(others[:, 1:] - (y, x)).max(axis=1)
            # Isolated spots: others, and those too weak to be planted, must not add to the height.
            if np.sort(apart)[:2][-1] < 16 or snr < 20 or not (7 <= iy < 121 and 7 <= ix < 89):
                continue
            window = signal[p, iy - 5 : iy + 6, ix - 5 : ix + 6]
            assert window.max() == window[5, 5]
            assert (signal / noise)[p, iy, ix] == pytest.approx(snr, rel=0.02)
            offsets = np.arange(-5, 6)
            centre_y = iy + (window.sum(axis=1) * offsets).sum() / window.sum()
            centre_x = ix + (window.sum(axis=0) * offsets).sum() / window.sum()
            assert (centre_y, centre_x) == pytest.approx((y, x), abs=0.1)
            compared += 1
    assert compared > 15


def test_planted_peaks_are_inside_and_visible() -> None:
    sim = small(spot_photons=1e4)
    for idx in range(10):
        planted = sim.planted_peaks(idx)
        assert planted.peaks.dtype == np.float64
        assert planted.peaks.shape == (len(planted.snr), 3)
        panel, y, x = planted.peaks.T
        assert panel.min() >= 0
        assert panel.max() <= 3
        assert y.min() >= 1
        assert y.max() <= 126
        assert x.min() >= 1
        assert x.max() <= 94
        assert planted.snr.min() >= 1


def test_default_settings_give_a_usual_serial_experiment() -> None:
    sim = Simulator(hit_fraction=1.0)
    planted = [sim.planted_peaks(idx) for idx in range(40)]
    assert 20 <= np.median([np.count_nonzero(p.snr >= 8) for p in planted]) <= 80
    snr = np.concatenate([p.snr for p in planted])
    assert np.mean((snr > 3) & (snr < 50)) > 0.5
    image, _ = sim.event(0)
    assert image.shape == (4, 512, 512)
    assert image.dtype == np.float32


def test_integer_images_are_the_float_image_rounded() -> None:
    image = small(spot_photons=1e6).event(0)[0]
    rounded = np.rint(image).astype(np.int64)
    as_int32 = small(spot_photons=1e6, dtype="int32").event(0)[0]
    assert as_int32.dtype == np.int32
    np.testing.assert_array_equal(as_int32, rounded)
    as_uint16 = small(spot_photons=1e6, dtype="uint16").event(0)[0]
    assert as_uint16.dtype == np.uint16
    assert rounded.min() < 0
    assert rounded.max() > 65535
    np.testing.assert_array_equal(as_uint16, np.clip(rounded, 0, 65535))


def test_int32_saturates_instead_of_wrapping() -> None:
    image = small(background=1e3, gain_adu_per_photon=1e8, dtype="int32").event(0)[0]
    assert image.max() == 2**31 - 128  # the largest float32 below 2**31
    assert image.min() >= 0


def test_spots_conserve_photons_and_are_cut_at_the_edge() -> None:
    one = np.array([1.0])
    panel = np.array([1])
    image = np.zeros((2, 40, 30))
    GaussianSpots(panel, 20.3 * one, 15.7 * one, 1.5 * one, 100 * one).add_to(image)
    assert image[1].sum() == pytest.approx(100.0, rel=1e-4)
    assert image[0].sum() == 0.0
    image[:] = 0.0
    # Centred half a pixel outside row 0: the rows inside hold half of it.
    GaussianSpots(panel, -0.5 * one, 15.0 * one, 1.0 * one, 100 * one).add_to(image)
    assert image.sum() == pytest.approx(50.0, rel=1e-3)
    image[:] = 0.0
    # Two spots in one place add up.
    two = np.ones(2)
    GaussianSpots(np.array([0, 0]), 5 * two, 5 * two, two, 50 * two).add_to(image)
    assert image[0].sum() == pytest.approx(100.0, rel=1e-4)
    GaussianSpots.none().add_to(image)


@pytest.mark.parametrize("panels", [1, 2, 3, 5, 32])
def test_panels_do_not_overlap_and_points_find_their_panel(panels: int) -> None:
    detector = TiledDetector(panels, 20, 30, 1e-4, 0.1)
    x_PHW, y_PHW, z_PHW = detector.unit_vectors()
    rays = np.stack([x_PHW, y_PHW, z_PHW], axis=-1).reshape(-1, 3)
    y, x = detector.project(3.0 * rays)
    assert len(set(zip(y.round(6), x.round(6), strict=True))) == panels * 20 * 30
    point, panel, py, px = detector.to_panels(y, x, margin=0.25)
    np.testing.assert_array_equal(np.sort(point), np.arange(panels * 600))
    np.testing.assert_allclose(panel * 600 + py * 30 + px, point, atol=1e-6)
    # The furthest pixel is where the largest angle says.
    assert np.arccos(z_PHW.min()) == pytest.approx(detector.max_two_theta())


def test_rays_backwards_miss_the_detector() -> None:
    detector = TiledDetector(1, 20, 30, 1e-4, 0.1)
    y, x = detector.project(np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
    assert len(detector.to_panels(y, x, margin=1.0)[0]) == 0


def test_smooth_scattering_has_the_water_ring_at_its_angle() -> None:
    detector = TiledDetector(1, 801, 801, 1e-4, 0.08)
    wavelength = 1.3
    flat = smooth_scattering(detector, wavelength, 3.0, 0.0)[0]
    assert flat[400, 400] == pytest.approx(3.0)
    # Along y the horizontal polarisation takes nothing away; along x it takes sin^2(2 theta).
    two_theta = np.arctan(0.04 / 0.08)
    assert flat[800, 400] == pytest.approx(3.0 * np.cos(two_theta) ** 3)
    assert flat[400, 800] == pytest.approx(3.0 * np.cos(two_theta) ** 5)
    ring = smooth_scattering(detector, wavelength, 3.0, 10.0)[0] - flat
    along_y = ring[400:, 400] / (flat[400:, 400] / 3.0)
    crest = np.arctan(np.argmax(along_y) * 1e-4 / 0.08)
    assert 2 * np.sin(crest / 2) / wavelength == pytest.approx(WATER_RING_Q, abs=0.001)
    assert along_y.max() == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"panels": 0}, "panels must be at least 1; got 0"),
        ({"num_events": -1}, "num_events must be 0 or more"),
        ({"distance_m": 0.0}, "distance_m must be positive"),
        ({"photon_energy_ev": float("nan")}, "photon energy is nan eV"),
        ({"photon_energy_ev": 9.5}, "likely keV"),
        ({"hit_fraction": 1.5}, "hit_fraction must be between 0 and 1"),
        ({"hot_pixels": 0.6, "dead_pixels": 0.6}, "hot_and_dead_pixels"),
        ({"photon_energy_jitter": 0.5}, "photon_energy_jitter"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_the_command_line_can_read_the_constructor() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Simulator, "source")
    config = parser.parse_args(["--source.panels=1", "--source.cell=[80,80,38,90,90,90]"])
    assert parser.instantiate(config).source.event(0)[0].shape == (1, 512, 512)
