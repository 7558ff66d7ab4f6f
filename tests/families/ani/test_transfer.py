from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.neighborlist import neighbor_list
from numpy.random import default_rng

from helpers.potential_references import torchani_energy_and_forces, toy_potential, with_exact_celu
from tlmc.errors import ConfigError, ModelError
from tlmc.families.ani import extend, relabel, scratch, to_torchani, trainable_layers
from tlmc.potentials import predict
from tlmc.potentials.borrowing import THESIS_DONORS, parse_element_map
from tlmc.potentials.reference import ReferenceEnergies


def test_relabelled_atoms_behave_as_their_donors():
    model = relabel(toy_potential(), THESIS_DONORS)
    assert model.elements == ("H", "C", "O", "S", "Cl", "Si", "I", "Cu")
    silane = molecule("SiH4")
    methane = Atoms("CH4", silane.positions)
    ours, donors = predict(model, [silane]), predict(toy_potential(), [methane])
    assert ours.energies == donors.energies
    np.testing.assert_array_equal(ours.forces[0], donors.forces[0])


def test_relabel_adds_to_earlier_loans_and_leaves_the_model_alone():
    model = toy_potential()
    twice = relabel(relabel(model, {"Si": "C"}), {"Si": "C", "I": "Cl"})
    assert twice.element_map == {"Si": "C", "I": "Cl"}
    assert model.element_map == {}


def test_relabelled_element_can_have_a_reference_of_its_own():
    model = relabel(toy_potential(), {"Si": "C"})
    silane = molecule("SiH4")
    shifted = model.with_reference(ReferenceEnergies({"Si": 2.0, "H": 0.25}, "per_element"))
    assert predict(shifted, [silane]).energies - predict(model, [silane]).energies == pytest.approx(3.0, abs=1e-12)


def silyl_iodide_crystal() -> Atoms:
    """All new elements and their donors, in a cell shorter than the cutoff."""
    frame = Atoms("SiCISClHCuO", default_rng(2).random((8, 3)) * [4.0, 4.5, 5.0], cell=[4.0, 4.5, 5.0], pbc=True)
    return relax_overlaps(frame, 1.2)


def relax_overlaps(frame: Atoms, shortest: float) -> Atoms:
    """Push atoms apart that are nearer than `shortest`."""
    for _ in range(200):
        first, second, vectors, distances = neighbor_list("ijDd", frame, shortest)
        if not len(first):
            break
        np.add.at(frame.positions, first, -0.5 * vectors * (shortest / distances - 0.999)[:, None])
    return frame


@pytest.mark.parametrize("members", [1, 3])
def test_extended_model_starts_as_the_relabelled_one(members):
    model, frame = toy_potential(members=members), silyl_iodide_crystal()
    borrowed, own = relabel(model, THESIS_DONORS), extend(model, THESIS_DONORS)
    assert own.symbols == ("H", "C", "O", "S", "Cl", "Si", "I", "Cu")
    assert own.element_map == {}
    expected, found = predict(borrowed, [frame]), predict(own, [frame])
    assert found.energies == pytest.approx(expected.energies, rel=1e-12)
    np.testing.assert_allclose(found.forces[0], expected.forces[0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.stresses[0], expected.stresses[0], rtol=1e-10, atol=1e-10)


def test_extended_element_has_channels_of_its_own():
    model, frame = extend(toy_potential(), THESIS_DONORS), silyl_iodide_crystal()
    before = predict(model, [frame])
    swapped = frame.copy()
    swapped.symbols[0], swapped.symbols[1] = "C", "Si"
    # as long as the copies are equal, silicon and carbon are the same to the model
    assert predict(model, [swapped]).energies == pytest.approx(before.energies, rel=1e-12)
    first = model.networks["O"][0]
    p, n = model.aev, len(model.symbols)
    blocks = {
        "radial": slice(5 * p.n_radial, 6 * p.n_radial),
        # the last pair is that of copper with copper
        "angular": slice(p.length(n) - p.n_angular, p.length(n)),
    }
    copper = Atoms("OCu2", [[0.0, 0.0, 0.0], [1.9, 0.0, 0.0], [0.0, 1.9, 0.3]])
    silicon = Atoms("OSi", [[0.0, 0.0, 0.0], [1.7, 0.0, 0.0]])
    for name, of_interest, untouched in (("radial", silicon, copper), ("angular", copper, silicon)):
        weight = first.weight.clone()
        weight[:, blocks[name]] += 0.1
        networks = model.networks | {"O": (first._replace(weight=weight), *model.networks["O"][1:])}
        changed = dataclasses.replace(model, networks=networks)
        assert predict(changed, [of_interest]).energies != predict(model, [of_interest]).energies
        assert predict(changed, [untouched]).energies == predict(model, [untouched]).energies


def test_extend_keeps_other_loans_and_takes_over_the_ones_it_names():
    model = relabel(toy_potential(), {"Si": "C", "I": "Cl"})
    own = extend(model, {"Si": "C"})
    assert own.symbols[-1] == "Si"
    assert own.element_map == {"I": "Cl"}
    assert model.symbols == toy_potential().symbols
    frame = silyl_iodide_crystal()[:6]
    assert predict(own, [frame]).energies == pytest.approx(predict(model, [frame]).energies, rel=1e-12)
    with pytest.raises(ModelError, match="I borrows from Cl|borrows from Cl already"):
        extend(model, {"I": "S"})
    with pytest.raises(ModelError, match="a network of its own for Si"):
        extend(own, {"Si": "C"})


def test_torchani_reproduces_an_extended_model_that_has_learned():
    own = scratch(extend(toy_potential(members=2), THESIS_DONORS), seed=5)
    frame = silyl_iodide_crystal()
    energy, forces = torchani_energy_and_forces(with_exact_celu(to_torchani(own)), frame)
    found = predict(own, [frame])
    assert found.energies[0] == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(found.forces[0], forces, rtol=0.0, atol=1e-10 * np.abs(forces).max())


def test_with_elements_goes_by_name():
    model = toy_potential()
    assert model.with_elements({}) is model
    assert model.with_elements({"Si": "C"}).element_map == {"Si": "C"}
    assert model.with_elements({"Si": "C"}, "extend").symbols[-1] == "Si"
    with pytest.raises(ConfigError, match="borrowing must be relabel or extend, got 'copy'"):
        model.with_elements({"Si": "C"}, "copy")


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"Si": "P"}, "cannot map Si onto 'P': toy has networks for H, C, O, S, Cl only"),
        ({"Ge": "Si"}, "cannot map Ge onto 'Si': toy has networks for H, C, O, S, Cl only"),
        ({"C": "O"}, "cannot map C onto O: toy has a network of its own for C"),
        ({"Xx": "C"}, "cannot map 'Xx' onto 'C': 'Xx' is not a chemical symbol"),
        ({"X": "C"}, "'X' is not a chemical symbol"),
        ({"si": "C"}, "'si' is not a chemical symbol"),
        ({"I": "S"}, "cannot map I onto S: it borrows from Cl already"),
    ],
)
def test_relabel_refuses(mapping, sentence):
    model = relabel(toy_potential(), {"I": "Cl"})
    with pytest.raises(ModelError, match=sentence):
        relabel(model, mapping)


def test_unmapped_elements_are_listed_with_counts():
    with pytest.raises(ModelError, match=r"toy has no network for Br \(1 atoms\), Si \(2 atoms\) in BrSi2"):
        predict(relabel(toy_potential(), {"I": "Cl"}), [Atoms("Si2Br", np.diag([1.0, 3.0, 5.0]))])


@pytest.mark.parametrize(
    ("scheme", "n_layers", "expected"),
    [
        ("all", 4, (True, True, True, True)),
        ("hidden", 4, (False, True, True, False)),
        ("hidden", 3, (False, True, False)),
        ("last", 4, (False, False, False, True)),
        ("last", 1, (True,)),
    ],
)
def test_trainable_layers(scheme, n_layers, expected):
    assert trainable_layers(scheme, n_layers) == expected


@pytest.mark.parametrize(
    ("scheme", "n_layers", "sentence"),
    [
        ("frozen", 4, "layers must be all, hidden or last, got 'frozen'"),
        ("hidden", 2, "none is left of 2"),
        ("all", 0, "at least one layer, got 0"),
    ],
)
def test_trainable_layers_refuses(scheme, n_layers, sentence):
    with pytest.raises(ConfigError, match=sentence):
        trainable_layers(scheme, n_layers)


def test_scratch_draws_everything_with_standard_deviation_a_tenth():
    model = toy_potential()
    fresh = scratch(model.with_reference(ReferenceEnergies({"H": 1.0}, "per_element")), seed=3)
    drawn = torch.cat([t.flatten() for layers in fresh.networks.values() for layer in layers for t in layer])
    start = torch.cat([t.flatten() for layers in model.networks.values() for layer in layers for t in layer])
    n = len(drawn)
    # five standard errors of the mean and of the standard deviation
    assert abs(drawn.mean()) < 5 * 0.1 / n**0.5
    assert abs(drawn.std() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5
    assert not (drawn == start).any()
    assert fresh.reference is None
    assert not fresh.committee
    gone = ("networks", "reference", "committee")
    kept = [field.name for field in dataclasses.fields(model) if field.name not in gone]
    assert all(getattr(fresh, name) == getattr(model, name) for name in kept)


def test_scratch_is_reproducible_in_both_precisions_and_leaves_the_global_generator_alone():
    model = toy_potential()
    state = torch.get_rng_state()
    first, again, other = scratch(model, 1), scratch(model, 1), scratch(model, 2)
    single = scratch(model.to(torch.float32), 1)
    assert torch.equal(torch.get_rng_state(), state)
    for symbol in model.symbols:
        for a, b, c, d in zip(*(m.networks[symbol] for m in (first, again, other, single)), strict=True):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.bias, b.bias)
            assert not torch.equal(a.weight, c.weight)
            assert torch.equal(a.weight.to(torch.float32), d.weight)
    # the first numbers of the generator, so that another machine or torch cannot draw others unnoticed
    expected = torch.tensor([-0.031128955419003207, -0.07130302768401124, -0.0729068152895376], dtype=torch.float64)
    torch.testing.assert_close(first.networks["H"][0].weight[0, 0, :3], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "mapping"),
    [("", {}), ("Si=C", {"Si": "C"}), (" Si = C ,I=Cl,", {"Si": "C", "I": "Cl"})],
)
def test_parse_element_map(text, mapping):
    assert parse_element_map(text) == mapping


@pytest.mark.parametrize("text", ["Si", "Si=", "=C", "Si:C", "Si=C, Si=N"])
def test_a_bad_element_map_is_quoted(text):
    with pytest.raises(ConfigError, match=f"reads 'Si=C, I=Cl', each new element once; got .* in '{text}'"):
        parse_element_map(text)
