from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.units import Hartree

from helpers.potential_references import (
    METHANE,
    ani2x_from_the_mirror,
    torchani_ani2x,
    torchani_energy_and_forces,
    toy_potential,
    with_exact_celu,
)
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.errors import ModelError
from tlmc.families.ani import Layer, average, enrich, export_state_dict, extend, relabel, scratch, to_torchani
from tlmc.families.ani.pretrained import parameter_fingerprint
from tlmc.families.ani.transfer import first_members
from tlmc.potentials import predict
from tlmc.potentials.borrowing import THESIS_DONORS
from tlmc.potentials.reference import ReferenceEnergies


def formaldehyde_crystal() -> Atoms:
    frame = molecule("H2CO")
    frame.rattle(0.05, seed=1)
    frame.set_cell([[4.0, 0.3, 0.0], [-0.4, 4.2, 0.5], [0.2, 0.1, 4.6]])
    frame.pbc = True
    return frame


def assert_same(model, exported, frame, rtol):
    energy, forces = torchani_energy_and_forces(exported, frame)
    ours = predict(model, [frame])
    assert ours.energies[0] == pytest.approx(energy, rel=rtol)
    np.testing.assert_allclose(ours.forces[0], forces, rtol=0.0, atol=rtol * np.abs(forces).max() + 1e-12)


def fine_tuned(model):
    """Other weights than the start model's and a fitted reference."""
    offsets = {"H": -0.5, "C": 1.5, "O": 40.0}
    return scratch(model, seed=4).with_reference(ReferenceEnergies(offsets, "per_element"))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("make", [lambda: METHANE, formaldehyde_crystal], ids=["methane", "crystal"])
def test_torchani_reproduces_a_fine_tuned_model(members, make):
    model = fine_tuned(toy_potential(members=members))
    assert_same(model, with_exact_celu(to_torchani(model)), make(), rtol=1e-12)


def test_borrowed_elements_become_elements_of_their_own():
    model = relabel(toy_potential(), THESIS_DONORS)
    model = model.with_reference(
        ReferenceEnergies({"H": -0.5, "C": 1.5, "Si": 7.0, "I": 3.0, "Cu": 2.0}, "per_element")
    )
    exported = with_exact_celu(to_torchani(model))
    assert exported.symbols == ("H", "C", "O", "S", "Cl", "Si", "I", "Cu")
    # donors and borrowers side by side in pairs and angles
    mixed = Atoms(
        "SiCHIHCu", [(0, 0, 0), (1.9, 0, 0), (-0.8, 1.2, 0), (-0.5, -1.4, 2.0), (2.4, 1.0, 0.3), (3, -1.2, 1)]
    )
    for frame in (mixed, Atoms(mixed, cell=(4.5, 4.5, 4.5), pbc=True), METHANE, molecule("SiH4")):
        assert_same(model, exported, frame, rtol=1e-12)


def test_elements_without_a_reference_cannot_pass_for_aligned():
    exported = to_torchani(toy_potential().with_reference(ReferenceEnergies({"H": 1.0, "C": 2.0}, "per_element")))
    assert np.isfinite(torchani_energy_and_forces(exported, METHANE)[0])
    assert np.isnan(torchani_energy_and_forces(exported, molecule("H2O"))[0])


def test_export_does_not_alias_the_model():
    model = toy_potential()
    before = predict(model, [METHANE]).energies[0]
    for tensor in to_torchani(model).state_dict().values():
        tensor.zero_()
    assert predict(model, [METHANE]).energies[0] == before


def test_ani2xt_goes_to_torchani_and_back_to_a_file(ani2xt, tmp_path):
    path = tmp_path / "new folder" / "ani2xt.pt"
    export_state_dict(ani2xt, path)
    assert [p.name for p in path.parent.iterdir()] == ["ani2xt.pt"]
    model = to_torchani(scratch(ani2xt, seed=0))
    model.load_state_dict(torch.load(path, weights_only=True))
    # computed in float64: float32 rounds differently from one processor to the next
    model = with_exact_celu(model.double())
    for frame in (METHANE, formaldehyde_crystal()):
        assert_same(ani2xt.to(torch.float64), model, frame, rtol=1e-7)


@pytest.mark.needs_mirror
def test_ani2x_comes_back_unchanged(ani2x):
    exported = to_torchani(ani2x).state_dict()
    published = torchani_ani2x().state_dict()
    assert parameter_fingerprint(exported) == ani2x.fingerprint
    assert list(exported) == list(published)
    for key, value in published.items():
        torch.testing.assert_close(exported[key], value, rtol=1e-7, atol=0.0)
        assert exported[key].dtype == value.dtype


@pytest.mark.needs_mirror
def test_fine_tuned_ani2x_loads_into_torchani(ani2x, tmp_path):
    # weights a little off the published ones, as after fine-tuning
    noise = scratch(ani2x, seed=1)
    for symbol, layers in noise.networks.items():
        for layer, start in zip(layers, ani2x.networks[symbol], strict=True):
            layer.weight.mul_(0.05).add_(start.weight)
            layer.bias.mul_(0.05).add_(start.bias)
    model = noise.with_reference(ReferenceEnergies({"H": -0.5, "C": 1.5, "O": 40.0}, "per_element"))
    export_state_dict(model, tmp_path / "model.pt")
    loaded = torchani_ani2x()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    untouched = predict(ani2x, [METHANE])
    for frame in (METHANE, formaldehyde_crystal()):
        assert_same(model, loaded, frame, rtol=5e-6)
    loaded = with_exact_celu(loaded.to(torch.float64))
    for frame in (METHANE, formaldehyde_crystal()):
        # what is left is the float32 of the self energies in the file
        assert_same(model.to(torch.float64), loaded, frame, rtol=1e-7)
    assert abs(predict(model, [METHANE]).energies[0] - untouched.energies[0]) > 0.01 * Hartree


@pytest.mark.needs_mirror
def test_double_precision_export_is_exact(ani2x):
    model = ani2x.to(torch.float64).with_reference(ReferenceEnergies({"H": -0.5, "C": 1.5, "O": 40.0}, "per_element"))
    exported = with_exact_celu(to_torchani(model))
    for frame in (METHANE, formaldehyde_crystal()):
        assert_same(model, exported, frame, rtol=1e-11)


def loaded_as_told(model, told):
    """Run the lines that the export returned, with the file that torchani would download."""
    names = {"model": scratch(model, seed=9)}
    with ani2x_from_the_mirror():
        exec(told, names)  # our own text, about a file of ours
    return names["network"]


def nudged(model):
    """Every member's weights a little off, and a reference, as after a fine-tuning."""
    noise = scratch(model, seed=1)
    networks = {
        symbol: tuple(
            Layer(start.weight + 0.05 * layer.weight, start.bias + 0.05 * layer.bias)
            for layer, start in zip(layers, model.networks[symbol], strict=True)
        )
        for symbol, layers in noise.networks.items()
    }
    offsets = {symbol: 0.5 * k for k, symbol in enumerate(model.elements)}
    tuned = dataclasses.replace(model, networks=networks, committee=False)
    return tuned.with_reference(ReferenceEnergies(offsets, "per_element"))


@pytest.mark.needs_mirror
@pytest.mark.parametrize(
    ("members", "precision"), [(1, torch.float32), (2, torch.float32), (5, torch.float64), (8, torch.float64)]
)
def test_any_number_of_members_loads_into_torchani_as_told(ani2x, tmp_path, members, precision):
    model = nudged(first_members(ani2x, members)).to(precision)
    told = export_state_dict(model, tmp_path / "model.pt")
    assert "to_torchani" not in told
    network = loaded_as_told(model, told)
    assert len(getattr(network.neural_networks, "members", [None])) == members
    for frame in (METHANE, formaldehyde_crystal()):
        assert_same(model, network, frame, rtol=5e-6 if precision == torch.float32 else 1e-7)
    # the same in float64: what is left is the float32 of the self energies in the file
    exact = with_exact_celu(network.to(torch.float64))
    for frame in (METHANE, formaldehyde_crystal()):
        assert_same(model.to(torch.float64), exact, frame, rtol=1e-7 if precision == torch.float32 else 1e-11)
    if members not in (1, 8):
        with pytest.raises(RuntimeError, match="Missing key"):
            torchani_ani2x().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


@pytest.mark.needs_mirror
@pytest.mark.parametrize("way", [relabel, extend])
def test_other_elements_load_into_what_to_torchani_makes(ani2x, tmp_path, way):
    model = nudged(way(first_members(ani2x, 2), {"Si": "C"})).to(torch.float64)
    told = export_state_dict(model, tmp_path / "model.pt")
    assert "to_torchani(model)" in told
    network = with_exact_celu(loaded_as_told(model, told))
    for frame in (METHANE, molecule("SiH4")):
        assert_same(model, network, frame, rtol=1e-9)
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected key|Missing key"):
        torchani_ani2x().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def test_means_and_other_models_load_as_told(ani2xt, tmp_path):
    single = nudged(ani2xt).to(torch.float64)
    for model in (single, average([single, ani2xt.to(torch.float64).with_reference(single.reference)])):
        told = export_state_dict(model, tmp_path / "model.pt")
        assert "to_torchani(model)" in told
        for frame in (METHANE, formaldehyde_crystal()):
            assert_same(model, with_exact_celu(loaded_as_told(model, told)), frame, rtol=1e-9)


def test_richer_columns_are_refused_and_nothing_is_written(tmp_path):
    soap = fit_enrichment([METHANE], "soap", {"r_cut": 3.0, "n_max": 2, "l_max": 2})
    with pytest.raises(ModelError, match="torchani knows nothing of the soap columns of this model: keep it as"):
        export_state_dict(enrich(toy_potential(), soap), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
