"""Masks of bad pixels that files hold, and what their bits mean."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from peaknet_predict.pixels import MAX_BAD, find_masked

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
"""True where a pixel is bad, of the shape of an image."""


class Bits(NamedTuple):
    """Which bits of a mask mean what, as in CrystFEL's geometry files.

    A pixel is bad if it has any bit of ``bad``, or lacks one of ``good``. The parameters are the
    user's settings; None stands for the rule of CXI and NeXus, where any bit marks a bad pixel.
    """

    good: int | None
    bad: int | None

    def find_bad(self, values: npt.NDArray[np.integer]) -> Mask:
        """Return where a mask says that pixels are bad."""
        return find_masked(values, self.good, self.bad)

    def check_share(self, bad: Mask, where: str) -> None:
        """Raise an error if a mask marks most pixels and the user has not said what its bits mean.

        Masks with 1 for good pixels are as common as masks with 1 for bad ones, and nothing in a
        file tells them apart.
        """
        number = int(np.count_nonzero(bad))
        if self == Bits(None, None) and number > MAX_BAD * bad.size:
            raise ValueError(
                f"{where} has {number} of {bad.size} pixels that are not 0, which usually marks "
                "bad ones. If its 1 marks good pixels, set mask_good: 1 and mask_bad: 0; if they "
                "are bad, set mask_bad: 0xffffffff; to go without it, set mask: none"
            )
        if number == bad.size:
            raise ValueError(f"{where} leaves no pixel: are mask_good and mask_bad its bits?")
        if number > MAX_BAD * bad.size:
            logger.warning(
                "%s leaves out %d of %d pixels: are mask_good and mask_bad its bits?",
                *(where, number, bad.size),
            )
