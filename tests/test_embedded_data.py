from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from tlmc.datasets import load_dataset
from tlmc.files import sha256_file
from tlmc.labelling import RECIPES, MolecularDynamics, label, method, perturb, screen
from tlmc.paths import data_dir


@pytest.fixture(scope="module")
def embedded() -> list[Atoms]:
    frames: list[Atoms] = ase.io.read(data_dir() / "naphthalene.extxyz", ":")
    return frames


def test_embedded_file_is_the_documented_one() -> None:
    path = data_dir() / "naphthalene.extxyz"
    (documented,) = re.findall(r"`([0-9a-f]{64})`", (data_dir() / "README.md").read_text())
    assert sha256_file(path) == documented


def test_embedded_set_is_what_the_readme_says(embedded: list[Atoms]) -> None:
    assert Counter(frame.info["group"] for frame in embedded) == {
        "start": 1,
        "rattle": 36,
        "strain": 43,
        "md": 40,
        "molecule": 10,
    }
    dataset = load_dataset("naphthalene")
    assert len(dataset.crystals()) == 120
    assert dataset.level_of_theory.startswith("GFN2-xTB, tblite ")
    crystals = dataset.crystals()
    per_atom = crystals.energies / crystals.n_atoms
    assert 0.05 < np.ptp(per_atom) < 0.2
    lengths = np.linalg.norm(np.concatenate(crystals.forces), axis=1)
    assert (lengths < 2).mean() > 0.8
    assert 5 < lengths.max() < 17
    kept, _ = screen(dataset.crystals().frames, dataset.frames[0])
    assert len(kept) == 120


def test_embedded_labels_are_reproduced(embedded: list[Atoms], tmp_path: Path) -> None:
    chosen = [embedded[50], embedded[-1]]
    report = label(chosen, method("gfn2-xtb"), tmp_path / "again.extxyz")
    for stored, found in zip(chosen, ase.io.read(report.target, ":"), strict=True):
        assert found.get_potential_energy() == pytest.approx(stored.get_potential_energy(), abs=1e-5)
        assert found.get_forces() == pytest.approx(stored.get_forces(), abs=1e-4)
        assert found.get_stress() == pytest.approx(stored.get_stress(), abs=1e-5)


def test_embedded_geometries_are_reproduced_from_their_seed(embedded: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    crystals, molecules = embedded[:120], embedded[120:]
    *plan, dynamics = recipe.plan
    for start, steps, seed, stored in (
        (crystals[0], plan, recipe.seed, crystals[:80]),
        (molecules[0], recipe.molecule_plan, recipe.seed + 1, molecules),
    ):
        for frame, expected in zip(perturb(start, steps, seed), stored, strict=True):
            assert frame.positions == pytest.approx(expected.positions, abs=1e-6)
            assert frame.cell.array == pytest.approx(expected.cell.array, abs=1e-6)
            assert frame.info["seed"] == expected.info["seed"]
    assert isinstance(dynamics, MolecularDynamics)


@pytest.mark.slow
def test_embedded_dynamics_is_reproduced_from_its_seed(embedded: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    dynamics = recipe.plan[-1]
    assert isinstance(dynamics, MolecularDynamics)
    stored = embedded[80]
    assert stored.info["group"] == "md"
    short = replace(dynamics, frames=1)
    frame = short.run(embedded[0], 0, int(stored.info["seed"]), method(recipe.sampler).make)[0]
    assert frame.positions == pytest.approx(stored.positions, abs=1e-6)
