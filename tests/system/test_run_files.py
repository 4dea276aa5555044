"""`run`: the peaks of files in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.sources import Simulator
from tests.helpers.commands import finish, start
from tests.helpers.input_files import KINDS

EVENTS, PANELS, HEIGHT, WIDTH = 7, 2, 160, 192

GEOMETRY = f"""
data = /entry_1/data_1/data
dim0 = %
dim1 = ss
dim2 = fs
bad_half/panel = p0
bad_half/min_fs = 0
bad_half/max_fs = {WIDTH // 2 - 1}
bad_half/min_ss = 0
bad_half/max_ss = {HEIGHT - 1}
""" + "".join(
    f"""
p{panel}/min_fs = 0
p{panel}/max_fs = {WIDTH - 1}
p{panel}/min_ss = {panel * HEIGHT}
p{panel}/max_ss = {(panel + 1) * HEIGHT - 1}
p{panel}/corner_x = 0
p{panel}/corner_y = 0
p{panel}/fs = x
p{panel}/ss = y
"""
    for panel in range(PANELS)
)


@pytest.fixture
def recorded(tmp_path: Path) -> Simulator:
    """Simulated events in two HDF5 files, each a slab of panels, and their geometry."""
    simulator = Simulator(
        num_events=EVENTS,
        panels=PANELS,
        height=HEIGHT,
        width=WIDTH,
        seed=5,
        hit_fraction=1.0,
        distance_m=0.05,
    )
    events = [simulator.event(idx) for idx in range(EVENTS)]
    (tmp_path / "run42").mkdir()
    for name, part in (("a", events[:4]), ("b", events[4:])):
        with h5py.File(tmp_path / "run42" / f"{name}.h5", "w") as file:
            slabs = np.stack([image.reshape(-1, WIDTH) for image, _ in part])
            file["/entry_1/data_1/data"] = slabs
            file["/LCLS/photon_energy_eV"] = [energy for _, energy in part]
    (tmp_path / "det.geom").write_text(GEOMETRY)
    return simulator


def listed(directory: Path) -> list[Any]:
    return [event for path in sorted(directory.glob("*.cxi")) for event in read_cxi(path)]


def test_files_become_cxi_files_in_one_command(recorded: Simulator, tmp_path: Path) -> None:
    """All that a run writes is in one folder, and its exit code is 0; a second run adds to it."""
    own = ("--source.panel_height", HEIGHT, "-c", "models/snr", "--min-peaks", 1)
    said = finish(start("run", "run42/*.h5", "-o", "peaks", *own, cwd=tmp_path))
    assert f"received {EVENTS} = predicted {EVENTS} + refused 0" in said
    events = listed(tmp_path / "peaks")
    assert len(events) > 3
    for event in events:
        np.testing.assert_array_equal(event.image, recorded.event(event.id.idx)[0])
    balance = json.loads((tmp_path / "peaks" / "predict_balance.json").read_text())
    assert balance["problem"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["det.geom", "peaks", "run42"]

    more = ("--geometry", "det.geom", "--threshold", 1.0)
    finish(start("run", "run42/*.h5", "-o", "masked", *own, *more, cwd=tmp_path))
    masked = listed(tmp_path / "masked")
    peaks = np.concatenate([event.peaks for event in masked])
    everywhere = np.concatenate([event.peaks for event in events])
    in_bad_half = (peaks[:, 0] == 0) & (peaks[:, 2] < WIDTH // 2)
    assert len(peaks)
    assert not in_bad_half.any(), "the geometry marks them as bad"
    assert ((everywhere[:, 0] == 0) & (everywhere[:, 2] < WIDTH // 2)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CSPAD, npz", "PILATUS, CBF", "EIGER, DECTRIS master"])
def test_other_kinds_of_files_run_too(kind: str, tmp_path: Path) -> None:
    written = KINDS[kind](tmp_path)
    own = ("-c", "models/snr") + (("--source.photon_energy_ev", 9500) if "npz" in kind else ())
    said = finish(start("run", written.path, "-o", tmp_path / "peaks", *own, cwd=tmp_path))
    assert f"predicted {len(written.images)} + refused 0" in said
