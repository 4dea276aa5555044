"""What peak finders find in measured shots, whose peaks nobody has planted.

    python -m benchmarks.accuracy.real_shots --shots '../shared/realdata/idx-*.npz'
        --geometry ../shared/realdata/thermolysin_cspad.geom
        --cell ../shared/realdata/thermolysin.cell
        [--config configs/models/peaknet_small.yaml@WEIGHTS ...] [--device cuda]
        [--pictures runs/pictures]

The judge is the lattice: an orientation of the known cell that indexes far more peaks than it
would of random ones shows that the peaks are Bragg peaks. Once the lattice is known, every finder's
peaks are held against it: of peaks at random places one in eight lies on it by chance, so those
that do not lie on it tell how many are false (`estimate`). That takes each shot for one crystal.

``--sweep 3 4 5`` adds `LocalSnr` with other thresholds to the second table: a network should have
more Bragg peaks than the one that is as precise.

The shots are npz files with ``data`` (P, H, W) or (H, W), all of one detector. A CrystFEL geometry
and a cell file that stand alone in their folder need not be named. The photon energy, where neither
option nor geometry states it, is the one at which most of LocalSnr's peaks are indexed.
Pictures show circles in one colour a finder, in the order of the table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from benchmarks.accuracy.detector_geometry import Geometry, read_geometry
from benchmarks.accuracy.finders import find
from benchmarks.accuracy.lattice import TOLERANCE, LatticeSearch, Orientation, Verdict
from benchmarks.accuracy.pictures import COLOURS, Assembled, Sheet, stamps, write_png
from benchmarks.accuracy.simulated_shots import Candidate, candidates, swept
from peaknet_predict.models import LocalSnr
from peaknet_predict.peaks.match import match_peaks
from peaknet_predict.sources.diffraction import Cell
from peaknet_predict.types import Image, Peaks

Floats = npt.NDArray[np.float64]

EDGE_PX = 2.0
"""Peaks closer than this to the outermost pixels of a sensor are counted as on its edge."""

SAME_PX = 1.5
"""Peaks of two shots within this distance are counted as on the same pixels."""

BY_CHANCE = (2.0 * TOLERANCE) ** 3
"""Share of random scattering vectors that a lattice indexes."""

SHELLS = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, np.inf)
"""Borders of the histogram over resolution, 1/d in inverse Angstrom."""


def read_cell(path: Path) -> Cell:
    """Read a CrystFEL unit cell file: a, b, c in Angstrom (or nm), angles in degrees."""
    values = []
    text = path.read_text()
    for name in ("a", "b", "c", "al", "be", "ga"):
        found = re.search(rf"^{name}\s*=\s*([\d.]+)\s*(A|nm|deg)\s*$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"{path} has no line '{name} = NUMBER UNIT'")
        values.append(float(found[1]) * (10.0 if found[2] == "nm" else 1.0))
    a, b, c, alpha, beta, gamma = values
    return a, b, c, alpha, beta, gamma


def estimate(num_peaks: int, num_indexed: int) -> float:
    """Return how many of the peaks are Bragg peaks, if all of those lie on the lattice.

    Of the others `BY_CHANCE` lies on it too: indexed = true + BY_CHANCE (peaks - true).
    """
    return float(np.clip((num_indexed - BY_CHANCE * num_peaks) / (1.0 - BY_CHANCE), 0, num_peaks))


def on_lattice(
    search: LatticeSearch, orientation: Orientation, q_M3: Floats
) -> npt.NDArray[np.bool_]:
    """Say which scattering vectors an orientation indexes, (M,) bool."""
    return search.orientation(orientation.rotation, q_M3).indexed_M


def best_energy(
    search: LatticeSearch, geometry: Geometry, peaks_M3: Peaks, energies_ev: Sequence[float]
) -> float:
    """Return the photon energy at which most peaks are indexed, and most closely, eV."""
    best = (-1.0, 0.0)
    for energy in energies_ev:
        found = search.find(geometry.scattering_vectors(peaks_M3, energy))
        off_M3 = found.hkl_M3 - np.rint(found.hkl_M3)
        closeness = np.exp(-0.5 * np.square(off_M3 / 0.1).sum(axis=1)).sum()
        best = max(best, (float(closeness), energy))
    return best[1]


def same_places(first_M3: Peaks, second_K3: Peaks) -> int:
    """Return how many of the first peaks have one of the second within `SAME_PX`."""
    if not len(first_M3) or not len(second_K3):
        return 0
    apart = np.array([1e6, 1.0, 1.0])
    distance_M, _ = cKDTree(second_K3 * apart).query(first_M3 * apart)
    return int((distance_M <= SAME_PX).sum())


def edge_share(geometry: Geometry) -> float:
    """Return the share of the detector's pixels that lies on edges."""
    sizes = [
        (piece.rows[1] - piece.rows[0] + 1, piece.columns[1] - piece.columns[0] + 1)
        for piece in geometry.pieces
    ]
    # Pixels at a distance of 0, 1, ... below EDGE_PX from the outermost ones.
    rim = 2 * int(np.ceil(EDGE_PX))
    inner = sum(max(h - rim, 0) * max(w - rim, 0) for h, w in sizes)
    return 1.0 - inner / sum(h * w for h, w in sizes)


class Report:
    """The tables of one shot.

    Parameters
    ----------
    search
        Knows the cell.
    geometry
        Where the pixels are.
    random_lists
        Lists of random peaks for the lattice's significance.
    """

    def __init__(self, search: LatticeSearch, geometry: Geometry, random_lists: int) -> None:
        self._search, self._geometry = search, geometry
        self._random_lists = random_lists

    def print_shot(
        self,
        names: Sequence[str],
        found: Sequence[Peaks],
        others: Sequence[Peaks],
        reference: int,
        energy_ev: float,
        num_judged: int,
    ) -> list[npt.NDArray[np.bool_]]:
        """Print the tables and return which peaks of each finder lie on the common lattice.

        Parameters
        ----------
        names, found
            Finders and their peaks.
        others
            Their peaks in all other shots.
        reference
            The finder to whose peaks the others' are compared.
        energy_ev
            Photon energy.
        num_judged
            As many finders, from the first, look for a lattice of their own.
        """
        q = [self._geometry.scattering_vectors(peaks, energy_ev) for peaks in found]
        verdicts = [self._search.judge(q_M3, self._random_lists) for q_M3 in q[:num_judged]]
        best = max(verdicts, key=lambda verdict: verdict.sigmas)
        print(f"photon energy {energy_ev:.0f} eV; each finder's own lattice:\n")
        columns = [
            "finder",
            "peaks",
            "indexed",
            "of random peaks, mean (most)",
            "sigmas",
            "indexed?",
        ]
        print(_row(columns) + "\n" + "| --- " * len(columns) + "|")
        for name, verdict in zip(names, verdicts, strict=False):
            print(_row([name, *_verdict_cells(verdict)]))
        indexed = [on_lattice(self._search, best.orientation, q_M3) for q_M3 in q]
        print("\nthe lattice that is furthest from chance, and where the peaks are:\n")
        columns = ["finder", "peaks", "on the lattice", "Bragg peaks, estimated"]
        columns += ["precision, estimated", f"{names[reference]}'s too"]
        columns += ["not so, and on the lattice", "at edges"]
        columns += ["as in another shot", "1/d median (most)"]
        print(_row(columns) + "\n" + "| --- " * len(columns) + "|")
        for name, peaks, other, on_M, q_M3 in zip(names, found, others, indexed, q, strict=True):
            true = estimate(len(peaks), int(on_M.sum()))
            index_M, _ = match_peaks(peaks, found[reference], 2.0)
            at_edges = int((self._geometry.edge_distances_px(peaks) < EDGE_PX).sum())
            norm_M = np.linalg.norm(q_M3, axis=1)
            cells = [name, str(len(peaks)), str(int(on_M.sum())), f"{true:.0f}"]
            cells += [f"{true / len(peaks):.2f}" if len(peaks) else "-", str((index_M >= 0).sum())]
            beyond_M = index_M < 0
            cells += [f"{beyond_M.sum()}, {(beyond_M & on_M).sum()}"]
            cells += [str(at_edges), str(same_places(peaks, other))]
            cells += [f"{np.median(norm_M):.2f} ({norm_M.max():.2f})" if len(peaks) else "-"]
            print(_row(cells))
        print(f"\n(by area {edge_share(self._geometry):.1%} of random peaks are at edges)")
        self._print_histograms(names[:num_judged], found[:num_judged], q[:num_judged])
        return indexed

    def _print_histograms(
        self, names: Sequence[str], found: Sequence[Peaks], q: Sequence[Floats]
    ) -> None:
        print("\npeaks by resolution, 1/d in inverse Angstrom, and by panel:\n")
        columns = [f"{low:g}-{high:g}" for low, high in pairwise(SHELLS)]
        print(
            _row(["finder", *columns, "panels, from 0"])
            + "\n"
            + "| --- " * (len(columns) + 2)
            + "|"
        )
        panels = 1 + max(piece.panel for piece in self._geometry.pieces)
        for name, peaks, q_M3 in zip(names, found, q, strict=True):
            shells, _ = np.histogram(np.linalg.norm(q_M3, axis=1), SHELLS)
            by_panel = np.bincount(peaks[:, 0].astype(np.int64), minlength=panels)
            cells = [str(count) for count in shells]
            print(_row([name, *cells, " ".join(str(count) for count in by_panel)]))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _verdict_cells(verdict: Verdict) -> list[str]:
    return [
        str(verdict.num_peaks),
        f"{verdict.num_indexed} ({verdict.fraction:.2f})",
        f"{verdict.chance.mean():.1f} ({verdict.chance.max():.0f})",
        f"{verdict.sigmas:.1f}",
        "yes" if verdict.is_indexed else "no",
    ]


def draw(
    folder: Path,
    stem: str,
    image_PHW: Image,
    geometry: Geometry,
    names: Sequence[str],
    found: Sequence[Peaks],
    indexed: Sequence[npt.NDArray[np.bool_]],
) -> None:
    """Write the pictures of a shot: assembled, by panel, and stamps by finder."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, picture in (
        ("assembled", Assembled(image_PHW, geometry)),
        ("panels", Sheet(image_PHW)),
    ):
        for k, (peaks, colour) in enumerate(zip(found, COLOURS.values(), strict=False)):
            picture.draw(peaks, 5.0 + 2.0 * k, colour)
        write_png(folder / f"{stem}_{kind}.png", picture.picture_HW3)
    for k, (peaks, on_M) in enumerate(zip(found, indexed, strict=True)):
        for kind, chosen_M in (("on_lattice", on_M), ("off_lattice", ~on_M)):
            path = folder / f"{stem}_{k}_{kind}.png"
            write_png(path, stamps(image_PHW, peaks[chosen_M]))
    legend = ", ".join(f"{colour} {name}" for name, colour in zip(names, COLOURS, strict=False))
    print(f"\npictures in {folder}: {legend}; stamps are numbered in that order from 0")


def read_shots(shots: Path) -> dict[str, Image]:
    """Read the shots of a folder or of a pattern, by name; (P, H, W), all of one shape."""
    folder, pattern = (shots, "*.npz") if shots.is_dir() else (shots.parent, shots.name)
    images: dict[str, Image] = {}
    for path in sorted(folder.glob(pattern)):
        image = np.load(path)["data"]
        images[path.stem] = image[None] if image.ndim == 2 else image
    shapes = {image.shape for image in images.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"{shots}: shots of one detector are needed, but these have shapes {sorted(shapes)}; "
            "choose some by a pattern, as --shots 'FOLDER/NAME*.npz'"
        )
    return images


def only(shots: Path, pattern: str, option: str) -> Path:
    """Return the one file beside the shots that matches, or say how to choose one."""
    folder = shots if shots.is_dir() else shots.parent
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} has {names}; name one {pattern} file with {option}")
    return found[0]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", default=[], metavar="PATH[@WEIGHTS]")
    parser.add_argument("--shots", type=Path, required=True, metavar="FOLDER|PATTERN")
    parser.add_argument("--geometry", type=Path, metavar="GEOM")
    parser.add_argument("--cell", type=Path)
    parser.add_argument("--photon-energy-ev", type=float)
    parser.add_argument(
        "--energy-range-ev",
        type=float,
        nargs=3,
        default=(9600.0, 9950.0, 25.0),
        metavar=("FIRST", "LAST", "STEP"),
        help="searched where the energy is not known",
    )
    parser.add_argument("--random-lists", type=int, default=20)
    parser.add_argument("--sweep", nargs="*", type=float, default=[])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args(words)

    shots = read_shots(arguments.shots)
    stems, images = list(shots), list(shots.values())
    geometry_path = arguments.geometry or only(arguments.shots, "*.geom", "--geometry")
    geometry = read_geometry(geometry_path, images[0].shape[1])
    cell = read_cell(arguments.cell or only(arguments.shots, "*.cell", "--cell"))
    search = LatticeSearch(cell, device=arguments.device)
    chosen: list[Candidate] = candidates(arguments.config)
    num_judged = len(chosen)
    reference = next(k for k, one in enumerate(chosen) if isinstance(one.module.net, LocalSnr))
    chosen += swept(arguments.sweep)
    names = [one.name for one in chosen]
    found = [
        [
            np.empty((0, 3)) if peaks is None else peaks
            for peaks in find(
                one.module, images, arguments.device, arguments.precision, arguments.batch_size
            )
        ]
        for one in chosen
    ]
    report = Report(search, geometry, arguments.random_lists)
    first, last, step = arguments.energy_range_ev
    for k, (stem, image) in enumerate(zip(stems, images, strict=True)):
        here = [peaks[k] for peaks in found]
        others = [
            np.concatenate([peaks[j] for j in range(len(images)) if j != k] or [np.empty((0, 3))])
            for peaks in found
        ]
        energy = arguments.photon_energy_ev or geometry.photon_energy_ev
        if energy is None:
            energies = np.arange(first, last + step / 2, step).tolist()
            energy = best_energy(search, geometry, here[reference], energies)
        print(f"\n### {stem}\n")
        indexed = report.print_shot(names, here, others, reference, energy, num_judged)
        if arguments.pictures is not None:
            drawn = slice(num_judged)
            draw(
                arguments.pictures,
                stem,
                image,
                geometry,
                names[drawn],
                here[drawn],
                indexed[drawn],
            )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
