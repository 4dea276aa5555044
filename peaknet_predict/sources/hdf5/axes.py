"""What each axis of a dataset with frames is: events, panels, thresholds, slow and fast scan."""

from __future__ import annotations

import re
from collections.abc import Sequence

import h5py

from peaknet_predict.sources.hdf5.files import LinkedFile
from peaknet_predict.sources.hdf5.nexus import detectors, entry_of, find_groups, join, text, texts

AXES = ("events", "panels", "thresholds", "slow", "fast")

_CXI = re.compile(r"/?entry_\d+/(data|image|instrument)_\d+/")
_WORDS = {
    "events": r"experiment_identifier|translation|(image|frame|event|shot|pulse|train)\w*",
    "panels": r"module(_identifier)?s?|panels?",
    "thresholds": r"channels?|thresholds?",
    "slow": r"y|ss|slow(_scan)?",
    "fast": r"x|fs|fast(_scan)?",
}


def axes_of(
    opened: LinkedFile, name: str, stated: Sequence[str] | None, choosing: bool
) -> tuple[str, ...]:
    """Return what each axis of a dataset is.

    Parameters
    ----------
    opened
        The file.
    name
        Path of the dataset, of two or more dimensions.
    stated
        What the user says they are; None looks in the file.
    choosing
        Whether the user has chosen a threshold, which implies an axis of thresholds.

    Returns
    -------
    tuple of str
        Of `AXES`, one for each dimension.

    Raises
    ------
    ValueError
        If that is ambiguous, or is not what the user says.
    """
    dataset = opened.dataset(name)
    where = f"{opened.path}: {name} has shape {dataset.shape}"
    if stated is not None:
        if len(stated) != dataset.ndim:
            raise ValueError(f"{where}, but axes names {len(stated)}: {', '.join(stated)}")
        return tuple(stated)
    said = _said(opened, name, dataset)
    if said is not None:
        return said
    if dataset.ndim == 2:
        return ("slow", "fast")
    if dataset.ndim == 3:
        return ("events", "slow", "fast")
    if dataset.ndim == 4:
        return ("events", _second(opened, name, dataset, choosing), "slow", "fast")
    raise ValueError(
        f"{where}; expected (events, slow, fast), perhaps with panels or thresholds behind the "
        f"events. Say with the option axes what its axes are, of {', '.join(AXES)}"
    )


def channel_names(opened: LinkedFile, name: str) -> list[str]:
    """Return the names of the thresholds of a dataset, none if the file does not name them."""
    scale = opened.find(join(name.rpartition("/")[0], "channel"))
    return texts(scale[()]) if isinstance(scale, h5py.Dataset) else []


def _said(opened: LinkedFile, name: str, dataset: h5py.Dataset) -> tuple[str, ...] | None:
    """Return the attribute ``axes`` of the dataset (CXI) or of its group (NeXus)."""
    group = opened.find(name.rpartition("/")[0] or "/")
    words: list[str] = []
    if "axes" in dataset.attrs:
        words = [word for one in texts(dataset.attrs["axes"]) for word in one.split(":")]
    elif text(group.attrs.get("signal", "")) == name.rpartition("/")[2] and "axes" in group.attrs:
        words = texts(group.attrs["axes"])
    if len(words) != dataset.ndim or dataset.ndim < 3:
        return None
    # NeXus writes "." for an axis without a scale; the last two are those of the image.
    kinds = [_kind(word) for word in words[:-2]] + ["slow", "fast"]
    return None if None in kinds or len(set(kinds)) < len(kinds) else tuple(map(str, kinds))


def _kind(word: str) -> str | None:
    return next((k for k, words in _WORDS.items() if re.fullmatch(words, word, re.I)), None)


def _second(opened: LinkedFile, name: str, dataset: h5py.Dataset, choosing: bool) -> str:
    """Return what the second of four axes is: panels or thresholds."""
    number = dataset.shape[1]
    if choosing:
        return "thresholds"
    entry = entry_of(name)
    thresholds = modules = 0
    for detector in detectors(opened, entry):
        channels = find_groups(opened, detector, "NXdetector_channel", r"\w+_channel")
        energies = opened.find(join(detector, "threshold_energy"))
        count = energies.size if isinstance(energies, h5py.Dataset) else 0
        thresholds += number in (len(channels), count)
        modules += number == len(find_groups(opened, detector, "NXdetector_module", r"module_?\d+"))
    if thresholds and not modules:
        return "thresholds"
    if number == 1 or (not thresholds and (modules or _CXI.match(name))):
        return "panels"
    raise ValueError(
        f"{opened.path}: {name} has shape {dataset.shape}, and nothing in the file says what its "
        f"second axis is. If these are {number} panels of each event, set "
        "axes: [events, panels, slow, fast]; if they are thresholds, choose one, e.g. threshold: 1"
    )
