"""Events from files with one image each: CBF of PILATUS and EIGER detectors, mccd of Rayonix."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peaknet_predict.photon_energy import HC_EV_ANGSTROM, explain_implausible, is_plausible
from peaknet_predict.sources.base import (
    SKIP_HINT,
    EventSource,
    SkippedFile,
    check_first,
    resolve_paths,
    unreadable,
)
from peaknet_predict.sources.energies import check_photon_energy_ev
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)

_CBF_WAVELENGTH = re.compile(r"#\s*Wavelength\s+([\d.]+)\s*A", re.I)
_PHOTON_COUNTER = re.compile(r"PILATUS|EIGER|DECTRIS", re.I)

_ANGSTROM_PER_FM = 1e-5  # the unit of mccd's wavelength is the femtometre


class ImageFileSource(EventSource):
    """Files with one image each, as detectors at storage rings write them.

    fabio reads them (``pip install 'peaknet-predict[images]'``), so every format with one 2-D image
    that it knows will do. In files of PILATUS and EIGER detectors, pixels below 0 are masked: -1
    stands for a gap and -2 for a bad pixel.

    Parameters
    ----------
    path
        File, glob pattern, or a list of them, see `resolve_paths`.
    photon_energy_ev
        Photon energy of all events, eV. None takes the wavelength in the file's header, of CBF and
        mccd files.
    panel_height
        Rows of one panel, if panels are stacked on each other.
    skip_unreadable
        Leave out files that cannot be opened, instead of refusing to start, or of refusing their
        events later. They are counted. Each file's header is read at the start.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If fabio is not installed, the first file cannot be read, is no single 2-D image, or has no
        photon energy and none is given.
    """

    def __init__(
        self,
        path: str | list[str],
        photon_energy_ev: float | None = None,
        panel_height: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        check_photon_energy_ev(photon_energy_ev)
        self._photon_energy_ev = photon_energy_ev
        self._panel_height = panel_height
        self._paths = resolve_paths(path)
        if panel_height is not None and panel_height < 1:
            raise ValueError(f"panel_height is {panel_height}; give the rows of a panel")
        if skip_unreadable:
            self._leave_out_unreadable()
        try:
            _, energy = self._read(self._paths[0])
        except ValueError as error:
            hint = "" if len(self._paths) == 1 or skip_unreadable else SKIP_HINT
            raise ValueError(f"{error}{hint}") from error
        if np.isnan(energy):
            raise ValueError(
                f"{self._paths[0]} has no wavelength in its header; give photon_energy_ev"
            )

    def _leave_out_unreadable(self) -> None:
        """Keep the files of which the header can be read."""
        paths, self._paths, self.skipped = self._paths, [], []
        for path in paths:
            try:
                _header(path)
            except ValueError as error:
                logger.warning("%s is left out: %s", path, error)
                self.skipped.append(SkippedFile(path, str(error), 1))
            else:
                self._paths.append(path)
        if not self._paths:
            raise ValueError(f"none of {len(paths)} files can be read: {self.skipped[0].reason}")

    def check(self) -> None:
        """Make sure that this process can read the files, see `EventSource.check`."""
        gone = [path for path in self._paths if not path.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(self._paths)} files are not there on {socket.gethostname()}, "
                f"the first is {gone[0]}"
            )
        image, energy = self._read(self._paths[0])
        if not is_plausible(energy):
            raise ValueError(f"{self._paths[0]}: {explain_implausible(energy)}")
        masked = np.ma.getmaskarray(image).sum() if np.ma.isMaskedArray(image) else 0
        logger.info(
            "%s and %d more: an event in each file (panels %d, slow %d, fast %d; %s); photon "
            "energy %.1f eV; %d pixels below 0 are bad",
            self._paths[0],
            len(self._paths) - 1,
            1 if image.ndim == 2 else image.shape[0],
            *image.shape[-2:],
            image.dtype,
            energy,
            masked,
        )

    def __len__(self) -> int:
        return len(self._paths)

    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass, see `EventSource.events`."""
        check_first(first, len(self))
        return self._read_from(first)

    def _read_from(self, first: int) -> Iterator[tuple[int, Image, float]]:
        for idx, path in enumerate(self._paths[first:], first):
            try:
                image, energy = self._read(path)
            except ValueError as error:
                yield idx, unreadable(path, 0, error), np.nan
            else:
                yield idx, image, energy

    def _read(self, path: Path) -> tuple[Image, float]:
        """Return the image of a file and its photon energy, NaN without one."""
        # Opened twice, because fabio drops the header of mccd files when it reads the pixels.
        header = _header(path)
        try:
            with _fabio(path).open(str(path)) as file:
                pixels, frames = file.data, file.nframes
        except Exception as error:  # fabio's readers raise many kinds of errors
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if frames != 1 or pixels is None or pixels.ndim != 2 or pixels.dtype.kind not in "iuf":
            raise ValueError(f"{path} is not a single 2-D image")
        # The header of a CBF file, or of a TIFF file from the same detectors.
        text = f"{header.get('_array_data.header_contents')} {header.get('imageDescription')}"
        image: Image = np.ascontiguousarray(pixels)
        if _PHOTON_COUNTER.search(text) and image.dtype.kind == "i" and image.min() < 0:
            image = np.ma.MaskedArray(image, image < 0)
        if self._panel_height is not None:
            if image.shape[0] % self._panel_height:
                raise ValueError(
                    f"{path} has {image.shape[0]} rows, not a multiple of "
                    f"panel_height={self._panel_height}"
                )
            image = image.reshape(-1, self._panel_height, image.shape[1])
        return image, self._photon_energy_ev or _energy(text, header)


def _fabio(path: Path) -> Any:
    try:
        import fabio
    except ImportError as error:
        raise ValueError(
            f"{path}: reading such files needs fabio: pip install 'peaknet-predict[images]'"
        ) from error
    return fabio


def _header(path: Path) -> dict[str, Any]:
    """Return a file's header; ValueError if there is none that fabio understands."""
    fabio = _fabio(path)
    try:
        return dict(fabio.openheader(str(path)).header)
    except Exception as error:  # fabio's formats raise whatever they stumble over
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _energy(text: str, header: dict[str, Any]) -> float:
    """Return the photon energy that a header states, in eV; NaN if it states none."""
    found = _CBF_WAVELENGTH.search(text)
    wavelength = float(found[1]) if found else 0.0
    if "source_wavelength" in header:
        wavelength = float(header["source_wavelength"]) * _ANGSTROM_PER_FM
    return HC_EV_ANGSTROM / wavelength if wavelength > 0 else np.nan
