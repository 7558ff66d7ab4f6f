r"""Normal modes of molecules and crystals, and structures drawn along them (thesis eq. 2.45).

Near a minimum the energy is :math:`E = \tfrac12 x^T H x` with the Hessian H. In mass-weighted coordinates,
:math:`\tilde H = M^{-1/2} H M^{-1/2}`, the eigenvectors e are motions that do not exchange energy. The Cartesian
displacement of mode i is :math:`d_i = M^{-1/2} e_i / |M^{-1/2} e_i|`, of length one, with

- reduced mass :math:`\mu_i = 1 / |M^{-1/2} e_i|^2` and force constant :math:`K_i = d_i^T H d_i = \omega_i^2 \mu_i`,
- energy :math:`\tfrac12 K_i R_i^2` at amplitude :math:`R_i`, and none across modes: :math:`d_i^T H d_j = 0`.

Rigid motions cost no energy, so rotations and translations are projected out: 3N - 6 modes are left for a molecule,
3N - 5 for a linear one. A crystal keeps its orientation and loses the three translations only (acoustic phonons); its
modes repeat in every cell, so they are the phonons at the Gamma point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from numpy.random import Generator
from numpy.typing import NDArray

from tlmc.data.geometry import contacts, is_crystal
from tlmc.descriptors.aev import aev
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError
from tlmc.families.ani.model import AniPotential
from tlmc.families.ani.network import forward
from tlmc.labelling.frames import template
from tlmc.potentials.calculator import TlmcCalculator, checked_pairs
from tlmc.potentials.model import Potential

FloatArray = NDArray[np.float64]
Draw = Literal["thesis", "boltzmann"]

_LINEAR: Final = 1e-2
"""Length of a rotation about the axis over that about another one, below which a molecule counts as linear. A rotation
about the axis of a molecule that is bent by rounding only would take a bending mode with it."""

_ASYMMETRY: Final = 0.05
"""Share of the largest second derivative by which finite differences may depend on the order of differentiation."""

WAVENUMBER: Final = float(units._hbar * 1e10 / np.sqrt(units._e * units._amu) / units.invcm)
"""1/cm per root of eV / (Angstrom^2 u)."""


def hessian(frame: Atoms, calculator: BaseCalculator | Potential, step: float | None = None) -> FloatArray:
    r"""Return second derivatives of the energy: exact ones of our models, else by central differences of forces.

    For a model of this package, or a :class:`tlmc.potentials.TlmcCalculator`, this is `exact_hessian`, unless a step is
    asked for. For other calculators it is :math:`H_{ab} = -[F_b(x + h e_a) - F_b(x - h e_a)] / 2h`, symmetrised. In a
    crystal all images of an atom move together.

    The error of a difference is :math:`O(h^2)` only where forces are smooth. Those of the ANI models are not: the slope
    of CELU has a kink, and so has that of the cosine cutoff at its end, so that second derivatives jump. A difference
    across a jump is wrong by a share of it, whatever the step. With h = 0.01 in double precision, the sums over the
    atoms, which should be zero (a crystal that moves as a whole feels no force), were off by 0.06 eV/Angstrom^2 for
    ethanol and urea, and modes by up to 11 1/cm; with 1e-5, where few jumps lie within a step, by 1e-8 and less than
    0.01. The sum rule is broken by the exact derivatives to rounding only.

    Parameters
    ----------
    frame
        ``n_atoms`` atoms, as a rule at rest; it is not changed. Constraints do not count.
    calculator
        A model, or any ASE calculator with forces, which is called ``6 n_atoms`` times.
    step
        h, Angstrom, 0.01 for calculators of others: larger steps feel the third derivatives' neighbours, smaller ones
        the rounding of the forces. If given, differences are taken of any calculator.

    Returns
    -------
    NDArray
        Shape ``(3 n_atoms, 3 n_atoms)``, eV/Angstrom^2.

    Raises
    ------
    ConfigError
        If the step is not positive, or given for a model without a calculator.
    DataError
        If the calculator returns a force that is not finite.
    ModelError, DataError
        Of a model, as `exact_hessian`.
    """
    # not of a class derived from it, which may add to the energy
    if type(calculator) is TlmcCalculator and isinstance(calculator.potential, AniPotential) and step is None:
        calculator = calculator.potential
    if isinstance(calculator, Potential) and not isinstance(calculator, AniPotential):
        calculator = TlmcCalculator(calculator)
    if isinstance(calculator, AniPotential):
        if step is not None:
            raise ConfigError("second derivatives of a model are exact and take no step: hand in its TlmcCalculator")
        return exact_hessian(calculator, frame)
    step = 0.01 if step is None else step
    if not step > 0:
        raise ConfigError(f"the step of a finite difference must be positive, got {step} Angstrom")
    moved = frame.copy()
    moved.set_constraint()  # an atom that is held in place would neither move nor feel a force
    moved.calc = calculator
    rows = []
    for k in range(3 * len(frame)):
        forces = []
        for sign in (1.0, -1.0):
            positions = frame.get_positions()
            positions.flat[k] += sign * step
            moved.set_positions(positions)
            forces.append(moved.get_forces().reshape(-1))
        rows.append((forces[1] - forces[0]) / (2.0 * step))
    result = np.array(rows)
    if not np.isfinite(result).all():
        raise DataError(f"{frame.get_chemical_formula()}: the calculator returned forces that are not finite")
    symmetric: FloatArray = 0.5 * (result + result.T)
    return symmetric


def exact_hessian(model: AniPotential, frame: Atoms) -> FloatArray:
    """Return second derivatives of a model's energy, to rounding, by differentiating it twice in float64.

    Back-propagation through networks and descriptors gives the gradient as a function that can be differentiated again;
    one more sweep per coordinate gives the rows.

    Parameters
    ----------
    model
        Start or fine-tuned model.
    frame
        A molecule or crystal of ``n_atoms``, of any size against the cutoff.

    Returns
    -------
    NDArray
        Shape ``(3 n_atoms, 3 n_atoms)``, eV/Angstrom^2.

    Raises
    ------
    ModelError, DataError
        As `tlmc.potentials.predict`.
    """
    model = model.to(torch.float64)
    pairs, _ = checked_pairs(model, frame, "frame")
    species = model.species(frame)
    positions = torch.tensor(frame.positions, dtype=torch.float64)
    # image shifts are constants: x_j + shift - x_i follows the atoms, several images of one atom included
    shifts = pairs.vectors - (positions[pairs.neighbour] - positions[pairs.centre])
    positions.requires_grad_(True)
    vectors = positions[pairs.neighbour] - positions[pairs.centre] + shifts
    features = aev(model.aev, len(model.symbols), species, pairs._replace(vectors=vectors))
    if model.enrichment is not None:
        features = torch.cat([features, model.enrichment.columns(frame, positions)], dim=1)
    energy = torch.zeros((), dtype=torch.float64)
    for s in species.unique():
        outputs = forward(model.networks[model.symbols[s]], features[species == s])[0]
        energy = energy + model.scale * outputs.mean(0).sum()
    (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
    rows = [torch.autograd.grad(g, positions, retain_graph=True)[0].reshape(-1) for g in gradient.reshape(-1)]
    result = torch.stack(rows)
    return np.asarray(0.5 * (result + result.T), dtype=np.float64)


def rigid_motions(frame: Atoms) -> FloatArray:
    """Return translations and, for a molecule, rotations, orthonormal in mass-weighted coordinates.

    Parameters
    ----------
    frame
        A molecule, in a periodic box of vacuum or not, or a structure that is periodic and fills its cell.

    Returns
    -------
    NDArray
        Shape ``(n_rigid, 3 n_atoms)``: 6 rows, 5 for a linear molecule, 3 for an atom or anything periodic.

    Raises
    ------
    DataError
        If a molecule is cut by the border of its box, so that rotations about its centre have no meaning.
    """
    root = np.sqrt(frame.get_masses())
    translations: FloatArray = np.einsum("i,ac->aic", root / np.linalg.norm(root), np.eye(3)).reshape(3, -1)
    if frame.pbc.any() and not (frame.pbc.all() and not is_crystal(frame)):
        return translations
    if frame.pbc.any() and contacts(frame).shift.any():
        raise DataError(f"{frame.get_chemical_formula()}: the molecule is cut by the border of its box: make it whole")
    # velocity of every atom in a rotation about each axis through the centre of mass
    arms = frame.positions - frame.get_center_of_mass()
    rotations = np.stack([root[:, None] * np.cross(axis, arms) for axis in np.eye(3)]).reshape(3, -1)
    _, lengths, directions = np.linalg.svd(rotations, full_matrices=False)
    kept = directions[lengths > _LINEAR * lengths[0]] if len(frame) > 1 else directions[:0]
    return np.concatenate([translations, kept])


@equal_by_content
@dataclass(frozen=True)
class NormalModes:
    """Vibrations of a structure, softest first."""

    frame: Atoms
    """The structure at rest, ``n_atoms`` atoms."""
    displacements: FloatArray
    """Cartesian, shape ``(n_modes, n_atoms, 3)``, each of length one."""
    force_constants: FloatArray
    """K, eV/Angstrom^2, shape ``(n_modes,)``; negative for a mode that is no minimum."""
    reduced_masses: FloatArray
    """u, shape ``(n_modes,)``."""

    def __len__(self) -> int:
        """Return the number of modes."""
        return len(self.force_constants)

    @property
    def frequencies(self) -> FloatArray:
        """Wavenumbers, 1/cm, shape ``(n_modes,)``; those of imaginary frequencies negative."""
        squared = self.force_constants / self.reduced_masses
        return np.asarray(np.sign(squared) * np.sqrt(np.abs(squared)) * WAVENUMBER, dtype=np.float64)

    def oscillation(self, mode: int, amplitude: float = 0.5, n_frames: int = 20) -> list[Atoms]:
        """Return one period of a mode, to be played in a viewer; amplitude in Angstrom."""
        phases = np.sin(2.0 * np.pi * np.arange(n_frames) / n_frames)
        return [_moved(self.frame, amplitude * phase * self.displacements[mode]) for phase in phases]


def normal_modes(frame: Atoms, hessian: FloatArray) -> NormalModes:
    """Return the vibrations that a Hessian describes, rigid motions projected out.

    Parameters
    ----------
    frame
        The structure at rest; its masses count (``frame.set_masses`` for isotopes).
    hessian
        Shape ``(3 n_atoms, 3 n_atoms)``, eV/Angstrom^2.

    Returns
    -------
    NormalModes
        ``3 n_atoms`` modes less the rows of `rigid_motions`.

    Raises
    ------
    DataError
        If the Hessian has another shape, is not finite or far from symmetric, or as in `rigid_motions`.
    """
    n = len(frame)
    hessian = np.asarray(hessian, dtype=np.float64)
    if hessian.shape != (3 * n, 3 * n) or not np.isfinite(hessian).all():
        raise DataError(f"the Hessian of {n} atoms must be finite, of shape ({3 * n}, {3 * n}); got {hessian.shape}")
    asymmetry, largest = np.abs(hessian - hessian.T).max(), np.abs(hessian).max()
    if asymmetry > _ASYMMETRY * largest:
        raise DataError(
            f"{frame.get_chemical_formula()}: second derivatives must not depend on their order, but the Hessian and "
            f"its transpose differ by {asymmetry:.3g} of {largest:.3g} eV/Angstrom^2"
        )
    hessian = 0.5 * (hessian + hessian.T)
    root = np.repeat(np.sqrt(frame.get_masses()), 3)
    rigid = rigid_motions(frame)
    # the rows of V that belong to no singular value span everything but the rigid motions
    vibrations = np.linalg.svd(rigid, full_matrices=True)[2][len(rigid) :]
    weighted = vibrations @ (hessian / np.outer(root, root)) @ vibrations.T
    eigenvalues, vectors = np.linalg.eigh(weighted)
    cartesian = (vectors.T @ vibrations) / root
    length = np.linalg.norm(cartesian, axis=1)
    return NormalModes(
        frame=frame.copy(),
        displacements=(cartesian / length[:, None]).reshape(-1, n, 3),
        force_constants=eigenvalues / length**2,
        reduced_masses=1.0 / length**2,
    )


@equal_by_content
class Samples(NamedTuple):
    """Structures drawn along normal modes."""

    frames: list[Atoms]
    """``n_samples`` structures, ``info["harmonic_energy"]`` above the one at rest, eV."""
    fractions: FloatArray
    """c, the share of each mode in ``3/2 N_a k_B T``, shape ``(n_samples, n_modes)``."""
    amplitudes: FloatArray
    """R, Angstrom, shape ``(n_samples, n_modes)``."""
    energies: FloatArray
    """Sum of ``1/2 K R^2`` over the modes, eV, shape ``(n_samples,)``."""


def draw_fractions(n_samples: int, n_modes: int, rng: Generator) -> FloatArray:
    """Draw fractions c of eq. (2.45): a sum that is uniform in [0, 1], divided among the modes uniformly.

    The thesis, as the paper it follows (Smith et al., Chem. Sci. 8, 3192, 2017), asks for uniform random numbers whose
    sum lies in [0, 1]. Drawing every c from [0, 1] and dividing by the number of modes would keep the sum near 1/2, and
    a uniform density over all allowed c would keep it near 1; only the sum drawn by itself gives energies from 0 to the
    largest.

    Parameters
    ----------
    n_samples, n_modes
        Numbers of draws and of modes.
    rng
        Source of randomness.

    Returns
    -------
    NDArray
        Shape ``(n_samples, n_modes)``, none negative.
    """
    shares = rng.dirichlet(np.ones(n_modes), size=n_samples)
    return np.asarray(rng.uniform(size=(n_samples, 1)) * shares, dtype=np.float64)


def sample(
    modes: NormalModes,
    temperature: float,
    n_samples: int,
    rng: Generator,
    draw: Draw = "thesis",
    chosen: Sequence[int] | None = None,
) -> Samples:
    r"""Draw structures along normal modes.

    ``"thesis"``, eq. (2.45): :math:`R_i = \pm \sqrt{3 c_i N_a k_B T / K_i}` with `draw_fractions` and random signs. The
    harmonic energy is then :math:`\tfrac32 N_a k_B T \sum_i c_i`: uniform from 0 to :math:`\tfrac32 N_a k_B T`, mean
    :math:`\tfrac34 N_a k_B T`.

    ``"boltzmann"``: :math:`R_i` normal with variance :math:`k_B T / K_i`, the classical harmonic ensemble, whose energy
    has mean :math:`\tfrac12 n k_B T` for n modes and a relative width :math:`\sqrt{2/n}`.

    Parameters
    ----------
    modes
        Of a minimum: every force constant drawn along must be positive.
    temperature
        T, K.
    n_samples
        Structures to draw.
    rng
        Source of randomness.
    draw
        The distribution.
    chosen
        Modes to move along, by default all; the energy is then divided among them.

    Raises
    ------
    ConfigError
        If the temperature or the number is not positive, or the distribution or a mode is unknown.
    DataError
        If a chosen mode has no positive force constant.
    """
    if not (temperature > 0 and n_samples >= 1):
        raise ConfigError(f"temperature and n_samples must be positive, got {temperature} K and {n_samples}")
    if draw not in get_args(Draw):
        raise ConfigError(f"draw must be one of {', '.join(get_args(Draw))}, got {draw!r}")
    indices = np.arange(len(modes)) if chosen is None else np.asarray(chosen, dtype=np.int64)
    if not indices.size or indices.min() < 0 or indices.max() >= len(modes):
        raise ConfigError(f"chosen must name modes 0 to {len(modes) - 1}, got {indices.tolist()}")
    stiffness = modes.force_constants[indices]
    if (stiffness <= 0).any():
        wrong = int(indices[stiffness.argmin()])
        raise DataError(
            f"{modes.frame.get_chemical_formula()}: mode {wrong} has the force constant {stiffness.min():.3g} "
            "eV/Angstrom^2, so the structure is no minimum: relax it further"
        )
    thermal = units.kB * temperature
    fractions, amplitudes = np.zeros((2, n_samples, len(modes)))
    if draw == "thesis":
        drawn = draw_fractions(n_samples, len(indices), rng)
        signs = rng.choice([-1.0, 1.0], size=drawn.shape)
        moved = signs * np.sqrt(3.0 * drawn * len(modes.frame) * thermal / stiffness)
    else:
        moved = rng.normal(size=(n_samples, len(indices))) * np.sqrt(thermal / stiffness)
        drawn = stiffness * moved**2 / (3.0 * len(modes.frame) * thermal)
    fractions[:, indices], amplitudes[:, indices] = drawn, moved
    energies = 0.5 * (moved**2 @ stiffness)
    frames = [
        _moved(modes.frame, np.tensordot(amplitude, modes.displacements, axes=1), harmonic_energy=float(energy))
        for amplitude, energy in zip(amplitudes, energies, strict=True)
    ]
    return Samples(frames, fractions, amplitudes, energies)


def _moved(frame: Atoms, displacement: FloatArray, **info: float) -> Atoms:
    moved = template(frame)  # with its charge and spin
    moved.set_constraint()
    moved.positions += displacement
    moved.info |= info
    moved.set_masses(frame.get_masses())
    return moved
