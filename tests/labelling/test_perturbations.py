from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import spglib
from ase import Atoms, units
from ase.build import bulk
from numpy.random import default_rng
from scipy.spatial.transform import Rotation

from helpers.labelling_calculators import Make, MakeArgon
from tlmc.errors import ConfigError, DataError
from tlmc.labelling import (
    RECIPES,
    Method,
    MolecularDynamics,
    Rattle,
    RigidMotion,
    Strain,
    find_molecules,
    identified,
    isolated_molecules,
    make_whole,
    perturb,
    read_structure,
    screen,
)


@pytest.fixture(scope="module")
def naphthalene() -> Atoms:
    return make_whole(read_structure(RECIPES["naphthalene"].structure))


# --- structures ---


def test_read_structure_gives_the_experimental_crystal(naphthalene: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spglib.error, "OLD_ERROR_HANDLING", False)  # its default warns
    assert naphthalene.get_chemical_formula() == "C20H16"
    assert naphthalene.cell.cellpar() == pytest.approx([8.098, 5.953, 8.652, 90, 124.4, 90])
    cell = (naphthalene.cell.array, naphthalene.get_scaled_positions(), naphthalene.numbers)
    assert spglib.get_symmetry_dataset(cell, symprec=1e-3).number == 14


def test_read_structure_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no CIF 'napthalene'; it has .*naphthalene"):
        read_structure("pyxtal:napthalene")
    with pytest.raises(DataError, match=r"missing\.cif: cannot be read"):
        read_structure(str(tmp_path / "missing.cif"))


def test_make_whole_undoes_wrapping(naphthalene: Atoms) -> None:
    wrapped = naphthalene.copy()
    wrapped.positions += [3.0, 2.0, 1.0]
    wrapped.wrap()
    whole = make_whole(wrapped)
    for molecule in find_molecules(whole):
        assert len(molecule) == 18
        expected = naphthalene[molecule].get_all_distances()
        assert whole[molecule].get_all_distances() == pytest.approx(expected, abs=1e-9)
        assert not np.allclose(wrapped[molecule].get_all_distances(), expected, atol=0.1)
        centre = whole.cell.scaled_positions(whole.positions[molecule].mean(axis=0))
        assert ((centre > -1e-6) & (centre < 1 + 1e-6)).all()


def test_make_whole_refuses_a_network() -> None:
    with pytest.raises(DataError, match="of C2 close a bonded network through the periodic cell"):
        make_whole(bulk("C"))


def test_isolated_molecule_has_room(naphthalene: Atoms) -> None:
    (molecule,) = isolated_molecules(naphthalene, vacuum=7.0)
    assert molecule.get_chemical_formula() == "C10H8"
    assert molecule.pbc.all()
    low, high = molecule.positions.min(axis=0), molecule.positions.max(axis=0)
    assert (low > 7.0 - 1e-9).all()
    assert (molecule.cell.lengths() - high > 7.0 - 1e-9).all()


# --- perturbations ---

PLAN = (
    Rattle(count=2, widths=(0.01, 0.05), correlation=1.5),
    RigidMotion(count=2, shifts=(0.1,), angles=(5.0,)),
    Strain(count=3, linear=(-0.03, 0.03), random=0.0),
)


def test_perturb_is_deterministic_and_counts(naphthalene: Atoms) -> None:
    frames, again, other = (perturb(naphthalene, PLAN, seed) for seed in (1, 1, 2))
    assert [frame.info["group"] for frame in frames] == ["start"] + 4 * ["rattle"] + 3 * ["strain"]
    for a, b, c in zip(frames[1:], again[1:], other[1:], strict=True):
        assert (a.positions == b.positions).all()
        assert (a.cell.array == b.cell.array).all()
        assert a.info == b.info
        if a.info["group"] == "rattle":
            assert np.abs(a.positions - c.positions).max() > 1e-3
    assert len({frame.info["seed"] for frame in frames}) == len(frames)


def test_parts_of_a_plan_are_independent(naphthalene: Atoms) -> None:
    longer = (replace(PLAN[0], count=5), *PLAN[1:])
    frames, more = perturb(naphthalene, PLAN, 1), perturb(naphthalene, longer, 1)
    for a, b in zip(frames[3:], more[6:], strict=True):
        assert (a.positions == b.positions).all()


def test_rigid_motion_and_strain_keep_molecules_rigid(naphthalene: Atoms) -> None:
    for frame in perturb(naphthalene, PLAN[1:], 7)[1:]:
        for molecule in find_molecules(naphthalene):
            expected = naphthalene[molecule].get_all_distances()
            assert frame[molecule].get_all_distances() == pytest.approx(expected, abs=1e-7)
        if frame.info["perturbation"] != "isotropic +0.0000, random 0":
            assert np.abs(frame.get_all_distances() - naphthalene.get_all_distances()).max() > 0.01


def test_strain_spans_its_range(naphthalene: Atoms) -> None:
    frames = perturb(naphthalene, [PLAN[2]], 7)[1:]
    volumes = [frame.get_volume() / naphthalene.get_volume() for frame in frames]
    assert volumes == pytest.approx([0.97**3, 1.0, 1.03**3], rel=1e-6)


def test_rattle_has_its_width_and_correlation(naphthalene: Atoms) -> None:
    plan = [Rattle(count=60, widths=(0.1,), correlation=c) for c in (0.0, 1.5)]
    moved = np.array([frame.positions - naphthalene.positions for frame in perturb(naphthalene, plan, 5)[1:]])
    free, smooth = moved[:60], moved[60:]
    assert free.std() == pytest.approx(0.1, rel=0.03)
    assert smooth.std() == pytest.approx(0.1, rel=0.1)
    distances = naphthalene.get_all_distances(mic=True)
    bonded, far = (distances > 0) & (distances < 1.2), distances > 5
    # noise averaged with weights exp(-(r / c)^2) is correlated as exp(-(r / c)^2 / 2)
    for field, near in ((free, 0.0), (smooth, np.exp(-((1.09 / 1.5) ** 2) / 2))):
        correlation = np.einsum("fik,fjk->ij", field, field) / (60 * 3 * 0.01)
        assert correlation[bonded].mean() == pytest.approx(near, abs=0.1)
        assert correlation[far].mean() == pytest.approx(0.0, abs=0.1)


@pytest.mark.slow
def test_molecular_dynamics_reaches_its_temperature_and_resumes(tmp_path: Path) -> None:
    argon = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
    step = MolecularDynamics(temperatures=(20.0, 20.0), strains=(0.0, 0.01), frames=2, interval=60, timestep=5.0)
    sampler = Method("Lennard-Jones", MakeArgon())
    frames = perturb(argon, [step], 4, sampler, processes=2, work=tmp_path)
    assert [frame.info["group"] for frame in frames] == ["start"] + 4 * ["md"]
    assert frames[3].get_volume() == pytest.approx(1.01**3 * argon.get_volume(), rel=1e-6)
    # half of the kinetic energy has become potential energy
    energies = []
    for frame in frames[:3]:
        frame.calc = MakeArgon()()
        energies.append(frame.get_potential_energy())
    thermal = 1.5 * units.kB * 20 * len(argon)
    assert energies[1] - energies[0] == pytest.approx(thermal, rel=0.5)
    assert energies[2] - energies[0] == pytest.approx(thermal, rel=0.5)

    assert len(list(tmp_path.glob("md-*.extxyz"))) == 2
    # a run found in the work folder is not run again, so not even its calculator is needed
    again = perturb(
        argon, [step], 4, Method("Lennard-Jones", Make("bug"), identified(sampler, tmp_path).identity), work=tmp_path
    )
    for a, b in zip(frames, again, strict=True):
        assert (a.positions == b.positions).all()
        assert a.info == b.info


def test_molecular_dynamics_needs_a_sampler(naphthalene: Atoms) -> None:
    step = MolecularDynamics(temperatures=(300.0,), strains=(0.0,), frames=1, interval=1)
    with pytest.raises(ConfigError, match="needs a sampler"):
        perturb(naphthalene, [step], 0)


# --- screening ---


def test_screen_leaves_out_unphysical_frames_and_copies(naphthalene: Atoms) -> None:
    first, second = find_molecules(naphthalene)
    broken = naphthalene.copy()
    hydrogen = next(int(k) for k in first if broken.symbols[k] == "H")
    carbon = int(np.argmin(np.where(broken.symbols == "C", broken.get_distances(hydrogen, range(36)), np.inf)))
    broken.set_distance(carbon, hydrogen, 1.6, fix=0)
    squeezed = naphthalene.copy()
    squeezed.set_distance(carbon, hydrogen, 0.5, fix=0)
    # the nearest hydrogen atoms of two molecules are brought too close, though not so close that they count as bonded
    overlapping = naphthalene.copy()
    gaps = overlapping.get_all_distances(mic=True, vector=True)
    near = [(i, j) for i in first for j in second if str(overlapping.symbols[[i, j]]) == "H2"]
    i, j = min(near, key=lambda pair: np.linalg.norm(gaps[pair]))
    overlapping.positions[second] -= gaps[i, j] * (1 - 1.1 / np.linalg.norm(gaps[i, j]))
    fused = naphthalene.copy()
    fused.positions[second] += naphthalene.positions[first[0]] - naphthalene.positions[second[0]] + [0.0, 0.0, 0.9]
    copied = naphthalene.copy()
    turn = Rotation.from_euler("zyx", [30, 20, 10], degrees=True)
    copied.set_cell(turn.apply(copied.cell.array))
    copied.positions = turn.apply(copied.positions) + [1.0, 2.0, 3.0]
    shaken = naphthalene.copy()
    shaken.rattle(0.02, rng=default_rng(0))

    frames = [naphthalene, broken, squeezed, overlapping, fused, copied, shaken]
    kept, rejected = screen(frames, naphthalene)
    assert kept == [naphthalene, shaken]
    assert [k for k, _ in rejected] == [1, 2, 3, 4, 5]
    reasons = [reason for _, reason in rejected]
    assert reasons[0] == f"bond broken between {broken.symbols[min(carbon, hydrogen)]}" + (
        f"{min(carbon, hydrogen)} and {broken.symbols[max(carbon, hydrogen)]}{max(carbon, hydrogen)}"
    )
    assert re.fullmatch(r"[CH]\d+ and [CH]\d+ overlap at 0\.500 A, limit 0\.69\d A", reasons[1])
    assert re.fullmatch(r"[CH]\d+ and [CH]\d+ overlap at 1\.100 A, limit 1\.200 A", reasons[2])
    assert reasons[3].startswith("bond formed between ")
    assert reasons[4] == "duplicate of frame 0"
