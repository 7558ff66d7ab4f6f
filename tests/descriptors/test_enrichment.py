"""Columns of another descriptor behind the AEV: nothing changes at first, and everything stays exact."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from ase.build import molecule
from dscribe import descriptors as dscribe

from helpers.descriptor_structures import small_cell, structure
from helpers.potential_references import toy_potential
from tlmc.data.loading import load_dataset
from tlmc.descriptors.enrichment import Enrichment, fit_enrichment
from tlmc.errors import ConfigError, ModelError
from tlmc.families.ani import Layer, enrich, extend, relabel, to_torchani
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.engine import Engine
from tlmc.families.ani.evaluation import member_energies
from tlmc.potentials import TlmcCalculator, predict
from tlmc.potentials.model_files import load_model, save_model
from tlmc.sampling.modes import exact_hessian
from tlmc.training.loss import batch_loss

SMALL = {"r_cut": 3.0, "n_max": 2, "l_max": 2}
KINDS = {
    "soap": SMALL,
    "symmetry_functions": {"r_cut": 3.5, "radial": [[0.5, 1.0], [1.0, 0.0]], "angular": [[0.01, 2.0, 1.0]]},
    "bispectrum": {"r_cut": 3.0, "J_max": 2},
}


def frames():
    return [molecule("CH3CONH2"), small_cell(), molecule("CH3OH")]


def make(kind="soap", compression="none", **options):
    return fit_enrichment(frames(), kind, KINDS[kind], compression=compression, **options)


def toy():
    return toy_potential(symbols=("H", "C", "N", "O"))


def trained(model, seed=0):
    """Give the zero weights of the new columns values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    networks = {}
    for symbol, (first, *rest) in model.networks.items():
        weight = first.weight.clone()
        new = weight[:, -model.enrichment.n_columns :]
        new += 0.2 * torch.randn(new.shape, generator=generator, dtype=torch.float64).to(new.dtype)
        networks[symbol] = (Layer(weight, first.bias), *rest)
    return dataclasses.replace(model, networks=networks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_richer_model_starts_as_the_model_it_was(kind, tmp_path):
    model = toy()
    richer = enrich(model, make(kind))
    expected = predict(model, frames())
    save_model(richer, tmp_path / "model.safetensors")
    back, _ = load_model(tmp_path / "model.safetensors")
    for candidate in (richer, back):
        found = predict(candidate, frames())
        np.testing.assert_allclose(found.energies, expected.energies, rtol=1e-10)
        for ours, theirs in zip(found.forces, expected.forces, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)
    cache = build_cache(richer, frames(), torch.float64, tmp_path)
    engine = Engine(richer, cache, (True,) * 4)
    result = engine.energies_forces(merge(cache.structures))
    np.testing.assert_allclose(
        result.energies, expected.energies - richer.atomic_reference(frames()).numpy(), rtol=1e-9
    )
    order = torch.cat([s.order + shift for s, shift in zip(cache, (0, 9, 12), strict=True)])
    np.testing.assert_allclose(result.forces, np.concatenate(expected.forces)[order], atol=1e-9)


@pytest.mark.needs_mirror
def test_a_start_model_in_single_precision_stays_what_it_was(ani2x):
    data = load_dataset("naphthalene").crystals()
    few = [data.frames[k] for k in (0, 50)]
    before, after = predict(ani2x, few), predict(enrich(ani2x, fit_enrichment(few)), few)
    np.testing.assert_allclose(after.energies, before.energies, rtol=1e-7)
    for ours, theirs in zip(after.forces, before.forces, strict=True):
        assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize(("kind", "compression"), [*((k, "none") for k in KINDS), ("soap", "species"), ("soap", "pca")])
def test_engine_and_calculator_agree_and_forces_are_derivatives(kind, compression, tmp_path):
    model = trained(enrich(toy(), make(kind, compression, n_columns=20)))
    cache = build_cache(model, frames(), torch.float64, tmp_path)
    assert len(cache.columns) == len(model.columns(cache.present))
    result = Engine(model, cache, (True,) * 4).energies_forces(merge(cache.structures))
    expected = predict(model, frames())
    np.testing.assert_allclose(result.energies, expected.energies - model.atomic_reference(frames()).numpy(), rtol=1e-9)
    order = torch.cat([s.order + shift for s, shift in zip(cache, (0, 9, 12), strict=True)])
    np.testing.assert_allclose(result.forces, np.concatenate(expected.forces)[order], atol=1e-8)
    plain = predict(toy(), frames())
    assert np.abs(expected.forces[1] - plain.forces[1]).max() > 1e-3
    h, atoms = 1e-5, small_cell()
    atoms.calc = TlmcCalculator(model)
    for atom, axis in ((0, 0), (2, 1)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            energies.append(predict(model, [moved]).energies[0])
        assert atoms.get_forces()[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * h), abs=1e-6)
    energies = []
    for sign in (1, -1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ (np.eye(3) + sign * h * np.eye(3)[[1, 0, 2]] / 2), scale_atoms=True)
        energies.append(predict(model, [strained]).energies[0])
    voigt = atoms.get_stress()
    slope = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
    assert voigt[5] + voigt[2] / 2 == pytest.approx(slope, abs=1e-6)
    assert member_energies(model, atoms).mean() == pytest.approx(expected.energies[1], rel=1e-10)


def test_the_loss_gradient_of_the_new_weights_is_exact(tmp_path):
    model = enrich(toy(), make())
    cache = build_cache(model, frames(), torch.float64, tmp_path)
    engine, batch = Engine(model, cache, (True,) * 4), merge(cache.structures)
    rng = np.random.default_rng(0)
    energies = torch.from_numpy(rng.normal(size=3))
    forces = torch.from_numpy(rng.normal(size=(len(batch.structure), 3)))
    loss = partial(batch_loss, lambda_=0.6)
    engine.loss_gradient(batch, energies, forces, loss)
    gradient, weights = engine.gradient.clone(), engine.flat.clone()
    direction = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=len(weights))), dim=0)
    values = []
    for sign in (1, -1):
        engine.flat.copy_(weights + sign * 1e-6 * direction)
        values.append(engine.loss_gradient(batch, energies, forces, loss).loss.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-6)
    k = cache.present[0]
    first = engine._slots[k][0].weight
    assert first[:, -engine.model.enrichment.n_columns :].abs().max() > 0


def test_second_derivatives_know_the_new_columns():
    model, atoms = trained(enrich(toy(), make())), molecule("CH3OH")
    hessian, h = exact_hessian(model, atoms), 1e-5
    rows = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[1, 2] += sign * h
        rows.append(predict(model, [moved]).forces[0].reshape(-1))
    np.testing.assert_allclose(hessian[5], -(rows[0] - rows[1]) / (2 * h), atol=1e-5)


def test_summing_over_species_is_what_dscribe_calls_mu1nu1():
    atoms = structure("27-like molecule")
    options = {"r_cut": 4.0, "n_max": 3, "l_max": 2, "sigma": 0.5}
    species = sorted(set(atoms.symbols))
    enrichment = fit_enrichment([atoms], "soap", {**options, "cutoff": "none"}, compression="species")
    ours = enrichment.descriptor(atoms) @ enrichment.descriptor.summed_over_species()
    theirs = dscribe.SOAP(species=species, periodic=False, compression={"mode": "mu1nu1"}, **options).create(atoms)
    # the order differs: compare the sorted numbers of every atom
    np.testing.assert_allclose(np.sort(ours.numpy(), 1), np.sort(theirs, 1), rtol=1e-6, atol=1e-9)


def test_columns_are_centred_and_of_one_size():
    for compression in ("none", "species", "pca"):
        enrichment = make(compression=compression, n_columns=20, scale=0.3)
        columns = torch.cat([enrichment.columns(frame) for frame in frames()])
        assert columns.mean(0).abs().max() < 1e-10
        used = columns.std(0, unbiased=False)
        used = used[used > 0]
        assert used.square().mean().sqrt() == pytest.approx(0.3, rel=1e-6 if compression != "pca" else 0.05)
        assert columns.shape[1] % 16 == 0


def test_elements_can_be_added_before_or_after():
    atoms = [molecule("SiH4"), molecule("CH3OH")]
    enrichment = fit_enrichment(atoms, "soap", SMALL)
    model = trained(enrich(toy(), enrichment))
    expected = predict(relabel(model, {"Si": "C"}), atoms).energies
    np.testing.assert_allclose(predict(extend(model, {"Si": "C"}), atoms).energies, expected, rtol=1e-10)


def test_wrong_columns_get_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="richer columns come from soap, symmetry_functions"):
        fit_enrichment(frames(), "coulomb")
    with pytest.raises(ConfigError, match="soap: .*unexpected keyword"):
        fit_enrichment(frames(), "soap", {"rcut": 3.0})
    with pytest.raises(ConfigError, match="must describe atoms"):
        fit_enrichment(frames(), "soap", {**SMALL, "average": "outer"})
    with pytest.raises(ConfigError, match="compression must be none, species or pca, got 'lossy'"):
        make(compression="lossy")
    with pytest.raises(ConfigError, match="compression = 'species' is for SOAP"):
        make("bispectrum", "species")
    with pytest.raises(ConfigError, match="scale must be positive"):
        make(scale=0.0)
    model = enrich(toy(), make())
    with pytest.raises(ModelError, match="has richer columns already"):
        enrich(model, make())
    with pytest.raises(ModelError, match="torchani knows nothing of the soap columns"):
        to_torchani(model)
    wrong = dataclasses.replace(model, enrichment=Enrichment("nothing", {}, *(torch.zeros(1), torch.zeros(1, 16))))
    save_model(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match=r"wrong.safetensors lacks a part .* got 'nothing'"):
        load_model(tmp_path / "wrong.safetensors")
