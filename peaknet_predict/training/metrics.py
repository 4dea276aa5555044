"""How well a network finds the peaks of labelled shots, at many operating points at once.

Shape legend: B events, P panels of an event, H rows, W columns, M known peaks, T thresholds.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peaknet_predict.peaks import PeakTable, find_peaks
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.preprocess import Preprocess
from peaknet_predict.simulation.labels import IGNORED, PEAK

if TYPE_CHECKING:
    from peaknet_predict.peaks.finder import PeakFinder
    from peaknet_predict.simulation.shots import LabelledShots

MATCH_PX = 2.0
"""A peak found and a known one match within this distance, in pixels."""

WEAK_SNR, STRONG_SNR = 3.0, 5.0
"""Bounds of the bands in which recall is counted: weak peaks from the first to the second, strong
ones from there on. Fainter ones, and spots that their label calls no peak, are neither missed nor
false."""

MAX_FALSE_PER_BLANK = 0.1
"""Most false peaks per blank panel, on average, at an operating point: a blank shot must not become
a hit."""

THRESHOLDS = tuple(np.arange(-3.0, 5.01, 0.25).tolist())
"""Peak log odds above which a pixel counts as peak: the operating points that are compared."""

OPERATING_POINT = "peaknet_predict_operating_point"
"""Key of a checkpoint's figures from its last validation."""

_MAX_PEAKS_PER_PANEL = 2048
"""Room in the peak finder's table; panels with more peaks work too, but slowly."""

_DISTANCE_BINS = 200
"""Bins of the histogram that gives the median distance, 0.01 pixels wide."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one operating point achieves.

    Attributes
    ----------
    threshold
        Peak log odds above which a pixel counts as peak.
    precision
        Share of the listed peaks that are known ones; 1 if none is listed.
    recall
        Share of the peaks of at least `WEAK_SNR` that are found.
    recall_weak, recall_strong
        The same in the bands of `WEAK_SNR` and `STRONG_SNR`.
    f1
        Harmonic mean of precision and recall.
    false_per_blank
        Peaks listed on a panel without known ones, on average.
    centroid_px
        Median distance of a listed peak from the known one, pixels.
    """

    threshold: float
    precision: float
    recall: float
    recall_weak: float
    recall_strong: float
    f1: float
    false_per_blank: float
    centroid_px: float

    def __str__(self) -> str:
        return (
            f"at threshold {self.threshold:g} precision {self.precision:.3f}, recall of weak peaks "
            f"{self.recall_weak:.3f}, of strong {self.recall_strong:.3f}; "
            f"{self.false_per_blank:.3f} false a blank panel, centroids off by "
            f"{self.centroid_px:.2f} px"
        )

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


_COUNTS = ("weak", "weak_found", "strong", "strong_found", "listed", "true", "blank", "on_blank")


class Scores:
    """Counts over a set of shots for every threshold.

    Attributes
    ----------
    counts_TK
        (T, K) float64 tensor on the CPU: for each threshold what `_COUNTS` names, then the
        histogram of distances. Counts of several processes add up.
    """

    def __init__(self) -> None:
        self.counts_TK = torch.zeros(
            len(THRESHOLDS), len(_COUNTS) + _DISTANCE_BINS, dtype=torch.float64
        )
        self._finder: PeakFinder | None = None

    def add(
        self, odds_NHW: Tensor, valid_NHW: Tensor, shots: LabelledShots, preprocess: Preprocess
    ) -> None:
        """Find the peaks of a batch at every threshold, as prediction does, and count.

        Parameters
        ----------
        odds_NHW
            (N, H, W) float32 peak log odds of the prepared panels.
        valid_NHW
            (N, H, W) bool.
        shots
            The batch before preprocessing.
        preprocess
            What prepared the panels.
        """
        known_M3, known_of_panel = _flat_panels(shots)
        snr_M = shots.snr_M.cpu().numpy()
        labels_BPHW = shots.labels_BPHW.cpu().numpy()
        for row, threshold in enumerate(THRESHOLDS):
            table = self._find((odds_NHW > threshold) & valid_NHW)
            found_K3 = _in_original_frame(table, shots, preprocess)
            counts_K = _count(known_M3, snr_M, known_of_panel, found_K3, labels_BPHW)
            self.counts_TK[row] += torch.from_numpy(counts_K)

    def _find(self, class_map_NHW: Tensor) -> PeakTable:
        if class_map_NHW.device.type == "cuda":
            # On a GPU without CuPy training goes on; only validation takes longer.
            with contextlib.suppress(ImportError):
                return self._finder_for(class_map_NHW).enqueue(class_map=class_map_NHW).table()
        return find_peaks(class_map_NHW.cpu())

    def _finder_for(self, class_map_NHW: Tensor) -> PeakFinder:
        """Return the finder for all thresholds; the lowest ones find many peaks."""
        from peaknet_predict.peaks.finder import PeakFinder

        num_panels, height, width = class_map_NHW.shape
        finder = self._finder
        if finder is None or (finder.max_panels, finder.height, finder.width) != (
            num_panels,
            height,
            width,
        ):
            finder = PeakFinder(
                num_panels, height, width, _MAX_PEAKS_PER_PANEL, class_map_NHW.device
            )
            self._finder = finder
        return finder

    def figures(self) -> list[Figures]:
        """Return what each threshold achieves, in the order of `THRESHOLDS`."""
        return [
            _figures(threshold, counts_K)
            for threshold, counts_K in zip(THRESHOLDS, self.counts_TK.numpy(), strict=True)
        ]


def operating_point(figures: list[Figures]) -> Figures:
    """Return the figures with the best F1 among those that keep `MAX_FALSE_PER_BLANK`.

    A few false peaks among many harm an indexer less than too few peaks. If every threshold has
    more false peaks, only F1 counts.
    """
    quiet = [f for f in figures if f.false_per_blank <= MAX_FALSE_PER_BLANK]
    best = max((f.f1 for f in quiet), default=0.0)
    if best == 0:
        return max(figures, key=lambda f: f.f1)
    equals = [f for f in quiet if f.f1 == best]
    # The middle one, farthest from worse thresholds.
    return equals[len(equals) // 2]


def _flat_panels(
    shots: LabelledShots,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the known peaks by panel of the batch, (M, 3), and each panel's number of them."""
    events, panels = shots.images_BPHW.shape[:2]
    peaks_M4 = shots.peaks_M4.cpu().numpy().astype(np.float64)
    panel_M = peaks_M4[:, 0] * panels + peaks_M4[:, 1]
    known_M3 = np.column_stack([panel_M, peaks_M4[:, 2:]])
    return known_M3, np.bincount(panel_M.astype(np.int64), minlength=events * panels)


def _in_original_frame(
    table: PeakTable, shots: LabelledShots, preprocess: Preprocess
) -> npt.NDArray[np.float64]:
    """Return the peaks found, (K, 3): panel of the batch, y, x before preprocessing."""
    events, panels, height, width = shots.images_BPHW.shape
    shape_PHW = (panels, height, width)
    prepared_panels = preprocess.output_shape(shape_PHW)[0]
    found = []
    for event, peaks_K3 in enumerate(table.split(prepared_panels, events)):
        original_K3, _ = preprocess.to_original(peaks_K3, shape_PHW)
        found.append(original_K3 + np.array([event * panels, 0, 0]))
    return np.concatenate(found)


def _count(
    known_M3: npt.NDArray[np.float64],
    snr_M: npt.NDArray[np.float32],
    known_of_panel: npt.NDArray[np.int64],
    found_K3: npt.NDArray[np.float64],
    labels_BPHW: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float64]:
    index_M, distance_M = match_peaks(known_M3, found_K3, MATCH_PX)
    is_found_M = index_M >= 0
    labels_NHW = labels_BPHW.reshape(-1, *labels_BPHW.shape[2:])
    # The pixel that holds a peak's centre belongs to its disc.
    is_peak_M = labels_NHW[_pixels(known_M3, labels_NHW.shape)] == PEAK
    is_strong_M = is_peak_M & (snr_M >= STRONG_SNR)
    is_weak_M = is_peak_M & (snr_M >= WEAK_SNR) & ~is_strong_M
    is_true_K = np.zeros(len(found_K3), dtype=np.bool_)
    is_true_K[index_M[is_found_M]] = True
    # A peak at an ignored place (ice, a border) is neither true nor false.
    pixel_K = _pixels(found_K3, labels_NHW.shape)
    counts_K = is_true_K | (labels_NHW[pixel_K] != IGNORED)
    is_blank_N = known_of_panel == 0
    counts = (
        is_weak_M.sum(),
        (is_weak_M & is_found_M).sum(),
        is_strong_M.sum(),
        (is_strong_M & is_found_M).sum(),
        counts_K.sum(),
        is_true_K.sum(),
        is_blank_N.sum(),
        (counts_K & is_blank_N[pixel_K[0]]).sum(),
    )
    bins = np.histogram(distance_M[is_found_M], bins=_DISTANCE_BINS, range=(0, MATCH_PX))[0]
    return np.concatenate([np.array(counts, dtype=np.float64), bins])


def _pixels(places_K3: npt.NDArray[np.float64], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return panel, row and column of the pixels that hold places."""
    pixels_K3 = np.rint(places_K3).astype(np.int64)
    return tuple(np.clip(pixels_K3, 0, np.array(shape) - 1).T)


def _figures(threshold: float, counts_K: npt.NDArray[np.float64]) -> Figures:
    named = dict(zip(_COUNTS, counts_K[: len(_COUNTS)].tolist(), strict=True))
    known = named["weak"] + named["strong"]
    precision = _share(named["true"], named["listed"], 1.0)
    recall = _share(named["weak_found"] + named["strong_found"], known, 0.0)
    return Figures(
        threshold=threshold,
        precision=precision,
        recall=recall,
        recall_weak=_share(named["weak_found"], named["weak"], 0.0),
        recall_strong=_share(named["strong_found"], named["strong"], 0.0),
        f1=_share(2 * precision * recall, precision + recall, 0.0),
        false_per_blank=_share(named["on_blank"], named["blank"], 0.0),
        centroid_px=_median(counts_K[len(_COUNTS) :]),
    )


def _share(part: float, whole: float, of_nothing: float) -> float:
    return part / whole if whole else of_nothing


def _median(histogram: npt.NDArray[np.float64]) -> float:
    """Return the median of distances from their histogram, to half a bin; NaN if there are none."""
    if not histogram.sum():
        return float("nan")
    middle = int(np.searchsorted(histogram.cumsum(), histogram.sum() / 2))
    return (middle + 0.5) * MATCH_PX / _DISTANCE_BINS
