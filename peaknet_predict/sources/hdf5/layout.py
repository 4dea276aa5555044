"""What a file holds: datasets, their order, and their axes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import h5py
import numpy as np

from peaknet_predict.sources.base import SkippedFile
from peaknet_predict.sources.hdf5.axes import axes_of, channel_names
from peaknet_predict.sources.hdf5.files import LinkedFile, UnreadableError
from peaknet_predict.sources.hdf5.nexus import (
    NUMBERED,
    detectors,
    entry_of,
    find_frames,
    frames_of_group,
    join,
)

logger = logging.getLogger(__name__)

Join = Literal["events", "panels"]


@dataclass(frozen=True)
class Request:
    """What the user says about the layout; the fields are options of `Hdf5Source`."""

    data: str | list[str] | None
    join: Join | None
    axes: list[str] | None
    threshold: int | None
    panel_height: int | None


@dataclass(frozen=True)
class Layout:
    """The frames of one file.

    Attributes
    ----------
    names
        Datasets, one after the other (``join`` "events") or one for each panel ("panels").
    join
        How several datasets belong together.
    axes
        What each axis of each of them is.
    threshold
        Index along the axis of thresholds, None without one.
    panel_height
        Rows of a panel of a slab; None if panels are not stacked on each other.
    lengths
        Events of each dataset.
    image_shape
        (P, H, W) or (H, W).
    dtype
        Of the pixels.
    """

    names: tuple[str, ...]
    join: Join
    axes: tuple[str, ...]
    threshold: int | None
    panel_height: int | None
    lengths: tuple[int, ...]
    image_shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def num_events(self) -> int:
        """Events of the file."""
        return sum(self.lengths) if self.join == "events" else self.lengths[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of a frame of one dataset, as it is stored."""
        if self.panel_height is not None:
            panels, height, width = self.image_shape
            return (panels * height, width)
        return self.image_shape[1:] if self.join == "panels" else self.image_shape

    def __str__(self) -> str:
        many = len(self.names)
        names = self.names[0] if many == 1 else f"{self.names[0]} and {many - 1} more datasets"
        if many > 1:
            names += f", joined as {self.join}"
        *panels, slow, fast = self.image_shape
        parts = [f"panels {panels[0] if panels else 1}", f"slow {slow}", f"fast {fast}"]
        if self.threshold is not None:
            parts.append(f"threshold {self.threshold + 1}")
        return f"{names} ({', '.join(parts)}; {self.dtype})"


def find_layout(
    opened: LinkedFile, request: Request, skip: bool
) -> tuple[Layout, list[SkippedFile]]:
    """Find the frames of a file.

    Parameters
    ----------
    opened
        The file.
    request
        What the user says.
    skip
        Leave out datasets of a series that cannot be read.

    Returns
    -------
    layout, skipped
        The frames, and what was left out.

    Raises
    ------
    UnreadableError
        If a dataset is there by name alone.
    ValueError
        If there is no such dataset, or if it is ambiguous what belongs together or what an axis is.
    """
    names, how = _names(opened, request)
    # A list of the user's own may have gaps on purpose.
    gaps = [] if isinstance(request.data, list) else _gaps(opened, names)
    lost = [SkippedFile(opened.path, reason, None) for reason in gaps]
    kept: list[tuple[str, tuple[str, ...]]] = []
    for name in names:
        try:
            opened.dataset(name)
            kept.append((name, axes_of(opened, name, request.axes, request.threshold is not None)))
        except UnreadableError as error:
            lost.append(SkippedFile(opened.path, str(error), None))
    if lost and (not skip or how == "panels" or not kept):
        raise UnreadableError(lost[0].reason)
    first, axes = kept[0]
    threshold = _threshold(opened, first, axes, request.threshold)
    frames = {name: _frame_shape(opened, name, axes) for name, axes in kept}
    if len(set(frames.values())) > 1 or len({axes for _, axes in kept}) > 1:
        raise ValueError(
            f"{opened.path}: these datasets have frames of different shapes: "
            + ", ".join(f"{name} {opened.dataset(name).shape}" for name in frames)
        )
    lengths = [_num_events(opened, name, axes) for name in frames]
    if how == "panels" and (len(set(lengths)) > 1 or "panels" in axes):
        raise ValueError(
            f"{opened.path}: join: panels needs one panel, and as many events, in each dataset: "
            + ", ".join(f"{name} {opened.dataset(name).shape}" for name in frames)
        )
    shape = frames[first] if how == "events" else (len(frames), *frames[first])
    layout = Layout(
        tuple(frames),
        how,
        axes,
        threshold,
        request.panel_height,
        tuple(lengths),
        _cut(opened, first, shape, request.panel_height),
        opened.dataset(first).dtype,
    )
    missing = _announced(opened, first) - layout.num_events
    if len(lost) == 1 and missing > 0:
        lost = [replace(lost[0], events=missing)]
    elif not lost and missing > 0 and how == "events" and isinstance(request.data, str | None):
        logger.warning(
            "%s announces %d images, and %d are there",
            opened.path,
            layout.num_events + missing,
            layout.num_events,
        )
    return layout, lost


def _announced(opened: LinkedFile, name: str) -> int:
    """Return how many images a DECTRIS master announces; 0 if it does not say."""
    for detector in detectors(opened, entry_of(name)):
        counts = [
            opened.find(join(detector, "detectorSpecific", key)) for key in ("nimages", "ntrigger")
        ]
        if all(isinstance(count, h5py.Dataset) and count.size == 1 for count in counts):
            return int(np.prod([int(count[()].reshape(())) for count in counts]))
    return 0


def _names(opened: LinkedFile, request: Request) -> tuple[list[str], Join]:
    """Return the datasets with frames, and how they belong together."""
    data, how = request.data, request.join
    if data is None:
        return find_frames(opened), "events"
    if isinstance(data, str):
        name = join(data)
        if isinstance(opened.find(name), h5py.Group):
            names = frames_of_group(opened, name)
            if not names:
                raise ValueError(
                    f"{opened.path}: the group {name} has no frames. " + opened.inventory()
                )
            return names, "events"
        _warn_of_others(opened, name)
        return [name], "events"
    names = [join(name) for name in data]
    series = all(NUMBERED.fullmatch(name.rpartition("/")[2]) for name in names)
    if series and len({name.rpartition("/")[0] for name in names}) == 1:
        if how == "panels":
            raise ValueError(
                f"{names[0]} and its like are pieces of one series of events, not panels; leave "
                "out join: panels"
            )
        return names, "events"
    if how is None and len(names) > 1:
        raise ValueError(
            f"data names {len(names)} datasets: say with join: events that their events follow "
            "each other, or with join: panels that each holds one panel of every event"
        )
    return names, how or "events"


def _warn_of_others(opened: LinkedFile, name: str) -> None:
    """Warn if a dataset is one piece of a series whose other pieces are not read."""
    group, _, own = name.rpartition("/")
    others = frames_of_group(opened, group) if NUMBERED.fullmatch(own) else []
    if len(others) > 1:
        logger.warning(
            "%s: %s is one of %d pieces of a series; data: %s reads all of them",
            opened.path,
            name,
            len(others),
            group,
        )


def _gaps(opened: LinkedFile, names: Sequence[str]) -> list[str]:
    """Return a sentence for each number that is missing in a series of DECTRIS's datasets."""
    if len(names) == 1:
        return []
    numbers = [int(name[-6:]) for name in names if NUMBERED.fullmatch(name.rpartition("/")[2])]
    missing = sorted(set(range(1, max(numbers, default=0))) - set(numbers))
    group = names[0].rpartition("/")[0]
    return [f"{opened.path} has no {group}/data_{number:06d}" for number in missing]


def _threshold(
    opened: LinkedFile, name: str, axes: tuple[str, ...], wanted: int | None
) -> int | None:
    """Return the index of the chosen threshold; None if there is no axis of them."""
    if "thresholds" not in axes:
        if wanted is not None:
            raise ValueError(
                f"{opened.path}: {name} has the axes {', '.join(axes)}, so that there is no "
                "threshold to choose; leave out threshold"
            )
        return None
    number = opened.dataset(name).shape[axes.index("thresholds")]
    channels = channel_names(opened, name)
    if wanted is None:
        if number == 1:
            return 0
        said = f" ({', '.join(channels)})" if channels else ""
        raise ValueError(
            f"{opened.path}: {name} has frames for {number} thresholds{said}; choose one, e.g. "
            "threshold: 1"
        )
    if f"threshold_{wanted}" in channels:
        return channels.index(f"threshold_{wanted}")
    if channels or not 1 <= wanted <= number:
        listed = ", ".join(channels) or f"1 to {number}"
        raise ValueError(f"{opened.path}: {name} has no threshold {wanted}; it has {listed}")
    return wanted - 1


def _frame_shape(opened: LinkedFile, name: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    dataset = opened.dataset(name)
    if dataset.dtype.kind not in "iuf":
        raise ValueError(f"{opened.path}: {name} has dtype {dataset.dtype}, not real numbers")
    sizes = dict(zip(axes, dataset.shape, strict=True))
    return tuple(sizes[axis] for axis in ("panels", "slow", "fast") if axis in sizes)


def _num_events(opened: LinkedFile, name: str, axes: tuple[str, ...]) -> int:
    return int(opened.dataset(name).shape[axes.index("events")]) if "events" in axes else 1


def _cut(
    opened: LinkedFile, name: str, shape: tuple[int, ...], panel_height: int | None
) -> tuple[int, ...]:
    """Return the shape of an image, cut into panels if it is a slab."""
    if panel_height is None:
        return shape
    where = f"{opened.path}: {name} has frames of {shape}"
    if len(shape) != 2:
        raise ValueError(f"{where}; panel_height cuts one slab, and this has panels already")
    if shape[0] % panel_height:
        raise ValueError(
            f"{where}: {shape[0]} rows are not a multiple of panel_height={panel_height}"
        )
    return (shape[0] // panel_height, panel_height, shape[1])
