"""Whether a list of peaks shows a lattice: orientation search with a known cell.

Peaks are good if an indexing program can use them. CrystFEL is in no package registry, so this is
a search of our own, for judging peaks: it knows the cell, tries every orientation, and compares
what it finds with what it finds in lists of as many random peaks.

1. Every direction of the longest cell axis is scored by how close the peaks' components along it
   are to whole numbers (the one-dimensional projections of Steller et al., J. Appl. Cryst. 30
   (1997) 1036, with the length known, as in XGANDALF: Gevorkov et al., Acta Cryst. A75 (2019) 694).
2. About each of the best directions the crystal is turned in small steps, all three axes are
   scored, and the best orientations are refined by least squares on the peaks that they index.
3. The same is done with random peaks: each peak is turned about the beam by a random angle, which
   keeps its resolution and leaves it on the Ewald sphere.

Rotations act as ``v_lab = rotation @ v_crystal``; lengths are inverse Angstrom, without 2 pi.

Shape legend, in addition to that of `peaknet_predict.types`: D directions, R rotations, 3 for x, y,
z or h, k, l.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peaknet_predict.sources.diffraction import Cell, reciprocal_basis

Floats = npt.NDArray[np.float64]

TOLERANCE = 0.25
"""A peak is indexed if each of its Miller indices is this close to a whole number."""

_STEP = 0.2
"""Fractional index by which a peak at the limit of resolution may move between two neighbours of
the search's grids."""

_WIDTH = 0.12
"""Width (standard deviation) in fractional indices of the score's reward for whole numbers."""

_KEPT_DIRECTIONS, _KEPT_ROTATIONS = 200, 30
"""Of each stage, how many go on to the next."""

_MAX_USED = 150
"""Peaks that are enough to find an orientation by; the search's time grows with them."""

_CHUNK = 4_000_000
"""Numbers held at once."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """A lattice that was found.

    Attributes
    ----------
    rotation
        (3, 3) crystal to laboratory frame.
    indexed_M
        (M,) bool, which peaks it indexes.
    hkl_M3
        (M, 3) float64, fractional Miller indices.
    """

    rotation: Floats
    indexed_M: npt.NDArray[np.bool_]
    hkl_M3: Floats

    @property
    def num_indexed(self) -> int:
        """How many peaks are indexed."""
        return int(self.indexed_M.sum())


@dataclass(frozen=True, slots=True)
class Verdict:
    """How much more of a list of peaks is indexed than chance would.

    Attributes
    ----------
    num_peaks, num_indexed
        Of the list.
    chance
        (K,) peaks indexed in each of K random lists, by the same search.
    orientation
        What was found.
    """

    num_peaks: int
    num_indexed: int
    chance: Floats
    orientation: Orientation

    @property
    def fraction(self) -> float:
        """Share of the peaks that are indexed; NaN without peaks."""
        return self.num_indexed / self.num_peaks if self.num_peaks else float("nan")

    @property
    def sigmas(self) -> float:
        """Peaks indexed beyond the mean of the random lists, in their standard deviations.

        The deviation is taken as at least that of counting one peak: few lists can agree by chance.
        """
        spread = max(float(self.chance.std(ddof=1)), 1.0)
        return (self.num_indexed - float(self.chance.mean())) / spread

    @property
    def is_indexed(self) -> bool:
        """Whether it is a lattice: 5 sigmas from chance, and more than in any random list."""
        return self.sigmas >= 5.0 and self.num_indexed > self.chance.max()


class LatticeSearch:
    """Finds the orientation of a known cell.

    Parameters
    ----------
    cell
        a, b, c in Angstrom, alpha, beta, gamma in degrees.
    max_q
        1/d up to which peaks are used to find an orientation, inverse Angstrom; all are counted at
        the end. A lower one makes the grid coarser and the search faster.
    device
        Where it is computed.
    """

    def __init__(self, cell: Cell, max_q: float = 0.3, device: str = "cpu") -> None:
        self.max_q = max_q
        self.device = torch.device(device)
        self.reciprocal = reciprocal_basis(cell)  # rows a*, b*, c*
        self.axes: Floats = np.asarray(np.linalg.inv(self.reciprocal).T, np.float64)  # rows a, b, c
        lengths = np.linalg.norm(self.axes, axis=1)
        # The longest axis has the finest, most telling projections; the directions are of it.
        self._first = int(np.argmax(lengths))
        self._angle = _STEP / (max_q * float(lengths.max()))
        self._directions_D3 = self._on_device(_hemisphere(self._angle))
        self._axes_33 = self._on_device(self.axes)

    def find(self, q_M3: Floats) -> Orientation:
        """Find the orientation that indexes most of the peaks.

        Parameters
        ----------
        q_M3
            (M, 3) scattering vectors, inverse Angstrom.
        """
        norm_M = np.linalg.norm(q_M3, axis=1)
        used_M3 = q_M3[norm_M <= self.max_q]
        if len(used_M3) > _MAX_USED:
            # Of all resolutions some; all are counted once there are orientations to refine.
            by_norm = np.argsort(np.linalg.norm(used_M3, axis=1))
            used_M3 = used_M3[by_norm[np.linspace(0, len(used_M3) - 1, _MAX_USED).astype(int)]]
        if len(used_M3) < 3:
            return self.orientation(np.eye(3), q_M3)
        used = self._on_device(used_M3)
        rotations_R33 = self._turned(used, self._best_directions(used))
        found = [self._refined(rotation, q_M3) for rotation in rotations_R33]
        return max(found, key=lambda orientation: orientation.num_indexed)

    def judge(self, q_M3: Floats, random_lists: int = 20, seed: int = 0) -> Verdict:
        """Find the orientation, and compare with random peaks of the same resolutions."""
        if random_lists < 2:
            raise ValueError(f"random_lists is {random_lists}; a spread needs at least 2")
        rng = np.random.default_rng(seed)
        found = self.find(q_M3)
        chance = [self.find(turned_about_beam(q_M3, rng)).num_indexed for _ in range(random_lists)]
        return Verdict(len(q_M3), found.num_indexed, np.array(chance, dtype=np.float64), found)

    def _on_device(self, values: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, torch.float32)

    def _best_directions(self, q_M3: Tensor) -> Tensor:
        """Return the first axis's directions with projections closest to whole numbers, (D, 3)."""
        length = float(np.linalg.norm(self.axes[self._first]))
        scores = [
            torch.cos(2.0 * math.pi * length * (part_D3 @ q_M3.T)).sum(dim=1)
            for part_D3 in torch.split(self._directions_D3, max(1, _CHUNK // len(q_M3)))
        ]
        score_D = torch.cat(scores)
        # Neighbours on the grid are one maximum. More than are kept are looked at, best first.
        best_D = torch.topk(score_D, min(20 * _KEPT_DIRECTIONS, len(score_D))).indices
        best_D3 = self._directions_D3[best_D].cpu().numpy().astype(np.float64)
        kept: list[int] = []
        free_D = np.ones(len(best_D3), dtype=np.bool_)
        for k, direction in enumerate(best_D3):
            if free_D[k]:
                kept.append(k)
                # The axis and its opposite are the same for a lattice of points and its inverse.
                free_D &= np.abs(best_D3 @ direction) < math.cos(1.5 * self._angle)
            if len(kept) == _KEPT_DIRECTIONS:
                break
        return self._on_device(best_D3[kept])

    def _turned(self, q_M3: Tensor, directions_D3: Tensor) -> Floats:
        """Return the best rotations about the directions, which the first axis takes; (R, 3, 3)."""
        axis: Floats = self.axes[self._first] / float(np.linalg.norm(self.axes[self._first]))
        # Both senses of the direction: of the lattices that they give one can be the other's
        # mirror image, which no rotation makes from it.
        both_D3 = np.concatenate([directions_D3.cpu().numpy(), -directions_D3.cpu().numpy()])
        align_D33 = np.stack([_rotation_between(axis, d) for d in both_D3.astype(np.float64)])
        steps = math.ceil(2.0 * math.pi / self._angle)
        angles_T: Floats = np.linspace(0.0, 2.0 * math.pi, steps, endpoint=False, dtype=np.float64)
        turns_T33 = _turns(axis, angles_T)
        # hkl = axes @ rotation.T @ q; rotation = align @ turn.
        turned_T33 = self._on_device(self.axes @ turns_T33.transpose(0, 2, 1))
        best: list[tuple[float, int, int]] = []
        for d, align in enumerate(align_D33):
            aligned_M3 = q_M3 @ self._on_device(align)
            hkl_TM3 = torch.einsum("tij,mj->tmi", turned_T33, aligned_M3)
            off_TM3 = hkl_TM3 - hkl_TM3.round()
            score_T = torch.exp(off_TM3.square().sum(dim=2) / (-2.0 * _WIDTH**2)).sum(dim=1)
            top = torch.topk(score_T, 3)
            best += [
                (score, d, turn)
                for score, turn in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
        best.sort(reverse=True)
        return np.stack([align_D33[d] @ turns_T33[turn] for _, d, turn in best[:_KEPT_ROTATIONS]])

    def orientation(self, rotation: Floats, q_M3: Floats) -> Orientation:
        """Hold peaks against a given orientation; arguments as in `Orientation` and `find`."""
        hkl_M3 = q_M3 @ rotation @ self.axes.T
        off_M3 = np.abs(hkl_M3 - np.rint(hkl_M3))
        # The direct beam is on every lattice.
        indexed_M = np.all(off_M3 < TOLERANCE, axis=1)
        indexed_M &= np.any(np.rint(hkl_M3) != 0.0, axis=1)
        return Orientation(rotation, indexed_M, hkl_M3)

    def _refined(self, rotation: Floats, q_M3: Floats) -> Orientation:
        """Turn a lattice onto the peaks that it indexes, low resolution first."""
        norm_M = np.linalg.norm(q_M3, axis=1)
        # A small error of the angle moves peaks in proportion to |q|: those far out join later.
        for limit in (0.5 * self.max_q, self.max_q, 1.3 * self.max_q, np.inf, np.inf):
            found = self.orientation(rotation, q_M3)
            use_M = found.indexed_M & (norm_M <= limit)
            if use_M.sum() < 3:
                continue
            lattice_M3 = np.rint(found.hkl_M3[use_M]) @ self.reciprocal
            rotation = _best_rotation(lattice_M3, q_M3[use_M])
        return self.orientation(rotation, q_M3)


def turned_about_beam(q_M3: Floats, rng: np.random.Generator) -> Floats:
    """Turn each scattering vector about z, the beam, by a random angle of its own."""
    angle_M = rng.uniform(0.0, 2.0 * np.pi, len(q_M3))
    radius_M = np.hypot(q_M3[:, 0], q_M3[:, 1])
    return np.stack([radius_M * np.cos(angle_M), radius_M * np.sin(angle_M), q_M3[:, 2]], axis=1)


def symmetry_rotations(cell: Cell) -> Floats:
    """Return the proper rotations that take the lattice of a cell to itself, (R, 3, 3).

    They are found among the matrices of integers from -1 to 1, which suffice for a reduced cell, by
    whether they keep the metric (International Tables for Crystallography A, section 9.2).
    """
    axes = np.linalg.inv(reciprocal_basis(cell)).T
    metric = axes @ axes.T
    changes_R33 = np.array(list(itertools.product((-1, 0, 1), repeat=9))).reshape(-1, 3, 3)
    new_R33 = changes_R33 @ metric @ changes_R33.transpose(0, 2, 1)
    same_R = np.abs(new_R33 - metric).max(axis=(1, 2)) < 1e-6 * metric.max()
    same_R &= np.rint(np.linalg.det(changes_R33)) == 1
    # Rows of `change @ axes` are the turned axes.
    return np.asarray(np.linalg.inv(axes) @ changes_R33[same_R] @ axes).transpose(0, 2, 1)


def misorientation_deg(first: Floats, second: Floats, cell: Cell) -> float:
    """Return the smallest angle by which two orientations of a lattice differ, degrees."""
    turns_R33 = first.T @ second @ symmetry_rotations(cell)
    cosine = (np.trace(turns_R33, axis1=1, axis2=2).max() - 1.0) / 2.0
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _hemisphere(angle: float) -> Floats:
    """Return evenly spread directions, (D, 3), neighbours about `angle` radians apart.

    Points of a Fibonacci lattice (Swinbank, Purser, Q. J. R. Meteorol. Soc. 132 (2006) 1769).
    """
    num = math.ceil(2.0 * math.pi / angle**2)
    k_D = np.arange(num)
    z_D = (k_D + 0.5) / num
    turn_D = k_D * (math.pi * (3.0 - math.sqrt(5.0)))
    radius_D = np.sqrt(1.0 - z_D**2)
    return np.stack([radius_D * np.cos(turn_D), radius_D * np.sin(turn_D), z_D], axis=1)


def _turns(axis: Floats, angles_T: Floats) -> Floats:
    """Return the rotations about a unit vector by angles in radians, (T, 3, 3)."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    sine_T11, cosine_T11 = np.sin(angles_T)[:, None, None], np.cos(angles_T)[:, None, None]
    # Rodrigues' formula.
    return np.asarray(np.eye(3) + sine_T11 * cross + (1.0 - cosine_T11) * (cross @ cross))


def _rotation_between(start: Floats, end: Floats) -> Floats:
    """Return a rotation that takes one unit vector to another."""
    axis = np.cross(start, end)
    length = float(np.linalg.norm(axis))
    if length < 1e-9:
        # Parallel, or opposite: then half a turn about anything perpendicular.
        if start @ end > 0.0:
            return np.eye(3)
        axis = np.cross(start, np.eye(3)[int(np.argmin(np.abs(start)))])
        return np.asarray(_turns(axis / np.linalg.norm(axis), np.array([math.pi]))[0])
    angle = math.atan2(length, float(start @ end))
    return np.asarray(_turns(axis / length, np.array([angle]))[0])


def _best_rotation(from_M3: Floats, to_M3: Floats) -> Floats:
    """Return the rotation that takes vectors closest to others, least squares.

    Kabsch, Acta Cryst. A32 (1976) 922, by singular values.
    """
    left, _, right = np.linalg.svd(to_M3.T @ from_M3)
    sign = np.sign(np.linalg.det(left @ right))
    return np.asarray(left @ np.diag([1.0, 1.0, sign]) @ right)
