"""From expected photons to numbers in a file: counting, noise, offsets, defects, number formats.

Shape legend: B events, P panels of an event, H rows, W columns. Parameters of an event are (B, 1,
1, 1). Offsets and defects are drawn in units of the readout noise; for events without readout
noise, in photons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peaknet_predict.simulation.defects import bad_blocks, bad_lines, defects, tracks
from peaknet_predict.simulation.draws import Band, Domain, Draws
from peaknet_predict.simulation.tiles import ASICS, Tiling

GAIN_ADU = Band(0.1, 300.0, 24.0, 36.0)
"""ADU (or keV, or any calibrated unit) per photon. Held out: CSPAD's 30."""

NOISE_PHOTONS = Band(0.02, 5.0, 0.15, 0.25)
"""Readout noise, photons rms: 0.02 (Jungfrau at 12 keV) to several (CCDs, CSPAD in low gain).
Held out: between ePix10k's and CSPAD's."""

MAX_SHARING = 0.8
"""Highest probability that a photon shares its charge: small pixels, thick sensors."""

STEP_ADU = (0.0, 1.0, 8.0)
"""Quantisation of the readout, ADU; 0 for none."""

HELD_OUT_STEPS_ADU = (4.0, 0.5, 0.01)
"""The same for held-out shots: bits dropped, two digits of keV."""


@dataclass(slots=True)
class Electronics:
    """How each event is read out.

    Attributes
    ----------
    gain_B, noise_B, saturation_B, step_B
        (B, 1, 1, 1): ADU per photon; photons rms; photons at which the signal saturates; ADU per
        quantisation step, 0 for none.
    sharing_B
        (B, 1, 1, 1): probability that a photon leaves part of its charge in a neighbouring pixel.
    counting_B, raw_B
        (B, 1, 1, 1) bool: whether the detector counts photons; whether it delivers integrated
        charge without dark subtraction.
    """

    gain_B: Tensor
    noise_B: Tensor
    saturation_B: Tensor
    step_B: Tensor
    sharing_B: Tensor
    counting_B: Tensor
    raw_B: Tensor


@dataclass(slots=True)
class MeasuredFrames:
    """What the detectors have recorded.

    Attributes
    ----------
    images_BPHW
        ADU, with NaN where there is no pixel.
    excess_BPHW
        Photons as measured: with readout noise, without offsets, gains and defects.
    sigma_BPHW
        Readout noise of the pixel, photons rms.
    bad_BPHW
        bool; pixels whose value says nothing: in gaps, outside, dead, hot, noisy.
    saturated_BPHW
        bool; pixels at saturation.
    """

    images_BPHW: Tensor
    excess_BPHW: Tensor
    sigma_BPHW: Tensor
    bad_BPHW: Tensor
    saturated_BPHW: Tensor


def draw_electronics(draws: Draws, background_B: Tensor, domain: Domain) -> Electronics:
    """Draw the kinds of detectors of a batch with a given mean background, (B, 1, 1, 1)."""
    one = (len(background_B), 1, 1, 1)
    # A fifth are photon counters. 40 % of the rest deliver data without dark subtraction.
    counting = draws.chance(*one, probability=0.2)
    raw = draws.chance(*one, probability=0.4) & ~counting
    gain = draws.band(*one, band=GAIN_ADU, domain=domain)
    noise = draws.band(*one, band=NOISE_PHOTONS, domain=domain)
    steps = STEP_ADU if domain == "training" else HELD_OUT_STEPS_ADU
    which = draws.among(*one, weights=(0.5, 0.4, 0.1))
    step = torch.where(which == 0, steps[0], torch.where(which == 1, steps[1], steps[2]))
    # Coarser steps than half a photon would hide faint spots from anybody.
    step = torch.where(step > 0.5 * gain, 0.0, step)
    # Some facilities round to photons ("photonise").
    photonised = draws.chance(*one, probability=0.1) & ~raw
    step = torch.where(photonised, gain, step)
    gain = torch.where(counting, 1.0, gain)
    # A CCD or CSPAD pixel holds hundreds of photons, a Jungfrau pixel 10^4. Experimenters keep the
    # background far below that.
    saturation = draws.log_uniform(*one, low=80.0, high=1e6)
    saturation = saturation + 4.0 * background_B + 10.0 * noise
    return Electronics(
        gain_B=gain,
        noise_B=torch.where(counting, 0.0, noise),
        saturation_B=saturation,
        step_B=torch.where(counting, 1.0, step),
        # Counters count a photon where half of its charge arrives. Neighbouring pixels of a CSPAD
        # are correlated by 0.04, which a probability of 0.5 reproduces.
        sharing_B=torch.where(counting, 0.0, draws.uniform(*one, high=MAX_SHARING)),
        counting_B=counting,
        raw_B=raw,
    )


def read_out(
    draws: Draws, expected_BPHW: Tensor, tiling: Tiling, electronics: Electronics
) -> MeasuredFrames:
    """Read a batch of exposures.

    Parameters
    ----------
    draws
        Stream of random numbers.
    expected_BPHW
        (B, P, H, W) photons expected in pixels of the usual size.
    tiling, electronics
        The detectors.
    """
    B, P, H, W = expected_BPHW.shape
    e = electronics
    area = tiling.area_BPH1 * tiling.area_BP1W
    counts = share_charge(draws, draws.poisson(expected_BPHW * area), e.sharing_B)
    # Unit of offsets and defects.
    unit = torch.where(e.counting_B, 1.0, e.noise_B)

    hot, dead, noisy, negative, height = defects(draws, B, P, H, W)
    sigma = torch.where(noisy, 10.0 * e.noise_B, e.noise_B)
    # The borders of sensors leak, more on some detectors than on others.
    leaky = draws.chance(B, 1, 1, 1, probability=0.3) * draws.uniform(B, 1, 1, 1, high=3.0)
    sigma = sigma * (1.0 + leaky * tiling.border_BPHW)
    # Where the gain has switched, the noise is several times higher and the scales do not quite
    # match.
    switching = draws.chance(B, 1, 1, 1, probability=0.15) & ~e.counting_B
    threshold = draws.log_uniform(B, 1, 1, 1, low=20.0, high=2000.0)
    threshold = threshold + 2.0 * expected_BPHW.mean(dim=(1, 2, 3), keepdim=True)
    switched = switching & (counts > threshold)
    low_gain_noise = draws.uniform(B, 1, 1, 1, low=2.0, high=10.0)
    mismatch = 1.0 + 0.1 * draws.normal(B, 1, 1, 1)
    sigma = torch.where(switched, sigma * low_gain_noise, sigma)
    noise = sigma * draws.normal(B, P, H, W)
    measured = torch.where(switched, counts * mismatch, counts) + noise

    offset = _offsets(draws, tiling, e, unit, H, W)
    signal = _smeared(draws, measured) + tracks(draws, B, P, H, W).view(B, P, H, W) * unit
    signal = signal * _gains(draws, tiling, B, P, H, W)
    signal = torch.where(hot, signal + height * unit, signal)
    signal = torch.where(negative & ~e.counting_B, signal - height * unit, signal)
    saturated = signal >= e.saturation_B
    signal = torch.minimum(signal, e.saturation_B)
    blocks, block_value = bad_blocks(draws, B, P, H, W)
    signal = torch.where(blocks, block_value * unit + sigma, signal)
    adu = (signal + offset) * e.gain_B

    # Dead pixels read 0, before the offset or after it.
    dead_adu = torch.where(draws.chance(B, 1, 1, 1, probability=0.5), 0.0, offset * e.gain_B)
    adu = torch.where(dead, dead_adu, adu)
    images = _numbers(draws, adu, tiling, e, hot | dead | blocks | noisy)
    bad = hot | dead | noisy | negative | blocks | tiling.gap_BPHW | ~tiling.on_panel_BPHW
    return MeasuredFrames(images, counts + noise, sigma, bad, saturated)


def share_charge(draws: Draws, counts_BPHW: Tensor, sharing_B: Tensor) -> Tensor:
    """Let photons leave up to half of their charge in a neighbouring pixel.

    The noise of a background then contains faint pairs of pixels that are no peaks, up to half as
    many again as independent pixels would form.

    Parameters
    ----------
    draws
        Stream.
    counts_BPHW
        (B, P, H, W) photons that each pixel has absorbed.
    sharing_B
        (B, 1, 1, 1) probability that a photon shares its charge.

    Returns
    -------
    Tensor
        (B, P, H, W) charge in units of a photon's.
    """
    result, whole = counts_BPHW.clone(), counts_BPHW.clone()
    for axis in (-2, -1):
        for step in (-1, 1):
            shared = torch.minimum(draws.poisson(counts_BPHW * (sharing_B / 4)), whole)
            whole -= shared
            charge = shared * draws.uniform(*counts_BPHW.shape, high=0.5)
            arrived = charge.roll(step, axis)
            # Charge that leaves the panel is lost.
            arrived.select(axis, 0 if step == 1 else -1).zero_()
            result += arrived - charge
    return result


def _smeared(draws: Draws, measured_BPHW: Tensor) -> Tensor:
    """Mix pixels with the mean of their surroundings, in an eighth of the events.

    Resampled images have such correlated noise, for example those of fibre-optic tapers after the
    correction of their distortion. A matched filter loses nothing by it.
    """
    B = len(measured_BPHW)
    mixed = draws.chance(B, 1, 1, 1, probability=1 / 8) * draws.uniform(B, 1, 1, 1, high=0.7)
    around = F.avg_pool2d(measured_BPHW, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(measured_BPHW, around, mixed)


def _offsets(
    draws: Draws, tiling: Tiling, e: Electronics, unit: Tensor, height: int, width: int
) -> Tensor:
    """Draw pedestals and common modes, photons.

    Without dark subtraction, pedestals reach 3000 times the noise, and ASICs differ by up to
    hundreds. With it, what common-mode correction leaves over remains. Rows or columns share noise
    of up to 1.5 sigma.
    """
    B, P = tiling.gap_BPHW.shape[:2]
    one = (B, 1, 1, 1)
    pedestal = e.raw_B * draws.log_uniform(*one, low=1.0, high=3000.0) * draws.sign(*one)
    pedestal = torch.where(draws.chance(*one, probability=0.9), pedestal.abs(), pedestal)
    apart = torch.where(
        e.raw_B,
        draws.log_uniform(*one, low=0.3, high=300.0),
        draws.chance(*one, probability=0.5) * draws.log_uniform(*one, low=0.05, high=3.0),
    )
    table = (apart * draws.normal(B, P, ASICS * ASICS, 1)).squeeze(-1)
    offset = pedestal + _look_up(table, tiling.asic_BPHW)
    # Raw pedestals drift across a sensor.
    slope = (
        e.raw_B * draws.chance(*one, probability=0.3) * draws.log_uniform(*one, low=1.0, high=30.0)
    )
    ramp_y = torch.linspace(-1.0, 1.0, height, device=draws.device)[:, None]
    ramp_x = torch.linspace(-1.0, 1.0, width, device=draws.device)
    ramp = draws.normal(B, P, 1, 1) * ramp_y + draws.normal(B, P, 1, 1) * ramp_x
    offset = offset + slope * ramp
    lines = draws.chance(*one, probability=0.3) * draws.uniform(*one, high=1.5)
    by_row = draws.chance(*one, probability=0.5)
    rows = draws.normal(B, P, height, 1) * (lines * by_row)
    columns = draws.normal(B, P, 1, width) * (lines * ~by_row)
    offset = offset + rows + columns + bad_lines(draws, B, P, height, width)
    return torch.where(e.counting_B, 0.0, offset * unit)


def _look_up(table_BPA: Tensor, asic_BPHW: Tensor) -> Tensor:
    """Return for each pixel the value of its ASIC."""
    return table_BPA.flatten(0, 1).gather(1, asic_BPHW.flatten(0, 1).flatten(1)).view_as(asic_BPHW)


def _gains(draws: Draws, tiling: Tiling, B: int, P: int, height: int, width: int) -> Tensor:
    """Draw gain errors: 0.5 to 5 % from ASIC to ASIC, 0.1 to 5 % from pixel to pixel."""
    between = draws.log_uniform(B, 1, 1, low=0.005, high=0.05)
    table = between * draws.normal(B, P, ASICS * ASICS)
    within = draws.log_uniform(B, 1, 1, 1, low=0.001, high=0.05)
    return 1.0 + _look_up(table, tiling.asic_BPHW) + within * draws.normal(B, P, height, width)


def _numbers(
    draws: Draws, adu: Tensor, tiling: Tiling, e: Electronics, known_bad: Tensor
) -> Tensor:
    """Return the numbers in the file: rounded, cut off, and marked where there is no pixel."""
    one = (len(adu), 1, 1, 1)
    step = e.step_B.clamp(min=1e-6)
    adu = torch.where(e.step_B > 0.0, (adu / step).round() * step, adu)
    # Counters cannot go below 0. Some files of other detectors cannot either: they are unsigned.
    unsigned = e.counting_B | (draws.chance(*one, probability=0.08) & ~e.raw_B)
    adu = torch.where(unsigned, adu.clamp(min=0.0), adu)
    # Some data are masked: known bad pixels are NaN or 0. Not all bad pixels are known.
    mask = draws.among(*one, weights=(0.65, 0.2, 0.15))
    known_bad = known_bad & draws.chance(*adu.shape, probability=0.8)
    adu = torch.where(known_bad & (mask == 1), torch.nan, adu)
    adu = torch.where(known_bad & (mask == 2), 0.0, adu)
    # Gaps: 0, NaN, -1, the largest number, or something in between.
    gap = draws.among(*one, weights=(0.45, 0.25, 0.15, 0.03, 0.12))
    constant = e.gain_B * draws.log_uniform(*one, low=0.1, high=100.0)
    value = torch.where(gap == 0, 0.0, torch.where(gap == 1, torch.nan, -1.0))
    value = torch.where(gap == 3, 65535.0, torch.where(gap == 4, constant, value))
    adu = torch.where(tiling.gap_BPHW, value, adu)
    outside = torch.where(draws.chance(*one, probability=0.8), torch.nan, 0.0)
    return torch.where(tiling.on_panel_BPHW, adu, outside)
