"""Photon energies that files hold: units, one for each event, and whether they are plausible."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from peaknet_predict.photon_energy import (
    HC_EV_ANGSTROM,
    JOULES_PER_EV,
    MAX_EV,
    MIN_EV,
    explain_implausible,
    is_plausible,
)

logger = logging.getLogger(__name__)

Energies = npt.NDArray[np.float64]

_EV = {
    1.0: ("ev", "electronvolt", "electronvolts", "electron volt", "electron volts"),
    1e3: ("kev", "kiloelectronvolt", "kiloelectronvolts"),
    1.0 / JOULES_PER_EV: ("j", "joule", "joules"),
}
_ANGSTROM = {
    1.0: ("a", "å", "ångström", "angstrom", "angstroms", "ang"),
    10.0: ("nm", "nanometer", "nanometers", "nanometre", "nanometres"),
    0.01: ("pm", "picometer", "picometers", "picometre", "picometres"),
    1e10: ("m", "meter", "meters", "metre", "metres"),
}
_FACTORS = {name: factor for factor, names in _EV.items() for name in names}
_LENGTHS = {name: factor for factor, names in _ANGSTROM.items() for name in names}


def to_ev(values: Energies, unit: str, where: str) -> Energies:
    """Convert energies, or wavelengths, to photon energies in eV.

    Parameters
    ----------
    values
        Energies or wavelengths.
    unit
        Its name, in any case: eV, keV, J, angstrom, nm, pm or m.
    where
        File and dataset, for the error message.

    Raises
    ------
    ValueError
        If the unit is unknown.
    """
    name = unit.strip().casefold()
    if name in _FACTORS:
        return values * _FACTORS[name]
    if name in _LENGTHS:
        with np.errstate(divide="ignore"):
            return np.asarray(HC_EV_ANGSTROM / (values * _LENGTHS[name]))
    raise ValueError(
        f"{where} is in {unit!r}; known units are eV, keV, J, angstrom, nm, pm and m. Say with "
        "photon_energy_unit which one it is, or give photon_energy_ev instead"
    )


def energies_from_table(values: npt.NDArray[Any], num_events: int, where: str) -> Energies:
    """Spread the photon energies that a file holds over its events.

    Parameters
    ----------
    values
        One number for the whole file, or one for each event in whatever arrangement of axes, such
        as (num_events, 1). A longer table is accepted if its surplus was never filled in (0 or
        NaN), or if all its values are equal, so that it does not matter which event has which.
    num_events
        Events in the file.
    where
        File and dataset, for the error message.

    Returns
    -------
    ndarray
        (num_events,) | float64, in the unit of `values`.

    Raises
    ------
    ValueError
        If the values are not numbers, or if it is not clear which event has which.
    """
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{where} should hold photon energies but has dtype {values.dtype}")
    if values.size == 1:
        return np.full(num_events, float(values.reshape(())))
    table = values.reshape(-1).astype(np.float64)
    is_list = max(values.shape, default=0) == values.size
    if is_list and len(table) > num_events > 0:
        surplus = table[num_events:]
        if np.all((surplus == 0) | np.isnan(surplus)):
            logger.info(
                "%s has %d values for %d events; the rest was never filled in and is left out",
                where,
                len(table),
                num_events,
            )
            return table[:num_events]
        if np.all(table == table[0]):
            return table[:num_events]
    if not is_list or len(table) != num_events:
        raise ValueError(
            f"{where} has shape {values.shape} for {num_events} events, so that it is not clear "
            "which event has which photon energy; it needs one number, or one for each event. "
            "Name another dataset with photon_energy, or give photon_energy_ev"
        )
    return table


def plausible(energies: Energies) -> npt.NDArray[np.bool_]:
    """Return which photon energies, in eV, an experiment can have."""
    return (energies >= MIN_EV) & (energies <= MAX_EV)


def explain_energies(energies: Energies, where: str) -> str | None:
    """Say what is wrong with the photon energies of a file if no event has a plausible one.

    Parameters
    ----------
    energies
        (N,) eV; NaN where there is none.
    where
        File and dataset they come from.
    """
    given = energies[np.isfinite(energies)]
    if not given.size or plausible(energies).any():
        return None
    return f"{where}: {explain_implausible(float(given[0]))}"


def check_photon_energy_ev(photon_energy_ev: float | None) -> None:
    """Raise a `ValueError` if a photon energy is given that no experiment can have."""
    if photon_energy_ev is not None and not is_plausible(photon_energy_ev):
        raise ValueError(f"photon_energy_ev: {explain_implausible(photon_energy_ev)}")
