"""Photon energies that no experiment has are refused, and the message names the likely unit."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peaknet_predict.batching import check_event
from peaknet_predict.photon_energy import (
    HC_EV_ANGSTROM,
    JOULES_PER_EV,
    MAX_EV,
    MIN_EV,
    explain_implausible,
    is_plausible,
)
from peaknet_predict.queues.codec import decode, encode
from peaknet_predict.queues.wire import event_to_item, item_to_event
from peaknet_predict.sources import Hdf5Source
from peaknet_predict.types import Event, EventId

PIXELS = np.ones((2, 3), np.float32)


def check(image: object, energy: float) -> str | None:
    return check_event(Event(EventId("s", 0, 0), image, energy))  # type: ignore[arg-type]


@pytest.mark.parametrize("energy", [MIN_EV, 280.0, 9500.0, 87_100.0, MAX_EV])
def test_energies_from_soft_to_hard_x_rays_are_accepted(energy: float) -> None:
    assert check(PIXELS, energy) is None


@given(st.floats(1000.0, 99_000.0))
def test_a_value_in_another_unit_is_refused_with_that_unit(energy: float) -> None:
    """Over the range of diffraction experiments, 1 to 99 keV."""
    wavelength = HC_EV_ANGSTROM / energy
    for unit, value in {
        "keV": energy / 1e3,
        "a wavelength in angstrom": wavelength,
        "joules": energy * JOULES_PER_EV,
        "a wavelength in metres": wavelength * 1e-10,
        "eV taken for joules": energy / JOULES_PER_EV,
        "a wavelength in angstrom taken for metres": energy * 1e-10,
        "a wavelength in metres taken for angstrom": energy * 1e10,
    }.items():
        reason = check(PIXELS, value)
        assert reason is not None, (unit, value)
        assert f"{unit} ({energy:.0f} eV)" in reason, (unit, reason)


@pytest.mark.parametrize("energy", [0.0, -9500.0, math.nan, math.inf, 99.9, 200_001.0])
def test_what_is_no_energy_at_all_is_refused(energy: float) -> None:
    assert not is_plausible(energy)
    reason = check(PIXELS, energy)
    assert reason == explain_implausible(energy)
    assert "expected 100 eV to 200 keV" in reason


def test_a_reason_survives_the_item_of_another_programs_queue_and_the_spool() -> None:
    reason = np.array("run.h5: frame 3 is unreadable: Å")
    event = Event(EventId("s", 0, 3), reason, math.nan)
    there = item_to_event(event_to_item(event), "s", 0)
    skeleton, buffers = encode(event)
    back = decode(skeleton, memoryview(b"".join(bytes(part) for part in buffers)))
    for copy in (there, back):
        assert isinstance(copy, Event)
        assert check_event(copy) == f"the frame could not be read: {reason}"


def test_a_reason_in_place_of_pixels_is_the_reason_of_the_refusal() -> None:
    said = "the frame could not be read: run.h5: frame 3 is unreadable: filter 32008 is missing"
    reason = "run.h5: frame 3 is unreadable: filter 32008 is missing"
    assert check(np.array(reason), math.nan) == said
    assert len(check(np.array("x" * 100_000), math.nan) or "") == 2000
    assert "shape (2,)" in (check(np.array(["a", "b"]), 9500.0) or "")


@pytest.mark.parametrize(("wavelength", "unit"), [(0.13, None), (0.13, "nm"), (1.3, None)])
def test_a_short_wavelength_without_a_unit_is_ambiguous(
    tmp_path: Path, wavelength: float, unit: str | None
) -> None:
    with h5py.File(tmp_path / "run.nxs", "w") as h5:
        entry = h5.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        entry["data/data"] = np.ones((2, 8, 8), np.uint16)
        beam = entry.create_group("instrument/beam")
        beam.attrs["NX_class"], entry["data"].attrs["NX_class"] = "NXbeam", "NXdata"
        beam["incident_wavelength"] = wavelength
        if unit is not None:
            beam["incident_wavelength"].attrs["units"] = np.array([unit.encode()])
    path = str(tmp_path / "run.nxs")
    if (wavelength, unit) == (0.13, None):
        with pytest.raises(ValueError, match=r"0\.13 without units: angstrom or nm\?"):
            Hdf5Source(path)
    given = "nm" if wavelength < 1 else "angstrom"
    for source in [Hdf5Source(path, photon_energy_unit=given)] + (
        [] if (wavelength, unit) == (0.13, None) else [Hdf5Source(path)]
    ):
        assert [energy for _, _, energy in source.events()] == pytest.approx([9537.25] * 2, abs=1)
