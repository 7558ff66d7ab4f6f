"""Recipes of data sets as data, and `build`, which follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ase import Atoms

from tlmc.errors import ConfigError
from tlmc.files import held
from tlmc.labelling.frames import template
from tlmc.labelling.identity import identified
from tlmc.labelling.labels import LabelReport, check_name, label, work_folder
from tlmc.labelling.methods import Method, method
from tlmc.labelling.molecules import isolated_molecules, make_whole
from tlmc.labelling.packings import Packings, pack
from tlmc.labelling.perturbations import MolecularDynamics, Perturbation, Rattle, RigidMotion, Strain, perturb
from tlmc.labelling.relaxation import relaxed
from tlmc.labelling.screening import Rejection, screen
from tlmc.labelling.sources import read_structure


@dataclass(frozen=True)
class Recipe:
    """How an embedded data set is made, as data."""

    name: str
    structure: str
    """``pyxtal:<name>`` for a CIF inside PyXtal's wheel, ``smiles:<SMILES>``, or the path of any file ASE reads."""
    plan: tuple[Perturbation, ...]
    """Perturbations of the crystal, or of each of its packings."""
    packings: Packings | None = None
    """Candidate crystals of the molecule that ``structure``, a SMILES, describes; None for a structure as it is."""
    molecule_plan: tuple[Perturbation, ...] = ()
    """Perturbations of each distinct molecule alone in a box; empty for none."""
    seed: int = 0
    method: str = "gfn2-xtb"
    """Labels and relaxes."""
    sampler: str = "gfn1-xtb"
    """Relaxes packings and drives molecular dynamics, where the distribution matters less than the cost."""
    fmax: float = 0.02
    """Relaxation threshold, eV/Angstrom."""
    relax_cell: bool = False
    """Relax the cell too, or keep the experimental one."""
    vacuum: float = 8.0
    """Distance from an isolated molecule to the faces of its box, Angstrom."""


# eighteen frames of each packing
_PACKING_PLAN: tuple[Perturbation, ...] = (
    RigidMotion(count=3, shifts=(0.05, 0.1, 0.15), angles=(2.0, 4.0, 6.0), rattle=0.02, correlation=1.5),
    Rattle(count=3, widths=(0.02, 0.04, 0.06), correlation=1.5),
    Rattle(count=2, widths=(0.01, 0.02)),
    Strain(count=5, linear=(-0.03, 0.04), random=0.02, rattle=0.03, correlation=1.5),
    MolecularDynamics(
        temperatures=(150.0, 300.0, 450.0, 600.0), strains=(0.0, -0.01, 0.01, 0.02), frames=1, interval=25
    ),
)
# dynamics is the dearest part: here two snapshots share a run
_SHORTER_DYNAMICS = MolecularDynamics(temperatures=(150.0, 600.0), strains=(0.0, 0.01), frames=2, interval=12)
_SHORTER_PACKING_PLAN: tuple[Perturbation, ...] = (*_PACKING_PLAN[:-1], _SHORTER_DYNAMICS)
# the ends of a long molecule move far when it turns, and are in each other's way when the cell shrinks
_LONG_MOLECULE_PLAN: tuple[Perturbation, ...] = (
    RigidMotion(count=3, shifts=(0.03, 0.06, 0.09), angles=(1.0, 1.5, 2.0), rattle=0.02, correlation=1.5),
    *_PACKING_PLAN[1:3],
    Strain(count=5, linear=(-0.02, 0.04), random=0.012, rattle=0.03, correlation=1.5),
    _SHORTER_DYNAMICS,
)
_MOLECULE_PLAN: tuple[Perturbation, ...] = (
    Rattle(count=6, widths=(0.02, 0.04, 0.06), correlation=1.5),
    Rattle(count=3, widths=(0.01, 0.02, 0.03)),
)
# common space groups of organic crystals, with formula units per cell: two, or four of a small one
_TWO_UNITS = ((2, 2), (4, 2), (1, 2), (7, 2))
_TWO_OR_FOUR_UNITS = ((14, 4), (2, 2), (4, 2), (19, 4), (1, 2), (33, 4))


def _packed(number: int, smiles: str, packings: Packings, plan: tuple[Perturbation, ...] = _PACKING_PLAN) -> Recipe:
    """Return the recipe of one of the five sets that mirror those of the thesis."""
    return Recipe(
        name=f"{number}-like",
        structure=f"smiles:{smiles}",
        packings=packings,
        plan=plan,
        molecule_plan=_MOLECULE_PLAN,
        seed=number * 1000,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # (iodoethynyl)trimethylsilane
        _packed(27, "C[Si](C)(C)C#CI", Packings(tries=14, keep=8, cells=_TWO_OR_FOUR_UNITS)),
        # chlorotris(thiourea)copper(I)
        _packed(28, "NC(N)=S->[Cu](Cl)(<-S=C(N)N)<-S=C(N)N", Packings(tries=14, keep=8, cells=_TWO_UNITS)),
        # diflubenzuron
        _packed(
            31,
            "O=C(NC(=O)c1c(F)cccc1F)Nc1ccc(Cl)cc1",
            Packings(tries=10, keep=8, cells=_TWO_UNITS),
            _LONG_MOLECULE_PLAN,
        ),
        # ROY, 5-methyl-2-[(2-nitrophenyl)amino]thiophene-3-carbonitrile
        _packed(
            32,
            "Cc1cc(C#N)c(Nc2ccccc2[N+](=O)[O-])s1",
            Packings(tries=10, keep=8, cells=_TWO_UNITS, conformers=3),
            _LONG_MOLECULE_PLAN,
        ),
        # morpholinium chloride
        _packed(
            33,
            "C1COCC[NH2+]1.[Cl-]",
            Packings(tries=12, keep=8, cells=_TWO_UNITS),
            _SHORTER_PACKING_PLAN,
        ),
        Recipe(
            name="ethanol",
            structure="smiles:CCO",
            seed=20222,
            plan=(MolecularDynamics(temperatures=5 * (300.0, 500.0), strains=10 * (0.0,), frames=100, interval=20),),
        ),
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
            molecule_plan=_MOLECULE_PLAN,
        ),
    )
}


def for_structure(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe for a structure of your own.

    Parameters
    ----------
    recipe
        If it packs molecules, a molecule is packed in the same way; a crystal is perturbed like one of its packings.
    source
        As `read_structure` takes it.

    Raises
    ------
    ConfigError, DataError
        As in `read_structure`.
    """
    if not source.startswith(("smiles:", "pyxtal:")):
        source = str(Path(source).resolve())
    packings = None if read_structure(source).pbc.any() else recipe.packings
    return replace(recipe, name=Path(source).stem, structure=source, packings=packings)


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
    check_name(target)
    folder = work_folder(target, work)
    with held(folder):
        return _follow(recipe, target, processes, folder, retry_failed)


def _follow(recipe: Recipe, target: Path, processes: int, folder: Path, retry_failed: bool) -> LabelReport:
    labels, sampler = (identified(method(name), folder) for name in (recipe.method, recipe.sampler))
    starts, discarded = _starts(recipe, labels, sampler, processes, folder)
    frames: list[Atoms] = []
    rejected: list[Rejection] = []
    for start, plan, seed, info in starts:
        drawn = perturb(start, plan, seed, sampler, processes, folder)
        for frame in drawn:
            frame.info |= info
        screened = screen(drawn, start)
        rejected += [Rejection(len(frames) + len(rejected) + k, reason) for k, reason in screened.rejected]
        frames += screened.frames
    report = label(frames, labels, target, processes, folder, retry_failed)
    return replace(report, rejected=tuple(rejected), discarded=tuple(discarded))


class _Start(NamedTuple):
    """A relaxed structure and how it is perturbed."""

    structure: Atoms
    plan: tuple[Perturbation, ...]
    seed: int
    info: dict[str, Any]
    """What is known of every frame that comes of it."""


def _starts(
    recipe: Recipe, labels: Method, sampler: Method, processes: int, folder: Path
) -> tuple[list[_Start], list[Rejection]]:
    """Return the crystals of a recipe, then its isolated molecules, and the packings that were discarded."""
    discarded: list[Rejection] = []
    if recipe.packings is None:
        structure = make_whole(read_structure(recipe.structure))
        crystal = relaxed(structure, labels, recipe.fmax, recipe.relax_cell, folder)
        starts = [_Start(crystal, recipe.plan, recipe.seed, {})]
        molecules = _alone(structure, recipe.vacuum) if recipe.molecule_plan else []
    else:
        packed = pack(recipe.structure, recipe.packings, recipe.seed, sampler, labels, processes, folder)
        discarded = packed.rejected
        starts = [
            _Start(
                _unnumbered(crystal),
                recipe.plan,
                crystal.info["seed"],
                {k: crystal.info[k] for k in ("packing", "space_group")},
            )
            for crystal in packed.crystals
        ]
        # the ions of a salt stay together: alone they would be charged
        molecules = (
            isolated_molecules(starts[0].structure, recipe.vacuum, together=True) if recipe.molecule_plan else []
        )
    for index, molecule in enumerate(molecules):
        alone = relaxed(molecule, labels, recipe.fmax, False, folder)
        starts.append(_Start(alone, recipe.molecule_plan, recipe.seed + 1 + index, {"group": "molecule"}))
    return starts, discarded


def _unnumbered(crystal: Atoms) -> Atoms:
    """Return a packing less what `pack` says of it."""
    copy = template(crystal)
    for key in ("packing", "space_group", "seed"):
        copy.info.pop(key, None)
    return copy


def _alone(crystal: Atoms, vacuum: float) -> list[Atoms]:
    """Return the molecules of a crystal, each alone; ions of a salt together, since alone they would be charged."""
    molecules = isolated_molecules(crystal, vacuum)
    ions = [m for m in molecules if m.get_initial_charges().sum().round() or m.numbers.sum() % 2]
    return isolated_molecules(crystal, vacuum, together=True) if len(molecules) > 1 and ions else molecules
