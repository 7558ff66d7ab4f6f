"""The engine's energies, forces and loss gradients against autograd through torchani."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.units import Hartree

from helpers.descriptor_structures import small_cell
from helpers.engine_gradients import LAMBDA, engine_gradient, labels
from helpers.potential_references import torchani_ani2x, toy_potential, with_exact_celu
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError
from tlmc.families.ani import engine as module
from tlmc.families.ani import relabel, to_torchani, trainable_layers
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.compiled_sweeps import CompiledSweeps, library
from tlmc.families.ani.engine import Engine, TorchSweeps
from tlmc.potentials import predict
from tlmc.training.loss import batch_loss
from tlmc.training.optimizer import Update

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def torchani_gradient(model, network, frames):
    """Gradient of the same loss by double backward through torchani, in the engine's flat order, float64."""
    energies, forces = labels(frames)
    loss = torch.zeros((), dtype=torch.float64)
    for frame, energy, force in zip(frames, energies, forces, strict=True):
        periodic = frame.pbc.any()
        positions = torch.tensor(frame.positions)[None].requires_grad_()
        cell, pbc = (torch.tensor(frame.cell.array), torch.tensor(frame.pbc)) if periodic else (None, None)
        species = network.species_converter(torch.tensor(frame.numbers)[None])
        out = network.neural_networks(species, network.aev_computer(species, positions, cell, pbc)).sum() * Hartree
        gradient = torch.autograd.grad(out, positions, create_graph=True)[0][0]
        n = len(frame)
        force_term = (gradient + torch.from_numpy(force)).square().sum() / n
        loss = loss + (LAMBDA * force_term + (1 - LAMBDA) * ((out - energy) / n) ** 2) / len(frames)
    network.zero_grad()
    loss.backward()
    return loss.item()


def relative_difference(engine, network):
    """Norm of the difference of all weight gradients over the norm of the reference."""
    model, parts = engine.model, []
    for k in engine._present:
        symbol = model.symbols[k]
        for number, slot in enumerate(engine._slots[k]):
            name = f"layers.{number}" if number < 3 else "final_layer"
            modules = [m.atomics[symbol].get_submodule(name) for m in members(network)]
            weight = torch.stack([m.weight.grad.t() for m in modules])
            bias = torch.stack([m.bias.grad[None] for m in modules])
            if number == 0:
                weight = weight[:, engine.columns]
            parts.append((slot.weight.double() - weight, weight))
            parts.append((slot.bias.double().reshape(-1) - bias.reshape(-1), bias))
    difference, reference = (torch.cat([p[i].reshape(-1) for p in parts]).norm() for i in (0, 1))
    return (difference / reference).item()


def members(network):
    networks = network.neural_networks
    return networks.members if hasattr(networks, "members") else [networks]


def reference(model):
    network = with_exact_celu((torchani_ani2x() if model.members == 8 else to_torchani(model)).double())
    return network.requires_grad_(True)


@pytest.mark.slow
@pytest.mark.needs_mirror
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["21_urea", "06_benzene", "23_succinic_acid"])
def test_ani2x_gradient_equals_autograd_on_crystals_and_molecules(ani2x, name, dtype, tmp_path):
    """A crystal frame and an isolated molecule of the same file merged into one batch."""
    dataset = load_dataset(f"molcrys-mace/{name}")
    frames = [dataset.crystals().frames[40], dataset.molecules().frames[0]]
    engine, loss = engine_gradient(ani2x, frames, dtype, tmp_path)
    network = reference(ani2x)
    assert loss == pytest.approx(torchani_gradient(ani2x, network, frames), rel=TOLERANCE[dtype])
    assert relative_difference(engine, network) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "frames",
    [[small_cell()], [molecule("CH3CH2OH")], [small_cell(), molecule("CH4")]],
    ids=["cell shorter than the cutoff", "molecule", "both"],
)
def test_ani2xt_gradient_equals_autograd(ani2xt, frames, dtype, tmp_path):
    engine, loss = engine_gradient(ani2xt, frames, dtype, tmp_path)
    network = reference(ani2xt)
    assert loss == pytest.approx(torchani_gradient(ani2xt, network, frames), rel=TOLERANCE[dtype])
    assert relative_difference(engine, network) <= TOLERANCE[dtype]


def test_energies_and_forces_equal_the_calculator(tmp_path):
    model = relabel(toy_potential(), {"Si": "C"})
    silane = molecule("SiH4", cell=[4.0, 4.2, 4.4], pbc=True)
    frames = [small_cell(), silane, molecule("CH3CH2OH")]
    cache = build_cache(model, frames, torch.float64, tmp_path)
    result = Engine(model, cache, (True,) * 4).energies_forces(merge(cache.structures))
    expected = predict(model, frames)
    np.testing.assert_allclose(result.energies + model.atomic_reference(frames), expected.energies, rtol=1e-12)
    forces = torch.split(result.forces, [len(f) for f in frames])
    for structure, force, reference_force in zip(cache.structures, forces, expected.forces, strict=True):
        np.testing.assert_allclose(force.numpy(), reference_force[structure.order.numpy()], atol=1e-10)


@pytest.mark.parametrize("scheme", ["all", "hidden", "last"])
def test_flat_gradient_equals_finite_differences_of_the_loss(scheme, tmp_path):
    """A random direction in the space of trainable weights, every scheme, energies and forces in the loss."""
    model, frames = toy_potential(), [small_cell(), molecule("CH3OH")]
    engine, _ = engine_gradient(model, frames, torch.float64, tmp_path, trainable_layers(scheme, 4))
    slope = engine.gradient.clone()
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    energies, forces = labels(frames)
    cache = build_cache(model, frames, torch.float64, tmp_path)
    ordered = torch.cat([torch.from_numpy(f)[cache[i].order] for i, f in enumerate(forces)])
    start, values = engine.flat.clone(), []
    for step in (1e-6, -1e-6):
        engine.flat.copy_(start + step * direction)
        batch = merge(cache.structures)
        loss = partial(batch_loss, lambda_=LAMBDA)
        values.append(engine.loss_gradient(batch, torch.from_numpy(energies), ordered, loss).loss.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(torch.dot(slope, direction).item(), rel=1e-6)


def test_only_trainable_layers_change(tmp_path):
    model, frames = toy_potential(), [molecule("CH3OH")]
    engine, _ = engine_gradient(model, frames, torch.float64, tmp_path, trainable_layers("hidden", 4))
    engine.flat.sub_(0.01 * engine.gradient)
    changed = engine.potential()
    for symbol in model.symbols:
        for number, (before, after) in enumerate(zip(model.networks[symbol], changed.networks[symbol], strict=True)):
            expected = symbol in "HCO" and number in (1, 2)
            assert torch.equal(before.weight, after.weight) != expected, (symbol, number)


def test_potential_returns_the_model_it_was_given(tmp_path):
    model = toy_potential(dtype=torch.float32)
    cache = build_cache(model, [molecule("CH3OH")], torch.float32, tmp_path)
    back = Engine(model, cache, (True,) * 4).potential()
    for symbol in model.symbols:
        for before, after in zip(model.networks[symbol], back.networks[symbol], strict=True):
            assert torch.equal(before.weight, after.weight)
            assert torch.equal(before.bias, after.bias)


def test_inactive_columns_only_decay(tmp_path):
    model = toy_potential()
    cache = build_cache(model, [molecule("CH3OH")], torch.float64, tmp_path)
    back = Engine(model, cache, (True,) * 4).potential(inactive=0.5)
    inactive = torch.ones(model.aev.length(len(model.symbols)), dtype=torch.bool)
    inactive[cache.columns] = False
    before, after = model.networks["C"][0].weight, back.networks["C"][0].weight
    torch.testing.assert_close(after[:, inactive], 0.5 * before[:, inactive])
    assert torch.equal(after[:, ~inactive], before[:, ~inactive])
    assert torch.equal(back.networks["S"][0].weight, model.networks["S"][0].weight)


def test_elements_absent_from_a_batch_get_no_gradient(tmp_path):
    model, frames = toy_potential(), [molecule("CH4"), molecule("H2O")]
    cache = build_cache(model, frames, torch.float64, tmp_path)
    engine = Engine(model, cache, (True,) * 4)
    engine.gradient.fill_(7.0)
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    engine.loss_gradient(
        merge([cache[0]]), torch.zeros(1, dtype=torch.float64), zeros, partial(batch_loss, lambda_=0.5)
    )
    oxygen, carbon = model.symbols.index("O"), model.symbols.index("C")
    assert all(bool((part == 0).all()) for layer in engine._slots[oxygen] for part in layer)
    assert all(bool((part != 0).any()) for layer in engine._slots[carbon] for part in layer)


def test_merging_does_not_change_anything(tmp_path):
    """A batch of different structures gives each the energy and forces it has alone."""
    model, frames = toy_potential(), [small_cell(), molecule("CH3OH"), Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])]
    cache = build_cache(model, frames, torch.float64, tmp_path)
    engine = Engine(model, cache, (True,) * 4)
    together = engine.energies_forces(merge(cache.structures))
    alone = [engine.energies_forces(merge([structure])) for structure in cache.structures]
    torch.testing.assert_close(together.energies, torch.cat([a.energies for a in alone]))
    torch.testing.assert_close(together.forces, torch.cat([a.forces for a in alone]))


@pytest.mark.parametrize(
    "frames",
    [[Atoms("H")], [Atoms("H"), molecule("CH4")], [molecule("CH4") + Atoms("H", [[30.0, 0.0, 0.0]])]],
    ids=["alone", "beside a molecule", "out of reach"],
)
def test_atoms_without_neighbours(frames, tmp_path):
    """Isolated atoms, which training sets often hold, have no Jacobian: no force, and a gradient all the same."""
    engine, _ = engine_gradient(toy_potential(), frames, torch.float64, tmp_path)
    cache = build_cache(toy_potential(), frames, torch.float64, tmp_path)
    forces = engine.energies_forces(merge(cache.structures)).forces
    expected = predict(toy_potential(), frames).forces
    ordered = np.concatenate([f[s.order.numpy()] for f, s in zip(expected, cache.structures, strict=True)])
    np.testing.assert_allclose(forces.numpy(), ordered, atol=1e-10)
    assert bool(torch.isfinite(engine.gradient).all())
    assert bool((engine.gradient != 0).any())


@pytest.fixture
def torch_operations(monkeypatch):
    """Engines made meanwhile do without the compiled code."""
    monkeypatch.setattr(module, "library", lambda dtype: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_operations_equal_autograd(ani2xt, dtype, tmp_path, torch_operations):
    """What serves where there is no compiler; the tests above are about the compiled code."""
    frames = [small_cell(), molecule("CH4")]
    engine, loss = engine_gradient(ani2xt, frames, dtype, tmp_path)
    assert isinstance(engine._sweeps, TorchSweeps)
    network = reference(ani2xt)
    assert loss == pytest.approx(torchani_gradient(ani2xt, network, frames), rel=TOLERANCE[dtype])
    assert relative_difference(engine, network) <= TOLERANCE[dtype]


@pytest.mark.parametrize("scheme", ["all", "hidden", "last"])
def test_compiled_step_equals_torch(scheme, tmp_path, monkeypatch):
    """Two AdamW steps, the second on a batch that lacks an element of the first, for every scheme."""
    if library(torch.float64) is None:
        pytest.skip("no C compiler here: training falls back on torch, which the other tests cover")
    model, frames = toy_potential(members=3), [small_cell(), molecule("CH3OH"), molecule("CH4")]
    trainable, weights = trainable_layers(scheme, 4), []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(module, "library", lambda dtype: None)
        cache = build_cache(model, frames, torch.float64, tmp_path)
        engine = Engine(model, cache, trainable)
        assert isinstance(engine._sweeps, CompiledSweeps if compiled else TorchSweeps)
        moments = [torch.zeros_like(engine.flat) for _ in range(2)]
        for step, picked in enumerate([(0, 1), (2,)], start=1):
            energies, forces = labels([frames[i] for i in picked])
            ordered = torch.cat([torch.from_numpy(f)[cache[i].order] for f, i in zip(forces, picked, strict=True)])
            update = Update(engine.flat, *moments, engine.gradient, 1e-3, 0.1, step)
            batch = merge([cache[i] for i in picked])
            engine.loss_gradient(
                batch, torch.from_numpy(energies), ordered, partial(batch_loss, lambda_=LAMBDA), update
            )
        weights.append(engine.flat)
    torch.testing.assert_close(*weights, rtol=1e-11, atol=1e-11)


def test_number_of_threads_does_not_change_a_bit(tmp_path):
    before, gradients = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        engine, _ = engine_gradient(toy_potential(members=3), [small_cell(), molecule("CH4")], torch.float32, tmp_path)
        gradients.append(engine.gradient)
    torch.set_num_threads(before)
    assert torch.equal(*gradients)


def test_missing_compiler_is_said_and_bad_switch_refused(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path))
    assert library.__wrapped__(torch.float32) is None
    assert "without the compiled code" in caplog.text
    monkeypatch.setenv("TLMC_COMPILED", "perhaps")
    with pytest.raises(ConfigError, match="TLMC_COMPILED must be on or off, got 'perhaps'"):
        library.__wrapped__(torch.float32)
