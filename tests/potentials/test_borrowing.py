"""Borrowed elements from the cache to the exported file, on the embedded sets that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.potential_references import torchani_energy_and_forces, with_exact_celu
from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset
from tlmc.data.splits import split_dataset
from tlmc.families.ani import build_cache, export_state_dict, scratch, to_torchani
from tlmc.families.ani.batch import merge
from tlmc.families.ani.engine import Engine
from tlmc.potentials import Potential, TlmcCalculator, load_model, predict, save_model
from tlmc.potentials.borrowing import Borrowing
from tlmc.potentials.reference import ReferenceEnergies
from tlmc.training import finetune, recipe

CRYSTALS: list[tuple[str, dict[str, str]]] = [("27-like", {"Si": "C", "I": "Cl"}), ("28-like", {"Cu": "S"})]
WAYS: tuple[Borrowing, ...] = ("relabel", "extend")


@pytest.fixture(scope="module", params=CRYSTALS, ids=lambda param: param[0])
def crystal(request: pytest.FixtureRequest) -> tuple[Dataset, dict[str, str]]:
    name, mapping = request.param
    return load_dataset(name).subset(range(0, 144, 12)), mapping


def test_engine_starts_alike_in_both_ways(crystal: Any, ani2xt: Potential, tmp_path: Path) -> None:
    data, mapping = crystal
    found = []
    for way in WAYS:
        model = ani2xt.with_elements(mapping, way)
        cache = build_cache(model, data.frames[:3], torch.float64, tmp_path)
        engine = Engine(model, cache, (True,) * 4)
        results = [engine.energies_forces(merge([structure])) for structure in cache.structures]
        # each cache sorts atoms by network in its own way
        forces = [np.empty((len(s.order), 3)) for s in cache.structures]
        for structure, result, target in zip(cache.structures, results, forces, strict=True):
            target[structure.order.numpy()] = result.forces.numpy()
        found.append((np.array([result.energies.item() for result in results]), np.concatenate(forces)))
    (energies, forces), (other_energies, other_forces) = found
    assert other_energies == pytest.approx(energies, rel=1e-6)
    np.testing.assert_allclose(other_forces, forces, rtol=0.0, atol=1e-6 * np.abs(forces).max())


@pytest.mark.parametrize("route", ["calculator", "checkpoint", "export"])
def test_both_ways_start_alike_wherever_the_model_goes(
    crystal: Any, route: str, ani2xt: Potential, tmp_path: Path
) -> None:
    data, mapping = crystal
    frame = data.frames[0].copy()
    found = []
    for way in WAYS:
        model = ani2xt.with_elements(mapping, way).to(torch.float64)
        model = model.with_reference(ReferenceEnergies(dict.fromkeys(data.elements, -2.0), "per_element"))
        constant = model.atomic_reference([frame]).item()
        if route == "export":
            export_state_dict(model, tmp_path / f"{way}.pt")
            network = to_torchani(scratch(model, seed=1))
            network.load_state_dict(torch.load(tmp_path / f"{way}.pt", weights_only=True))
            found.append(torchani_energy_and_forces(with_exact_celu(network), frame))
            continue
        if route == "checkpoint":
            save_model(model, tmp_path / f"{way}.safetensors", {})
            model, _ = load_model(tmp_path / f"{way}.safetensors")
            assert set(mapping).isdisjoint(model.symbols) == (way == "relabel")
        frame.calc = TlmcCalculator(model)
        found.append((frame.get_potential_energy(), frame.get_forces()))
    (energy, forces), (other_energy, other_forces) = found
    # relative to what the networks say: next to the self energies of the atoms it is small
    assert abs(other_energy - energy) < 1e-6 * abs(energy - constant)
    np.testing.assert_allclose(other_forces, forces, rtol=0.0, atol=1e-6 * np.abs(forces).max())


@pytest.mark.parametrize("way", WAYS)
def test_what_was_learned_survives_checkpoint_calculator_and_export(
    crystal: Any, way: Borrowing, ani2xt: Potential, tmp_path: Path
) -> None:
    data, mapping = crystal
    model = ani2xt.with_elements(mapping, way)
    split = split_dataset(data, seed=0)
    result = finetune(model, data, split, recipe("short", epochs=2), tmp_path / "run")
    loaded, _ = load_model(tmp_path / "run" / "model.safetensors")
    frame = data.frames[int(split.test[0])].copy()
    expected = predict(result.potential, [frame])
    frame.calc = TlmcCalculator(loaded)
    assert frame.get_potential_energy() == expected.energies[0]
    np.testing.assert_array_equal(frame.get_forces(), expected.forces[0])

    precise = loaded.to(torch.float64)
    export_state_dict(precise, tmp_path / "model.pt")
    network = to_torchani(ani2xt.with_elements(mapping, way).with_reference(precise.reference).to(torch.float64))
    network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    numbers, positions = torch.from_numpy(frame.numbers)[None], torch.from_numpy(frame.positions)[None]
    theirs = network((numbers, positions), torch.from_numpy(frame.cell.array), torch.from_numpy(frame.pbc))
    ours = predict(precise, [frame]).energies[0]
    assert theirs.energies.item() * precise.scale == pytest.approx(ours, abs=1e-6 * len(frame))

    borrowed, donor = next(iter(mapping.items()))
    frame.symbols[[int(k) for k in np.flatnonzero(frame.symbols == borrowed)]] = donor
    bare = precise.with_reference(None)
    swapped, kept = (predict(bare, [f]).energies[0] for f in (frame, data.frames[int(split.test[0])]))
    # a relabelled atom is its donor; an extended one has left it
    assert (abs(swapped - kept) < 1e-9) == (way == "relabel")
