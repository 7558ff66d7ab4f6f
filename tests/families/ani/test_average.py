"""The mean of several models as one model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers.descriptor_structures import small_cell
from helpers.potential_references import toy_potential
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.errors import ModelError
from tlmc.families.ani import average, enrich, relabel
from tlmc.families.ani.model import Layer
from tlmc.potentials import TlmcCalculator, predict
from tlmc.potentials.model_files import load_model, save_model
from tlmc.potentials.reference import ReferenceEnergies

FRAMES = [molecule("CH3CONH2"), small_cell(), molecule("CH3OH")]


def toy(seed, compression=None, frames=FRAMES):
    """A model with weights of its own everywhere, with or without richer columns, and a fitted reference."""
    model = toy_potential(symbols=("H", "C", "N", "O"))
    if compression is not None:
        soap = {"r_cut": 4.0, "n_max": 3, "l_max": 2}
        fitted = fit_enrichment(
            frames, "soap", soap, species=["H", "C", "N", "O"], compression=compression, n_columns=20
        )
        model = enrich(model, fitted)
    generator = torch.Generator().manual_seed(seed)

    def moved(part):
        return part + 0.05 * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)

    networks = {
        symbol: tuple(Layer(moved(weight), moved(bias)) for weight, bias in layers)
        for symbol, layers in model.networks.items()
    }
    reference = ReferenceEnergies({symbol: 0.1 * seed + k for k, symbol in enumerate("HCNO")}, "per_element")
    return dataclasses.replace(model, networks=networks, reference=reference)


@pytest.mark.parametrize(
    "models",
    [
        # columns fitted on different frames are centred differently
        [toy(1, "species"), toy(2, "pca", FRAMES[:2])],
        [toy(1), toy(2, "pca"), toy(3, "species", FRAMES[1:])],
        [toy(1), toy(2)],
    ],
    ids=["species and pca", "without, pca and species", "without"],
)
def test_it_is_the_mean_of_what_the_models_say(models, tmp_path):
    mean = average(models)
    assert mean.members == len(models) * models[0].members
    save_model(mean, tmp_path / "mean.safetensors")
    mean, _ = load_model(tmp_path / "mean.safetensors")
    said = [predict(model, FRAMES) for model in models]
    ours = predict(mean, FRAMES)
    np.testing.assert_allclose(ours.energies, np.mean([one.energies for one in said], axis=0), rtol=0, atol=1e-6)
    for k, of_frame in enumerate(ours.forces):
        np.testing.assert_allclose(of_frame, np.mean([one.forces[k] for one in said], axis=0), rtol=0, atol=1e-6)
    assert np.abs(said[0].forces[1] - said[1].forces[1]).max() > 1e-3  # they do differ

    cell = small_cell()
    cell.calc = TlmcCalculator(mean)
    stress = cell.get_stress()
    parts = []
    for model in models:
        cell.calc = TlmcCalculator(model)
        parts.append(cell.get_stress())
    np.testing.assert_allclose(stress, np.mean(parts, axis=0), rtol=0, atol=1e-7)


def test_models_that_do_not_belong_together_get_one_sentence():
    model = toy(1, "species")
    with pytest.raises(ModelError, match="a mean needs two models or more, got 1"):
        average([model])
    with pytest.raises(ModelError, match="models 1 and 3 are one and the same, which would count twice"):
        average([model, toy(2, "pca"), toy(1, "species")])
    with pytest.raises(ModelError, match="different element map have no mean: {} and {'Si': 'C'}"):
        average([model, relabel(model, {"Si": "C"})])
    with pytest.raises(ModelError, match="different dtype"):
        average([model, model.to(torch.float16)])
    assert model.enrichment is not None
    other = dataclasses.replace(model.enrichment, parameters=model.enrichment.parameters | {"r_cut": 5.0})
    with pytest.raises(ModelError, match="columns come from different descriptors have no mean: .*4.0.*5.0"):
        average([model, dataclasses.replace(model, enrichment=other)])
    with pytest.raises(ModelError, match="all, or none, have reference energies"):
        average([model, model.with_reference(None)])
