r"""Ridge regression of the output layers: the best last layer for the start model's hidden layers, in closed form.

Energies and forces are linear in the weights ``w_m`` and biases ``b_m`` of the output layers. For one structure, with
``f`` the energy per unit of a member's output and ``a_L`` the activation of the last hidden layer,

- ``E = f sum_i sum_m (a_L[m, i] w_m + b_m)``, so a row of the design matrix sums ``f a_L`` over an element;
- ``F_c = -f sum_i sum_m (da_L[m, i]/dx_c) w_m`` for a coordinate ``x_c``: the tangent sweep of
  :mod:`tlmc.families.ani.engine` with ``v = dG/dx_c``, for all coordinates at once.

With every row weighted as in the loss, ``min |A d - r|^2 + ridge |d|^2`` over the change ``d`` of the output layers,
``r`` the errors of the start model, gives a smaller loss at once, whatever the ridge. The cost is about a tangent sweep
per coordinate and structure, and the square of the number of unknowns per row: seconds to a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tlmc.descriptors.aev import BLOCK
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import DescriptorCache, Structure
from tlmc.families.ani.device_cache import DeviceCache
from tlmc.families.ani.engine import Engine
from tlmc.families.ani.network import CELU_ALPHA


def ridge_start(
    engine: Engine,
    cache: DescriptorCache | DeviceCache,
    indices: Iterable[int],
    energies: Tensor,
    forces: Sequence[Tensor],
    lambda_: float,
    ridge: float,
) -> None:
    """Replace the output layers by those that minimise the squared loss plus a penalty on their change.

    Parameters
    ----------
    engine
        Its output layers must be trainable; they change in place.
    cache, indices
        Structures to fit.
    energies, forces
        Labels as in :meth:`Engine.loss_gradient`, for every structure of the cache.
    lambda_
        Weight of the forces.
    ridge
        Penalty per squared change of a weight, in eV^2.
    """
    picked = list(indices)
    normal: Tensor | None = None
    for i in picked:
        A = design_matrix(engine, cache[i])
        predicted = engine.energies_forces(merge([cache[i]]))
        n = len(forces[i])
        error = torch.cat([(energies[i] - predicted.energies), (forces[i] - predicted.forces).reshape(-1).double()])
        weight = torch.full_like(error, (lambda_ / n / len(picked)) ** 0.5)
        weight[0] = ((1.0 - lambda_) / len(picked)) ** 0.5 / n
        A = torch.cat([A, error[:, None]], 1).mul_(weight[:, None])
        normal = A.T @ A if normal is None else normal.addmm_(A.T, A)
    if normal is None:
        return
    left, right = normal[:-1, :-1].clone(), normal[:-1, -1]
    left.diagonal().add_(ridge)
    change = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(left)).squeeze(1)
    offset = 0
    for k in engine.layers:
        for part in engine.layers[k][-1]:
            part.add_(change[offset : offset + part.numel()].view(part.shape).to(part.dtype))
            offset += part.numel()


def design_matrix(engine: Engine, structure: Structure) -> Tensor:
    """Return the derivative of energy (first row) and forces by the output layers, element after element.

    Returns
    -------
    Tensor
        float64, shape ``(1 + 3 n_atoms, n_unknowns)``; unknowns per element: weights of all members, then biases.
    """
    n_coordinates, device = 3 * len(structure.species), structure.G.device
    columns = []
    for k, layers in engine.layers.items():
        atoms = torch.nonzero(structure.species == k).squeeze(1).to(device)
        *hidden, (w, _) = layers
        n_members, width = w.shape[:2]
        atom, coordinate, tangents = _coordinates(structure, atoms)
        A = torch.zeros(1 + n_coordinates, n_members * (width + 1), dtype=torch.float64, device=device)
        for m in range(n_members):
            a, t = structure.G[atoms], tangents
            for weight, bias in hidden:
                a = torch.celu(a @ weight[m] + bias[m], CELU_ALPHA)
                t = (t @ weight[m]).mul_((a.clamp(max=0.0) / CELU_ALPHA + 1.0)[atom])
            part = A[:, m * width : (m + 1) * width]
            part[0] = a.double().sum(0)
            part[1:].index_add_(0, coordinate, t.double(), alpha=-1.0)
        A[0, n_members * width :] = len(atoms)
        columns.append(A.mul_(engine.factor))
    return torch.cat(columns, 1)


def _coordinates(structure: Structure, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coordinates that move the descriptors of some atoms.

    Returns
    -------
    tuple
        Position in `atoms` and coordinate (3 times the moved atom plus direction), both ``(n_rows,)``, and the
        derivative of the descriptor, ``(n_rows, n_columns)``.
    """
    n_atoms, n_columns = structure.G.shape
    parts = n_columns // BLOCK
    row = torch.repeat_interleave(structure.starts.diff())
    place = torch.full((n_atoms,), -1, device=atoms.device)
    place[atoms] = torch.arange(len(atoms), device=atoms.device)
    picked = torch.nonzero(place[row // parts] >= 0).squeeze(1)
    row, moved = row[picked], structure.atoms[picked].long()
    pairs, pair = torch.unique(place[row // parts] * n_atoms + moved, return_inverse=True)
    derivative = structure.values.new_zeros(len(pairs), 3, parts, BLOCK)
    derivative[pair, :, row % parts] = structure.values[picked]
    atom = (pairs // n_atoms).repeat_interleave(3)
    coordinate = (3 * (pairs % n_atoms)[:, None] + torch.arange(3, device=atoms.device)).reshape(-1)
    return atom, coordinate, derivative.view(-1, n_columns)
