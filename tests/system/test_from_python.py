"""The way in from Python gives what the command line gives, to the last bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import numpy as np
import pytest

from peaknet_predict import FilesDataModule, find_peaks, load_model
from peaknet_predict.sources import Simulator
from tests.helpers.commands import environment, finish, start
from tests.helpers.paths import CONFIGS, REPOSITORY


@pytest.mark.slow
def test_what_the_page_shows(tmp_path: Path) -> None:
    """All blocks of docs/python.md, one after the other, as a notebook would run them."""
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) > 6
    (tmp_path / "page.py").write_text("\n".join(blocks))
    ran = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 of 4 events are refused: event 3: no pixel of the image is finite" in ran.stdout
    assert "fed 4 events in" in ran.stdout


def test_the_peaks_of_the_demo(tmp_path: Path) -> None:
    shots = {"num_events": 5, "panels": 2, "height": 192, "width": 256}
    options = [f"--data.init_args.source.init_args.{name}={n}" for name, n in shots.items()]
    configs = ("-c", CONFIGS / "demo.yaml", "-c", CONFIGS / "topology" / "cpu.yaml")
    command = start("predict", *configs, *options, "--output.min_peaks", 0, cwd=tmp_path)
    assert "written 5" in finish(command)
    (path,) = (tmp_path / "demo_output").glob("*.cxi")
    with h5py.File(path) as file:
        lists = file["entry_1/result_1"]
        written = [lists[f"peak{axis}PosRaw"][()] for axis in "XY"]
        assert lists["nPeaks"].shape == (5,)

    simulator = Simulator(seed=1, **shots)  # type: ignore[arg-type]
    model = load_model("peaknet_small")
    images = np.stack([image for _, image, _ in simulator.events()])
    tables = find_peaks(images, model)
    assert sum(map(len, tables)) > 50
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    handles: Any = trainer.predict(model, FilesDataModule(simulator, batch_size=2))
    results = [result for handle in handles for result in handle.result().results]
    for idx, (table, result) in enumerate(zip(tables, results, strict=True)):
        peaks = np.stack([table["panel"], table["y"], table["x"]], axis=1)
        assert np.array_equal(peaks, result.peaks)
        # A file has the strongest first, of panels that are stacked.
        panel, y, x = peaks[np.argsort(-table["intensity"], kind="stable")].T
        for ours, theirs in ((x, written[0]), (panel * 192 + y, written[1])):
            assert np.array_equal(ours.astype(theirs.dtype), theirs[idx, : len(table)])
            assert not theirs[idx, len(table) :].any()
