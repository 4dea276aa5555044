"""Still diffraction from a rotated crystal lattice: reflections, directions and intensities.

Lengths of reciprocal space are 1/d in inverse Angstrom, without the factor of 2 pi. The laboratory
frame is right-handed: x along a panel's rows (fast scan), y along its columns (slow scan), z along
the beam. Shape legend, in addition to that of `peaknet_predict.types`: R reflections of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peaknet_predict.photon_energy import HC_EV_ANGSTROM

Floats = npt.NDArray[np.float64]

Cell = tuple[float, float, float, float, float, float]
"""a, b, c in Angstrom, alpha, beta, gamma in degrees."""

TOLERANCE_WIDTHS = 3.0
"""Reflections more than this many peak widths away from the Ewald sphere are left out. Their
partiality is below exp(-4.5), 1 %."""

MAX_REFLECTIONS = 5_000_000
"""Largest table of reflections; it takes about 1 GB to build. A cell that needs more is probably
mistyped."""


def wavelength_angstrom(photon_energy_ev: float) -> float:
    """Return the wavelength in Angstrom for a photon energy in eV."""
    return HC_EV_ANGSTROM / photon_energy_ev


def reciprocal_basis(cell: Cell) -> Floats:
    """Return the reciprocal lattice vectors of an unrotated cell.

    The real-space axes follow the usual convention: a along x, b in the x-y plane (Giacovazzo,
    *Fundamentals of Crystallography*, chapter 2; also that of PDB files).

    Parameters
    ----------
    cell
        See `Cell`.

    Returns
    -------
    ndarray
        (3, 3) | float64, rows a*, b*, c* in inverse Angstrom: ``q = hkl @ basis``.

    Raises
    ------
    ValueError
        If these lengths and angles do not form a lattice.
    """
    if len(cell) != 6:
        raise ValueError(f"cell needs six numbers a, b, c, alpha, beta, gamma; got {cell}")
    a, b, c = cell[:3]
    alpha, beta, gamma = np.radians(cell[3:])
    cos_a, cos_b, cos_g = np.cos([alpha, beta, gamma])
    # The square of the volume of a cell with edges of length 1.
    volume2 = 1.0 - cos_a**2 - cos_b**2 - cos_g**2 + 2.0 * cos_a * cos_b * cos_g
    if min(cell) <= 0.0 or max(cell[3:]) >= 180.0 or volume2 <= 1e-12:
        raise ValueError(f"no lattice has the cell {cell} (Angstrom and degrees)")
    sin_g = np.sin(gamma)
    axes = np.array(
        [
            [a, 0.0, 0.0],
            [b * cos_g, b * sin_g, 0.0],
            [c * cos_b, c * (cos_a - cos_b * cos_g) / sin_g, c * np.sqrt(volume2) / sin_g],
        ]
    )
    return np.asarray(np.linalg.inv(axes).T, dtype=np.float64)


def random_rotation(rng: np.random.Generator) -> Floats:
    """Draw a rotation uniformly over all orientations.

    Four normal deviates, normalised, are a uniform point of the unit sphere of quaternions, which
    is a uniform rotation (Marsaglia, *Ann. Math. Stat.* 43 (1972) 645).

    Returns
    -------
    ndarray
        (3, 3) | float64, proper rotation: ``v_lab = rotation @ v_crystal``.
    """
    q = rng.standard_normal(4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@dataclass(slots=True)
class Reflections:
    """The M reflections that lie close to the Ewald sphere in one orientation.

    Attributes
    ----------
    hkl_M3
        (M, 3) | int16, Miller indices.
    k_out_M3
        (M, 3) | float64, outgoing wave vectors in the laboratory frame, inverse Angstrom, of length
        1/wavelength (elastic scattering).
    excitation_M
        (M,) | float64, distance of the lattice point from the Ewald sphere, inverse Angstrom,
        positive outside.
    intensity_M
        (M,) | float64, expected intensity relative to the mean of all full reflections at zero
        scattering angle.
    """

    hkl_M3: npt.NDArray[np.int16]
    k_out_M3: Floats
    excitation_M: Floats
    intensity_M: Floats


class Crystal:
    """A primitive lattice with random, fixed structure factors.

    Parameters
    ----------
    cell
        See `Cell`.
    max_q
        Largest 1/d of the table of reflections, inverse Angstrom.
    peak_width
        Gaussian width (standard deviation) of a reciprocal lattice point along the beam, inverse
        Angstrom; combines mosaic block size, bandwidth and divergence.
    b_factor
        Overall temperature factor B, square Angstrom.
    rng
        Draws the structure factors.

    Raises
    ------
    ValueError
        If the cell is impossible or has too many reflections.
    """

    def __init__(
        self,
        cell: Cell,
        max_q: float,
        peak_width: float,
        b_factor: float,
        rng: np.random.Generator,
    ) -> None:
        self.basis = reciprocal_basis(cell)
        self.peak_width = peak_width
        # The sphere of radius max_q over the volume of one reciprocal cell.
        expected = 4.0 / 3.0 * np.pi * max_q**3 / abs(np.linalg.det(self.basis))
        if expected > MAX_REFLECTIONS:
            raise ValueError(
                f"the cell {cell} has {expected:.3g} reflections to d = {1 / max_q:.2f} Angstrom, "
                f"more than {MAX_REFLECTIONS}: is it in Angstrom? Otherwise lower the photon energy"
                " or the detector's size, or increase its distance"
            )
        # |h| = |q . a| <= max_q a, and so on for k and l.
        h, k, ell = (np.arange(-n, n + 1) for n in (max_q * np.array(cell[:3])).astype(int))
        hkl_R3 = np.stack(np.meshgrid(h, k, ell, indexing="ij"), axis=-1).reshape(-1, 3)
        q2_R = ((hkl_R3 @ self.basis) ** 2).sum(axis=1)
        inside_R = (q2_R <= max_q**2) & (q2_R > 0.0)
        self._hkl_R3 = hkl_R3[inside_R].astype(np.int16)
        self._q_R3 = hkl_R3[inside_R] @ self.basis
        self._q2_R = q2_R[inside_R]
        # Acentric Wilson statistics: |F|^2 is exponentially distributed (Wilson, Acta Cryst. 2
        # (1949) 318). The table is symmetric about the origin, so reversing it exchanges h, k, l
        # with -h, -k, -l: Friedel mates get the same |F|^2.
        half = rng.exponential(size=len(self._q2_R) // 2)
        # exp(-2 B sin^2(theta) / wavelength^2), with sin(theta) / wavelength = q / 2.
        falloff_R = np.exp(-0.5 * b_factor * self._q2_R)
        self._intensity_R = np.concatenate([half, half[::-1]]) * falloff_R

    def diffract(self, rotation: Floats, photon_energy_ev: float) -> Reflections:
        """Find the reflections of a still exposure.

        A lattice point q scatters if the sphere of radius k = 1/wavelength around -k_in passes
        within `TOLERANCE_WIDTHS` peak widths of it. At a distance s (the excitation error) it
        scatters the fraction exp(-s^2 / 2 width^2) of its full intensity, towards k_in + q.

        Parameters
        ----------
        rotation
            (3, 3) | crystal to laboratory frame, see `random_rotation`.
        photon_energy_ev
            eV.

        Returns
        -------
        Reflections
            Without polarisation, which depends on the direction alone.
        """
        k = 1.0 / wavelength_angstrom(photon_energy_ev)
        tolerance = TOLERANCE_WIDTHS * self.peak_width
        # |k_in + q|^2 - k^2. Only q_z matters, so one product does instead of rotating the table.
        w_R = self._q2_R + 2.0 * k * (self._q_R3 @ rotation[2])
        chosen = np.flatnonzero(
            (w_R <= tolerance * (2 * k + tolerance)) & (w_R >= -tolerance * (2 * k - tolerance))
        )
        k_out_M3 = self._q_R3[chosen] @ rotation.T + np.array([0.0, 0.0, k])
        length_M = np.linalg.norm(k_out_M3, axis=1)
        # Equals length - k, without the cancellation.
        excitation_M = w_R[chosen] / (length_M + k)
        partiality_M = np.exp(-0.5 * (excitation_M / self.peak_width) ** 2)
        return Reflections(
            hkl_M3=self._hkl_R3[chosen],
            k_out_M3=k_out_M3 * (k / length_M)[:, None],
            excitation_M=excitation_M,
            intensity_M=self._intensity_R[chosen] * partiality_M,
        )
