"""How well the peaks in the CXI files match those that the simulator planted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np

from peaknet_predict.callbacks.cxi_output import CxiOutput
from peaknet_predict.callbacks.find_callback import find_callback
from peaknet_predict.cxi.file import read_cxi
from peaknet_predict.data import QueueDataModule
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.sources import Simulator

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PlantedPeakCounts:
    """Counts over a run, from which recall and precision follow.

    Attributes
    ----------
    planted, found
        Planted peaks at or above the given signal-to-noise ratio, and how many of them were found.
    listed, true
        Peaks in the files, and how many of them lie at a planted peak of any strength.
    """

    planted: int = 0
    found: int = 0
    listed: int = 0
    true: int = 0

    @property
    def recall(self) -> float:
        """Share of the planted peaks that were found; NaN without planted peaks."""
        return self.found / self.planted if self.planted else float("nan")

    @property
    def precision(self) -> float:
        """Share of the listed peaks that were planted; NaN without listed peaks."""
        return self.true / self.listed if self.listed else float("nan")


class PlantedPeakScore(L.Callback):
    """Compare the CXI files of a simulated run with the truth, and log recall and precision.

    Events of another source have no planted peaks, which the log says.

    List it behind `CxiOutput`. It reads the files back, so it judges what a user gets.

    Parameters
    ----------
    min_snr
        A planted peak whose brightest pixel stands fewer sigmas above the background does not count
        as missed.
    radius_px
        A listed and a planted peak match within this distance, in pixels.

    Attributes
    ----------
    score
        The result, once the run has ended.
    """

    def __init__(self, min_snr: float = 8.0, radius_px: float = 2.0) -> None:
        self.min_snr = min_snr
        self.radius_px = radius_px
        self.score: PlantedPeakCounts | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin a new run."""
        self.score = None

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the files back and log the score."""
        if not trainer.is_global_zero:
            return
        datamodule = getattr(trainer, "datamodule", None)
        output = find_callback(trainer, CxiOutput)
        simulator = datamodule.source if isinstance(datamodule, QueueDataModule) else None
        if not isinstance(simulator, Simulator):
            log.info("no planted peaks to compare with: the events are not the Simulator's")
            return
        if output is None or output.report is None:
            raise ValueError(
                "PlantedPeakScore compares planted peaks with the files of a CxiOutput: list one "
                "before it"
            )
        report = output.report
        files = report.run_files or report.cxi.files
        self.score = score_files(files, simulator, self.min_snr, self.radius_px)
        log.info(
            "planted peaks of at least %g sigma: %d of %d found (recall %.3f); "
            "listed peaks: %d of %d planted (precision %.3f)",
            self.min_snr,
            self.score.found,
            self.score.planted,
            self.score.recall,
            self.score.true,
            self.score.listed,
            self.score.precision,
        )


def score_files(
    paths: list[Path], simulator: Simulator, min_snr: float, radius_px: float
) -> PlantedPeakCounts:
    """Compare CXI files with everything a simulator planted; parameters as in `PlantedPeakScore`.

    All planted peaks of events that are in no file, because they were filtered, count as missed.
    """
    listed = {event.id.idx: event.peaks for path in paths for event in read_cxi(path)}
    score = PlantedPeakCounts()
    for idx in range(len(simulator)):
        planted = simulator.planted_peaks(idx)
        peaks = listed.get(idx, np.empty((0, 3)))
        strong = planted.snr >= min_snr
        index, _ = match_peaks(planted.peaks, peaks, radius_px)
        matched = index >= 0
        score.planted += int(strong.sum())
        score.found += int((matched & strong).sum())
        score.listed += len(peaks)
        score.true += int(matched.sum())
    return score
