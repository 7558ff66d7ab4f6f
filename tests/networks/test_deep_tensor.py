"""The deep tensor network against its equations written as loops, and what each pass adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from tlmc.errors import ConfigError
from tlmc.networks import DeepTensorNetwork


def network(**settings):
    settings = {"r_cut": 4.0, "n_features": 6, "n_factors": 7, "spacing": 0.5, "n_hidden": 4} | settings
    return DeepTensorNetwork("HCO", dtype=torch.float64, **settings)


def by_loops(net, frame):
    """Return the energy by the equations of the paper, one pair after the other, for a molecule."""
    w = {name: value.detach().numpy() for name, value in net.named_parameters()}
    channel = {"H": 0, "C": 1, "O": 2}
    c = np.array([w["embedding"][channel[s]] for s in frame.symbols])
    mu = np.arange(0.0, net.r_cut + net.spacing, net.spacing)
    for _ in range(net.n_passes):
        new = c.copy()
        for i in range(len(frame)):
            for j in range(len(frame)):
                d = np.linalg.norm(frame.positions[i] - frame.positions[j])
                if i != j and d < net.r_cut:
                    d_hat = np.exp(-((d - mu) ** 2) / (2 * net.spacing**2))
                    left = w["from_atom"] @ c[j] + w["from_atom_bias"]
                    right = w["from_distance"] @ d_hat + w["from_distance_bias"]
                    f = 0.5 * (1 + np.cos(np.pi * d / net.r_cut))
                    new[i] += f * np.tanh(w["to_atom"] @ (left * right))
        c = new
    hidden = np.tanh(c @ w["energy.weights.0"].T + w["energy.biases.0"])
    return (hidden @ w["energy.weights.1"].T + w["energy.biases.1"]).sum()


@pytest.mark.parametrize("n_passes", [0, 1, 2, 4])
def test_equals_the_equations(n_passes):
    net, frame = network(n_passes=n_passes), molecule("CH3CH2OH")
    for name, parameter in net.named_parameters():
        if "bias" in name:
            parameter.data += 0.1
    assert net(net.prepare([frame])).energies.item() == pytest.approx(by_loops(net, frame), abs=1e-12)


def bent(angle):
    radians = np.radians(angle)
    return Atoms("OH2", [[0, 0, 0], [1.0, 0, 0], [np.cos(radians), np.sin(radians), 0]])


@pytest.mark.parametrize("n_passes", [1, 2, 3])
def test_angles_are_seen_through_the_distance_between_neighbours(n_passes):
    # below the distance of the two hydrogens no pass can tell the angles apart: all that the atoms see are O-H bonds
    for r_cut, sees in ((1.2, False), (4.0, True)):
        net = network(n_passes=n_passes, r_cut=r_cut)
        energies = [net(net.prepare([bent(angle)])).energies.item() for angle in (100, 130)]
        assert (abs(energies[0] - energies[1]) > 1e-6) == sees


def test_influence_reaches_one_cutoff_per_pass():
    chain = Atoms("H4", [[k, 0, 0] for k in range(4)])
    changed = chain.copy()
    changed.symbols[3] = "O"
    for n_passes in range(4):
        net = network(n_passes=n_passes, r_cut=1.5)
        first = [net.atomic_energies(frame)[0] for frame in (chain, changed)]
        assert (first[0] != first[1]) == (n_passes >= 3)


def test_without_a_pass_an_atom_has_the_energy_of_its_element():
    net = network(n_passes=0)
    output = net(net.prepare([molecule("CH3OH"), molecule("H2O")]))
    atomic = output.atomic.detach().numpy()
    assert len(np.unique(atomic.round(12))) == 3
    assert not output.forces.any()


def test_representations_begin_with_the_embedding():
    net, frame = network(n_passes=2), molecule("H2O")
    steps = net.representations(net.prepare([frame])[0])
    assert [tuple(c.shape) for c in steps] == [(3, 6)] * 3
    assert torch.equal(steps[0], net.embedding[net.channels(frame)])
    # the two hydrogens of water are equal by symmetry, after every pass
    torch.testing.assert_close(steps[2][1], steps[2][2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_passes": -1}, "must be at least 1, got 0"),
        ({"n_features": 0}, "n_features of a deep tensor network must be at least 1, got 0"),
        ({"spacing": 0.0}, "spacing must be positive"),
        ({"spacing": 5.0}, "at most r_cut = 4.0 A, got 5.0 A"),
    ],
)
def test_wrong_sizes_are_named(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        network(**settings)
