"""Whether two networks find the same peaks: the gates, and a row of the table.

Shape legend: N panels, H rows and W columns of a panel, M peaks of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peaknet_predict.peaks import PeakTable, find_peaks

SAME_CLASS, MATCHED, COUNT_OFF = 0.9999, 0.998, 0.002
"""Gates: share of pixels in the same class, of peaks found again, and change of their number."""
MATCH_RADIUS = 0.25  # pixels
GATES = (
    f"gates: same class >= {SAME_CLASS}, matched within {MATCH_RADIUS} px >= {MATCHED},\n"
    f"number off by <= {COUNT_OFF:.1%}"
)
HEADER = ["same class", "matched", "peaks", "off", ""]


def centres(table: PeakTable, panels: int) -> list[Tensor]:
    """Return (M, 2) centres of each panel."""
    return [torch.from_numpy(peaks[:, 1:].copy()) for peaks in table.split(1, panels)]


def matched(wanted: list[Tensor], found: list[Tensor], radius: float) -> float:
    """Share of the wanted centres that have a found one within so many pixels."""
    hits = total = 0
    for these, those in zip(wanted, found, strict=True):
        total += len(these)
        if len(these) and len(those):
            hits += int((torch.cdist(these, those).min(1).values <= radius).sum())
    return hits / max(total, 1)


def compare(exact_NHW: Tensor, other_NHW: Tensor) -> tuple[list[str], bool]:
    """Return the columns of `HEADER` for two maps of classes, and whether they pass the gates."""
    panels = len(exact_NHW)
    same = float((exact_NHW == other_NHW).double().mean())
    exact, other = (centres(find_peaks(map_NHW), panels) for map_NHW in (exact_NHW, other_NHW))
    count, other_count = sum(map(len, exact)), sum(map(len, other))
    share = min(matched(exact, other, MATCH_RADIUS), matched(other, exact, MATCH_RADIUS))
    off = abs(other_count - count) / max(count, 1)
    passed = same >= SAME_CLASS and share >= MATCHED and off <= COUNT_OFF
    columns = [f"{same:.6f}", f"{share:.4f}", f"{other_count} of {count}", f"{off:.2%}"]
    return [*columns, "pass" if passed else "FAIL"], passed
