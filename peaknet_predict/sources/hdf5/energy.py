"""Photon energies of HDF5 files: where they are, in which unit, and which event has which."""

from __future__ import annotations

from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from peaknet_predict.sources.energies import energies_from_table, plausible, to_ev
from peaknet_predict.sources.hdf5.files import LinkedFile
from peaknet_predict.sources.hdf5.nexus import detectors, entry_of, find_groups, join, text

LCLS_ENERGY = "/LCLS/photon_energy_eV"
"""Where Cheetah and psana's writers put the photon energy, eV; also CrystFEL's usual setting."""

CXI_ENERGY = "/entry_1/instrument_1/source_1/energy"
"""Where the CXI format has the photon energy, in joules (CXI file format, version 1.5, source)."""

_AMBIGUOUS_ANGSTROM = 0.25
"""A wavelength below, in angstrom, is that of 50 keV and more; in nm, of an everyday 5 keV."""

Energies = npt.NDArray[np.float64]


class Found(NamedTuple):
    """Photon energies, (N,) in eV, NaN where there is none; and the dataset that they come from."""

    energies: Energies
    where: str


def read_energies(
    opened: LinkedFile, frames: str, named: str | None, unit: str | None, num_events: int
) -> Found | None:
    """Return the photon energies of a file, None if it has none.

    Parameters
    ----------
    opened
        The file.
    frames
        Path of its frames; beams and detectors of the same entry are looked at.
    named
        Path of the dataset of photon energies or wavelengths; None looks at the usual places, and
        takes the first one with a plausible photon energy.
    unit
        Its unit; None takes the dataset's attribute.
    num_events
        Events in the file.

    Raises
    ------
    ValueError
        If a dataset is missing, has another number of values, or an unknown unit.
    """
    if named is not None:
        default = {LCLS_ENERGY: "eV", CXI_ENERGY: "J"}.get(join(named), _default_unit(named))
        return _read(opened, opened.dataset(named), named, unit or "", default, num_events)
    best = None
    for name, default in _usual_places(opened, entry_of(frames)):
        item = opened.find(name)
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "iuf":
            continue
        found = _read(opened, item, name, unit or "", default, num_events)
        if plausible(found.energies).any():
            return found
        if best is None and np.any(found.energies > 0) and np.isfinite(found.energies).any():
            best = found
    return best


def _default_unit(name: str) -> str:
    """Return the unit of a dataset without the attribute: DECTRIS's of a wavelength, or eV."""
    return "angstrom" if name.endswith("/incident_wavelength") else "eV"


def _usual_places(opened: LinkedFile, entry: str) -> list[tuple[str, str]]:
    places = [(LCLS_ENERGY, "eV"), (CXI_ENERGY, "J")]
    for beam in find_groups(opened, entry, "NXbeam", r"beam(_\d+)?"):
        places += [(join(beam, "incident_energy"), "eV")]
        places += [(join(beam, "incident_wavelength"), "angstrom")]
    for mono in find_groups(opened, entry, "NXmonochromator", r"monochromator(_\d+)?"):
        places += [(join(mono, "energy"), "eV"), (join(mono, "wavelength"), "angstrom")]
    for detector in detectors(opened, entry):
        places += [(join(detector, "detectorSpecific/photon_energy"), "eV")]
        places += [(join(detector, "photon_energy"), "eV")]
    return places


def _read(
    opened: LinkedFile,
    dataset: h5py.Dataset,
    name: str,
    unit: str,
    default: str,
    num_events: int,
) -> Found:
    where = f"{opened.path}: {name}"
    said = dataset.attrs.get("units", dataset.attrs.get("unit"))
    is_guess = not unit and said is None
    unit = unit or (default if said is None else text(said))
    values = energies_from_table(dataset[()], num_events, where)
    if is_guess and unit == "angstrom" and np.any((values > 0) & (values < _AMBIGUOUS_ANGSTROM)):
        raise ValueError(
            f"{where} has a wavelength of {values[0]:g} without units: angstrom or nm? Say it with "
            "photon_energy_unit"
        )
    return Found(to_ev(values, unit, where), name)
