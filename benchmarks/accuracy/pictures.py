"""Pictures of peaks on images, as PNG files, without a plotting library.

Shape legend, in addition to that of `peaknet_predict.types`: 3 for red, green, blue.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.detector_geometry import Geometry
from peaknet_predict.types import Image, Peaks

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

COLOURS = {
    "red": (255, 60, 60),
    "cyan": (0, 220, 255),
    "yellow": (255, 220, 0),
    "green": (80, 255, 80),
    "magenta": (255, 80, 255),
}
"""One a finder, in this order."""

_GAP = 4
"""Pixels between the tiles of a sheet."""


def write_png(path: Path, picture_HW3: Rgb) -> None:
    """Write a picture of 8-bit colours (PNG specification, ISO/IEC 15948, section 5)."""
    height, width, _ = picture_HW3.shape
    # Filter 0, none, in front of each row.
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = picture_HW3.reshape(height, -1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    )
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in chunks:
            checksum = zlib.crc32(kind + data)
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))


def grey(image: npt.NDArray[np.generic]) -> Rgb:
    """Return counts as shades, black for few; the brightest 0.3 % and bad pixels are cut off."""
    values = np.asarray(image, dtype=np.float64)
    good = values[np.isfinite(values)]
    low, high = np.percentile(good, [1.0, 99.7]) if good.size else (0.0, 1.0)
    shade = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-9), 0.0, 1.0)
    # The square root shows the background, whose noise grows like it.
    return np.repeat((220.0 * np.sqrt(shade)).astype(np.uint8)[..., None], 3, axis=-1)


def draw_circles(
    picture_HW3: Rgb, y_M: Floats, x_M: Floats, radius_px: float, colour: tuple[int, int, int]
) -> None:
    """Draw circles into a picture, in place."""
    height, width, _ = picture_HW3.shape
    angle = np.linspace(0.0, 2.0 * np.pi, math.ceil(8 * radius_px) + 8)
    y = np.rint(y_M[:, None] + radius_px * np.sin(angle)).astype(np.int64)
    x = np.rint(x_M[:, None] + radius_px * np.cos(angle)).astype(np.int64)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    picture_HW3[y[inside], x[inside]] = colour


class Sheet:
    """All panels of an image side by side, several to a row.

    Parameters
    ----------
    image_PHW
        Detector counts.
    columns
        Panels to a row.
    """

    def __init__(self, image_PHW: Image, columns: int = 4) -> None:
        panels, self._height, self._width = image_PHW.shape
        self._columns = columns
        rows = math.ceil(panels / columns)
        size = (rows * (self._height + _GAP), columns * (self._width + _GAP), 3)
        self.picture_HW3 = np.full(size, 60, dtype=np.uint8)
        shades = grey(image_PHW)
        for panel in range(panels):
            y, x = (int(start) for start in self._corner(np.array(panel)))
            self.picture_HW3[y : y + self._height, x : x + self._width] = shades[panel]

    def _corner(self, panel: npt.NDArray[np.generic]) -> tuple[Floats, Floats]:
        row, column = np.divmod(panel, self._columns)
        return row * (self._height + _GAP), column * (self._width + _GAP)

    def draw(self, peaks_M3: Peaks, radius_px: float, colour: tuple[int, int, int]) -> None:
        """Draw circles about peaks."""
        y_M, x_M = self._corner(peaks_M3[:, 0])
        draw_circles(
            self.picture_HW3, y_M + peaks_M3[:, 1], x_M + peaks_M3[:, 2], radius_px, colour
        )


class Assembled:
    """An image with its pixels where they are on the detector, seen along the beam, y upwards.

    Parameters
    ----------
    image_PHW
        Detector counts.
    geometry
        Where the pixels are; z is left out.
    """

    def __init__(self, image_PHW: Image, geometry: Geometry) -> None:
        self._geometry = geometry
        self._pitch = float(np.linalg.norm(geometry.pieces[0].column_step))
        self._offset = np.zeros(2)
        grid = np.indices(image_PHW.shape).reshape(3, -1).T.astype(np.float64)
        y, x = self._place(grid)
        there = np.isfinite(y)
        self._offset = np.array([np.nanmin(y), np.nanmin(x)])
        y, x = np.rint(y[there] - self._offset[0]), np.rint(x[there] - self._offset[1])
        rows, columns = y.astype(np.int64), x.astype(np.int64)
        self.picture_HW3 = np.full((rows.max() + 1, columns.max() + 1, 3), 60, dtype=np.uint8)
        self.picture_HW3[rows, columns] = grey(image_PHW).reshape(-1, 3)[there]

    def _place(self, peaks_M3: Peaks) -> tuple[Floats, Floats]:
        positions_M3 = self._geometry.positions(peaks_M3) / self._pitch
        return -positions_M3[:, 1] - self._offset[0], positions_M3[:, 0] - self._offset[1]

    def draw(self, peaks_M3: Peaks, radius_px: float, colour: tuple[int, int, int]) -> None:
        """Draw circles about peaks."""
        y_M, x_M = self._place(peaks_M3)
        there_M = np.isfinite(y_M)
        draw_circles(self.picture_HW3, y_M[there_M], x_M[there_M], radius_px, colour)


def stamps(
    image_PHW: Image, peaks_M3: Peaks, columns: int = 20, radius_px: int = 8, zoom: int = 4
) -> Rgb:
    """Return the surroundings of peaks, enlarged, one tile a peak, in the order of the list.

    Each tile has shades of its own; its middle is the pixel of the peak.
    """
    side = 2 * radius_px + 1
    tile = side * zoom + _GAP
    rows = max(1, math.ceil(len(peaks_M3) / columns))
    picture_HW3 = np.full((rows * tile, columns * tile, 3), 60, dtype=np.uint8)
    for k, (panel, y, x) in enumerate(np.rint(peaks_M3).astype(np.int64)):
        padded = np.pad(image_PHW[panel].astype(np.float64), radius_px, constant_values=np.nan)
        window = padded[y : y + side, x : x + side]
        shades = np.repeat(np.repeat(grey(window), zoom, axis=0), zoom, axis=1)
        row, column = divmod(k, columns)
        top, left = row * tile, column * tile
        picture_HW3[top : top + side * zoom, left : left + side * zoom] = shades
    return picture_HW3
