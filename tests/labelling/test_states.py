from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms

from helpers.labelling_calculators import witness
from tlmc.errors import ConfigError, DataError
from tlmc.labelling import (
    Method,
    MolecularDynamics,
    Rattle,
    State,
    build,
    isolated_molecules,
    label,
    make_whole,
    method,
    molecules_from_smiles,
    pack,
    perturb,
    read_structure,
    relax,
    screen,
    state_of,
    strained,
)
from tlmc.labelling.compression import compress
from tlmc.labelling.packings import Packings
from tlmc.labelling.recipes import Recipe
from tlmc.labelling.states import states_of
from tlmc.sampling import CalculatorPool, hessian, normal_modes, sample

WITNESS = Method("witness", witness)


def hydroxyl(charges: Any = None, magmoms: Any = None, **info: Any) -> Atoms:
    """The ion has ten electrons, the radical nine."""
    return Atoms("OH", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.98]], charges=charges, magmoms=magmoms, info=info)


# --- what frames state ---


@pytest.mark.parametrize(
    ("frame", "state"),
    [
        (hydroxyl(), (None, None)),
        (hydroxyl(charge=-1), (-1, None)),
        (hydroxyl(Charge=np.int64(-1)), (-1, None)),
        (hydroxyl(totalCharge=-1), (-1, None)),
        (hydroxyl(**{"Total charge": -1}), (-1, None)),
        (hydroxyl(molecular_charge=-1, **{"spin-multiplicity": 1}), (-1, 0)),
        (hydroxyl(system_charge=-1), (-1, None)),
        (hydroxyl(charge0=-1, charge1=0), (None, None)),  # of two fragments
        (hydroxyl(total_charge="-1", spin_multiplicity=1), (-1, 0)),
        (hydroxyl(charges=[-0.9, -0.1]), (-1, None)),
        (hydroxyl(charges=[-0.334, -0.663]), (-1, None)),
        (hydroxyl(charges=[-0.4, 0.1]), (-0.3, None)),
        (hydroxyl(charge=0, multiplicity=2, magmoms=[0.9, 0.1]), (0, 1)),
        (hydroxyl(magmoms=[-1, 0]), (None, 1)),
        (hydroxyl(uhf=1), (None, 1)),
        # as OMol25 counts, and as PySCF does
        (hydroxyl(charge=0, spin=2), (0, 1)),
        (hydroxyl(charge=0, spin=1), (0, 1)),
        (hydroxyl(charge=-1, spin=1), (-1, 0)),
        (hydroxyl(charge=-1, spin=0), (-1, 0)),
        (hydroxyl(key_value_pairs={"charge": -1}), (-1, None)),  # what ASE's databases make of it
    ],
)
def test_statements_are_understood(frame: Atoms, state: tuple[float | None, float | None]) -> None:
    found = state_of(frame, "frame 0")
    assert (found.charge, found.unpaired) == pytest.approx(state)


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (hydroxyl(charge=-1, charges=[0.0, 0.0]), r"charge = -1 and initial charges sum to \+0; keep one"),
        (hydroxyl(charge=-1, total_charge=0), "charge = -1 and total_charge = 0"),
        (hydroxyl(charge=-1, charges=[0.5, -0.8]), r"charge = -1 and initial charges sum to -0\.3"),
        (hydroxyl(charge=-1, multiplicity=2), r"multiplicity = 2, which 10 electrons \(charge -1\) cannot have"),
        (hydroxyl(multiplicity=1), r"multiplicity = 1, which 9 electrons \(charge \+0\) cannot have"),
        (hydroxyl(multiplicity=2, magmoms=[3, 0]), r"its spin twice .*multiplicity = 2 and .* sum to \+3"),
        (hydroxyl(multiplicity=2, spin=4), "its spin twice .*multiplicity = 2 and spin = 4"),
        (hydroxyl(multiplicity=12), "multiplicity = 12, more unpaired electrons than its 9"),
        (hydroxyl(multiplicity=0), "multiplicity = 0 in its info must be at least 1"),
        (hydroxyl(spin=0.5), "spin = 0.5 in its info is no whole number"),
        (hydroxyl(charge="minus one"), "charge = minus one in its info is no whole number"),
        (hydroxyl(charge=np.nan), "charge = nan in its info is no whole number"),
        (hydroxyl(charge=True), "charge = True in its info is no whole number"),
        (hydroxyl(charge=[-1, 0]), r"charge = \[-1, 0\] in its info is no whole number"),
        (hydroxyl(charges=[np.nan, 0.0]), "its initial charges are not finite"),
        (hydroxyl(magmoms=[np.inf, 0.0]), "its initial magnetic moments are not finite"),
        (hydroxyl(charge=10), "charge = 10, but its nuclei have 9 protons in all"),
    ],
)
def test_contradictions_are_refused_before_any_work(frame: Atoms, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^ions.traj: frame 1.*{sentence}"):
        label([hydroxyl(), frame], WITNESS, tmp_path / "out.extxyz", source="ions.traj")
    assert not list(tmp_path.iterdir())


def test_spin_must_mean_one_thing_in_a_file() -> None:
    frames = [hydroxyl(charge=-1, spin=1), hydroxyl(charge=0, spin=1)]
    with pytest.raises(DataError, match=r"frame 0 has spin = 1, .* is 2S\+1, and frame 1 has spin = 1"):
        states_of(frames)
    assert [state.unpaired for state in states_of([frames[0], hydroxyl(charge=0, spin=2)])] == [0, 1]


# --- tblite ---


def reference(charge: int, multiplicity: int | None) -> float:
    from tblite.ase import TBLite

    frame = hydroxyl()
    frame.calc = TBLite(method="GFN2-xTB", accuracy=0.1, verbosity=0, charge=charge, multiplicity=multiplicity)
    return float(frame.get_potential_energy())


@pytest.mark.slow
def test_ion_and_radical_of_one_geometry_get_their_own_labels(tmp_path: Path) -> None:
    ways = [
        hydroxyl(charge=-1),
        hydroxyl(total_charge=-1, spin=1),
        hydroxyl(charges=[-0.9, -0.1]),
        hydroxyl(charge=0, spin=2),
        hydroxyl(magmoms=[1, 0]),
        hydroxyl(),
        hydroxyl(charge=0, multiplicity=4),
        hydroxyl(charge=1, multiplicity=3),
    ]
    energies = 3 * [reference(-1, None)] + 3 * [reference(0, None)] + [reference(0, 4), reference(1, 3)]
    assert len({round(energy, 6) for energy in energies}) == 4
    target = tmp_path / "out.extxyz"
    report = label(ways, method("gfn2-xtb"), target)
    assert (report.labelled, report.failed) == (8, ())
    found = ase.io.read(target, ":")
    assert [frame.get_potential_energy() for frame in found] == pytest.approx(energies, abs=1e-6)
    for given, frame in zip(ways, found, strict=True):
        assert given.info.items() <= frame.info.items()
        for key in ("initial_charges", "initial_magmoms"):
            assert frame.has(key) == given.has(key)
            if given.has(key):
                assert frame.arrays[key] == pytest.approx(given.arrays[key])
    assert label(ways, method("gfn2-xtb"), target).reused == 8


@pytest.mark.slow
def test_a_method_of_ones_own_that_is_tblite_reads_info_too(tmp_path: Path) -> None:
    (tmp_path / "gfn2.py").write_text(
        "from tblite.ase import TBLite\n\n"
        "def free():\n    return TBLite(method='GFN2-xTB', accuracy=0.1, verbosity=0)\n\n"
        "def neutral():\n    return TBLite(method='GFN2-xTB', charge=0, verbosity=0)\n"
    )
    label([hydroxyl(charge=-1)], method(f"{tmp_path}/gfn2.py:free"), tmp_path / "out.extxyz")
    assert ase.io.read(tmp_path / "out.extxyz").get_potential_energy() == pytest.approx(reference(-1, None), abs=1e-6)
    with pytest.raises(ConfigError, match="frame 0 has charge -1, but TBLite is set to charge=0: let the function"):
        label([hydroxyl(charge=-1)], method(f"{tmp_path}/gfn2.py:neutral"), tmp_path / "no.extxyz")


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (hydroxyl(charges=[-0.4, 0.1]), "frame 0: tblite needs a whole charge, got -0.3"),
        (hydroxyl(magmoms=[0.5, 0]), "frame 0: tblite needs a whole number of unpaired electrons, got 0.5"),
        (
            hydroxyl(magmoms=[2, 0]),
            r"frame 0: 2 unpaired electrons by .*, which 9 electrons \(charge \+0\) cannot have",
        ),
        (hydroxyl(magmoms=[1, -1]), "frame 0: 0 unpaired electrons by its initial magnetic moments"),
        (hydroxyl(magmoms=[[0, 0, 1], [0, 0, 0]]), "frame 0: tblite cannot take .* vectors"),
        (Atoms("EuH", [[0, 0, 0], [0, 0, 2]], magmoms=[6, 0]), "frame 0: states a spin, but tblite keeps the 4f"),
        (Atoms("XH", [[0, 0, 0], [0, 0, 2]]), "frame 0: atom 0 is X, and tblite knows the elements H to Rn"),
        (Atoms("HFr", [[0, 0, 0], [0, 0, 2]]), "frame 0: atom 1 is Fr"),
    ],
)
def test_what_tblite_cannot_be_given_is_refused(frame: Atoms, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        label([frame], method("gfn2-xtb"), tmp_path / "out.extxyz")


# --- calculators of one's own ---


@pytest.mark.slow
def test_a_calculator_of_ones_own_gets_the_frame_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = hydroxyl()
    frames = [plain, hydroxyl(charges=[-1, 0]), hydroxyl(magmoms=[1, 0]), hydroxyl(solvent="water"), hydroxyl()]
    frames[4].set_tags([3, 4])
    target = tmp_path / "out.extxyz"
    label(frames, WITNESS, target)
    found = ase.io.read(target, ":")
    assert [frame.get_potential_energy() for frame in found] == [0, -1000, 100, 50, 7]
    assert found[3].info["solvent"] == "water"
    assert found[4].get_tags().tolist() == [3, 4]
    assert "2 frames state a charge or a spin" in caplog.text
    assert label(frames, WITNESS, target).reused == 5


class Coded(Calculator):
    """Like ORCA's: charge and multiplicity are parameters."""

    implemented_properties = ["energy", "forces"]
    default_parameters = {"charge": 0, "mult": 1}

    def calculate(self, *arguments: Any) -> None:
        super().calculate(*arguments)
        self.results = {"energy": 10.0 * self.parameters.charge + self.parameters.mult, "forces": np.zeros((2, 3))}


def coded_for(atoms: Atoms) -> Calculator:
    return Coded(charge=atoms.info["charge"], mult=atoms.info["multiplicity"])


@pytest.mark.slow
def test_parameters_of_a_calculator_must_agree_and_may_follow_the_frame(tmp_path: Path) -> None:
    frames = [hydroxyl(charge=-1, multiplicity=1), hydroxyl(charge=0, multiplicity=2)]
    with pytest.raises(ConfigError, match=r"frame 0 has charge -1, 0 unpaired electrons, but Coded is set to charge=0"):
        label(frames[:1], Method("coded", Coded), tmp_path / "out.extxyz")
    with pytest.raises(ConfigError, match=r"Coded is set to mult=1"):
        label(frames[1:], Method("coded", Coded), tmp_path / "out.extxyz")
    label(frames, Method("coded", coded_for), tmp_path / "out.extxyz")
    assert [frame.get_potential_energy() for frame in ase.io.read(tmp_path / "out.extxyz", ":")] == [-9, 2]


@pytest.mark.slow
def test_labels_are_those_of_free_atoms_and_constraints_stay(tmp_path: Path) -> None:
    frame = hydroxyl()
    frame.set_constraint(FixAtoms([0]))
    label([frame], WITNESS, tmp_path / "out.extxyz")
    found = ase.io.read(tmp_path / "out.extxyz")
    assert found.get_forces(apply_constraint=False) == pytest.approx(0.5)
    assert found.constraints[0].index.tolist() == [0]
    assert (found.positions == frame.positions).all()


# --- the way from a structure to frames ---


def ion_in_a_box() -> Atoms:
    frame = hydroxyl(charges=[-1, 0], charge=-1, solvent="water", REF_energy=-3.0)
    frame.set_cell([6, 6, 6])
    frame.pbc = True
    frame.set_tags([1, 2])
    return frame


def said(frame: Atoms) -> tuple[Any, ...]:
    keys = ("charge", "solvent", "REF_energy")
    return (frame.get_initial_charges().tolist(), frame.get_tags().tolist(), *(frame.info.get(key) for key in keys))


@pytest.mark.slow
def test_all_stages_keep_what_a_structure_says(tmp_path: Path) -> None:
    ion = ion_in_a_box()
    ase.io.write(tmp_path / "ion.extxyz", ion)
    structure = read_structure(str(tmp_path / "ion.extxyz"))
    # an energy belongs to the geometry that it was computed for
    kept = ([-1, 0], [1, 2], -1, "water", None)
    assert said(structure) == kept
    assert said(make_whole(structure)) == kept
    assert said(relax(structure, method("gfn1-xtb"), steps=2)) == kept
    assert said(strained(structure, 1.02 * np.eye(3))) == kept
    assert said(compress(structure, [np.arange(2)], steps=2)) == kept
    assert said(isolated_molecules(structure)[0]) == kept
    dynamics = MolecularDynamics(temperatures=(100.0,), strains=(0.0,), frames=1, interval=2)
    for work in (tmp_path, tmp_path, None):  # the second time from files
        frames = perturb(structure, [Rattle(1, (0.01,)), dynamics], 3, method("gfn1-xtb"), work=work)
        assert [said(frame) for frame in screen(frames, structure).frames] == 3 * [kept]


@pytest.mark.slow
def test_stages_work_on_the_ion_that_is_stated() -> None:
    ion, radical = hydroxyl(charge=-1), hydroxyl(charge=0)
    lengths = [relax(frame, method("gfn2-xtb"), fmax=1e-3).get_distance(0, 1) for frame in (ion, radical)]
    assert abs(lengths[0] - lengths[1]) > 1e-3
    dynamics = MolecularDynamics(temperatures=(100.0,), strains=(0.0,), frames=1, interval=5)
    ends = [perturb(frame, [dynamics], 3, method("gfn2-xtb"))[1].positions for frame in (ion, radical)]
    assert np.abs(ends[0] - ends[1]).max() > 1e-4


@pytest.mark.slow
def test_a_recipe_labels_the_ion_that_its_structure_states(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "ion.extxyz", hydroxyl(charge=-1))
    for source in (str(tmp_path / "ion.extxyz"), "smiles:[OH-]"):
        plan = Recipe(name="ion", structure=source, plan=(Rattle(1, (0.01,)),))
        build(plan, target := tmp_path / f"{len(source)}.extxyz")
        assert [f.get_potential_energy() for f in ase.io.read(target, ":")] == pytest.approx(
            2 * [reference(-1, None)], abs=0.3
        )
    assert abs(reference(-1, None) - reference(0, None)) > 3


def test_smiles_say_charge_and_unpaired_electrons() -> None:
    (acetate,) = molecules_from_smiles("CC(=O)[O-]")
    assert state_of(acetate, "acetate") == State(-1, None)
    (methyl,) = molecules_from_smiles("[CH3]")
    assert state_of(methyl, "methyl") == State(None, 1)
    # charges that cancel inside a molecule say nothing of it
    assert not molecules_from_smiles("C[N+](=O)[O-]")[0].has("initial_charges")
    salt = molecules_from_smiles("C[NH3+].[Cl-]")
    assert [ion.get_initial_charges().sum() for ion in salt] == [1, -1]


def test_a_crystal_must_be_neutral() -> None:
    with pytest.raises(DataError, match=r"smiles:CC\(=O\)\[O-\] has charge -1, and a crystal must be neutral"):
        pack("smiles:CC(=O)[O-]", Packings(tries=1, keep=1, cells=((2, 2),)), 0, WITNESS)


def test_the_charge_of_a_crystal_is_not_that_of_its_molecules() -> None:
    crystal = Atoms("NaClNaCl", [[0.5, 2, 2], [4.5, 2, 2], [10.5, 2, 2], [14.5, 2, 2]], cell=[20.0, 9.0, 9.0], pbc=True)
    crystal.info = {"charge": 1, "solvent": "water"}
    with pytest.raises(DataError, match=r"has charge \+1, but its atoms do not say which molecule"):
        isolated_molecules(crystal, 5.0)
    crystal.info["charge"] = 0
    assert [found.info for found in isolated_molecules(crystal, 5.0)] == 2 * [{"solvent": "water"}]
    crystal.set_initial_charges([1, -1, 1, -1])
    assert [found.get_initial_charges().tolist() for found in isolated_molecules(crystal, 5.0)] == [[1], [-1]]


# --- sampling and active learning ---


def test_samples_along_modes_keep_the_state() -> None:
    ion = hydroxyl(charge=-1, charges=[-1, 0], solvent="water")
    modes = normal_modes(ion, hessian(ion, method("gfn2-xtb").make()))
    drawn = sample(modes, 300.0, 2, np.random.default_rng(0)).frames
    assert [said(frame) for frame in drawn] == 2 * [([-1, 0], [0, 0], -1, "water", None)]


def test_a_pool_labels_the_states_of_its_frames(tmp_path: Path) -> None:
    frames = [hydroxyl(charge=-1), hydroxyl(charges=[-1, 0]), hydroxyl()]
    gfn2 = method("gfn2-xtb")
    pool = CalculatorPool(frames, gfn2.make(), tmp_path, gfn2.name)
    ions = pool.label([0, 1]).energies
    assert ions == pytest.approx(2 * [reference(-1, None)], abs=1e-6)
    assert pool.label([2]).energies == pytest.approx(reference(0, None), abs=1e-6)
    # another method, or the same with other settings, does not take its labels
    gfn1 = method("gfn1-xtb")
    for calculator, name in ((gfn1.make(), gfn1.name), (gfn1.make(), gfn2.name)):
        other = CalculatorPool(frames, calculator, tmp_path, name)
        other.label([0])
        assert other.calls == 1
    again = CalculatorPool(frames, gfn2.make(), tmp_path, gfn2.name)
    assert (again.label([0, 1]).energies == ions).all()
    assert again.calls == 0
    with pytest.raises(DataError, match="frame 1 states its charge twice"):
        CalculatorPool([*frames[:1], hydroxyl(charge=-1, charges=[0, 0])], gfn2.make())
