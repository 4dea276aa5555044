"""The table of peaks that every finder returns, and the structure that they label with.

Shape legend: N panels of a batch, P panels of an event, H rows and W columns of a panel, M peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from peaknet_predict.types import Peaks

STRUCTURE_333: npt.NDArray[np.bool_] = np.zeros((3, 3, 3), dtype=np.bool_)
"""(3, 3, 3) bool: which neighbours (panel, y, x) of a pixel belong to the same component.

The eight neighbours within the panel and none in other panels: so one call labels a whole batch,
and components of neighbouring panels never join.
"""
STRUCTURE_333[1] = True
STRUCTURE_333.setflags(write=False)


@dataclass(frozen=True, slots=True, eq=False)
class PeakTable:
    """Peaks of a batch of panels, one row each, in host memory.

    Rows are ordered by panel, then in raster order of the component's first pixel.

    Attributes
    ----------
    panel
        (M,) int64, which of the N panels the peak is on.
    y, x
        (M,) float64, the unweighted mean of the component's pixel indices; 0-based, top-left
        origin, pixel centres on integers.
    num_pixels
        (M,) int64, how many pixels the component has.
    intensity_sum, intensity_max
        (M,) float64, sum and maximum over the component's pixels of the image that the finder was
        given, in its units, without NaN and infinite pixels: 0 and NaN where there is no other.
        None where the finder was given no image.
    """

    panel: npt.NDArray[np.int64]
    y: npt.NDArray[np.float64]
    x: npt.NDArray[np.float64]
    num_pixels: npt.NDArray[np.int64]
    intensity_sum: npt.NDArray[np.float64] | None = None
    intensity_max: npt.NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return int(self.panel.size)

    @classmethod
    def from_sums(
        cls,
        panel: npt.NDArray[np.int64],
        sum_y: npt.NDArray[np.int64],
        sum_x: npt.NDArray[np.int64],
        num_pixels: npt.NDArray[np.int64],
    ) -> PeakTable:
        """Make a table from exact integer sums; all arguments are (M,) int64.

        The sums stay far below 2**53, so they are exact in float64 too and each centroid is rounded
        once, in the division, as it is in `scipy.ndimage.center_of_mass`.
        """
        return cls(panel=panel, y=sum_y / num_pixels, x=sum_x / num_pixels, num_pixels=num_pixels)

    def split(self, panels_per_event: int, num_events: int) -> list[Peaks]:
        """Split the peaks by the events of the batch.

        Parameters
        ----------
        panels_per_event
            P; the event of a row is ``panel // P``, its panel there ``panel % P``.
        num_events
            How many events to return; peaks on later panels, the padding of a last batch that was
            not full, are left out.

        Returns
        -------
        list of Peaks
            For each event (M_i, 3) float64: panel, y, x.

        Raises
        ------
        ValueError
            If `panels_per_event` is not positive or `num_events` is negative.
        """
        if panels_per_event < 1 or num_events < 0:
            raise ValueError(
                f"cannot split into {num_events} events of {panels_per_event} panels each"
            )
        peaks_M3 = np.stack([self.panel % panels_per_event, self.y, self.x], axis=1)
        # Rows are sorted by panel: an event is a slice. Copied, so that a result which is kept
        # does not keep the whole batch's table alive.
        borders = np.searchsorted(self.panel, np.arange(num_events + 1) * panels_per_event)
        return [peaks_M3[begin:end].copy() for begin, end in pairwise(borders)]
