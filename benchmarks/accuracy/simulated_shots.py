"""How well peak finders find planted peaks, and whether a network is good enough to ship.

Prints a table a data set, in Markdown::

    python -m benchmarks.accuracy.simulated_shots --config configs/models/peaknet_small.yaml
        [--check] [--index 5] [--config PATH[@WEIGHTS] ...]
        [--data-sets default cspad] [--events 40] [--device cuda]

Every finder sees the same shots, and runs as `predict` runs it. Besides those of the configurations
there is `LocalSnr` with its defaults and with the best thresholds of a sweep; and, where it can be
made, "ideal": a filter that is told background, noise and bad pixels
(`benchmarks.accuracy.ideal`), at the threshold that finds most within the
asked precision. What is counted:

- A found peak belongs to a planted one within 2 pixels on the same panel, one to one, nearest
  first (`benchmarks.accuracy.matching`).
- Recall: share of the planted peaks that are found, by signal-to-noise ratio (height of the
  brightest pixel over the noise of the background).
- Precision: share of the found peaks that belong to a planted one, of whatever strength from 1
  sigma on. Peaks at random places would have the precision in the column "by chance".
- Ice, spots on bad pixels and spots of next to no photons, which the training simulator marks, are
  neither missed nor false.
- False peaks on panels of shots without a crystal.
- Distance of the found from the planted centre, peaks of 5 sigma and more.

- With ``--index N``, in the first N hits: whether the peaks show the crystal's lattice, by an
  orientation search with the known cell (`benchmarks.accuracy.lattice`).

The `+-` is one standard error, from the scatter between events. ``--check`` compares every network
with the thresholds of acceptance and exits with 1 if one is missed. Where "ideal" misses a recall,
nine tenths of what it has are asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.accuracy.data_sets import DATA_SETS, DataSet
from benchmarks.accuracy.finders import find, local_snr, make_module
from benchmarks.accuracy.ideal import THRESHOLDS
from benchmarks.accuracy.lattice import LatticeSearch
from benchmarks.accuracy.matching import BANDS, STRONG, Score, Share
from peaknet_predict.models import LocalSnr
from peaknet_predict.module import PeakNetModule
from peaknet_predict.types import Image, Peaks

Finder = Callable[[PeakNetModule, Sequence[Image]], list[Peaks | None]]

SWEEP = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 13.0)
"""Thresholds of `LocalSnr`, sigmas."""


MIN_STRONG, MIN_MIDDLE, MIN_PRECISION, MAX_FALSE, MAX_ERROR_PX = 0.95, 0.80, 0.97, 0.2, 0.3
"""Thresholds of acceptance: recall from 5 sigmas on and from 3 to 5, precision, false peaks on a
panel of a blank, median distance from the planted centre."""

MIN_OF_IDEAL = 0.9
"""Share of the ideal finder's recall that is asked for where that is below the threshold."""


@dataclass(slots=True)
class Candidate:
    """A finder by name.

    Attributes
    ----------
    name
        For tables.
    module
        The finder.
    is_network
        Whether it has to meet the thresholds of acceptance.
    """

    name: str
    module: PeakNetModule
    is_network: bool


def candidates(configs: Sequence[str]) -> list[Candidate]:
    """Make the finders of the configurations, and `LocalSnr` if none of them is that."""
    chosen = []
    for config in configs:
        module = make_module(config)
        name = Path(config.partition("@")[0]).stem
        is_network = not isinstance(module.net, LocalSnr)
        sha256 = getattr(module.net, "weights_sha256", None)
        if is_network:
            name += f" ({sha256[:8] if sha256 else 'random'})"
        chosen.append(Candidate(name, module, is_network))
    if all(candidate.is_network for candidate in chosen):
        chosen.append(Candidate("LocalSnr", local_snr(), False))
    return chosen


def swept(thresholds: Sequence[float]) -> list[Candidate]:
    """Make `LocalSnr` with other thresholds: one alone, and all three in their default ratio."""
    chosen = []
    for threshold in thresholds:
        grow = min(3.0, threshold)
        chosen.append(
            (f"threshold {threshold:g}", local_snr(threshold=threshold, grow_threshold=grow))
        )
        # At the default both are the same.
        if threshold != 5.0:
            factor = threshold / 5.0
            scaled = {"grow_threshold": 3.0 * factor, "min_support": 4.0 * factor}
            chosen.append((f"all x {factor:g}", local_snr(threshold=threshold, **scaled)))
    return [Candidate(f"LocalSnr, {name}", module, False) for name, module in chosen]


def score(data_set: DataSet, candidate: Candidate, finder: Finder) -> tuple[Score, list[Peaks]]:
    """Run a finder over a data set.

    Returns
    -------
    score, peaks
        And its peaks in the hits; an event that it refused has none.
    """
    hits = finder(candidate.module, [shot.image_PHW for shot in data_set.hits])
    blanks = finder(candidate.module, [shot.image_PHW for shot in data_set.blanks])
    found = [np.empty((0, 3)) if peaks is None else peaks for peaks in hits]
    result = counted(data_set, found, blanks)
    result.refused = sum(peaks is None for peaks in [*hits, *blanks])
    return result, found


def counted(data_set: DataSet, hits: Sequence[Peaks], blanks: Sequence[Peaks | None]) -> Score:
    """Compare peaks of a data set's hits and blanks with what was planted."""
    result = Score()
    for shot, peaks in zip(data_set.hits, hits, strict=True):
        size = shot.image_PHW.size
        result.add_hit(shot.peaks_M3, shot.snr_M, peaks, size, shot.ignored_PHW)
    for shot, some in zip(data_set.blanks, blanks, strict=True):
        if some is not None:
            result.add_blank(some, shot.image_PHW.shape[0], shot.ignored_PHW)
    return result


def ideal_score(data_set: DataSet) -> tuple[str, Score] | None:
    """Return what can be found at all, as precise as is asked for; None where it is not known."""
    if data_set.ideal is None:
        return None
    kinds = [
        [told.find(shot.image_PHW) for shot in shots]
        for told, shots in zip(data_set.ideal, (data_set.hits, data_set.blanks), strict=True)
    ]
    scores = {}
    for threshold in THRESHOLDS:
        hits, blanks = ([peaks[z >= threshold] for peaks, z in kind] for kind in kinds)
        scores[f"ideal, from {threshold:g} on"] = counted(data_set, hits, blanks)
    good = [
        pair
        for pair in scores.items()
        if pair[1].precision.value >= MIN_PRECISION
        and pair[1].false_per_blank_panel.value < MAX_FALSE
    ]
    return max(good or scores.items(), key=lambda pair: (pair[1].recall(STRONG).value, pair[1].f1))


def best_at_precision(
    scored: Sequence[tuple[Candidate, Score]], precision: float
) -> tuple[Candidate, Score] | None:
    """Return the candidate of the highest strong recall among those of at least that precision."""
    precise = [pair for pair in scored if pair[1].precision.value >= precision]
    return max(precise, key=lambda pair: pair[1].recall(STRONG).value, default=None)


def best_f1(scored: Sequence[tuple[Candidate, Score]]) -> tuple[Candidate, Score]:
    """Return the candidate of the highest F1, of precision and strong recall."""
    return max(scored, key=lambda pair: pair[1].f1)


@dataclass(slots=True)
class Check:
    """A threshold of acceptance on one data set: what was asked, what came, does it hold."""

    data_set: str
    finder: str
    asked: str
    came: str
    holds: bool


def checks(
    data_set: str,
    candidate: Candidate,
    its: Score,
    sweep: Sequence[tuple[Candidate, Score]],
    ideal: Score | None = None,
) -> list[Check]:
    """Compare a network with the thresholds of acceptance and with the best `LocalSnr`.

    A recall that the ideal finder misses is not asked for, but `MIN_OF_IDEAL` of the ideal's.
    """
    result = []

    def ask(asked: str, value: float, holds: bool, digits: int = 3) -> None:
        result.append(Check(data_set, candidate.name, asked, f"{value:.{digits}f}", bool(holds)))

    strong, middle = its.recall(STRONG).value, its.recall(3.0, 5.0).value
    precision, false = its.precision.value, its.false_per_blank_panel.value
    error = its.error_px(0.5)
    ask("no event refused", its.refused, its.refused == 0, 0)

    def limit_of(wanted: float, low: float, high: float = np.inf) -> tuple[float, str]:
        possible = ideal.recall(low, high).value if ideal is not None else 1.0
        if possible >= wanted:
            return wanted, f"recall >= {wanted}"
        limit = MIN_OF_IDEAL * possible
        return limit, f"recall >= {limit:.3f} ({wanted} is not possible, {possible:.3f} is)"

    limit, words = limit_of(MIN_STRONG, STRONG)
    ask(f"{words} from 5 sigma on", strong, strong >= limit)
    ask(f"precision >= {MIN_PRECISION}", precision, precision >= MIN_PRECISION)
    limit, words = limit_of(MIN_MIDDLE, 3.0, 5.0)
    ask(f"{words} at 3 to 5 sigma", middle, middle >= limit)
    ask(f"< {MAX_FALSE} false peaks a blank panel", false, false < MAX_FALSE)
    ask(f"centroid error <= {MAX_ERROR_PX} px, median", error, error <= MAX_ERROR_PX)

    best, other = best_f1(sweep)
    ask(f"F1 above {best.name} ({other.f1:.3f})", its.f1, its.f1 > other.f1)
    rival = best_at_precision(sweep, precision)
    if rival is None:
        ask("precision that no LocalSnr of the sweep has", precision, True)
        best, other = best_f1(sweep)
    else:
        best, other = rival
    against = f"{best.name} of precision {other.precision.value:.3f}"
    limit = other.recall(STRONG).value
    ask(f"strong recall above {against} ({limit:.3f})", strong, strong > limit)
    limit = other.recall(3.0, 5.0).value
    ask(f"recall at 3 to 5 sigma above {against} ({limit:.3f})", middle, middle > limit)
    limit = other.false_per_blank_panel.value
    ask(f"false peaks a blank panel not above {against} ({limit:.3f})", false, false <= limit)
    error, limit = its.errors_beside(other)
    ask(f"centroid error not above {against} ({limit:.3f} where both found)", error, error <= limit)
    return result


def _with_error(value: Share) -> str:
    return "-" if not value.whole else f"{value.value:.3f} +- {value.error:.3f}"


def _band_name(low: float, high: float) -> str:
    return f"> {low:g}" if np.isinf(high) else f"{low:g}-{high:g}"


def table(rows: Sequence[tuple[str, Score]]) -> str:
    """Return the table of a data set, Markdown."""
    columns = [
        "finder",
        *(f"recall {_band_name(*band)}" for band in BANDS),
        f"recall >= {STRONG:g}",
        "precision",
        "by chance",
        "F1",
        "false / blank panel",
        "centroid px, median (90 %)",
        "found / hit",
    ]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, its in rows:
        cells = [
            name,
            *(_with_error(its.recall(*band)) for band in BANDS),
            _with_error(its.recall(STRONG)),
            _with_error(its.precision),
            f"{np.mean(its.chance):.3f}" if its.chance else "-",
            f"{its.f1:.3f}",
            _with_error(its.false_per_blank_panel),
            f"{its.error_px(0.5):.2f} ({its.error_px(0.9):.2f})",
            f"{np.mean(its.listed):.1f}" if its.listed else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption(data_set: DataSet, its: Score) -> str:
    """Say what a data set holds."""
    shape = "x".join(str(size) for size in data_set.hits[0].image_PHW.shape)
    planted = ", ".join(
        f"{sum(count)} at {_band_name(*band)}"
        for band, count in zip(BANDS, its.planted, strict=True)
    )
    return (
        f"{len(data_set.hits)} hits and {len(data_set.blanks)} blanks of {shape} "
        f"{data_set.hits[0].image_PHW.dtype}; planted peaks by sigmas: {planted}"
        + (f"; {its.not_asked} of 5 and more are not asked for." if its.not_asked else ".")
    )


def index_table(
    data_set: DataSet, found: dict[str, list[Peaks]], num: int, device: str
) -> str | None:
    """Return how many of the first hits' lattices the finders' peaks show; None if not to be known.

    Parameters
    ----------
    data_set
        Needs a geometry and a cell.
    found
        Peaks of the hits by finder.
    num
        How many hits.
    device
        Where the search runs.
    """
    if data_set.geometry is None or data_set.cell is None or not num:
        return None
    search = LatticeSearch(data_set.cell, device=device)
    columns = ["finder", "hits", "indexed", "share of peaks indexed, median", "sigmas, median"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, peaks in found.items():
        verdicts = [
            search.judge(
                data_set.geometry.scattering_vectors(peaks_M3, shot.photon_energy_ev), 8, seed=k
            )
            for k, (shot, peaks_M3) in enumerate(zip(data_set.hits[:num], peaks, strict=False))
        ]
        cells = [name, str(len(verdicts)), str(sum(verdict.is_indexed for verdict in verdicts))]
        cells += [f"{np.median([verdict.fraction for verdict in verdicts]):.2f}"]
        cells += [f"{np.median([verdict.sigmas for verdict in verdicts]):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluate(
    data_set: DataSet,
    chosen: Sequence[Candidate],
    sweep: Sequence[Candidate],
    finder: Finder,
    index: int = 0,
    device: str = "cpu",
) -> list[Check]:
    """Print the tables of a data set and return the networks' checks."""
    scored, peaks = [], {}
    for candidate in chosen:
        its, peaks[candidate.name] = score(data_set, candidate, finder)
        scored.append((candidate, its))
    baselines = [(candidate, score(data_set, candidate, finder)[0]) for candidate in sweep]
    rows = [(candidate.name, its) for candidate, its in scored]
    ideal = ideal_score(data_set)
    if ideal is not None:
        rows.append(ideal)
    if baselines:
        best, its = best_f1(baselines)
        rows.append((f"best F1: {best.name}", its))
    found = []
    for candidate, its in scored:
        if not candidate.is_network or not baselines:
            continue
        rival = best_at_precision(baselines, its.precision.value)
        if rival is not None:
            rows.append((f"best as precise as {candidate.name}: {rival[0].name}", rival[1]))
        told = None if ideal is None else ideal[1]
        found += checks(data_set.name, candidate, its, baselines, told)
    print(f"\n### {data_set.name}\n\n{caption(data_set, rows[0][1])}\n\n{table(rows)}\n")
    for candidate, its in scored:
        missed = its.recall(STRONG).whole - its.recall(STRONG).part
        print(
            f"{candidate.name}: {missed} peaks of {STRONG:g} sigma and more missed, "
            f"{its.missed_crowded} of them with a stronger one within 5 px; "
            f"{its.refused} events refused."
        )
    peaks["planted, 3 sigma and more"] = [
        shot.peaks_M3[shot.snr_M >= 3.0] for shot in data_set.hits
    ]
    indexed = index_table(data_set, peaks, index, device)
    if indexed is not None:
        print("\n" + indexed)
    sys.stdout.flush()
    return found


def print_checks(found: Sequence[Check]) -> None:
    print("\n### thresholds of acceptance\n")
    print("| data set | finder | asked | came | holds |\n| --- | --- | --- | --- | --- |")
    for check in found:
        verdict = "yes" if check.holds else "**no**"
        print(f"| {check.data_set} | {check.finder} | {check.asked} | {check.came} | {verdict} |")
    print(f"\n{sum(check.holds for check in found)} of {len(found)} hold.")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", default=[], metavar="PATH[@WEIGHTS]")
    parser.add_argument("--data-sets", nargs="*", default=list(DATA_SETS), choices=DATA_SETS)
    parser.add_argument("--events", type=int, default=40, help="hits, and as many blanks")
    parser.add_argument("--seed", type=int, default=1912)
    parser.add_argument("--sweep", nargs="*", type=float, default=list(SWEEP))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", help="Lightning's; as in configs/topology by default")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--index", type=int, default=0, help="hits whose lattice is looked for")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a threshold is missed")
    arguments = parser.parse_args(words)

    def finder(module: PeakNetModule, images: Sequence[Image]) -> list[Peaks | None]:
        return find(module, images, arguments.device, arguments.precision, arguments.batch_size)

    chosen, sweep = candidates(arguments.config), swept(arguments.sweep)
    found: list[Check] = []
    for name in arguments.data_sets:
        started = time.monotonic()
        data_set = DATA_SETS[name](arguments.events, arguments.seed, arguments.device)
        made = time.monotonic()
        found += evaluate(data_set, chosen, sweep, finder, arguments.index, arguments.device)
        print(f"({made - started:.0f} s to make, {time.monotonic() - made:.0f} s to search)")
    if found:
        print_checks(found)
    if arguments.check:
        # Nothing asked is nothing shown.
        return 0 if found and all(check.holds for check in found) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
