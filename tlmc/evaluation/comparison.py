"""A model before and after fine-tuning, on one part of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from tlmc.equality import equal_by_content
from tlmc.evaluation.metrics import Metric, by_kind, evaluate
from tlmc.potentials.calculator import predict
from tlmc.potentials.model import Predictions
from tlmc.potentials.reference import fit_reference

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.data.splits import Split
    from tlmc.potentials.model import Potential

Part = Literal["train", "validation", "test"]

START = "start"
REFITTED = "start, offset refitted"


@equal_by_content
class Stage(NamedTuple):
    """A model's answers about one part of a data set, and their errors."""

    predictions: Predictions
    metrics: dict[str, Metric]
    by_kind: Mapping[str, dict[str, Metric]] = MappingProxyType({})
    """Errors of ``crystals`` and ``molecules`` apart, where the part holds both."""


def refit_offset(model: Potential, dataset: Dataset) -> Potential:
    """Return the model with reference energies fitted anew to all labels of a data set, weights as they are."""
    bare = model.with_reference(None)
    reference = fit_reference(dataset.frames, dataset.energies, predict(bare, dataset.frames).energies)
    return bare.with_reference(reference)


def before_and_after(
    start: Potential, tuned: Mapping[str, Potential], dataset: Dataset, split: Split, part: Part = "test"
) -> dict[str, Stage]:
    """Evaluate a start model, the same with its energy offset refitted, and what became of it.

    The offset is fitted on the training part. Against it, and not against the start model as it is, the energy error
    after fine-tuning says what was learned: a start model's energies are mostly off by a constant (thesis, table 4.6).

    Parameters
    ----------
    start
        Model before fine-tuning.
    tuned
        Fine-tuned models by recipe.
    dataset, split
        All frames and their parts.
    part
        The part to evaluate on.

    Returns
    -------
    dict
        A stage under ``"start"``, ``"start, offset refitted"`` and every recipe.
    """
    chosen = dataset.subset(getattr(split, part))
    models = {START: start, REFITTED: refit_offset(start, dataset.subset(split.train)), **tuned}
    stages = {}
    for name, model in models.items():
        predictions = predict(model, chosen.frames)
        stages[name] = Stage(predictions, evaluate(chosen, predictions), by_kind(chosen, predictions))
    return stages
