from __future__ import annotations

import json
import sys
from importlib.metadata import distribution

import matplotlib.pyplot as plt
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from tlmc.errors import DataError
from tlmc.plots import views


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def water_crystal(shift=0.0):
    """One molecule per cell, cut by the border of the cell for some shifts."""
    atoms = molecule("H2O")
    atoms.cell = [[4.0, 0, 0], [0.5, 4.0, 0], [0, 0.3, 4.0]]
    atoms.pbc = True
    atoms.positions += shift
    atoms.wrap()
    return atoms


class TestShow:
    @pytest.mark.parametrize("atoms", [molecule("C6H6"), bulk("NaCl", "rocksalt", 5.64), water_crystal(), Atoms("H")])
    def test_draws_every_atom(self, atoms, displayed):
        ax = views.show(atoms)
        ax.figure.canvas.draw()
        assert len([patch for patch in ax.patches if isinstance(patch, plt.Circle)]) >= len(atoms)
        assert ax.get_title() == atoms.get_chemical_formula("hill")
        assert not displayed

    def test_draws_into_axes(self):
        _, given = plt.subplots()
        assert views.show(molecule("H2O"), ax=given, title="water") is given
        assert given.get_title() == "water"

    def test_cell_is_outlined_for_crystals_only(self):
        boxed = molecule("H2O", vacuum=10)
        boxed.pbc = True
        bare = len(views.show(molecule("H2O")).patches)
        assert len(views.show(boxed).patches) == bare
        assert len(views.show(water_crystal()).patches) > bare

    def test_does_not_touch_the_structure(self):
        atoms = water_crystal(2.0)
        before = atoms.copy()
        views.show(atoms)
        assert atoms == before

    def test_widget_on_request(self, displayed):
        views.show(water_crystal(), interactive=True)
        (widget,) = displayed
        assert type(widget).__name__ == "NGLWidget"
        drawn = [(m["methodName"], m["args"]) for m in widget._ngl_msg_archive]
        assert [name for name, _ in drawn] == ["loadFile", "addRepresentation"]
        assert drawn[1][1] == ["unitcell"]

    def test_the_front_end_is_the_one_that_the_widget_asks_for(self):
        # a browser draws nothing where they differ, and no error reaches Python
        import nglview

        view = views.widget(molecule("H2O"))
        extension = [
            path.locate() for path in distribution("nglview").files if path.match("labextensions/*/package.json")
        ]
        [front_end] = [json.loads(path.read_text()) for path in extension]
        assert view._view_module == view._model_module == front_end["name"]
        asked = {view._view_module_version, view._model_module_version}
        assert asked == {front_end["version"]}, f"nglview {nglview.__version__}"

    def test_nglview_is_imported_only_then(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "nglview", None)
        views.show(molecule("H2O"))
        with pytest.raises(ImportError):
            views.widget(molecule("H2O"))

    def test_nothing_to_draw(self):
        with pytest.raises(DataError, match="there are no atoms to draw"):
            views.show(Atoms())
        with pytest.raises(DataError, match="HO cannot be drawn: a position or the cell is not finite"):
            views.widget(Atoms("OH", positions=[[0, 0, 0], [0, 0, np.nan]]))


class TestGallery:
    def test_panels(self):
        figure = views.gallery([molecule(name) for name in ("H2O", "CH4", "NH3")], n_columns=2)
        assert [ax.get_title() for ax in figure.axes] == ["H2O", "CH4", "H3N", ""]
        figure.canvas.draw()

    def test_titles(self):
        figure = views.gallery(iter([molecule("H2O"), molecule("CH4")]), ["first", "second"])
        assert [ax.get_title() for ax in figure.axes] == ["first", "second"]

    @pytest.mark.parametrize(
        ("structures", "titles", "message"),
        [([], None, "got 0 structures"), ([molecule("H2O")], ["a", "b"], "got 1 structures, 4 columns, 2 titles")],
    )
    def test_bad_input(self, structures, titles, message):
        with pytest.raises(DataError, match=message):
            views.gallery(structures, titles)


class TestWholeMolecules:
    @pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, 3.5, 3.9, -0.2])
    def test_bonds_are_not_cut(self, shift):
        expected = molecule("H2O").get_all_distances()
        cut = water_crystal(shift)
        whole = views.whole_molecules(cut)
        np.testing.assert_allclose(whole.get_all_distances(), expected, atol=1e-9)
        # the same crystal: every atom moved by whole cells
        moved = whole.cell.scaled_positions(whole.positions - cut.positions)
        np.testing.assert_allclose(moved, moved.round(), atol=1e-9)
        centre = whole.cell.scaled_positions(whole.positions.mean(axis=0))
        assert ((centre > -1e-5) & (centre < 1)).all()

    def test_some_shift_needed_it(self):
        assert water_crystal(2.0 + 2.0).get_all_distances().max() > 2

    def test_two_molecules_stay_two(self):
        crystal = water_crystal(1.9).repeat((2, 1, 1))
        whole = views.whole_molecules(crystal)
        for part in (whole[:3], whole[3:]):
            assert part.get_all_distances().max() < 1.6

    def test_bonds_without_end(self):
        salt = bulk("NaCl", "rocksalt", 5.64, cubic=True)
        assert len(views.whole_molecules(salt)) == 8

    def test_molecule_is_left_as_it_is(self):
        water = molecule("H2O")
        assert views.whole_molecules(water) == water


def test_face_on_keeps_shape_and_handedness():
    rng = np.random.default_rng(3)
    for _ in range(10):
        atoms = Atoms("CHFCl", rng.normal(size=(4, 3)))
        turned = views._face_on(atoms)
        np.testing.assert_allclose(turned.get_all_distances(), atoms.get_all_distances())
        volumes = [np.linalg.det(one.positions[1:] - one.positions[0]) for one in (atoms, turned)]
        assert volumes[0] == pytest.approx(volumes[1])
        spread = turned.positions.std(axis=0)
        assert spread[0] >= spread[1] >= spread[2]
