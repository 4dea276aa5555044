"""Simulated shots for training: physics, labels, randomness, and that everything occurs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from peaknet_predict.simulation.backgrounds import Background, draw_background
from peaknet_predict.simulation.cameras import LONGEST_AXIS, PIXEL_UM, Cameras, draw_cameras
from peaknet_predict.simulation.defects import bad_blocks, bad_lines, defects, tracks
from peaknet_predict.simulation.draws import Band, Domain, Draws, stream_seed
from peaknet_predict.simulation.electronics import (
    GAIN_ADU,
    HELD_OUT_STEPS_ADU,
    NOISE_PHOTONS,
    STEP_ADU,
    Electronics,
    MeasuredFrames,
    draw_electronics,
    read_out,
    share_charge,
)
from peaknet_predict.simulation.labels import (
    BACKGROUND,
    IGNORED,
    MIN_DISTANCE,
    PEAK,
    Merged,
    disc_radius,
    draw_labels,
    merge_spots,
)
from peaknet_predict.simulation.lattices import draw_axes, find_reflections
from peaknet_predict.simulation.shots import LabelledShots, ShotSimulator
from peaknet_predict.simulation.spot_shapes import Shapes, render
from peaknet_predict.simulation.tiles import GAP_PX, TILE_PX, Tiling, draw_tiling
from peaknet_predict.simulation.truth import Scene, judge, label
from tests.helpers.examples import examples

CPU = torch.device("cpu")
DOMAINS: tuple[Domain, Domain] = ("training", "held_out")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sample() -> list[LabelledShots]:
    """A few hundred small events."""
    simulator = ShotSimulator(1, 96, 96, hit_fraction=0.7, seed=11)
    return [simulator.shots(index, 64, CPU) for index in range(6)]


def components(labels_HW: Tensor) -> np.ndarray:
    """Return the (y, x) centroids of the 8-connected peaks, (M, 2)."""
    numbered, count = ndimage.label(labels_HW.numpy() == PEAK, np.ones((3, 3)))
    centres = ndimage.center_of_mass(numbered > 0, numbered, range(1, count + 1))
    return np.array(centres).reshape(-1, 2)


def peaks_at(*places: tuple[float, float]) -> Tensor:
    return torch.tensor([[0.0, 0.0, y, x] for y, x in places])


def spots_at(*spots: tuple[float, float, float, float]) -> Merged:
    """Return spots of panel 0, each y, x, photons, sigma."""
    y, x, photons, sigma = torch.tensor(spots).unbind(1)
    panel = torch.zeros(len(spots), dtype=torch.int64)
    return Merged(panel, y, x, photons, sigma, torch.zeros(len(spots), dtype=torch.bool))


# --- random numbers -------------------------------------------------------------------------------


def test_streams_are_independent_in_every_word() -> None:
    seeds = {stream_seed(a, b, c) for a in range(20) for b in range(20) for c in range(2)}
    assert len(seeds) == 800
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 800, "CPU generators take 32 bits of them"
    flipped = [bin(stream_seed(7, i) ^ stream_seed(7, i + 1)).count("1") for i in range(500)]
    assert np.mean(flipped) == pytest.approx(31.5, abs=1.0)


@pytest.mark.parametrize("mean", [0.05, 3.0, 400.0])
def test_poisson_mean_and_variance(mean: float) -> None:
    counts = Draws(CPU, 1).poisson(torch.full((200_000,), mean)).double()
    assert counts.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(mean / 2e5))
    spread = math.sqrt((mean + 2 * mean**2) / 2e5)
    assert counts.var().item() == pytest.approx(mean, abs=5 * spread)


@pytest.mark.parametrize("band", [PIXEL_UM, LONGEST_AXIS, TILE_PX, GAP_PX, GAIN_ADU, NOISE_PHOTONS])
def test_training_never_draws_what_is_held_out(band: Band) -> None:
    draws = Draws(CPU, 2)
    seen = draws.band(20_000, band=band, domain="training")
    held_out = draws.band(20_000, band=band, domain="held_out")
    assert band.low * 0.999 <= seen.min() <= band.low * 1.05
    assert band.high * 0.95 <= seen.max() <= band.high * 1.001
    inside = (seen > band.hole_low * 1.001) & (seen < band.hole_high * 0.999)
    assert not inside.any()
    assert (held_out >= band.hole_low * 0.999).all()
    assert (held_out <= band.hole_high * 1.001).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_events_use_their_domain(domain: Domain) -> None:
    cameras = draw_cameras(Draws(CPU, 3), 300, 1, 64, 64, domain)
    electronics = draw_electronics(Draws(CPU, 4), torch.ones(300, 1, 1, 1), domain)
    integrating = ~electronics.counting_B
    values = [
        (PIXEL_UM, cameras.pixel_um_B),
        (LONGEST_AXIS, cameras.longest_axis_B),
        (GAIN_ADU, electronics.gain_B[integrating]),
        (NOISE_PHOTONS, electronics.noise_B[integrating]),
    ]
    for band, value in values:
        margin = 1.001 if domain == "held_out" else 0.999
        inside = (value * margin >= band.hole_low) & (value <= band.hole_high * margin)
        assert inside.all() if domain == "held_out" else not inside.any()
    assert not set(STEP_ADU) & set(HELD_OUT_STEPS_ADU)


# --- crystals and spots ---------------------------------------------------------------------------


def test_reflections_are_those_of_the_lattice_by_brute_force() -> None:
    """All lattice points near the Ewald sphere, where spots are 6 pixels apart, and no others."""
    size, distance, wavelength = 256, 1400.0, 1.3
    cameras = Cameras(
        wavelength_B=torch.tensor([wavelength]),
        distance_px_B=torch.tensor([distance]),
        pixel_um_B=torch.tensor([100.0]),
        bandwidth_B=torch.tensor([0.0]),
        top_BP=torch.tensor([[150.0]]),
        left_BP=torch.tensor([[-260.0]]),
        longest_axis_B=torch.tensor([130.0]),
        spacing_px_B=torch.tensor([14.0]),
    )
    axes = draw_axes(Draws(CPU, 5), cameras.longest_axis_B)
    found = find_reflections(cameras, axes, size, size)
    near = found.exists_BCPG[0, 0, 0] & (found.excitation_BCPG[0, 0, 0].abs() < 1e-3)
    got = {
        (int(h), int(k), int(ell)): (float(y), float(x))
        for h, k, ell, y, x in zip(
            found.h_BCPG[0, 0, 0][near],
            found.k_BCPG[0, 0, 0][near],
            found.l_BCPG[0, 0, 0][near],
            found.y_BCPG[0, 0, 0][near],
            found.x_BCPG[0, 0, 0][near],
            strict=True,
        )
    }
    reciprocal = np.linalg.inv(axes[0, 0].double().numpy()).T
    index = np.arange(-50, 51)
    hkl = np.stack(np.meshgrid(index, index, index, indexing="ij"), axis=-1).reshape(-1, 3)
    k_out = hkl @ reciprocal + [0.0, 0.0, 1.0 / wavelength]
    excitation = np.linalg.norm(k_out, axis=1) - 1.0 / wavelength
    y = k_out[:, 1] / k_out[:, 2] * distance - 150.0
    x = k_out[:, 0] / k_out[:, 2] * distance + 260.0
    on = (np.abs(excitation) < 1e-3) & (k_out[:, 2] > 0)
    on &= (y > 0) & (y < size - 1) & (x > 0) & (x < size - 1)
    assert on.sum() > 10
    for (h, k, ell), place in zip(hkl[on].tolist(), np.stack([y, x], 1)[on], strict=True):
        assert got[h, k, ell] == pytest.approx(place, abs=0.02)
    inside = [place for place in got.values() if all(0 < p < size - 1 for p in place)]
    assert len(inside) == pytest.approx(on.sum(), abs=1)


def test_rendered_photons_and_their_centre_of_gravity() -> None:
    shapes = Shapes(
        y_MJ=torch.tensor([[30.3, 31.3], [12.0, 12.0]]),
        x_MJ=torch.tensor([[40.1, 41.7], [20.5, 20.5]]),
        sigma_MJ=torch.tensor([[1.1, 0.4], [0.35, 0.35]]),
        weight_MJ=torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
    )
    image = torch.tensor([0, 1])
    photons = render(image, shapes, torch.tensor([500.0, 8.0]), 2, 64, 64)
    assert photons.sum(dim=(1, 2)).tolist() == pytest.approx([500.0, 8.0], rel=1e-3)
    y_M, x_M, sigma_M = shapes.moments()
    assert y_M.tolist() == pytest.approx([31.05, 12.0])
    rows, columns = torch.arange(64.0)[:, None], torch.arange(64.0)
    assert (photons[0] * rows).sum() / 500 == pytest.approx(31.05, abs=0.03)
    assert (photons[0] * columns).sum() / 500 == pytest.approx(float(x_M[0]), abs=0.03)
    square = (rows - y_M[0]).square() + (columns - x_M[0]).square()
    measured = ((photons[0] * square).sum() / 1000).sqrt()
    assert measured == pytest.approx(float(sigma_M[0]), rel=0.02)


# --- labels ---------------------------------------------------------------------------------------

places = st.floats(12.0, 20.0)


@examples(150)
@given(places, places, st.floats(0.3, 3.5))
def test_a_disc_has_its_centroid_at_the_peak(y: float, x: float, sigma: float) -> None:
    labels = draw_labels(peaks_at((y, x)), disc_radius(torch.tensor([sigma])), (1, 1, 32, 32))
    centres = components(labels[0, 0])
    assert centres.shape == (1, 2)
    assert np.hypot(*(centres[0] - [y, x])) < 0.17


@examples(150)
@given(places, places, st.floats(MIN_DISTANCE, 9.0), st.floats(0.0, 6.28), st.floats(0.3, 2.5))
def test_two_peaks_stay_two(y: float, x: float, apart: float, angle: float, sigma: float) -> None:
    other = (y + apart * math.sin(angle), x + apart * math.cos(angle))
    peaks = peaks_at((y, x), other)
    labels = draw_labels(peaks, disc_radius(torch.tensor([sigma, sigma])), (1, 1, 32, 32))
    centres = components(labels[0, 0])
    assert len(centres) == 2
    for truth in ((y, x), other):
        # Small discs cannot be centred better than on pixels and their borders.
        limit = 0.17 if apart > 5.5 and sigma < 1.2 else 0.72
        assert np.hypot(*(centres - truth).T).min() < limit


def test_labels_of_peaks_at_the_edge_and_in_their_own_panel() -> None:
    peaks = torch.tensor([[0.0, 1.0, 0.0, 15.0], [1.0, 0.0, 8.0, 8.0], [1.0, 0.0, 8.2, 8.1]])
    labels = draw_labels(peaks, torch.full((3,), 1.55), (2, 2, 16, 16))
    assert labels.dtype == torch.uint8
    assert labels.sum(dim=(2, 3)).gt(0).tolist() == [[False, True], [True, False]]
    assert labels[0, 1, 0, 15] == PEAK
    assert len(components(labels[1, 0])) == 1
    empty = draw_labels(torch.empty(0, 4), torch.empty(0), (1, 1, 8, 8))
    assert not empty.any()


def test_spots_too_near_are_one_at_their_centre_of_gravity() -> None:
    spots = spots_at((10.0, 10.0, 300.0, 0.8), (10.0, 12.0, 100.0, 0.8), (30.0, 30.0, 50.0, 0.8))
    merged = merge_spots(spots, 1, 64, 64)
    assert merged.photons_M.tolist() == [400.0, 50.0]
    assert merged.x_M.tolist() == pytest.approx([10.5, 30.0])
    assert merged.sigma_M[0] == pytest.approx(math.sqrt(0.64 + 0.5 * 0.75), rel=1e-3)
    assert merged.sigma_M[1] == pytest.approx(0.8)


def test_merging_goes_by_the_width_and_along_chains() -> None:
    narrow = spots_at((10.0, 10.0, 9.0, 0.8), (10.0, 14.0, 8.0, 0.8))
    wide = spots_at((10.0, 10.0, 9.0, 2.0), (10.0, 14.0, 8.0, 2.0))
    chain = spots_at(*[(10.0, 10.0 + 2.0 * i, 9.0 - i, 0.5) for i in range(5)])
    assert len(merge_spots(narrow, 1, 64, 64).y_M) == 2
    assert len(merge_spots(wide, 1, 64, 64).y_M) == 1
    assert len(merge_spots(chain, 1, 64, 64).y_M) == 1


def scene_of(photons: float, background: float, noise: float) -> tuple[Merged, Scene]:
    """One spot of sigma 1 in the middle of a faultless panel, read out without luck."""
    spots = spots_at((16.0, 16.0, photons, math.sqrt(1.0 + 1 / 12)))
    one = torch.ones(1, 1)
    shapes = Shapes(16.0 * one, 16.0 * one, one, one)
    planted = render(spots.image_M, shapes, spots.photons_M, 1, 32, 32)[None]
    flat, never = torch.full_like(planted, background), torch.zeros_like(planted, dtype=torch.bool)
    tiling = Tiling(
        ~never, never, torch.ones(1, 1, 32, 1), torch.ones(1, 1, 1, 32), never.long(), never
    )
    readout = MeasuredFrames(
        planted + flat, planted + flat, torch.full_like(flat, noise), never, never
    )
    seen = Background(flat, torch.zeros_like(flat), torch.ones_like(flat))
    return spots, Scene(seen, tiling, readout, planted)


@pytest.mark.parametrize(
    ("photons", "background", "noise", "verdict"),
    [
        # A matched filter's noise is sqrt(4 pi sigma^2) = 3.7 pixels' noise.
        (200.0, 100.0, 0.0, PEAK),
        (160.0, 100.0, 0.0, IGNORED),
        (60.0, 100.0, 0.0, BACKGROUND),
        (8.0, 0.01, 0.0, PEAK),
        (1.0, 0.0, 0.0, BACKGROUND),
        (80.0, 0.0, 3.0, PEAK),
        (40.0, 0.0, 3.0, IGNORED),
    ],
)
def test_who_is_a_peak(photons: float, background: float, noise: float, verdict: int) -> None:
    peak, ignored = judge(*scene_of(photons, background, noise))
    assert bool(peak) == (verdict == PEAK)
    assert bool(ignored) == (verdict == IGNORED)


def test_a_spot_on_dead_pixels_is_ignored_and_one_in_a_gap_is_none() -> None:
    spots, scene = scene_of(1000.0, 1.0, 0.1)
    scene.readout.bad_BPHW = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    scene.readout.bad_BPHW[..., 16:, :] = True
    peak, ignored = judge(spots, scene)
    assert (bool(peak), bool(ignored)) == (False, True)
    scene.readout.bad_BPHW[...] = True
    scene.tiling.gap_BPHW = scene.readout.bad_BPHW
    peak, ignored = judge(spots, scene)
    assert (bool(peak), bool(ignored)) == (False, False)


def test_what_is_seen_of_a_spot_in_a_gap_is_no_background() -> None:
    spots, scene = scene_of(1e5, 1.0, 0.1)
    scene.tiling.gap_BPHW = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    scene.tiling.gap_BPHW[..., 14:19, :] = True
    scene.readout.bad_BPHW = scene.tiling.gap_BPHW
    labels = label(spots, *judge(spots, scene), scene)[0, 0]
    assert set(labels[13:20, 16].tolist()) == {IGNORED}
    assert labels[12, 16] == IGNORED
    assert labels[16, 24] == labels[6, 16] == BACKGROUND


def test_a_plateau_is_ignored_beyond_its_disc() -> None:
    spots, scene = scene_of(1e6, 1.0, 0.1)
    scene.readout.saturated_BPHW = scene.planted_BPHW > 100
    labels = label(spots, *judge(spots, scene), scene)
    assert labels[0, 0, 16, 16] == PEAK
    assert labels[0, 0, 16, 19] == IGNORED
    assert labels[0, 0, 16, 25] == BACKGROUND


# --- shots ----------------------------------------------------------------------------------------


def same(one: LabelledShots, other: LabelledShots) -> bool:
    return one.snr_M.shape == other.snr_M.shape and all(
        torch.equal(a.nan_to_num(-7e7), b.nan_to_num(-7e7))
        for a, b in (
            (one.images_BPHW, other.images_BPHW),
            (one.labels_BPHW, other.labels_BPHW),
            (one.peaks_M4, other.peaks_M4),
            (one.snr_M, other.snr_M),
        )
    )


def test_a_batch_depends_on_seed_index_and_domain_alone() -> None:
    def simulator(seed: int = 3, domain: Domain = "training") -> ShotSimulator:
        return ShotSimulator(2, 48, 64, seed=seed, domain=domain)

    first = simulator().shots(5, 4, CPU)
    used = simulator()
    used.shots(9, 4, CPU)
    assert same(first, used.shots(5, 4, CPU))
    assert not same(first, used.shots(6, 4, CPU))
    assert not same(first, simulator(seed=4).shots(5, 4, CPU))
    assert not same(first, simulator(domain="held_out").shots(5, 4, CPU))


def test_everything_is_made_on_the_given_device() -> None:
    with torch.device("meta"):
        shots = ShotSimulator(1, 48, 48).shots(0, 4, CPU)
    assert shots.images_BPHW.device == CPU


@pytest.mark.parametrize("domain", DOMAINS)
def test_shapes_and_types(domain: Domain) -> None:
    shots = ShotSimulator(3, 50, 70, seed=1, domain=domain).shots(0, 5, CPU)
    assert shots.images_BPHW.shape == shots.labels_BPHW.shape == (5, 3, 50, 70)
    assert shots.images_BPHW.dtype == shots.peaks_M4.dtype == shots.snr_M.dtype == torch.float32
    assert shots.labels_BPHW.dtype == torch.uint8
    assert set(shots.labels_BPHW.flatten().tolist()) <= {BACKGROUND, PEAK, IGNORED}
    assert not shots.images_BPHW.isinf().any()
    event, panel, y, x = shots.peaks_M4.unbind(1)
    assert len(event) == len(shots.snr_M) > 0
    assert ((event >= 0) & (event < 5) & (panel >= 0) & (panel < 3)).all()
    assert ((y > -0.5) & (y < 49.5) & (x > -0.5) & (x < 69.5)).all()
    assert (shots.snr_M >= 1.0).all()
    assert torch.equal(event, event.round())


def test_blank_shots_have_artefacts_but_no_labels() -> None:
    shots = ShotSimulator(2, 64, 64, hit_fraction=0.0).shots(0, 32, CPU)
    assert not shots.labels_BPHW.any()
    assert len(shots.peaks_M4) == len(shots.snr_M) == 0
    assert shots.images_BPHW.isnan().any()


@pytest.mark.parametrize(
    "wrong", [{"panels": 0}, {"height": 0}, {"hit_fraction": 1.5}, {"domain": "test"}]
)
def test_wrong_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShotSimulator(**wrong)  # type: ignore[arg-type]


def test_strong_spots_are_labelled_where_they_are_listed(sample: list[LabelledShots]) -> None:
    total = strong = near = weak = of_weak = 0
    for shots in sample:
        index = shots.peaks_M4.round().long().unbind(1)
        at = shots.labels_BPHW[index]
        total += len(at)
        strong += int((shots.snr_M > 25).sum())
        near += int((at[shots.snr_M > 25] != BACKGROUND).sum())
        weak += int((shots.snr_M < 1.2).sum())
        of_weak += int((at[shots.snr_M < 1.2] == PEAK).sum())
    assert total > 1000
    assert near > 0.95 * strong
    assert of_weak < 0.25 * weak


def test_peaks_of_the_label_have_their_centroids_at_listed_spots(
    sample: list[LabelledShots],
) -> None:
    distances = []
    for shots in sample[:3]:
        for event in range(len(shots.images_BPHW)):
            centres = components(shots.labels_BPHW[event, 0])
            listed = shots.peaks_M4[shots.peaks_M4[:, 0] == event, 2:].numpy()
            # Discs at the edge are cut off.
            whole = ((centres > 5) & (centres < 90)).all(axis=1)
            for centre in centres[whole]:
                apart = np.hypot(*(listed - centre).T)
                distances.append(apart.min() if len(apart) else np.inf)
    assert len(distances) > 300
    assert np.quantile(distances, 0.9) < 0.3
    assert np.mean(np.array(distances) > 2.0) < 0.01


def test_events_of_a_batch_differ(sample: list[LabelledShots]) -> None:
    medians = sample[0].images_BPHW.flatten(1).nanmedian(dim=1).values
    assert len(set(medians.tolist())) > 0.6 * len(medians)
    counts = torch.stack(
        [torch.bincount(shots.peaks_M4[:, 0].long(), minlength=64) for shots in sample]
    )
    assert (counts == 0).any()
    assert counts.max() > 40


def test_every_artefact_occurs(sample: list[LabelledShots]) -> None:
    images = torch.cat([shots.images_BPHW[:, 0] for shots in sample])
    events = len(images)
    finite = images.isfinite()
    filled = torch.where(finite, images, 0.0)
    integers = (filled == filled.round()).all(dim=2).all(dim=1)
    negative = (filled < 0).flatten(1).float().mean(dim=1)
    lines_nan = (~finite).all(dim=2).any(dim=1) | (~finite).all(dim=1).any(dim=1)
    lines_0 = ((filled == 0) & finite).all(dim=2).any(dim=1)
    single_nan = ((~finite).flatten(1).float().mean(dim=1) > 0) & ~lines_nan
    highest = filled.flatten(1).amax(dim=1)
    plateau = (filled == highest[:, None, None]).flatten(1).sum(dim=1) > 20
    median = images.flatten(1).nanmedian(dim=1).values
    frequent = {
        "integers": integers,
        "fractions": ~integers,
        "negative pixels": negative > 0.05,
        "no negative pixels": negative == 0,
        "gaps or edges of NaN": lines_nan,
        "gaps of 0": lines_0,
        "bad pixels of NaN": single_nan,
        "plateaus": plateau & (highest > 10) & (highest != 65535),
        "pedestals": median > 500,
        "empty backgrounds": (filled == 0).flatten(1).float().mean(dim=1) > 0.9,
    }
    for name, found in frequent.items():
        assert found.sum() > 0.01 * events, name


def test_backgrounds_have_shadows_rings_grain_and_streaks() -> None:
    cameras = draw_cameras(Draws(CPU, 7), 200, 1, 96, 96, "training")
    background = draw_background(Draws(CPU, 8), cameras, 96, 96)
    photons = background.photons_BPHW
    assert (photons >= 0).all()
    assert (background.grain_BPHW >= 0).all()
    dark = (background.transmission_BPHW < 0.5).flatten(1).float().mean(dim=1)
    assert 0.03 < (dark > 0.01).float().mean() < 0.5
    assert 0.03 < (background.grain_BPHW > 0.05 * photons).flatten(1).any(dim=1).float().mean()
    level = photons.flatten(1).mean(dim=1)
    assert level.min() < 0.05
    assert level.max() > 1000
    # Contrast of lines and rings: some events have pixels far above their neighbourhood.
    contrast = photons.flatten(1).amax(dim=1) / photons.flatten(1).median(dim=1).values
    assert (contrast > 10).float().mean() > 0.05
    assert (contrast < 1.5).float().mean() > 0.2


def test_defects_occur_and_are_rare() -> None:
    *masks, height = defects(Draws(CPU, 9), 300, 1, 64, 64)
    for mask in masks:
        assert 0 < mask.float().mean() < 0.005
        assert 0.1 < mask.flatten(1).any(dim=1).float().mean() < 0.9
    overlap = torch.stack([mask.long() for mask in masks]).sum(dim=0)
    assert overlap.max() == 1
    bad = height[masks[0]]
    assert bad.min() < 8
    assert bad.max() > 1500
    lines = bad_lines(Draws(CPU, 10), 300, 1, 64, 64)
    assert 0.05 < (lines != 0).flatten(1).any(dim=1).float().mean() < 0.4
    blocks, value = bad_blocks(Draws(CPU, 11), 300, 1, 64, 64)
    assert 0.05 < blocks.flatten(1).any(dim=1).float().mean() < 0.4
    assert (value == 0).any()
    assert (value > 5).any()
    ways = (tracks(Draws(CPU, 12), 300, 1, 64, 64) > 0).sum(dim=1)
    assert (ways == 0).any()
    assert (ways == 1).any()
    assert (ways > 10).any()


@pytest.mark.parametrize(("photons", "noise", "gain"), [(20.0, 0.0, 1.0), (5.0, 2.0, 30.0)])
def test_mean_and_variance_of_a_readout(photons: float, noise: float, gain: float) -> None:
    """Gain times photons, and gain squared times Poisson and readout variance."""
    one, never = torch.ones(400, 1, 1, 1), torch.zeros(400, 1, 1, 1, dtype=torch.bool)
    flat = torch.full((400, 1, 32, 32), photons)
    no_pixel = torch.zeros_like(flat, dtype=torch.bool)
    tiling = Tiling(
        ~no_pixel,
        no_pixel,
        torch.ones(400, 1, 32, 1),
        torch.ones(400, 1, 1, 32),
        no_pixel.long(),
        no_pixel,
    )
    nothing = 0.0 * one
    electronics = Electronics(
        gain * one, noise * one, 1e9 * one, nothing, nothing, ~never if noise == 0 else never, never
    )
    readout = read_out(Draws(CPU, 13), flat, tiling, electronics)
    assert readout.excess_BPHW[~readout.bad_BPHW].mean() == pytest.approx(photons, rel=0.02)
    # The median event: others have smeared or switched pixels, or lines of common mode.
    images = torch.where(readout.bad_BPHW, torch.nan, readout.images_BPHW).flatten(1)
    mean = images.nanmean(dim=1)
    expected = gain**2 * (photons + noise**2)
    # Tracks of particles are clipped.
    reach = 6 * math.sqrt(expected)
    variance = (images - mean[:, None]).clamp(-reach, reach).square().nanmean(dim=1)
    assert mean.nanmedian() == pytest.approx(gain * photons, rel=0.05)
    # Common modes and gains that differ add to it.
    assert 0.98 * expected < variance.nanmedian() < 1.15 * expected


def test_shared_charge_makes_neighbours_alike_and_none_is_made() -> None:
    photons = Draws(CPU, 15).poisson(torch.full((2, 1, 400, 400), 3.0))
    sharing = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    shared = share_charge(Draws(CPU, 14), photons, sharing)
    assert torch.equal(shared[1], photons[1])
    assert shared.min() >= 0
    # A photon in eight crosses a border of one side, with a quarter of its charge.
    assert shared[0].sum() == pytest.approx(float(photons[0].sum()), rel=4 / 400 / 8)
    for one, other in (
        (shared[0, 0, :, 1:], shared[0, 0, :, :-1]),
        (shared[0, 0, 1:], shared[0, 0, :-1]),
    ):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        # Two ways of E[u (1 - u)] / 8 = 1/48, u up to 1/2; over a variance that is smaller by four.
        assert correlation == pytest.approx((1 / 24) / (1 - 4 / 24), abs=0.01)


def test_tilings_have_gaps_seams_and_small_panels() -> None:
    tiling = draw_tiling(Draws(CPU, 6), 200, 1, 128, 128, "training")
    assert 0.1 < (~tiling.on_panel_BPHW).flatten(1).any(dim=1).float().mean() < 0.6
    assert 0.3 < tiling.gap_BPHW.flatten(1).any(dim=1).float().mean() < 0.9
    assert {1.0, 1.5, 2.0, 3.0} == set(tiling.area_BPH1.flatten().tolist())
    assert not (tiling.gap_BPHW & ~tiling.on_panel_BPHW).any()
    assert len(set(tiling.asic_BPHW.flatten().tolist())) > 10
