"""Pictures of structures: always a drawing, which every reader and every run can show, and a widget on request."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.neighborlist import natural_cutoffs, neighbor_list
from ase.visualize.plot import plot_atoms
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from tlmc.arguments import checked
from tlmc.errors import DataError
from tlmc.plots import COLUMN, styled, subplots

if TYPE_CHECKING:
    from nglview import NGLWidget

ROTATION: Final = "-70x,12y,3z"
"""A view along b, tilted so that no axis of the cell hides another."""

_RADII: Final = 0.95
"""Drawn radius over covalent radius: bonded atoms touch."""

_ROOMY: Final = 60.0
"""Volume per atom, Angstrom^3, above which a cell is a box of vacuum whose outline would make its molecule a speck."""


@checked
def show(atoms: Atoms, interactive: bool = False, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Draw a structure, and add a widget that can be turned when asked to.

    Parameters
    ----------
    atoms
        A molecule or a crystal; positions in Angstrom.
    interactive
        Display an nglview widget too. The drawing does not wait for it.
    ax
        Where to draw.
    title
        Above the drawing; by default the chemical formula.

    Raises
    ------
    DataError
        If there are no atoms, or a position or the cell is not finite.
    """
    ax = _draw(atoms, ax, title)
    if interactive:
        from IPython.display import display

        display(widget(atoms))  # type: ignore[no-untyped-call]
    return ax


@checked
def widget(atoms: Atoms) -> NGLWidget:
    """Return an nglview widget of a structure, with its cell if it is periodic.

    Raises
    ------
    DataError
        As :func:`show`.
    """
    _check(atoms)
    # only here: the import takes a second and registers widgets with the notebook
    _ask_for_the_front_end_that_is_there()
    import nglview

    view = nglview.show_ase(atoms)
    if atoms.pbc.any():
        view.add_unitcell()
    return view


def _ask_for_the_front_end_that_is_there() -> None:
    """Let nglview ask the browser for the version of its front-end that it has installed, or nothing is drawn.

    nglview 4.0.1 ships front-end 3.1.5 and asks for 4.0; nglview 4.0 agrees with itself, but needs an older numpy.
    """
    name = "nglview._frontend"
    if "nglview" in sys.modules or find_spec("nglview") is None:
        return
    files = distribution("nglview").files or []
    shipped = [path.locate() for path in files if path.match("labextensions/*/package.json")]
    if len(shipped) == 1:
        module = ModuleType(name)
        # all widgets of nglview read their version here, some while it is imported
        vars(module)["__frontend_version__"] = json.loads(Path(str(shipped[0])).read_text(encoding="utf-8"))["version"]
        sys.modules[name] = module


@checked
@styled
def gallery(
    structures: Iterable[Atoms], titles: Sequence[str] | None = None, *, n_columns: int = 4, width: float = 2 * COLUMN
) -> Figure:
    """Draw several structures side by side.

    Parameters
    ----------
    structures
        Molecules or crystals.
    titles
        One for each; by default the chemical formulas.
    n_columns
        Drawings in a row.
    width
        Of the figure, inches.

    Raises
    ------
    DataError
        If there is no structure, the titles are not as many, or a structure cannot be drawn.
    """
    frames = list(structures)
    if not frames or n_columns < 1 or (titles is not None and len(titles) != len(frames)):
        raise DataError(
            f"a gallery needs structures, columns and as many titles: got {len(frames)} structures, "
            f"{n_columns} columns, {'no' if titles is None else len(titles)} titles"
        )
    for frame in frames:
        _check(frame)
    n_columns = min(n_columns, len(frames))
    figure, axes = subplots(math.ceil(len(frames) / n_columns), n_columns, width=width, aspect=1.1)
    for ax in axes.flat[len(frames) :]:
        ax.set_axis_off()
    for i, (ax, frame) in enumerate(zip(axes.flat, frames, strict=False)):
        _draw(frame, ax, titles[i] if titles is not None else None)
    return figure


@styled
def _draw(atoms: Atoms, ax: Axes | None, title: str | None) -> Axes:
    _check(atoms)
    if ax is None:
        ax = subplots(aspect=0.9)[1][0, 0]
    drawn = whole_molecules(atoms)
    in_vacuum = drawn.cell.rank < 3 or drawn.get_volume() > _ROOMY * len(drawn)
    if in_vacuum:
        drawn = _face_on(drawn)
    plot_atoms(
        drawn,
        ax,
        radii=_RADII * covalent_radii[drawn.numbers],
        rotation="" if in_vacuum else ROTATION,
        show_unit_cell=0 if in_vacuum else 2,
    )
    for patch in ax.patches:
        patch.set_linewidth(0.4)
    ax.set_axis_off()
    ax.autoscale_view()
    ax.set_title(title if title is not None else atoms.get_chemical_formula("hill"))
    return ax


def whole_molecules(atoms: Atoms) -> Atoms:
    """Return a copy in which no bond is cut by the border of the cell, molecules centred inside it.

    Atoms are bonded if they are nearer than 1.2 times the sum of their covalent radii. Where bonds run through the
    whole crystal, some stay cut.
    """
    whole: Atoms = atoms.copy()
    if not atoms.pbc.any() or atoms.cell.rank < 3:
        return whole
    first, second, vectors = neighbor_list("ijD", atoms, natural_cutoffs(atoms, mult=1.2))
    bonds = coo_array((np.ones(len(first)), (first, second)), shape=(len(atoms), len(atoms))).tocsr()
    _, molecule = connected_components(bonds, directed=False)
    for member in np.unique(molecule):
        indices = np.flatnonzero(molecule == member)
        order, parents = breadth_first_order(bonds, indices[0], directed=False)
        for atom in order[1:]:
            parent = parents[atom]
            bond = np.flatnonzero((first == parent) & (second == atom))[0]
            whole.positions[atom] = whole.positions[parent] + vectors[bond]
        centre = whole.cell.scaled_positions(whole.positions[indices].mean(axis=0))
        # a centre on a border, such as an inversion centre at the origin, must not jump with rounding
        whole.positions[indices] -= (np.floor(centre + 1e-6) * atoms.pbc) @ whole.cell.array
    return whole


def _face_on(atoms: Atoms) -> Atoms:
    """Return a copy without a cell, its longest extent along x and its shortest towards the reader."""
    turned: Atoms = Atoms(atoms.numbers, atoms.positions - atoms.positions.mean(axis=0))
    axes = np.linalg.svd(turned.positions)[2]
    # a rotation, not a reflection, so that a chiral molecule is not drawn as its mirror image
    axes[2] *= np.linalg.det(axes)
    turned.positions = turned.positions @ axes.T
    return turned


def _check(atoms: Atoms) -> None:
    if len(atoms) == 0:
        raise DataError("there are no atoms to draw")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise DataError(f"{atoms.get_chemical_formula()} cannot be drawn: a position or the cell is not finite")
