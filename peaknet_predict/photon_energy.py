"""Photon energies: constants, the plausible range, and the likely unit of an implausible value."""

from __future__ import annotations

import math

JOULES_PER_EV = 1.602176634e-19
"""Exact: the elementary charge in coulombs (SI, 2019)."""

HC_EV_ANGSTROM = 12398.419843320026
"""Planck constant times speed of light, eV Angstrom (exact in the SI of 2019)."""

MIN_EV, MAX_EV = 100.0, 200_000.0
"""Range of photon energies that are accepted: soft X-rays to the hardest beams that diffraction
uses. A value in keV, joules, angstrom or metres falls outside."""


def is_plausible(energy_ev: float) -> bool:
    """Return whether an experiment can have this photon energy, in eV; NaN is not plausible."""
    return MIN_EV <= energy_ev <= MAX_EV


def explain_implausible(energy_ev: float) -> str:
    """Return a sentence that refuses a photon energy and names the units it is likely to be in.

    Parameters
    ----------
    energy_ev
        A number outside `MIN_EV` to `MAX_EV`, or NaN.
    """
    text = f"photon energy is {energy_ev:g} eV; expected {MIN_EV:g} eV to {MAX_EV / 1e3:g} keV"
    if not math.isfinite(energy_ev) or energy_ev <= 0:
        return text
    wavelength = HC_EV_ANGSTROM / energy_ev
    readings = {
        "keV": energy_ev * 1e3,
        "a wavelength in angstrom": wavelength,
        "joules": energy_ev / JOULES_PER_EV,
        "a wavelength in metres": wavelength * 1e-10,
        "eV taken for keV": energy_ev / 1e3,
        "eV taken for joules": energy_ev * JOULES_PER_EV,
        "a wavelength in angstrom taken for metres": energy_ev * 1e10,
        "a wavelength in metres taken for angstrom": energy_ev * 1e-10,
    }
    likely = [f"{unit} ({ev:.0f} eV)" for unit, ev in readings.items() if is_plausible(ev)]
    return f"{text}; likely {' or '.join(likely)}" if likely else text
