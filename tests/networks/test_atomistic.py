"""What both kinds of network must hold: invariances, extensivity, exact forces, smooth cutoffs, small cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

from helpers.descriptor_structures import small_cell
from tlmc.data.loading import load_dataset
from tlmc.descriptors.soap import SOAP
from tlmc.errors import ConfigError, DataError
from tlmc.networks import BehlerParrinelloNetwork, DeepTensorNetwork

R_CUT = 3.5


def ethanol() -> Atoms:
    frame = molecule("CH3CH2OH")
    frame.rattle(0.05, seed=3)
    return frame


def slab() -> Atoms:
    frame = molecule("CH3OH", cell=[3.1, 3.3, 20.0], pbc=[True, True, False])
    frame.rattle(0.03, seed=5)
    return frame


FRAMES = {"ethanol": ethanol(), "small cell": small_cell(), "slab": slab()}


def behler_parrinello():
    descriptor = SOAP("HCO", r_cut=R_CUT, n_max=2, l_max=2, cutoff="cosine")
    # softplus does not saturate in the small cell, which is nothing like ethanol
    return BehlerParrinelloNetwork(descriptor, (6, 5), "softplus", torch.Generator().manual_seed(1), torch.float64)


def deep_tensor():
    generator = torch.Generator().manual_seed(1)
    return DeepTensorNetwork("HCO", R_CUT, 2, 8, 10, 0.4, 5, generator, torch.float64)


def evaluate(network, frame):
    output = network(network.prepare([frame]))
    return output.energies.item(), output.forces.detach().numpy()


@pytest.fixture(scope="module")
def data():
    return load_dataset("ethanol").subset(range(0, 200, 20))


@pytest.fixture(scope="module", params=[behler_parrinello, deep_tensor], ids=["Behler-Parrinello", "deep tensor"])
def network(request, data):
    """A network with scales of real labels."""
    network = request.param()
    network.fit_scales(data, network.prepare(data.frames))
    return network


@pytest.mark.parametrize("name", FRAMES)
class TestEveryFrame:
    @pytest.mark.slow
    def test_forces_are_minus_the_slopes_of_the_energy(self, network, name):
        frame, h = FRAMES[name], 1e-4
        _, forces = evaluate(network, frame)
        assert np.abs(forces).max() > 0.1
        for atom, axis in [(0, 0), (1, 1), (2, 2), (len(frame) - 1, 0)]:
            energies = []
            for sign in (1, -1):
                moved = frame.copy()
                moved.positions[atom, axis] += sign * h
                energies.append(evaluate(network, moved)[0])
            assert forces[atom, axis] == pytest.approx((energies[1] - energies[0]) / (2 * h), rel=1e-4, abs=1e-5)

    def test_forces_add_up_to_zero(self, network, name):
        _, forces = evaluate(network, FRAMES[name])
        np.testing.assert_allclose(forces.sum(0), 0, atol=1e-10)

    def test_rotation_translation_and_order_do_not_matter(self, network, name):
        frame = FRAMES[name]
        energy, forces = evaluate(network, frame)
        turn = Rotation.random(random_state=1).as_matrix()
        moved = frame.copy()
        moved.set_cell(frame.cell.array @ turn.T)
        moved.positions = frame.positions @ turn.T + [0.3, -7.0, 2.0]
        order = np.random.default_rng(0).permutation(len(frame))
        moved = moved[order]
        moved_energy, moved_forces = evaluate(network, moved)
        assert moved_energy == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(moved_forces, (forces @ turn.T)[order], atol=1e-8)

    def test_a_supercell_has_the_multiple_of_the_energy(self, network, name):
        frame = FRAMES[name]
        if frame.pbc.any():
            repeats = np.where(frame.pbc, 2, 1)
            many = frame.repeat(repeats)
        else:
            repeats = np.array([3])
            many = frame.copy()
            for k in (1, 2):
                other = frame.copy()
                other.positions += [20.0 * k, 0, 0]
                many += other
        energy, forces = evaluate(network, frame)
        total, all_forces = evaluate(network, many)
        assert total == pytest.approx(repeats.prod() * energy, rel=1e-10)
        np.testing.assert_allclose(all_forces, np.tile(forces, (repeats.prod(), 1)), atol=1e-8)

    def test_a_batch_gives_what_single_frames_give(self, network, name):
        together = network(network.prepare([FRAMES["ethanol"], FRAMES[name], FRAMES["slab"]]))
        energy, forces = evaluate(network, FRAMES[name])
        first = len(FRAMES["ethanol"])
        assert together.energies[1].item() == pytest.approx(energy, abs=1e-10)
        np.testing.assert_allclose(together.forces[first : first + len(forces)].detach(), forces, atol=1e-9)


def test_equal_atoms_may_change_places(network):
    frame = ethanol()
    swapped = frame.copy()
    hydrogens = [k for k, symbol in enumerate(frame.symbols) if symbol == "H"]
    swapped.positions[hydrogens[:2]] = frame.positions[hydrogens[1::-1]]
    assert evaluate(network, swapped)[0] == pytest.approx(evaluate(network, frame)[0], abs=1e-10)


def test_an_atom_leaves_the_cutoff_smoothly(network):
    far = 20.0
    at = {d: evaluate(network, Atoms("OH", [[0, 0, 0], [d, 0, 0]])) for d in (R_CUT - 1e-4, R_CUT + 1e-4, far)}
    inside, outside, free = at.values()
    assert outside[0] == free[0]
    assert inside[0] == pytest.approx(free[0], abs=1e-6)
    assert np.abs(inside[1]).max() < 1e-3
    assert np.abs(outside[1]).max() == 0
    assert abs(evaluate(network, Atoms("OH", [[0, 0, 0], [R_CUT - 0.8, 0, 0]]))[0] - free[0]) > 1e-5


def test_a_single_atom_has_an_energy_and_no_force(network):
    energy, forces = evaluate(network, Atoms("C"))
    assert np.isfinite(energy)
    assert not forces.any()


def test_energies_of_atoms_add_up(network):
    frame = small_cell()
    assert network.atomic_energies(frame).sum() == pytest.approx(evaluate(network, frame)[0], abs=1e-12)


def test_scales_are_those_of_the_labels(network, data):
    prepared = network.prepare(data.frames)
    assert network.scale.item() == pytest.approx(np.sqrt((np.concatenate(data.forces) ** 2).mean()), rel=1e-6)
    # one composition: the offsets add up to the mean energy
    assert network.reference(prepared).mean().item() == pytest.approx(data.energies.mean(), abs=1e-9)
    network_part = network(prepared).energies.detach().numpy()
    np.testing.assert_allclose(network.predict(prepared).energies, network_part + data.energies.mean(), rtol=1e-12)


def test_derivatives_for_training_are_those_of_the_loss(network):
    """Compare the derivative of a loss of energies and forces with finite differences, along a random direction."""
    prepared = network.prepare([ethanol(), small_cell()])

    def loss():
        output = network(prepared, create_graph=True)
        return output.energies.square().sum() + output.forces.square().sum()

    weights = list(network.parameters())
    gradient = torch.autograd.grad(loss(), weights)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    values, h = [], 1e-5
    for shift in (h, -h):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w += shift * d
        values.append(loss().item())
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w -= shift * d
    slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_a_copy_in_double_precision_is_the_same_network():
    single, frame = DeepTensorNetwork("HCO", R_CUT, 2, 8, 10, 0.4, 5), ethanol()
    double = single.in_double()
    energy, forces = evaluate(double, frame)
    assert forces.dtype == np.float64
    assert single.dtype == torch.float32
    assert evaluate(single, frame)[0] == pytest.approx(energy, abs=1e-4)
    np.testing.assert_allclose(evaluate(single, frame)[1], forces, atol=1e-4)


def test_unknown_elements_are_named(network):
    with pytest.raises(DataError, match=r"CH3F|CH3Cl.*holds Cl.*covers H, C, O"):
        network.prepare([molecule("CH3Cl")])


def test_elements_without_labels_are_named():
    data = load_dataset("naphthalene").subset([0, 1])
    network = DeepTensorNetwork("HCO")
    with pytest.raises(DataError, match="the training part holds no O"):
        network.fit_scales(data, network.prepare(data.frames))


def test_wrong_elements_are_refused():
    with pytest.raises(ConfigError, match=r"needs chemical symbols, got \['H', 'Xx'\]"):
        DeepTensorNetwork(["H", "Xx"])
