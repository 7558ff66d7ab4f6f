from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from potential_references import toy_potential

from tlmc.errors import ConfigError, ModelError
from tlmc.potentials import THESIS_DONORS, parse_element_map, predict, relabel, scratch, trainable_layers
from tlmc.reference import ReferenceEnergies


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
    kept = [field.name for field in dataclasses.fields(model) if field.name not in ("networks", "reference")]
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
