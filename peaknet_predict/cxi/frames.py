"""What CXI files of ours and of other programs have in common: frames, a mask, lists of peaks.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

PEAK_LISTS = ("nPeaks", "peakXPosRaw", "peakYPosRaw")
"""What a group of peak lists has at least."""


def open_cxi(path: str | Path) -> Any:
    """Open a finished file for reading; without a lock, which some file systems do not have.

    A file of ours is complete before it gets its name, and never changes behind it.

    Raises
    ------
    OSError
        If it cannot be opened as HDF5.
    """
    return h5py.File(path, "r", locking=False)


def panels_in(frames: Any) -> int:
    """Return how many panels a slab of a dataset (N, P*H, W) has; 1 where the file does not say."""
    return int(frames.parent.attrs.get("panels", 1))


def mask_beside(frames: Any) -> Any | None:
    """Return the dataset ``mask`` beside a dataset of frames, None if there is none.

    It has the frames' shape, or that of one frame for all events; 0 is a good pixel.
    """
    mask = frames.parent.get("mask")
    return mask if isinstance(mask, h5py.Dataset) else None


def index_of_event(dataset: Any, frames: Any, row: int) -> tuple[int, ...]:
    """Return where an event's part of a mask begins: nowhere in one that is of all events."""
    return (row,) if dataset.ndim == frames.ndim else ()


def read_peak_list(lists: Any, row: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the peaks of an event as a file lists them.

    Parameters
    ----------
    lists
        A group with `PEAK_LISTS`: (N,), and twice (N, most peaks).
    row
        The event's place in the file.

    Returns
    -------
    x, slab_y
        (M,) float64: fast and slow scan of the slab, in pixels, pixel centres on integers.
    """
    count = int(lists[PEAK_LISTS[0]][row])
    x, slab_y = (lists[name][row, :count].astype(np.float64) for name in PEAK_LISTS[1:])
    return x, slab_y
