"""Bad pixels from a CrystFEL geometry file.

Only settings about bad pixels are read, as crystfel_geometry(5) describes them: panels and their
place in the data, ``no_index``, ``mask_edge_pixels``, bad regions, masks in files of their own,
``flag_lessthan``, ``flag_morethan`` and ``flag_equal``. The library for the format, cfel_fmt, needs
pandas, is under the GPL, and stops at units behind numbers, which CrystFEL's own examples have.

Shape legend: S rows (slow scan) and F columns (fast scan) of a panel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peaknet_predict.pixels import find_masked
from peaknet_predict.preprocess.validity import StaticMask

Mask = npt.NDArray[np.bool_]
Index = tuple[int | slice, ...]
LoadMask = Callable[[Path, str], npt.NDArray[np.integer]]
"""Reads a dataset of a mask file."""

_NUMBER = re.compile(r"[+-]?(0x[0-9a-f]+|(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)
_TERM = re.compile(r"([+-]?)\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)?\s*([xyz])", re.IGNORECASE)
_DIM = re.compile(r"dim(\d+)")
_MASK = re.compile(r"mask(\d)_data")
_SHORT = {"mask": "data", "mask_file": "file", "mask_good": "goodbits", "mask_bad": "badbits"}
_FLAGS = ("flag_lessthan", "flag_morethan", "flag_equal")


class _Panel:
    """A panel's settings: its own, and the defaults above it in the file."""

    def __init__(self, name: str, defaults: dict[str, str], flags: set[tuple[str, float]]) -> None:
        self.name = name
        self.settings = dict(defaults)
        self.flags = set(flags)

    def number(self, key: str, default: float | None = None) -> float:
        text = self.settings.get(key)
        if text is None:
            if default is None:
                raise ValueError(f"panel {self.name} has no {key}")
            return default
        return _number(text, f"{self.name}/{key}")

    def index(self) -> Index:
        """Return the panel's place in the data of one event."""
        scans = {
            f"{scan}": slice(int(self.number(f"min_{scan}")), int(self.number(f"max_{scan}")) + 1)
            for scan in ("ss", "fs")
        }
        dims = {int(m[1]): self.settings[m[0]] for m in map(_DIM.fullmatch, self.settings) if m}
        entries = [dims[k] for k in sorted(dims) if dims[k] != "%"] or ["ss", "fs"]
        if [entry for entry in entries if entry in scans] != ["ss", "fs"]:
            raise ValueError(f"panel {self.name}: of its dims, ss must come before fs")
        return tuple(scans[e] if e in scans else int(_number(e, "dim")) for e in entries)

    def positions(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return x and y of every pixel, (S, F) each, in pixels from the beam."""
        fs, ss = (_direction(self.settings.get(key, ""), self.name) for key in ("fs", "ss"))
        rows, columns = (place for place in self.index() if isinstance(place, slice))
        s_SF, f_SF = np.mgrid[: rows.stop - rows.start, : columns.stop - columns.start]
        corner = self.number("corner_x"), self.number("corner_y")
        x_SF, y_SF = (f_SF * fs[k] + s_SF * ss[k] + corner[k] for k in (0, 1))
        return x_SF, y_SF


def read_geometry_mask(path: Path, load_mask: LoadMask) -> StaticMask:
    """Read bad pixels from a geometry file; pixels that belong to no panel are bad.

    Parameters
    ----------
    path
        The file.
    load_mask
        Reads the masks that the file names.

    Raises
    ------
    ValueError
        If a setting about bad pixels cannot be understood, or differs between panels where it must
        not; the message names the file.
    OSError
        If the file or a mask cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        panels, regions = _parse(text)
        return _combine(path, panels, regions, load_mask)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(text: str) -> tuple[dict[str, _Panel], dict[str, dict[str, str]]]:
    """Return panels and bad regions by name."""
    panels: dict[str, _Panel] = {}
    regions: dict[str, dict[str, str]] = {}
    defaults = _Panel("", {}, set())
    for line in text.splitlines():
        name, equals, value = line.partition(";")[0].partition("=")
        if not name.strip():
            continue
        if not equals:
            raise ValueError(f"not understood: {line.strip()!r}")
        owner, slash, key = name.strip().rpartition("/")
        key, value = key.strip(), value.strip()
        if slash and owner.startswith("bad"):
            regions.setdefault(owner, {})[key] = value
            continue
        panel = defaults
        if slash:
            if owner not in panels:
                panels[owner] = _Panel(owner, defaults.settings, defaults.flags)
            panel = panels[owner]
        if key in _FLAGS:
            panel.flags.add((key, _number(value, key)))
        elif key in _SHORT:
            panel.settings[f"mask0_{_SHORT[key]}"] = value
        else:
            panel.settings[key] = value
    if not panels:
        raise ValueError("it describes no panel")
    return panels, regions


def _combine(
    path: Path, panels: dict[str, _Panel], regions: dict[str, dict[str, str]], load_mask: LoadMask
) -> StaticMask:
    in_images: dict[str, None] = {}
    flags = next(iter(panels.values())).flags
    if any(panel.flags != flags for panel in panels.values()):
        raise ValueError("flag_lessthan, flag_morethan and flag_equal must be those of all panels")
    if len({panel.settings.get("data") for panel in panels.values()}) > 1:
        raise ValueError("its panels lie in several datasets, and events are images of one")
    indices = {name: panel.index() for name, panel in panels.items()}
    if len({len(index) for index in indices.values()}) > 1:
        raise ValueError("its panels differ in their dims")
    shape = tuple(
        max(place.stop if isinstance(place, slice) else place + 1 for place in places)
        for places in zip(*indices.values(), strict=True)
    )
    bad = np.ones(shape, np.bool_)
    for name, panel in panels.items():
        mine = np.zeros_like(bad[indices[name]])
        _mark_panel(panel, mine)
        in_images |= dict.fromkeys(_mark_masks(path, panel, indices[name], shape, mine, load_mask))
        for region, settings in regions.items():
            _mark_region(region, settings, panel, mine, only=len(panels) == 1)
        bad[indices[name]] = mine
    for region, settings in regions.items():
        if settings.get("panel") not in (None, *panels):
            raise ValueError(f"{region} is in panel {settings['panel']}, which is not described")
    numbers = {key: [number for flag, number in flags if flag == key] for key in _FLAGS}
    return StaticMask(
        bad,
        max(numbers["flag_lessthan"], default=-math.inf),
        min(numbers["flag_morethan"], default=math.inf),
        tuple(numbers["flag_equal"]),
        tuple(in_images),
    )


def _mark_panel(panel: _Panel, bad_SF: Mask) -> None:
    """Mark a whole panel (``no_index``), or its edges."""
    excluded = panel.settings.get("no_index", "0")
    if excluded.lower() == "true" or (_NUMBER.match(excluded) and _number(excluded, "") != 0):
        bad_SF[:] = True
    edge = int(panel.number("mask_edge_pixels", 0))
    if edge > 0:
        bad_SF[:edge], bad_SF[-edge:] = True, True
        bad_SF[:, :edge], bad_SF[:, -edge:] = True, True


def _mark_masks(
    path: Path,
    panel: _Panel,
    index: Index,
    shape: tuple[int, ...],
    bad_SF: Mask,
    load_mask: LoadMask,
) -> list[str]:
    """Mark what masks in files of their own mark; return how a source is told of the others."""
    in_images = []
    for key in (key for key in panel.settings if _MASK.fullmatch(key)):
        location, stem = panel.settings[key], key.removesuffix("data")
        good, bad = (int(panel.number(f"{stem}{bits}bits", 0)) for bits in ("good", "bad"))
        if good == bad == 0:
            raise ValueError(f"mask {location} has neither good nor bad bits: add mask_bad")
        file = panel.settings.get(f"{stem}file")
        if file is None:
            # In the image files: only their source can apply it.
            bits = f"mask_good: {good:#x}, mask_bad: {bad:#x}"
            in_images.append(f"mask: {location.replace('%', '').rstrip('/')}, {bits}")
            continue
        if "%" in location:
            raise ValueError(f"mask {location} is one for each event; only static ones are read")
        # Relative to the working directory, as in CrystFEL; or beside the geometry.
        found = Path(file) if Path(file).exists() else path.parent / file
        values = load_mask(found, location)
        if values.shape == (1, *shape):
            values = values[0]
        if values.shape != shape:
            raise ValueError(
                f"mask {location} of {found} has the shape {values.shape}, and the panels {shape}"
            )
        bad_SF |= find_masked(values[index], good, bad)
    return in_images


def _mark_region(
    name: str, settings: dict[str, str], panel: _Panel, bad_SF: Mask, only: bool
) -> None:
    """Mark the pixels in a bad region, given in pixels of the data or in laboratory x and y."""
    kinds = {key[4:] for key in settings if key[:4] in ("min_", "max_")}
    if kinds not in ({"fs", "ss"}, {"x", "y"}):
        raise ValueError(f"{name} needs min_ and max_ of fs and ss, or of x and y")
    try:
        bounds = {
            kind: tuple(_number(settings[f"{end}_{kind}"], name) for end in ("min", "max"))
            for kind in kinds
        }
    except KeyError as error:
        raise ValueError(f"{name} has no {error.args[0]}") from error
    if "x" in bounds:
        inside_SF = np.ones_like(bad_SF)
        for kind, values_SF in zip(("x", "y"), panel.positions(), strict=True):
            low, high = bounds[kind]
            inside_SF &= (values_SF > low) & (values_SF < high)
        bad_SF |= inside_SF
        return
    if "panel" not in settings and not only:
        raise ValueError(f"{name} does not say in which panel it is")
    if settings.get("panel", panel.name) != panel.name:
        return
    slices = []
    for scan, size in (("ss", bad_SF.shape[0]), ("fs", bad_SF.shape[1])):
        low, high = (int(bound - panel.number(f"min_{scan}")) for bound in bounds[scan])
        if not 0 <= low <= high < size:
            raise ValueError(f"{name} reaches beyond panel {panel.name}")
        slices.append(slice(low, high + 1))
    bad_SF[tuple(slices)] = True


def _number(text: str, where: str) -> float:
    """Return the number at the beginning of a text, which a unit may follow."""
    found = _NUMBER.match(text)
    if found is None:
        raise ValueError(f"{where} is {text!r}, not a number")
    return float(int(found[0], 16)) if "x" in found[0].lower() else float(found[0])


def _direction(text: str, panel: str) -> tuple[float, float]:
    """Return x and y of a direction such as ``-0.9999x +0.0048y``."""
    vector = dict.fromkeys("xyz", 0.0)
    if not _TERM.search(text):
        raise ValueError(f"panel {panel} does not say where its fs and ss point")
    for sign, size, axis in _TERM.findall(text):
        vector[axis.lower()] += float(f"{sign}{size or 1}")
    return vector["x"], vector["y"]
