"""How far a fine-tuned model has moved from its start model where no label asked for it: on isolated molecules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from tlmc.evaluation.metrics import Metric
from tlmc.potentials.calculator import predict
from tlmc.potentials.reference import fit_reference

if TYPE_CHECKING:
    from tlmc.potentials.model import Potential


def forgetting(start: Potential, tuned: Potential, frames: Sequence[Atoms]) -> dict[str, Metric]:
    """Compare a fine-tuned model with the model it was, on structures that it was not trained on.

    The start model's answers take the place of labels, so every structure will do. Not all of the difference is a loss:
    labels of another level of theory ask for some of it. Energies are compared after a constant per element, fitted to
    these frames, is taken out: how atoms are counted is a convention, and fine-tuning changes it.

    Parameters
    ----------
    start, tuned
        Models of the same elements.
    frames
        Isolated molecules, for instance ``isolated_molecules(elements, "held out")`` of :mod:`tlmc.training.replay`.

    Returns
    -------
    dict
        ``force_rmse_vector``, ``force_rmse_component`` (eV/Angstrom) and ``energy_rmse_per_atom`` (eV/atom), all of the
        difference between the two models.

    Raises
    ------
    ModelError
        If a model lacks an element of a frame.
    """
    before, after = (predict(model.with_reference(None), frames) for model in (start, tuned))
    reference = fit_reference(frames, before.energies, after.energies, "per_element")
    n_atoms = np.array([len(frame) for frame in frames])
    energy = (after.energies + reference.energies(frames) - before.energies) / n_atoms
    force = np.concatenate(after.forces) - np.concatenate(before.forces)
    component = float(np.sqrt(np.square(force).mean()))
    return {
        "force_rmse_vector": Metric(3**0.5 * component, "eV/A"),
        "force_rmse_component": Metric(component, "eV/A"),
        "energy_rmse_per_atom": Metric(float(np.sqrt(np.square(energy).mean())), "eV/atom"),
    }
