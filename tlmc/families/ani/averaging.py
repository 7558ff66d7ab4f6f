"""The mean of several fine-tunings of one start model, as one model.

Models that were fine-tuned with other columns err in part independently, so that their mean is often better than
either. A :class:`tlmc.families.ani.model.Potential` is the mean of its members already, so the mean of models is the
ensemble of all their members: it is saved and used like any other, and costs as much as its parts.

The mean is no committee. Its members are not kept apart by the model they came from, and the energies of each part
would need the reference that was fitted for it; for a spread, ask the models themselves
(:func:`tlmc.sampling.predict_committee` takes a list).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, combinations
from typing import cast

import torch

from tlmc.arguments import checked
from tlmc.descriptors.enrichment import Enrichment
from tlmc.errors import ModelError
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.potentials.model import Potential
from tlmc.potentials.reference import ReferenceEnergies

_SAME = ("symbols", "aev", "self_energies", "fingerprint", "element_map", "scale", "members", "dtype")
"""What models must have in common."""


@checked
def average(models: Sequence[Potential]) -> AniPotential:
    r"""Return the mean of several models: energies, forces and reference energies.

    Richer columns must come from one descriptor; they stand side by side, each model's members with zero weights for
    those of the others. Where models were centred on other training frames, :math:`x_k = (d - s_k) W_k` becomes
    :math:`(d - s_1) W_k`, and the constant :math:`(s_1 - s_k) W_k` goes into the bias of the first layer.

    Parameters
    ----------
    models
        Two or more, of one start model, with as many members each.

    Raises
    ------
    ModelError
        If there are fewer than two, two are the same, or they differ in start model, elements, members or precision,
        or their columns come from different descriptors.
    """
    if len(models) < 2:
        raise ModelError(f"a mean needs two models or more, got {len(models)}")
    others = [model.name for model in models if not isinstance(model, AniPotential)]
    if others:
        raise ModelError(f"the mean of several models is one model for the family ani only, not for {others[0]}")
    models = cast(Sequence[AniPotential], models)
    first = models[0]
    for model in models[1:]:
        for name in _SAME:
            ours, theirs = getattr(first, name), getattr(model, name)
            if ours != theirs:
                raise ModelError(f"models with different {name.replace('_', ' ')} have no mean: {ours} and {theirs}")
    for a, b in combinations(range(len(models)), 2):
        if models[a] == models[b]:
            raise ModelError(f"models {a + 1} and {b + 1} are one and the same, which would count twice in the mean")
    joint = _side_by_side([model.enrichment for model in models])
    widths = [0 if model.enrichment is None else model.enrichment.n_columns for model in models]
    befores = accumulate(widths[:-1], initial=0)
    alike = [_with_columns(model, joint, before) for model, before in zip(models, befores, strict=True)]
    networks = {
        symbol: tuple(_stack(layers) for layers in zip(*(model.networks[symbol] for model in alike), strict=True))
        for symbol in first.symbols
    }
    reference = _mean_reference(models)
    return dataclasses.replace(first, networks=networks, enrichment=joint, reference=reference, committee=False)


def _stack(layers: Sequence[Layer]) -> Layer:
    """Return the members of several ensembles as one."""
    return Layer(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _side_by_side(enrichments: Sequence[Enrichment | None]) -> Enrichment | None:
    """Return the columns of all models, centred as the first that has any."""
    present = [enrichment for enrichment in enrichments if enrichment is not None]
    if not present:
        return None
    for enrichment in present[1:]:
        if enrichment.to_json() != present[0].to_json():
            raise ModelError(
                f"models whose columns come from different descriptors have no mean: {present[0].to_json()} and "
                f"{enrichment.to_json()}"
            )
    return dataclasses.replace(present[0], projection=torch.cat([e.projection for e in present], dim=1))


def _with_columns(model: AniPotential, joint: Enrichment | None, before: int) -> AniPotential:
    """Return a model that takes the columns of all models; `before` of them come before its own."""
    if joint is None:
        return model
    own, n_aev = model.enrichment, model.aev.length(len(model.symbols))
    networks = {}
    for symbol, ((weight, bias), *rest) in model.networks.items():
        full = weight.new_zeros(weight.shape[0], n_aev + joint.n_columns, weight.shape[2])
        full[:, :n_aev] = weight[:, :n_aev]
        if own is not None:
            full[:, n_aev + before : n_aev + before + own.n_columns] = weight[:, n_aev:]
            moved = ((joint.shift - own.shift) @ own.projection).to(weight)
            bias = bias + torch.matmul(moved, weight[:, n_aev:])[:, None]
        networks[symbol] = (Layer(full, bias), *rest)
    return dataclasses.replace(model, networks=networks, enrichment=joint)


def _mean_reference(models: Sequence[AniPotential]) -> ReferenceEnergies | None:
    """Return the mean of the fitted reference energies."""
    fitted = [model.reference for model in models if model.reference is not None]
    if not fitted:
        return None
    elements = {tuple(sorted(reference.offsets)) for reference in fitted}
    if len(fitted) < len(models) or len(elements) > 1:
        raise ModelError("models have a mean if all, or none, have reference energies, fitted for the same elements")
    mean = {e: sum(reference.offsets[e] for reference in fitted) / len(fitted) for e in fitted[0].offsets}
    return ReferenceEnergies(mean, fitted[0].mode)
