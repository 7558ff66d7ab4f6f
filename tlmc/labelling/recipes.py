"""Recipes of data sets as data, and `build`, which follows them."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from ase import Atoms

from tlmc.errors import ConfigError
from tlmc.labelling.labels import LabelReport, label
from tlmc.labelling.methods import method
from tlmc.labelling.molecules import isolated_molecules, make_whole
from tlmc.labelling.perturbations import MolecularDynamics, Perturbation, Rattle, RigidMotion, Strain, perturb
from tlmc.labelling.relaxation import relaxed
from tlmc.labelling.screening import Rejection, screen


@dataclass(frozen=True)
class Recipe:
    """How an embedded data set is made, as data."""

    name: str
    structure: str
    """``pyxtal:<name>`` for a CIF inside PyXtal's wheel, or the path of any file ASE reads."""
    plan: tuple[Perturbation, ...]
    molecule_plan: tuple[Perturbation, ...] = ()
    """Perturbations of each distinct molecule alone in a box; empty for none."""
    seed: int = 0
    method: str = "gfn2-xtb"
    """Labels and relaxes."""
    sampler: str = "gfn1-xtb"
    """Drives molecular dynamics, where the distribution matters less than the cost."""
    fmax: float = 0.02
    """Relaxation threshold, eV/Angstrom."""
    relax_cell: bool = False
    """Relax the cell too, or keep the experimental one."""
    vacuum: float = 8.0
    """Distance from an isolated molecule to the faces of its box, Angstrom."""


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="naphthalene",
            structure="pyxtal:naphthalene",
            seed=20221,
            plan=(
                RigidMotion(
                    count=16, shifts=(0.05, 0.1, 0.15, 0.2), angles=(2.0, 4.0, 6.0, 8.0), rattle=0.02, correlation=1.5
                ),
                Rattle(count=12, widths=(0.02, 0.04, 0.06), correlation=1.5),
                Rattle(count=8, widths=(0.01, 0.015, 0.02, 0.03)),
                Strain(count=43, linear=(-0.05, 0.06), random=0.02, rattle=0.035, correlation=1.5),
                MolecularDynamics(
                    temperatures=(150.0, 300.0, 450.0, 600.0, 150.0, 300.0, 450.0, 600.0),
                    strains=(0.0, 0.0, 0.0, 0.0, -0.03, -0.02, 0.02, 0.03),
                    frames=5,
                    interval=40,
                ),
            ),
            molecule_plan=(
                Rattle(count=6, widths=(0.02, 0.04, 0.06), correlation=1.5),
                Rattle(count=3, widths=(0.01, 0.02, 0.03)),
            ),
        ),
    )
}


def read_structure(source: str) -> Atoms:
    """Read a structure from ``pyxtal:<name>`` or, the last one, from a file.

    Raises
    ------
    ConfigError
        If PyXtal is not installed or has no CIF of this name.
    DataError
        If the file cannot be read.
    """
    from tlmc.datasets import read_frames

    if source.startswith("pyxtal:"):
        # found without importing PyXtal, which takes seconds
        spec = importlib.util.find_spec("pyxtal")
        if spec is None or spec.submodule_search_locations is None:
            raise ConfigError(f"{source} needs PyXtal: pip install 'tlmc[label]'")
        path = Path(spec.submodule_search_locations[0], "database", "cifs", source.partition(":")[2] + ".cif")
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.cif")))
            raise ConfigError(f"PyXtal has no CIF {source.partition(':')[2]!r}; it has {known}")
    else:
        path = Path(source)
    with warnings.catch_warnings():
        # the symmetry operations listed in the file are used, so the setting it names is not needed
        warnings.filterwarnings("ignore", "crystal system .* is not interpreted", UserWarning)
        found = read_frames(path)[-1]
    return Atoms(found.numbers, found.positions, cell=found.cell, pbc=found.pbc)


def build(
    recipe: Recipe | str, target: Path | str, processes: int = 1, work: Path | None = None, retry_failed: bool = False
) -> LabelReport:
    """Follow a recipe to a labelled file; a killed run goes on where it was.

    Parameters
    ----------
    recipe
        A recipe or the name of one in `RECIPES`.
    target, processes, work, retry_failed
        As in `label`.

    Returns
    -------
    LabelReport
        With the frames that `screen` left out.

    Raises
    ------
    ConfigError, DataError
        As in `read_structure`, `perturb` and `label`; unknown recipe.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ConfigError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    target = Path(target)
    folder = (work or target.with_name(target.name + ".parts")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    labels, sampler = method(recipe.method), method(recipe.sampler)
    structure = make_whole(read_structure(recipe.structure))
    crystal = relaxed(structure, labels, recipe.fmax, recipe.relax_cell, folder)
    frames, rejected = screen(perturb(crystal, recipe.plan, recipe.seed, sampler, processes, folder), crystal)
    for index, molecule in enumerate(isolated_molecules(structure, recipe.vacuum) if recipe.molecule_plan else []):
        alone = relaxed(molecule, labels, recipe.fmax, False, folder)
        drawn = perturb(alone, recipe.molecule_plan, recipe.seed + 1 + index, sampler, processes, folder)
        for frame in drawn:
            frame.info["group"] = "molecule"
        screened = screen(drawn, alone)
        rejected += [Rejection(len(frames) + len(rejected) + k, reason) for k, reason in screened.rejected]
        frames += screened.frames
    report = label(frames, labels, target, processes, folder, retry_failed)
    return replace(report, rejected=tuple(rejected))
