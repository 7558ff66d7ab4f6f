r"""Small fits to real energy curves: descent on a surface of two parameters, and over- and underfitting.

An energy curve is what a calculator says along a stretched bond or a turning torsion. With one input it can be drawn,
and so can what a network makes of it between the points it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError
from tlmc.networks.mlp import MLP
from tlmc.networks.optimizers import OPTIMIZERS, AdamW

Array = NDArray[np.float64]


@equal_by_content
class Curve(NamedTuple):
    """Energies along one coordinate."""

    x: Array
    """Distance in Angstrom or angle in degrees, shape ``(n_points,)``."""
    energies: Array
    """eV, shape ``(n_points,)``."""


def bond_scan(frame: Atoms, bond: tuple[int, int], distances: ArrayLike, calculator: BaseCalculator) -> Curve:
    """Label a molecule while one bond is stretched; the second atom moves, all others stay.

    Parameters
    ----------
    frame
        A molecule; it is not changed.
    bond
        Indices of the two atoms.
    distances
        Angstrom, shape ``(n_points,)``.
    calculator
        Any ASE calculator.
    """
    x, energies = np.asarray(distances, dtype=np.float64), []
    for distance in x:
        moved = frame.copy()
        moved.set_distance(*bond, distance, fix=0)
        energies.append(_label(moved, calculator))
    return Curve(x, np.array(energies))


def torsion_scan(
    frame: Atoms,
    dihedral: tuple[int, int, int, int],
    angles: ArrayLike,
    calculator: BaseCalculator,
    rattle: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Curve:
    """Label a molecule while one half of it turns about a bond.

    Parameters
    ----------
    frame
        A molecule; it is not changed.
    dihedral
        Indices of four atoms in a chain; what hangs on the third turns about the bond in the middle.
    angles
        Degrees, shape ``(n_points,)``.
    calculator
        Any ASE calculator.
    rattle
        Standard deviation in Angstrom by which all coordinates are displaced at random at each point. The energy then
        depends on much that the angle does not tell, which is where noise in such a curve comes from.
    rng
        Source of the displacements; needed if there are any.

    Raises
    ------
    ConfigError
        If the bond in the middle is part of a ring or no bond, or displacements are asked for without ``rng``.
    """
    if rattle and rng is None:
        raise ConfigError(f"displacements of {rattle} A need a random number generator")
    x, energies, turning = np.asarray(angles, dtype=np.float64), [], _side(frame, dihedral[1], dihedral[2])
    for angle in x:
        moved = frame.copy()
        moved.set_dihedral(*dihedral, angle, indices=turning)
        if rng is not None:
            moved.positions += rattle * rng.normal(size=moved.positions.shape)
        energies.append(_label(moved, calculator))
    return Curve(x, np.array(energies))


class MorseLoss:
    r"""How badly a Morse curve of depth ``D`` and width ``a`` describes energies, and the slope of that.

    .. math:: L(D, a) = \frac1n \sum_i \left[ D (1 - e^{-a (r_i - r_0)})^2 - E_i \right]^2

    Near the minimum only the force constant :math:`2 D a^2` matters, so that the surface has a long curved valley.

    Parameters
    ----------
    curve
        Energies of a stretched bond; the lowest point is taken as :math:`r_0` and zero of energy.
    """

    def __init__(self, curve: Curve) -> None:
        lowest = curve.energies.argmin()
        self.stretch = torch.from_numpy(curve.x - curve.x[lowest])
        """``r - r_0`` in Angstrom, shape ``(n_points,)``."""
        self.energies = torch.from_numpy(curve.energies - curve.energies[lowest])
        """eV, shape ``(n_points,)``."""

    def __call__(self, depth: ArrayLike, width: ArrayLike) -> Array:
        """Return the loss in eV^2 for depths in eV and widths in 1/Angstrom, arrays of one shape."""
        D, a = np.asarray(depth, dtype=np.float64)[..., None], np.asarray(width, dtype=np.float64)[..., None]
        morse = D * (1.0 - np.exp(-a * self.stretch.numpy())) ** 2
        loss: Array = ((morse - self.energies.numpy()) ** 2).mean(-1)
        return loss

    def gradient(self, parameters: Tensor, points: Tensor | None = None) -> Tensor:
        """Return the derivative with respect to ``(D, a)``, shape ``(2,)``; of some points only if given."""
        D, a = parameters
        x, energies = self.stretch, self.energies
        if points is not None:
            x, energies = x[points], energies[points]
        rise = 1.0 - torch.exp(-a * x)
        error = D * rise**2 - energies
        return torch.stack([(2 * error * rise**2).mean(), (4 * error * D * rise * x * torch.exp(-a * x)).mean()])

    def stochastic(self, n_points: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """Return a gradient of ``n_points`` points, drawn anew at every call."""
        generator = torch.Generator().manual_seed(seed)

        def gradient(parameters: Tensor) -> Tensor:
            return self.gradient(parameters, torch.randperm(len(self.energies), generator=generator)[:n_points])

        return gradient


def descend(
    optimizer: str,
    gradient: Callable[[Tensor], Tensor],
    start: Sequence[float],
    lr: float,
    n_steps: int,
) -> Array:
    """Walk down a function with one of the optimisers.

    Parameters
    ----------
    optimizer
        Name in :data:`tlmc.networks.OPTIMIZERS`.
    gradient
        Derivative, or a subgradient or an estimate of it, at parameters of shape ``(n,)``.
    start
        First parameters.
    lr
        Learning rate.
    n_steps
        Steps.

    Returns
    -------
    NDArray
        The path, shape ``(n_steps + 1, n)``.

    Raises
    ------
    ConfigError
        If there is no such optimiser.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    w = torch.tensor(start, dtype=torch.float64)
    method, path = OPTIMIZERS[optimizer]([w], lr), [w.numpy().copy()]
    for _ in range(n_steps):
        method.step([gradient(w)])
        path.append(w.numpy().copy())
    return np.array(path)


@equal_by_content
@dataclass(frozen=True)
class CurveFit:
    """A network fitted to an energy curve; call it with coordinates for energies."""

    network: MLP
    """After the last step."""
    best: MLP
    """With the lowest error on the validation points: what early stopping keeps."""
    best_step: int
    history: pd.DataFrame
    """``step``, ``train_rmse`` and ``validation_rmse`` in eV."""
    centre: float
    half_width: float
    mean: float
    scale: float

    def __call__(self, x: ArrayLike, *, best: bool = False) -> Array:
        """Return the energies of the last or the best network, eV, shape as ``x``."""
        inputs = (torch.as_tensor(np.asarray(x, dtype=np.float64)) - self.centre) / self.half_width
        network = self.best if best else self.network
        energies: Array = (
            self.mean + self.scale * network(inputs.reshape(-1, 1)).detach().reshape(inputs.shape)
        ).numpy()
        return energies


def fit_curve(
    train: Curve,
    validation: Curve,
    hidden: Sequence[int],
    n_steps: int = 2000,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    seed: int = 0,
    record_every: int = 10,
) -> CurveFit:
    """Fit a tanh network to an energy curve with our own back-propagation and AdamW, all points in every step.

    Parameters
    ----------
    train
        Points that the weights are fitted to. Their range becomes [-1, 1], their energies get mean 0 and spread 1.
    validation
        Points that only say when to stop.
    hidden
        Neurons of the hidden layers.
    n_steps, lr, weight_decay
        Of the optimiser.
    seed
        Of the weights.
    record_every
        Steps between two rows of the history.

    Raises
    ------
    DataError
        If the training points do not differ.
    """
    centre, half_width = (train.x.max() + train.x.min()) / 2, (train.x.max() - train.x.min()) / 2
    mean, scale = train.energies.mean(), train.energies.std()
    if not (half_width > 0 and scale > 0):
        raise DataError(f"a curve needs points that differ, got x {train.x} and energies {train.energies} eV")
    # weights wide enough to bend within the range from the start
    network = MLP((1, *hidden, 1), "tanh", "he", torch.Generator().manual_seed(seed))
    optimizer = AdamW(network.flat(), lr, weight_decay=weight_decay)
    x, y, x_validation, y_validation = (
        torch.from_numpy(values).reshape(-1, 1)
        for curve in (train, validation)
        for values in ((curve.x - centre) / half_width, (curve.energies - mean) / scale)
    )
    history, best, best_rmse, best_step = [], _copy(network), np.inf, 0
    for step in range(n_steps + 1):
        with torch.no_grad():
            trace = network.trace(x)
        error = trace.sums[-1] - y
        if step % record_every == 0:
            rmse = scale * (network(x_validation) - y_validation).square().mean().sqrt().item()
            train_rmse = scale * error.square().mean().sqrt().item()
            history.append({"step": step, "train_rmse": train_rmse, "validation_rmse": rmse})
            if rmse < best_rmse:
                best, best_rmse, best_step = _copy(network), rmse, step
        if step < n_steps:
            optimizer.step(network.backward(trace, 2.0 * error / len(x)).flat())
    return CurveFit(network, best, best_step, pd.DataFrame(history), centre, half_width, mean, scale)


def _copy(network: MLP) -> MLP:
    result = MLP(network.sizes, network.activation)
    result.load_state_dict(network.state_dict())
    return result


def _label(frame: Atoms, calculator: BaseCalculator) -> float:
    frame.calc = calculator
    return float(frame.get_potential_energy())


def _side(frame: Atoms, fixed: int, turning: int) -> list[int]:
    """Return the atoms on one side of a bond."""
    i, j = neighbor_list("ij", frame, natural_cutoffs(frame, mult=1.2))
    bonded = ((i == fixed) & (j == turning)).any()
    cut = ((i == fixed) & (j == turning)) | ((i == turning) & (j == fixed))
    graph = coo_array((np.ones((~cut).sum()), (i[~cut], j[~cut])), shape=(len(frame), len(frame)))
    label = connected_components(graph, directed=False)[1]
    if not bonded or label[fixed] == label[turning]:
        raise ConfigError(f"atoms {fixed} and {turning} are not joined by a bond about which one side can turn")
    return [int(k) for k in np.flatnonzero(label == label[turning])]
