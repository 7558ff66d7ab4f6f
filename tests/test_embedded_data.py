from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset, read_frames
from tlmc.files import sha256_file
from tlmc.labelling import RECIPES, MolecularDynamics, Perturbation, label, method, perturb, screen
from tlmc.paths import data_dir

LIKE = [f"{number}-like" for number in (27, 28, 31, 32, 33)]
FILES = sorted(path.name for path in data_dir().glob("*.extxyz*"))


@pytest.fixture(scope="module")
def naphthalene() -> list[Atoms]:
    return read_frames(data_dir() / "naphthalene.extxyz")


@pytest.fixture(scope="module", params=LIKE)
def like(request: pytest.FixtureRequest) -> Dataset:
    return load_dataset(request.param)


def test_embedded_files_are_the_documented_ones() -> None:
    documented = dict(
        re.findall(r"^\| `([\w.-]+)` \| `([0-9a-f]{64})` \|", (data_dir() / "README.md").read_text(), re.M)
    )
    assert {name: sha256_file(data_dir() / name) for name in FILES} == documented


def test_embedded_sets_are_small() -> None:
    assert sum((data_dir() / name).stat().st_size for name in FILES) < 12e6


@pytest.mark.slow
def test_every_embedded_set_has_a_recipe() -> None:
    assert {name.partition(".")[0] for name in FILES} == set(RECIPES)
    for name in RECIPES:
        assert load_dataset(name).level_of_theory.startswith("GFN2-xTB, tblite ")


@pytest.mark.slow
def test_naphthalene_is_what_the_readme_says(naphthalene: list[Atoms]) -> None:
    assert Counter(frame.info["group"] for frame in naphthalene) == {
        "start": 1,
        "rattle": 36,
        "strain": 43,
        "md": 40,
        "molecule": 10,
    }
    dataset = load_dataset("naphthalene")
    assert len(dataset.crystals()) == 120
    crystals = dataset.crystals()
    per_atom = crystals.energies / crystals.n_atoms
    assert 0.05 < np.ptp(per_atom) < 0.2
    lengths = np.linalg.norm(np.concatenate(crystals.forces), axis=1)
    assert (lengths < 2).mean() > 0.8
    assert 5 < lengths.max() < 17
    kept, _ = screen(dataset.crystals().frames, dataset.frames[0])
    assert len(kept) == 120


class TestTheFiveThatMirrorTheThesis:
    def test_sizes_and_groups(self, like: Dataset) -> None:
        crystals, molecules = like.crystals(), like.molecules()
        assert 120 <= len(crystals) <= 200
        assert len(molecules) == 10
        assert crystals.n_atoms.min() >= 30
        assert crystals.n_atoms.max() <= 80
        packings = Counter(frame.info["packing"] for frame in crystals.frames)
        assert len(packings) >= 7
        assert len({frame.info["space_group"] for frame in crystals.frames}) >= 3
        assert (like.duplicates == np.arange(len(like))).all()

    def test_energies_and_forces_are_spread_as_in_the_thesis(self, like: Dataset) -> None:
        crystals = like.crystals()
        assert 0.05 < np.ptp(crystals.energies / crystals.n_atoms) < 0.22
        lengths = np.linalg.norm(np.concatenate(crystals.forces), axis=1)
        assert (lengths < 2).mean() > 0.8
        assert 4 < lengths.max() < 20

    def test_densities_are_those_of_crystals(self, like: Dataset) -> None:
        for frame in like.crystals().frames:
            if frame.info["group"] == "start":
                assert 8 < frame.get_volume() / len(frame) < 18

    @pytest.mark.slow
    def test_molecules_are_intact_in_every_packing(self, like: Dataset) -> None:
        crystals = like.crystals()
        for packing in {frame.info["packing"] for frame in crystals.frames}:
            frames = [frame for frame in crystals.frames if frame.info["packing"] == packing]
            assert frames[0].info["group"] == "start"
            kept, rejected = screen(frames, frames[0])
            assert len(kept) == len(frames), rejected


@pytest.mark.parametrize(
    ("name", "elements"), [("27-like", {"Si", "I"}), ("28-like", {"Cu", "S", "Cl"}), ("31-like", {"F", "Cl"})]
)
def test_elements_are_those_of_the_thesis(name: str, elements: set[str]) -> None:
    assert elements <= set(load_dataset(name).elements)


@pytest.mark.slow
def test_labels_are_reproduced(naphthalene: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_labels([naphthalene[50], naphthalene[-1]], tmp_path_factory)


def assert_labels(chosen: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> None:
    report = label(chosen, method("gfn2-xtb"), tmp_path_factory.mktemp("labels") / "again.extxyz")
    for stored, found in zip(chosen, read_frames(report.target), strict=True):
        assert found.get_potential_energy() == pytest.approx(stored.get_potential_energy(), abs=1e-5)
        assert found.get_forces() == pytest.approx(stored.get_forces(), abs=1e-4)
        assert found.get_stress() == pytest.approx(stored.get_stress(), abs=1e-5)


def assert_regenerated(plan: tuple[Perturbation, ...], stored: list[Atoms]) -> list[Atoms]:
    """Perturb the first of the stored frames again, with its seed; return the stored ones that were found."""
    assert not any(isinstance(step, MolecularDynamics) for step in plan)
    again = {frame.info["seed"]: frame for frame in perturb(stored[0], plan, stored[0].info["seed"])}
    found = [frame for frame in stored if frame.info["group"] != "md"]
    for frame in found:
        assert again[frame.info["seed"]].positions == pytest.approx(frame.positions, abs=1e-6)
        assert again[frame.info["seed"]].cell.array == pytest.approx(frame.cell.array, abs=1e-6)
    return found


def test_geometries_are_reproduced_from_their_seed(naphthalene: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    crystals, molecules = naphthalene[:120], naphthalene[120:]
    assert len(assert_regenerated(recipe.plan[:-1], crystals)) == 80
    assert len(assert_regenerated(recipe.molecule_plan, molecules)) == 10


@pytest.mark.slow
def test_ten_frames_are_reproduced_from_their_seed(tmp_path_factory: pytest.TempPathFactory) -> None:
    frames = read_frames(data_dir() / "27-like.extxyz.xz")
    packing = [frame for frame in frames if frame.info.get("packing") == frames[0].info["packing"]]
    found = assert_regenerated(RECIPES["27-like"].plan[:-1], packing)
    assert len(found) >= 10
    assert_labels(found[:10], tmp_path_factory)


@pytest.mark.slow
def test_dynamics_is_reproduced_from_its_seed(naphthalene: list[Atoms]) -> None:
    recipe = RECIPES["naphthalene"]
    dynamics = recipe.plan[-1]
    assert isinstance(dynamics, MolecularDynamics)
    stored = naphthalene[80]
    assert stored.info["group"] == "md"
    short = replace(dynamics, frames=1)
    frame = short.run(naphthalene[0], 0, int(stored.info["seed"]), method(recipe.sampler))[0]
    assert frame.positions == pytest.approx(stored.positions, abs=1e-6)
