"""Reading what all CXI files have, ours and others: frames, a mask, lists of peaks.

Shape legend: N events of a file, P panels, H rows and W columns of a panel, M peaks of an event.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

PEAK_LISTS = ("nPeaks", "peakXPosRaw", "peakYPosRaw")
"""Datasets that every group of peak lists has."""


def open_cxi(path: str | Path) -> Any:
    """Open a finished file for reading, without a lock: some file systems have none.

    One of our files is complete before it gets its name, and never changes afterwards.

    Raises
    ------
    OSError
        If it cannot be opened as HDF5.
    """
    return h5py.File(path, "r", locking=False)


def panels_in(frames: Any) -> int:
    """Return how many panels a slab of a dataset (N, P*H, W) has; 1 if the file does not say."""
    return int(frames.parent.attrs.get("panels", 1))


def mask_beside(frames: Any) -> Any | None:
    """Return the dataset ``mask`` beside a dataset of frames, None if there is none.

    It has the frames' shape, or one frame's shape for all events; 0 is a good pixel.
    """
    mask = frames.parent.get("mask")
    return mask if isinstance(mask, h5py.Dataset) else None


def index_of_event(dataset: Any, frames: Any, row: int) -> tuple[int, ...]:
    """Return the index of an event's part of a mask; empty if one mask serves all events."""
    return (row,) if dataset.ndim == frames.ndim else ()


def read_peak_list(lists: Any, row: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the peaks that a file lists for an event.

    Parameters
    ----------
    lists
        A group with `PEAK_LISTS`, of shapes (N,), (N, most peaks) and (N, most peaks).
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
