"""Found peaks against planted ones: what the matches add up to.

Shape legend, in addition to that of `peaknet_predict.types`: E events, F found peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.types import Peaks

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

RADIUS_PX = 2.0
"""A found and a planted peak may belong together within this distance, pixels."""

BANDS = ((2.0, 3.0), (3.0, 5.0), (5.0, 10.0), (10.0, np.inf))
"""Ranges of the planted peaks' signal-to-noise ratio for which recall is given, in sigmas."""

STRONG = 5.0
"""Sigmas from which a planted peak counts as one that a finder must find."""

CROWDED_PX = 5.0
"""Planted peaks with a stronger one within this distance, pixels, cannot always be told from it."""

# Panels are told apart by a distance that no radius reaches.
_APART = np.array([1e6, 1.0, 1.0])


def crowded(planted_M3: Peaks, snr_M: Floats) -> Mask:
    """Say of each planted peak whether a stronger one lies within `CROWDED_PX`; (M,) bool."""
    result_M = np.zeros(len(planted_M3), dtype=np.bool_)
    if len(planted_M3) < 2:
        return result_M
    pairs = cKDTree(planted_M3 * _APART).query_pairs(CROWDED_PX, output_type="ndarray")
    first_is_weaker = snr_M[pairs[:, 0]] <= snr_M[pairs[:, 1]]
    result_M[np.where(first_is_weaker, pairs[:, 0], pairs[:, 1])] = True
    return result_M


def _lies_in(peaks_M3: Peaks, mask_PHW: Mask | None, reach_px: int = 0) -> Mask:
    """Say of each peak whether a mask is set on its pixel or so many pixels beside it; (M,)."""
    if mask_PHW is None or not len(peaks_M3):
        return np.zeros(len(peaks_M3), dtype=np.bool_)
    offset = np.arange(-reach_px, reach_px + 1)
    panel_M, y_M, x_M = np.rint(peaks_M3).astype(np.int64).T
    _, height, width = mask_PHW.shape
    y_MK = np.clip(y_M[:, None] + offset, 0, height - 1)
    x_MK = np.clip(x_M[:, None] + offset, 0, width - 1)
    around = mask_PHW[panel_M[:, None, None], y_MK[:, :, None], x_MK[:, None, :]]
    return np.asarray(around.any(axis=(1, 2)))


class Share(NamedTuple):
    """A ratio of counts, and how far it may be off.

    Attributes
    ----------
    value
        The ratio; NaN of nothing.
    error
        Its standard error from the scatter between events: peaks of one event are not independent.
    part, whole
        The counts.
    """

    value: float
    error: float
    part: int
    whole: int


def share(part_E: Sequence[int], whole_E: Sequence[int]) -> Share:
    """Return the ratio of two sums over events, with the ratio estimator's standard error.

    Cochran, *Sampling Techniques*, 3rd ed. (1977), section 2.11: the residuals of the events about
    the ratio, over the sum of the denominators.
    """
    part, whole = np.array(part_E, dtype=np.float64), np.array(whole_E, dtype=np.float64)
    if not whole.sum():
        return Share(float("nan"), float("nan"), 0, 0)
    ratio = part.sum() / whole.sum()
    num = len(whole)
    spread = np.square(part - ratio * whole).sum() * num / max(num - 1, 1)
    return Share(
        float(ratio), float(np.sqrt(spread) / whole.sum()), int(part.sum()), int(whole.sum())
    )


@dataclass(slots=True)
class Score:
    """What a finder did on a data set, event by event.

    Hits are events with a crystal, blanks are events without.

    Attributes
    ----------
    listed, true
        Found peaks of each hit, and how many of them are matched to a planted peak of any strength
        that the truth lists.
    planted, found
        For each of `BANDS`, planted peaks of each hit, and how many of them were found.
    missed_crowded
        Planted peaks of at least `STRONG` that were missed and have a stronger one near by.
    errors_px
        Distance of each strong planted peak from its found one, pixels; NaN where it was missed.
    blank_peaks, blank_panels
        Found peaks of each blank, all false, and its panels.
    chance
        For each hit, the expected share of peaks at random places that would be near a planted one.
    refused
        Events that the finder could not take.
    not_asked
        Strong planted peaks that do not count: ice, on bad pixels, of next to no photons.
    """

    listed: list[int] = field(default_factory=list)
    true: list[int] = field(default_factory=list)
    planted: list[list[int]] = field(default_factory=lambda: [[] for _ in BANDS])
    found: list[list[int]] = field(default_factory=lambda: [[] for _ in BANDS])
    missed_crowded: int = 0
    errors_px: list[float] = field(default_factory=list)
    blank_peaks: list[int] = field(default_factory=list)
    blank_panels: list[int] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    refused: int = 0
    not_asked: int = 0

    def add_hit(
        self,
        planted_M3: Peaks,
        snr_M: Floats,
        found_F3: Peaks,
        num_pixels: int,
        ignored_PHW: Mask | None = None,
    ) -> None:
        """Count one event with a crystal.

        Parameters
        ----------
        planted_M3, snr_M
            All planted peaks, and their strengths in sigmas.
        found_F3
            The finder's.
        num_pixels
            Of the image.
        ignored_PHW
            Pixels where peaks are neither asked for nor false.
        """
        index_M, distance_M = match_peaks(planted_M3, found_F3, RADIUS_PX)
        matched_M = index_M >= 0
        # Ignored peaks take their found ones with them.
        asked_M, free_F = ~_lies_in(planted_M3, ignored_PHW), ~_lies_in(found_F3, ignored_PHW, 2)
        free_F[index_M[matched_M]] = asked_M[matched_M]
        self.not_asked += int((~asked_M & (snr_M >= STRONG)).sum())
        matched_M &= asked_M
        strong_M = (snr_M >= STRONG) & asked_M
        for (low, high), planted, found in zip(BANDS, self.planted, self.found, strict=True):
            in_band_M = (snr_M >= low) & (snr_M < high) & asked_M
            planted.append(int(in_band_M.sum()))
            found.append(int((in_band_M & matched_M).sum()))
        self.listed.append(int(free_F.sum()))
        self.true.append(int(matched_M.sum()))
        missed_M = strong_M & ~matched_M
        self.missed_crowded += int((missed_M & crowded(planted_M3, snr_M)).sum())
        self.errors_px += np.where(matched_M, distance_M, np.nan)[strong_M].tolist()
        self.chance.append(len(planted_M3) * np.pi * RADIUS_PX**2 / num_pixels)

    def add_blank(self, found_F3: Peaks, panels: int, ignored_PHW: Mask | None = None) -> None:
        """Count one event without a crystal; parameters as in `add_hit`."""
        self.blank_peaks.append(int((~_lies_in(found_F3, ignored_PHW, 2)).sum()))
        self.blank_panels.append(panels)

    def recall(self, low: float, high: float = np.inf) -> Share:
        """Return the recall over the bands that lie between two signal-to-noise ratios."""
        chosen = [k for k, band in enumerate(BANDS) if low <= band[0] and band[1] <= high]
        part = np.sum([self.found[k] for k in chosen], axis=0)
        whole = np.sum([self.planted[k] for k in chosen], axis=0)
        return share(part.tolist(), whole.tolist())

    @property
    def precision(self) -> Share:
        """Share of the found peaks of hits that are planted ones."""
        return share(self.true, self.listed)

    @property
    def f1(self) -> float:
        """Harmonic mean of the precision and the recall of strong peaks; 0 without any."""
        precision, recall = self.precision.value, self.recall(STRONG).value
        total = precision + recall
        return 2.0 * precision * recall / total if total > 0 else 0.0

    @property
    def false_per_blank_panel(self) -> Share:
        """Found peaks of blanks over their panels."""
        return share(self.blank_peaks, self.blank_panels)

    def error_px(self, quantile: float) -> float:
        """Return a quantile of the strong peaks' centroid errors, pixels; NaN without any."""
        return _quantile(np.array(self.errors_px), quantile)

    def errors_beside(self, other: Score) -> tuple[float, float]:
        """Return two finders' median centroid errors in the strong peaks that both found, pixels.

        Who finds more finds fainter ones, whose places are less certain. ``other`` is of the same
        data set.
        """
        ours, theirs = np.array(self.errors_px), np.array(other.errors_px)
        both = np.isfinite(ours) & np.isfinite(theirs)
        return _quantile(ours[both], 0.5), _quantile(theirs[both], 0.5)


def _quantile(values: Floats, quantile: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, quantile)) if len(known) else float("nan")
