"""Where the pixels of an image are, and which scattering vector a peak belongs to.

The laboratory frame is right-handed with z along the beam; lengths are metres. Scattering vectors
are k_out - k_in with |k| = 1/wavelength, inverse Angstrom, without the factor of 2 pi.

Shape legend, in addition to that of `peaknet_predict.types`: 3 for x, y, z.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from peaknet_predict.sources.detector import TiledDetector
from peaknet_predict.sources.diffraction import wavelength_angstrom
from peaknet_predict.types import Peaks

Floats = npt.NDArray[np.float64]

_TERM = re.compile(r"([+-]?\s*\d*\.?\d*(?:[eE][+-]?\d+)?)\s*([xyz])")


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of pixels on one flat sensor: a whole panel of the image or a part of it.

    Attributes
    ----------
    panel
        Index in the image.
    rows, columns
        First and last, both inclusive.
    origin
        (3,) centre of the image panel's pixel (0, 0), were it on this sensor; metres.
    row_step, column_step
        (3,) from a pixel to the next of its column (slow scan), and of its row (fast scan); metres.
    """

    panel: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    origin: Floats
    row_step: Floats
    column_step: Floats


@dataclass(frozen=True, slots=True)
class Geometry:
    """All pieces of a detector.

    Attributes
    ----------
    pieces
        No two share a pixel.
    photon_energy_ev
        eV, where the description states it; otherwise None.
    """

    pieces: list[Piece]
    photon_energy_ev: float | None = None

    def piece_of(self, peaks_M3: Peaks) -> npt.NDArray[np.int64]:
        """Return the piece that each peak lies on, (M,) int64; -1 for none."""
        panel_M, row_M, column_M = np.rint(peaks_M3).astype(np.int64).T
        result_M = np.full(len(peaks_M3), -1, dtype=np.int64)
        for k, piece in enumerate(self.pieces):
            on_M = panel_M == piece.panel
            on_M &= (row_M >= piece.rows[0]) & (row_M <= piece.rows[1])
            on_M &= (column_M >= piece.columns[0]) & (column_M <= piece.columns[1])
            result_M[on_M] = k
        return result_M

    def positions(self, peaks_M3: Peaks) -> Floats:
        """Return where peaks are, (M, 3) metres; NaN for those on no piece."""
        result_M3 = np.full((len(peaks_M3), 3), np.nan)
        piece_M = self.piece_of(peaks_M3)
        for k, piece in enumerate(self.pieces):
            on_M = piece_M == k
            result_M3[on_M] = (
                piece.origin
                + peaks_M3[on_M, 1, None] * piece.row_step
                + peaks_M3[on_M, 2, None] * piece.column_step
            )
        return result_M3

    def scattering_vectors(self, peaks_M3: Peaks, photon_energy_ev: float) -> Floats:
        """Return the scattering vectors of peaks, (M, 3) inverse Angstrom."""
        positions_M3 = self.positions(peaks_M3)
        directions_M3 = positions_M3 / np.linalg.norm(positions_M3, axis=1, keepdims=True)
        directions_M3[:, 2] -= 1.0
        return np.asarray(directions_M3 / wavelength_angstrom(photon_energy_ev))

    def edge_distances_px(self, peaks_M3: Peaks) -> Floats:
        """Return how far peaks are from the outermost pixels of their piece, (M,) pixels."""
        result_M = np.full(len(peaks_M3), np.nan)
        piece_M = self.piece_of(peaks_M3)
        for k, piece in enumerate(self.pieces):
            y_M, x_M = peaks_M3[piece_M == k, 1], peaks_M3[piece_M == k, 2]
            sides = [y_M - piece.rows[0], piece.rows[1] - y_M]
            sides += [x_M - piece.columns[0], piece.columns[1] - x_M]
            result_M[piece_M == k] = np.min(sides, axis=0)
        return result_M


def simulator_geometry(
    panels: int, height: int, width: int, pixel_size_m: float, distance_m: float
) -> Geometry:
    """Return the geometry of a `peaknet_predict.sources.Simulator` with these parameters."""
    detector = TiledDetector(panels, height, width, pixel_size_m, distance_m)
    pieces = [
        Piece(
            panel,
            (0, height - 1),
            (0, width - 1),
            np.array([x * pixel_size_m, y * pixel_size_m, distance_m]),
            np.array([0.0, pixel_size_m, 0.0]),
            np.array([pixel_size_m, 0.0, 0.0]),
        )
        for panel, (y, x) in enumerate(zip(detector.origin_y_P, detector.origin_x_P, strict=True))
    ]
    return Geometry(pieces)


def read_geometry(path: str | Path, height: int) -> Geometry:
    """Read a CrystFEL geometry file for images whose panels lie below one another in its data.

    Parameters
    ----------
    path
        Written as the manual page crystfel_geometry(5) has it: in front of a panel's name stand
        defaults for the panels after them; ``corner_x``, ``corner_y`` are the corner of the first
        pixel in pixels, ``res`` pixels per metre, ``clen`` and ``coffset`` metres.
    height
        Rows of an image panel: row ``ss`` of the file's data is row ``ss % height`` of panel
        ``ss // height``.

    Raises
    ------
    ValueError
        If a panel lacks a property, takes one from the data file, or spans two image panels.
    """
    defaults: dict[str, str] = {}
    panels: dict[str, dict[str, str]] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition(";")[0].partition("="))
        if not value or name.startswith(("bad", "rigid_group", "group")):
            continue
        panel, slash, key = name.rpartition("/")
        if slash:
            panels.setdefault(panel, dict(defaults))[key] = value
        else:
            defaults[key] = value
    pieces = [_piece(f"{path}: {name}", given, height) for name, given in panels.items()]
    energy = re.match(r"[\d.]+(?:[eE]\d+)?", defaults.get("photon_energy", ""))
    return Geometry(pieces, float(energy.group()) if energy else None)


def _piece(name: str, given: dict[str, str], height: int) -> Piece:
    numbers = ("min_fs", "max_fs", "min_ss", "max_ss", "corner_x", "corner_y", "res", "clen")
    value = {}
    for key in numbers:
        try:
            value[key] = float(given[key])
        except KeyError:
            raise ValueError(f"{name} has no {key}") from None
        except ValueError:
            raise ValueError(f"{name}: {key} is {given[key]!r}, not a number") from None
    panel, first_row = divmod(int(value["min_ss"]), height)
    last_panel, last_row = divmod(int(value["max_ss"]), height)
    if panel != last_panel:
        raise ValueError(f"{name} spans image panels {panel} and {last_panel} of {height} rows")
    fs, ss = _vector(given.get("fs", "1x")), _vector(given.get("ss", "1y"))
    first_column = int(value["min_fs"])
    z = (value["clen"] + float(given.get("coffset", 0.0))) * value["res"]
    corner = np.array([value["corner_x"], value["corner_y"], z])
    # Half a pixel from its corner to its centre; back to row and column 0 of the image's panel.
    origin = corner + (0.5 - first_column) * fs + (0.5 - first_row) * ss
    return Piece(
        panel,
        (first_row, last_row),
        (first_column, int(value["max_fs"])),
        origin / value["res"],
        ss / value["res"],
        fs / value["res"],
    )


def _vector(text: str) -> Floats:
    """Read a direction such as ``-0.0036x +0.99999y``, in pixels."""
    result = np.zeros(3)
    for number, axis in _TERM.findall(text):
        number = number.replace(" ", "")
        result["xyz".index(axis)] += float(number + "1" if number in ("", "+", "-") else number)
    return result
