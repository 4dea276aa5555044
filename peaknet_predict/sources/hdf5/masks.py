"""Bad pixels in a file: masks beside the frames, and values that mark bad pixels."""

from __future__ import annotations

import h5py
import numpy as np

from peaknet_predict.sources.hdf5.axes import channel_names
from peaknet_predict.sources.hdf5.files import LinkedFile
from peaknet_predict.sources.hdf5.frames import Frames
from peaknet_predict.sources.hdf5.nexus import detectors, entry_of, join
from peaknet_predict.sources.masks import Bits, Mask
from peaknet_predict.types import Image


def find_masks(opened: LinkedFile, frames: str, threshold: int | None) -> tuple[list[str], bool]:
    """Look for masks of a dataset of frames.

    Returns
    -------
    names, is_near
        The datasets that may be masks of these frames, the nearest first, and whether the first one
        must be: it lies beside the frames, or belongs to the only detector.
    """
    beside = [join(frames.rpartition("/")[0], name) for name in ("mask", "pixel_mask")]
    groups = detectors(opened, entry_of(frames))
    places = list(beside)
    for detector in groups:
        if threshold is not None and (channels := channel_names(opened, frames)):
            places.append(join(detector, f"{channels[threshold]}_channel", "pixel_mask"))
        places += [
            join(detector, name) for name in ("pixel_mask", "mask", "detectorSpecific/pixel_mask")
        ]
    found = []
    for name in dict.fromkeys(places):
        item = opened.find(name)
        if isinstance(item, h5py.Dataset) and item.ndim >= 2:
            found.append(name)
    return found, bool(found) and (found[0] in beside or len(groups) == 1)


class MaskReader:
    """The masks of a file's events: one for all of them, or one for each.

    Parameters
    ----------
    opened
        The file.
    name
        Path of the mask.
    axes
        What each of its axes is, see `axes_of_mask`.
    threshold
        Index along the axis of thresholds.
    image_shape
        (P, H, W) or (H, W) of an image.
    bits
        What its bits mean.

    Attributes
    ----------
    num_bad
        Bad pixels in the first mask.

    Raises
    ------
    UnreadableError
        If it cannot be read.
    ValueError
        If it marks more pixels than is credible, see `Bits.check_share`.
    """

    def __init__(
        self,
        opened: LinkedFile,
        name: str,
        axes: tuple[str, ...],
        threshold: int | None,
        image_shape: tuple[int, ...],
        bits: Bits,
    ) -> None:
        dtype = opened.dataset(name).dtype
        if dtype.kind not in "biuf":
            raise ValueError(
                f"{opened.path}: the mask {name} has dtype {dtype}, not integers; name another "
                "dataset with the option mask, or go without it: mask: none"
            )
        self._bits = bits
        self._image_shape = image_shape
        self._frames = Frames(opened, name, axes, threshold if "thresholds" in axes else None)
        first = self._find_bad(0)
        self.is_static = len(self._frames) == 1
        self._static = first if self.is_static else None
        self.num_bad = int(np.count_nonzero(first))
        bits.check_share(first, f"{opened.path}: the mask {name}")

    def read(self, record: int) -> Mask:
        """Return the mask of an event.

        Raises
        ------
        UnreadableError
            If it cannot be read.
        """
        return self._find_bad(record) if self._static is None else self._static

    def _find_bad(self, record: int) -> Mask:
        values, _ = self._frames.read(record)
        return self._bits.find_bad(values).reshape(self._image_shape)


def axes_of_mask(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    data_shape: tuple[int, ...],
    image_shape: tuple[int, ...],
) -> tuple[str, ...] | None:
    """Return what each axis of a mask is, by comparison with the frames; None if it does not fit.

    Parameters
    ----------
    shape
        Of the mask.
    axes, data_shape
        Of the frames as they are stored.
    image_shape
        (P, H, W) or (H, W) of an image made of them.
    """
    if shape == data_shape:
        return axes
    for dropped in (("events",), ("events", "thresholds")):
        kept = [k for k, axis in enumerate(axes) if axis not in dropped]
        of_frame = tuple(data_shape[k] for k in kept)
        if shape == of_frame:
            return tuple(axes[k] for k in kept)
        if shape == (1, *of_frame):
            return ("events", *(axes[k] for k in kept))
    # Panels stacked on each other in one of the two, and one after the other in the other.
    if axes[-2:] != ("slow", "fast"):
        return None
    slab = (int(np.prod(image_shape[:-1])), image_shape[-1])
    several = (data_shape[axes.index("events")], 1) if "events" in axes else (1,)
    for like, names in (
        (image_shape, ("panels", "slow", "fast")[-len(image_shape) :]),
        (slab, ("slow", "fast")),
    ):
        if shape == like:
            return names
        if shape[1:] == like and shape[0] in several:
            return ("events", *names)
    return None


def marked(image: Image, equal: int | None, below: float | None) -> Mask | None:
    """Return the pixels whose values mark them as bad, by what a detector's metadata says.

    Parameters
    ----------
    image
        Detector counts.
    equal
        The value that marks a bad pixel.
    below
        The least value that a pixel can measure.
    """
    bad: Mask | None = None
    if equal is not None:
        bad = image == equal
    if below is not None:
        low = image < below
        bad = low if bad is None else bad | low
    return bad if bad is not None and bad.any() else None


def read_marks(
    opened: LinkedFile, frames: str, dtype: np.dtype[np.generic]
) -> tuple[int | None, float | None]:
    """Return the value that marks bad pixels and the least value of a good one, where files say so.

    DECTRIS detectors mark with the largest value of ``bit_depth_image`` bits, which is not the
    largest of the dtype where counts are stored in wider integers. NeXus has ``underload_value``.
    """
    equal: int | None = None
    below: float | None = None
    for detector in detectors(opened, entry_of(frames)):
        depth = opened.find(join(detector, "detectorSpecific/bit_depth_image"))
        depth = opened.find(join(detector, "bit_depth_image")) if depth is None else depth
        if isinstance(depth, h5py.Dataset) and depth.size == 1 and dtype.kind in "iu":
            bits = int(depth[()].reshape(()))
            equal = 2**bits - 1 if 0 < bits < 8 * dtype.itemsize else None
        lowest = opened.find(join(detector, "underload_value"))
        # Not for calibrated counts in floating point: their noise goes below it.
        if isinstance(lowest, h5py.Dataset) and lowest.size == 1 and dtype.kind in "iu":
            below = float(lowest[()].reshape(()))
    return equal, below
