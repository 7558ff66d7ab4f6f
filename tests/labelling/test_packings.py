from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from numpy.random import default_rng

from helpers.labelling_calculators import MakeArgon
from tlmc.errors import ConfigError, DataError
from tlmc.labelling import (
    RECIPES,
    Method,
    Packings,
    Recipe,
    Strain,
    build,
    find_molecules,
    for_structure,
    isolated_molecules,
    method,
    molecules_from_smiles,
    pack,
    read_structure,
)
from tlmc.labelling.compression import SoftMolecules, compress

# RDKit and PyXtal bring warnings of their own
pytestmark = pytest.mark.filterwarnings("ignore")

CARBON_DIOXIDE = Packings(tries=4, keep=2, cells=((2, 2), (4, 2)), steps=15)


# --- molecules ---


def test_a_smiles_becomes_its_fragments_with_hydrogen() -> None:
    cation, anion = molecules_from_smiles("C1COCC[NH2+]1.[Cl-]")
    assert cation.get_chemical_formula() == "C4H10NO"
    assert anion.get_chemical_formula() == "Cl"
    row = read_structure("smiles:C1COCC[NH2+]1.[Cl-]")
    assert not row.pbc.any()
    assert row.get_distances(len(cation), range(len(cation))).min() > 5.9
    first, again, other = (molecules_from_smiles("CCCCO", seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert not np.allclose(first.get_all_distances(), other.get_all_distances(), atol=1e-3)


@pytest.mark.parametrize(
    ("smiles", "sentence"),
    [("C1CC", "RDKit cannot read the SMILES 'C1CC'"), ("C12C3C4C1C5C2C3C45#N", "RDKit")],
)
def test_an_impossible_smiles_gets_a_sentence(smiles: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        molecules_from_smiles(smiles)


def test_ions_of_a_salt_stay_together_in_a_box() -> None:
    ions = Atoms("NaClCl", [[0.5, 2, 2], [8.0, 2, 2], [16.0, 2, 2]], cell=[20.0, 9.0, 9.0], pbc=True)
    assert [found.get_chemical_formula() for found in isolated_molecules(ions, 5.0)] == ["Na", "Cl"]
    (pair,) = isolated_molecules(ions, 5.0, together=True)
    assert pair.get_chemical_formula() == "ClNa"
    # the nearest chloride is an image of the second, across the face of the cell
    assert pair.get_distance(0, 1) == pytest.approx(4.5)
    assert pair.cell.lengths() == pytest.approx([14.5, 14.5, 14.5])


# --- compression ---


def loose_crystal() -> tuple[Atoms, list[np.ndarray]]:
    water, methane = molecule("H2O"), molecule("CH4")
    methane.positions += [4.0, 0.5, 0.3]
    frame = water + methane
    frame.set_cell([[7.0, 0.2, 0.0], [0.4, 4.5, 0.1], [0.0, 0.3, 4.8]])
    frame.pbc = True
    frame.center()
    return frame, [np.arange(3), np.arange(3, 8)]


def test_soft_molecules_have_exact_forces_and_stress() -> None:
    frame, members = loose_crystal()
    frame.calc = SoftMolecules(frame, members)
    frame.rattle(0.05, rng=default_rng(0))
    assert frame.get_forces() == pytest.approx(
        calculate_numerical_forces(frame, eps=1e-5, force_consistent=False), abs=1e-6
    )
    assert frame.get_stress() == pytest.approx(
        calculate_numerical_stress(frame, eps=1e-5, force_consistent=False), abs=1e-6
    )
    assert frame.get_forces().sum(axis=0) == pytest.approx(0.0, abs=1e-10)


def test_compression_makes_a_dense_crystal_of_the_same_molecules() -> None:
    frame, members = loose_crystal()
    frame.set_cell(frame.cell.array * 2.0)
    dense = compress(frame, members, pressure=0.02)
    assert 6.0 < dense.get_volume() / len(dense) < 14.0
    assert [len(found) for found in find_molecules(dense)] == [3, 5]
    for indices in members:
        before, after = (f[indices].get_all_distances() for f in (frame, dense))
        assert after == pytest.approx(before, abs=0.05)


# --- packings ---


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Atoms]]:
    work = tmp_path_factory.mktemp("packings")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pack("smiles:O=C=O", CARBON_DIOXIDE, 5, method("gfn1-xtb"), work=work)
    assert len(found.crystals) + len(found.rejected) == CARBON_DIOXIDE.tries
    return work, found.crystals


@pytest.mark.slow
def test_packings_are_dense_crystals_of_intact_molecules(packed: tuple[Path, list[Atoms]]) -> None:
    _, crystals = packed
    assert 1 <= len(crystals) <= 2
    energies = [crystal.info["energy_per_atom"] for crystal in crystals]
    assert energies == sorted(energies)
    for crystal in crystals:
        assert crystal.info["space_group"] in ("P-1", "P21")
        assert [len(found) for found in find_molecules(crystal)] == [3, 3]
        assert 8.0 < crystal.get_volume() / len(crystal) < 18.0
        crystal.calc = method("gfn1-xtb").make()
        assert crystal.get_potential_energy() / 6 == pytest.approx(crystal.info["energy_per_atom"], abs=1e-6)


@pytest.mark.slow
def test_packings_are_reproduced_from_their_seed_and_resumed(packed: tuple[Path, list[Atoms]]) -> None:
    work, crystals = packed
    files = sorted(work.glob("packing-*.extxyz"))
    assert len(files) == CARBON_DIOXIDE.tries
    lost = next(f for f in files if "left_out" not in f.read_text())
    lost.unlink()
    times = {f: f.stat().st_mtime_ns for f in files if f != lost}
    again = pack("smiles:O=C=O", CARBON_DIOXIDE, 5, method("gfn1-xtb"), work=work).crystals
    assert {f: f.stat().st_mtime_ns for f in times} == times
    for first, second in zip(crystals, again, strict=True):
        assert second.positions == pytest.approx(first.positions, abs=1e-6)
        assert second.cell.array == pytest.approx(first.cell.array, abs=1e-6)
        assert second.info["packing"] == first.info["packing"]


@pytest.mark.slow
def test_tries_that_are_not_worth_keeping_are_counted_with_the_reason(packed: tuple[Path, list[Atoms]]) -> None:
    work, crystals = packed
    sampler = method("gfn1-xtb")
    few = pack("smiles:O=C=O", replace(CARBON_DIOXIDE, keep=1), 5, sampler, work=work)
    assert len(few.crystals) == 1
    assert len(few.rejected) == 3
    if len(crystals) > 1:
        assert any("not among the 1 of lowest energy" in rejection.reason for rejection in few.rejected)
    with pytest.raises(DataError, match=r"none of 4 packings of smiles:O=C=O is worth keeping; 0: .* A\^3 per atom"):
        pack("smiles:O=C=O", replace(CARBON_DIOXIDE, volume_per_atom=(1.0, 2.0)), 5, sampler, work=work)


@pytest.mark.slow
def test_an_impossible_cell_gets_a_sentence() -> None:
    with pytest.raises(DataError, match="none of 1 packings of smiles:CO is worth keeping; 0: PyXtal: "):
        pack("smiles:CO", Packings(tries=1, keep=1, cells=((2, 3),)), 0, Method("argon", MakeArgon()))


@pytest.mark.slow
def test_a_recipe_that_packs_makes_a_labelled_set(packed: tuple[Path, list[Atoms]], tmp_path: Path) -> None:
    recipe = Recipe(
        name="dry ice",
        structure="smiles:O=C=O",
        packings=CARBON_DIOXIDE,
        plan=(Strain(count=2, linear=(-0.02, 0.02), random=0.01),),
        molecule_plan=(Strain(count=1, linear=(0.0, 0.0), random=0.0, rattle=0.02),),
        seed=5,
        method="gfn1-xtb",
    )
    target = tmp_path / "dry_ice.extxyz.xz"
    report = build(recipe, target, work=packed[0])
    frames = ase.io.read(target, ":")
    crystals = [frame for frame in frames if frame.info["group"] != "molecule"]
    assert report.labelled == len(frames)
    assert len(report.discarded) == CARBON_DIOXIDE.tries - len(packed[1])
    assert {frame.info["packing"] for frame in crystals} == {crystal.info["packing"] for crystal in packed[1]}
    assert len(crystals) + len(report.rejected) >= 3 * len(packed[1])
    assert all("space_group" in frame.info for frame in crystals)
    assert [frame.get_chemical_formula() for frame in frames if frame.info["group"] == "molecule"][0] == "CO2"
    assert not any("packing" in frame.info for frame in frames if frame.info["group"] == "molecule")


# --- recipes for structures of your own ---


def test_a_recipe_takes_a_molecule_or_a_crystal(tmp_path: Path) -> None:
    packing = RECIPES["32-like"]
    assert for_structure(packing, "smiles:OC(=O)CCC(O)=O").packings == packing.packings
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"))
    own = for_structure(packing, str(tmp_path / "water.xyz"))
    assert (own.name, own.packings) == ("water", packing.packings)
    crystal = for_structure(packing, "pyxtal:benzene")
    assert crystal.packings is None
    assert crystal.plan == packing.plan
    with pytest.raises(ConfigError, match="PyXtal has no CIF 'benzeen'"):
        for_structure(packing, "pyxtal:benzeen")
