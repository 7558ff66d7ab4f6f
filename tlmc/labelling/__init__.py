"""Perturb a structure and label the frames with any ASE calculator: deterministic, parallel, resumable.

A `Recipe` is data: a structure, how it is relaxed, how it is perturbed, which method labels it. `build` follows it
stage by stage (relax, perturb, screen, label), and every stage is a public function for structures of your own.
"""

# tlmc.datasets and tlmc.geometry are imported where they are used: they load torch, for which every worker process
# would wait

from __future__ import annotations

from tlmc.labelling.labels import LabelReport, label
from tlmc.labelling.methods import ImportedFactory, Method, TBLiteFactory, method
from tlmc.labelling.molecules import Bonds, find_bonds, find_molecules, isolated_molecules, make_whole
from tlmc.labelling.perturbations import MolecularDynamics, Perturbation, Rattle, RigidMotion, Strain, perturb, strained
from tlmc.labelling.recipes import RECIPES, Recipe, build, read_structure
from tlmc.labelling.relaxation import relax
from tlmc.labelling.screening import Rejection, Screened, screen

__all__ = [
    "RECIPES",
    "Bonds",
    "ImportedFactory",
    "LabelReport",
    "Method",
    "MolecularDynamics",
    "Perturbation",
    "Rattle",
    "Recipe",
    "Rejection",
    "RigidMotion",
    "Screened",
    "Strain",
    "TBLiteFactory",
    "build",
    "find_bonds",
    "find_molecules",
    "isolated_molecules",
    "label",
    "make_whole",
    "method",
    "perturb",
    "read_structure",
    "relax",
    "screen",
    "strained",
]
