"""Reading the images of one file, with their bad pixels."""

from __future__ import annotations

import logging

import numpy as np

from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError
from peaknet_predict.sources.hdf5.frames import READ_ERRORS, Frames
from peaknet_predict.sources.hdf5.layout import Layout
from peaknet_predict.sources.hdf5.masks import (
    MaskReader,
    axes_of_mask,
    find_masks,
    marked,
    read_marks,
)
from peaknet_predict.sources.hdf5.nexus import join
from peaknet_predict.sources.masks import Bits, Mask
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)


class Reader:
    """Reads the images of an open file.

    Parameters
    ----------
    opened
        The file.
    layout
        What is in it.
    mask
        Path of the mask, "auto" or "none".
    bits
        What its bits mean.

    Attributes
    ----------
    masks
        What is done about bad pixels, in words.
    """

    def __init__(self, opened: LinkedFile, layout: Layout, mask: str, bits: Bits) -> None:
        self._opened = opened
        self._layout = layout
        self._mask = mask
        self._bits = bits
        self._bounds = np.cumsum(layout.lengths) if layout.join == "events" else None
        self._part: int | None = None
        self._frames: list[Frames] = []
        self._masks: list[MaskReader | None] = []
        self._known: dict[str, MaskReader] = {}
        self._broken: dict[int, str] = {}
        self._equal: int | None = None
        self._below: float | None = None
        self.masks = "no mask of bad pixels"

    def check(self, with_masks: bool) -> None:
        """Raise an error unless every dataset can be read.

        Parameters
        ----------
        with_masks
            Read the masks too, and log which ones are not used.

        Raises
        ------
        UnreadableError
            If one cannot be read.
        ValueError
            If a mask does not fit.
        """
        for part in range(len(self._layout.lengths) if self._bounds is not None else 1):
            self._open(part, with_masks)
        self._part = None
        if with_masks:
            self._name_unused_masks()

    def read(self, record: int) -> Image:
        """Return an image; a masked array if it has pixels that the file declares bad.

        Raises
        ------
        UnreadableError
            If it cannot be read.
        """
        part = 0
        if self._bounds is not None:
            part = int(np.searchsorted(self._bounds, record, side="right"))
            record -= int(self._bounds[part]) - self._layout.lengths[part]
        if part in self._broken:
            raise UnreadableError(self._broken[part])
        try:
            if part != self._part:
                self._open(part)
            parts = [frames.read(record) for frames in self._frames]
            masks = [None if mask is None else mask.read(record) for mask in self._masks]
        except READ_ERRORS as error:
            if part != self._part:
                self._broken[part] = str(error)
            raise UnreadableError(str(error)) from error
        shape = self._layout.image_shape
        images = [image for image, _ in parts]
        image = (images[0] if len(images) == 1 else np.stack(images)).reshape(shape)
        bad = _union(
            _stack_masks([unmapped for _, unmapped in parts], shape),
            _stack_masks(masks, shape),
            marked(image, self._equal, self._below),
        )
        return image if bad is None else np.ma.MaskedArray(image, bad)

    def _open(self, part: int, with_masks: bool = True) -> None:
        """Open the datasets of a part of the events, and their masks."""
        layout, self._part = self._layout, None
        names = (layout.names[part],) if layout.join == "events" else layout.names
        self._frames = [Frames(self._opened, name, layout.axes, layout.threshold) for name in names]
        for frames, name in zip(self._frames, names, strict=True):
            if frames.shape != layout.stored_shape:
                raise UnreadableError(f"{name}: its frames have shape {frames.shape} now")
        self._equal, self._below = read_marks(self._opened, names[0], layout.dtype)
        self._masks = self._open_masks(names) if with_masks and self._mask != "none" else []
        self._part = part

    def _open_masks(self, names: tuple[str, ...]) -> list[MaskReader | None]:
        layout, first = self._layout, self._opened.dataset(names[0])
        if layout.join == "events":
            return [self._open_mask(names[0], layout.axes, first.shape, layout.image_shape)]
        apart = len({name.rpartition("/")[0] for name in names}) == len(names)
        if apart and self._mask == "auto":
            # A mask beside the frames of each panel.
            shape = layout.stored_shape
            return [self._open_mask(name, layout.axes, first.shape, shape) for name in names]
        events = layout.lengths[:1] if "events" in layout.axes else ()
        axes = ("events", "panels", "slow", "fast")[-len(events) - 3 :]
        return [self._open_mask(names[0], axes, events + layout.image_shape, layout.image_shape)]

    def _open_mask(
        self,
        frames: str,
        axes: tuple[str, ...],
        data_shape: tuple[int, ...],
        image_shape: tuple[int, ...],
    ) -> MaskReader | None:
        """Open the mask of a dataset of frames; None if there is none."""
        threshold = self._layout.threshold
        if self._mask == "auto":
            names, is_near = find_masks(self._opened, frames, threshold)
        else:
            names, is_near = [join(self._mask)], True
        for name in names:
            shape = self._opened.dataset(name).shape
            mask_axes = axes_of_mask(shape, axes, data_shape, image_shape)
            if mask_axes is None:
                continue
            mask = self._known.get(name)
            if mask is None:
                mask = MaskReader(self._opened, name, mask_axes, threshold, image_shape, self._bits)
                if mask.is_static:
                    self._known[name] = mask
            several = "" if mask.is_static else " in the first event"
            self.masks = f"{mask.num_bad} bad pixels{several} from {name}"
            return mask
        if is_near:
            shape = self._opened.dataset(names[0]).shape
            raise ValueError(
                f"{self._opened.path}: the mask {names[0]} has shape {shape}, which does not fit "
                f"the frames {frames} {data_shape}; name another dataset with the option mask, or "
                "go without it: mask: none"
            )
        return None

    def _name_unused_masks(self) -> None:
        """Warn of masks that are not used."""
        names, _ = find_masks(self._opened, self._layout.names[0], self._layout.threshold)
        used = next((name for name in names if self.masks.endswith(f"from {name}")), None)
        for name in names:
            if used is not None and _same(self._opened, name, used):
                continue
            logger.warning("%s: the mask %s is not used", self._opened.path, name)


def _same(opened: LinkedFile, one: str, other: str) -> bool:
    """Return whether two masks are the same dataset, or have the same values."""
    first, second = opened.dataset(one), opened.dataset(other)
    return first == second or (
        first.shape == second.shape and np.array_equal(first[()], second[()])
    )


def _stack_masks(masks: list[Mask | None], shape: tuple[int, ...]) -> Mask | None:
    """Return one mask, of an image's shape, from those of its panels; None if there is none."""
    if all(mask is None for mask in masks):
        return None
    if len(masks) == 1:
        return np.asarray(masks[0]).reshape(shape)
    good = np.zeros(shape[1:], np.bool_)
    return np.stack([good if mask is None else mask for mask in masks]).reshape(shape)


def _union(*masks: Mask | None) -> Mask | None:
    """Return where any of the masks is True; None if there is no mask."""
    given = [mask for mask in masks if mask is not None]
    return np.logical_or.reduce(given) if len(given) > 1 else (given[0] if given else None)
