"""The Behler-Parrinello network against one differentiated through the descriptor, and its standardised inputs."""

from __future__ import annotations

import pytest
import torch
from ase.build import bulk, molecule

from tlmc.data.loading import load_dataset
from tlmc.descriptors.base import position_gradient
from tlmc.descriptors.soap import SOAP
from tlmc.descriptors.symmetry_functions import SymmetryFunctions
from tlmc.errors import ConfigError
from tlmc.networks import BehlerParrinelloNetwork

DESCRIPTORS = {
    "symmetry functions": SymmetryFunctions(
        "HCO", 3.5, [(1.0, 0.0), (4.0, 1.2), (4.0, 2.0)], [(0.05, 2.0, 1.0), (0.05, 2.0, -1.0)]
    ),
    "SOAP": SOAP(["H", "C", "O"], r_cut=3.5, n_max=2, l_max=2, cutoff="cosine"),
    "averaged": SOAP(["C"], r_cut=3.5, n_max=2, l_max=1, average="inner"),
}


def network(descriptor=DESCRIPTORS["symmetry functions"], hidden=(7, 5), activation="tanh"):
    return BehlerParrinelloNetwork(descriptor, hidden, activation, dtype=torch.float64)


@pytest.fixture(scope="module")
def ethanol():
    return load_dataset("ethanol").subset(range(0, 400, 40))


@pytest.mark.parametrize("name", ["symmetry functions", "SOAP"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("frame", [molecule("CH3CH2OH"), bulk("C", "diamond", a=3.57)], ids=["ethanol", "diamond"])
def test_forces_equal_those_through_the_descriptor(name, activation, frame):
    net = network(DESCRIPTORS[name], activation=activation)
    environments = net.descriptor.environments(frame)
    vectors = environments.vectors.requires_grad_()
    G = net.descriptor.values(environments._replace(vectors=vectors))
    channels = net.channels(frame)
    energy = sum(net.networks[symbol](G[channels == k]).sum() for k, symbol in enumerate(net.species))
    (slope,) = torch.autograd.grad(energy, vectors)
    output = net(net.prepare([frame]))
    torch.testing.assert_close(output.energies[0], energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.forces, -position_gradient(environments, slope), rtol=0, atol=1e-9)


def test_each_element_has_a_network_of_its_own():
    net, frame = network(), molecule("H2O")
    before = net.atomic_energies(frame)
    for w in net.networks["O"].parameters():
        w.data.zero_()
    after = net.atomic_energies(frame)
    assert after[0] == 0 != before[0]
    assert (after[1:] == before[1:]).all()


def test_inputs_are_standardised_per_element(ethanol):
    data, net = ethanol, network()
    prepared = net.prepare(data.frames)
    net.fit_scales(data, prepared)
    for k in range(3):
        columns = torch.cat([(frame.G[frame.species == k] - net.mean[k]) / net.spread[k] for frame in prepared])
        assert columns.mean(0).abs().max() < 1e-9
        spread = columns.std(0, correction=0)
        assert spread.max() == pytest.approx(1.0)
        assert spread.max() <= 1.0 + 1e-9


def test_columns_that_never_change_do_no_harm(ethanol):
    data, net = ethanol.subset([0]), network()
    prepared = net.prepare(data.frames)
    net.fit_scales(data, prepared)
    assert torch.isfinite(net(prepared).forces).all()
    # a single oxygen never varies
    assert torch.equal(net.spread[2], torch.ones_like(net.spread[2]))


def test_a_descriptor_of_whole_structures_is_refused():
    with pytest.raises(ConfigError, match="needs a row per atom"):
        network(DESCRIPTORS["averaged"])


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="all positive"):
        network(hidden=(5, 0))
