"""Make labelled sets: pack molecules into crystals, perturb them, label the frames with any ASE calculator.

A `Recipe` is data: a molecule and how it is packed, or a crystal; how it is perturbed; which methods relax and label.
`build` follows it stage by stage (pack or relax, perturb, screen, label), deterministic by seed, parallel over
processes and resumable, and every stage is a public function for structures of your own.
"""

# tlmc.data.loading and tlmc.data.geometry are imported where they are used: they load torch, for which every worker
# process would wait

from __future__ import annotations

from tlmc.labelling.identity import identified
from tlmc.labelling.labels import LabelReport, label
from tlmc.labelling.methods import ImportedFactory, Method, TBLiteFactory, method
from tlmc.labelling.molecules import Bonds, find_bonds, find_molecules, formula_unit, isolated_molecules, make_whole
from tlmc.labelling.packings import Packed, Packings, pack
from tlmc.labelling.perturbations import MolecularDynamics, Perturbation, Rattle, RigidMotion, Strain, perturb, strained
from tlmc.labelling.recipes import RECIPES, Recipe, build, for_structure
from tlmc.labelling.relaxation import relax
from tlmc.labelling.screening import Rejection, Screened, screen
from tlmc.labelling.sources import molecules_from_smiles, read_structure
from tlmc.labelling.states import State, state_of

__all__ = [
    "RECIPES",
    "Bonds",
    "ImportedFactory",
    "LabelReport",
    "Method",
    "MolecularDynamics",
    "Packed",
    "Packings",
    "Perturbation",
    "Rattle",
    "Recipe",
    "Rejection",
    "RigidMotion",
    "Screened",
    "State",
    "Strain",
    "TBLiteFactory",
    "build",
    "find_bonds",
    "find_molecules",
    "for_structure",
    "formula_unit",
    "identified",
    "isolated_molecules",
    "label",
    "make_whole",
    "method",
    "molecules_from_smiles",
    "pack",
    "perturb",
    "read_structure",
    "relax",
    "screen",
    "state_of",
    "strained",
]
