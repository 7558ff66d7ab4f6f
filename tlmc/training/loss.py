"""The training loss (thesis eq. 3.46) and its derivatives with respect to energies and forces."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from tlmc.equality import equal_by_content

LossKind = Literal["mse", "huber"]


@equal_by_content
class LossAndSlopes(NamedTuple):
    """Loss of one batch and what back-propagation starts from."""

    loss: Tensor
    """Scalar, eV^2 (the force term in eV^2/A^2)."""
    force_slope: Tensor
    """dL/dF, shape ``(n_atoms, 3)``."""
    energy_slope: Tensor
    """dL/dE, shape ``(n_structures,)``."""


def batch_loss(
    energy_error: Tensor,
    force_error: Tensor,
    n_atoms: Tensor,
    structure: Tensor,
    lambda_: float,
    kind: LossKind = "mse",
    delta: float = 1.0,
    n_structures: int | None = None,
) -> LossAndSlopes:
    r"""Return ``L = lambda MSE(F) + (1 - lambda) MSE(E/N)``, averaged over the structures of a batch.

    ``MSE(F)`` of one structure is ``(1/N) sum_i |dF_i|^2``, summed over x, y and z. With ``kind="huber"`` every square
    ``x^2`` of a force component or energy per atom is kept below `delta` and becomes ``delta (2|x| - delta)`` above.

    Parameters
    ----------
    energy_error
        Predicted minus labelled energy, eV, shape ``(n_structures,)``.
    force_error
        Predicted minus labelled forces, eV/A, shape ``(n_atoms, 3)``.
    n_atoms
        Atoms per structure, same dtype as the errors, shape ``(n_structures,)``.
    structure
        Structure of every atom, int64, shape ``(n_atoms,)``.
    lambda_
        Weight of the forces, from 0 to 1.
    kind, delta
        Squared or Huber errors; delta in eV/A and eV/atom.
    n_structures
        Structures of the whole batch if these are a share of one: shares then add up to loss and slopes of the whole.
    """
    count = n_structures or n_atoms.shape[0]
    per_atom = 1.0 / (n_atoms * count)
    force_value, force_slope = _penalty(force_error, kind, delta)
    energy_value, energy_slope = _penalty(energy_error / n_atoms, kind, delta)
    weight = lambda_ * per_atom.index_select(0, structure)[:, None]
    loss = (weight * force_value).sum() + (1.0 - lambda_) * energy_value.sum() / count
    return LossAndSlopes(loss, weight * force_slope, (1.0 - lambda_) * per_atom * energy_slope)


def _penalty(error: Tensor, kind: LossKind, delta: float) -> tuple[Tensor, Tensor]:
    """Return the penalty of each error and its slope."""
    if kind == "mse":
        return error.square(), 2.0 * error
    clipped = error.clamp(-delta, delta)
    return clipped * (2.0 * error - clipped), 2.0 * clipped
