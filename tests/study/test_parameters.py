"""The parameters of the notebooks: whatever is wrong is one sentence with name and value, before anything begins."""

from __future__ import annotations

import logging
import re

import ase.io
import nbformat
import numpy as np
import pytest

from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError
from tlmc.paths import project_root
from tlmc.study import parameters, profiles
from tlmc.study import runner as study

DEFAULTS = {
    path.stem: profiles.notebook_defaults(path) for path in sorted((project_root() / "notebooks").glob("*.ipynb"))
}
PARAMETERS = [(notebook, name) for notebook, defaults in DEFAULTS.items() for name in defaults]
WRONG = {
    str: [27, None, ["naphthalene"], True],
    int: ["5", -1, 1.5, True, None],
    float: ["5", -1.0, 0.0, float("nan"), float("inf"), True],
    bool: ["yes", 1, None],
}
FREE = {"label", "profile_name"}
"""Any text will do."""
MAY_BE_EMPTY = {"label", "element_map", "others", "borrow_dataset", "sizes", "left_out"}
ZERO_MEANS_ALL = {"frame_number", "l_max", "n_molecule", "n_crystal", "seed", "max_frames", "crystal_epochs"}
ZERO_MEANS_ALL |= {"shared_train", "n_train", "epochs"}
ZERO_IS_WRONG = {"00_start_here epochs", "04_sampling n_train"}


@pytest.fixture(scope="module")
def load():
    """Read a set once for all tests of this file."""
    read: dict[str, object] = {}
    return lambda name: read.setdefault(name, load_dataset(name))


def refused(notebook, load, **values):
    with pytest.raises(ConfigError) as caught:
        parameters.check(notebook, DEFAULTS[notebook] | values, load)
    sentence = str(caught.value)
    assert sentence.startswith(f"{notebook}: ")
    assert "\n" not in sentence
    return sentence.removeprefix(f"{notebook}: ")


def test_the_table_has_the_parameters_of_the_notebooks():
    assert {name: set(kinds) for name, kinds in parameters.PARAMETERS.items()} == {
        name: set(defaults) for name, defaults in DEFAULTS.items()
    }


@pytest.mark.parametrize("notebook", DEFAULTS)
class TestEveryNotebook:
    def test_its_first_cell_after_the_parameters_checks_them(self, notebook):
        cells = nbformat.read(project_root() / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        [k] = [k for k, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
        assert code[k + 1].source.startswith(f'parameters.check("{notebook}", globals())\n')

    @pytest.mark.slow
    def test_its_own_parameters_pass(self, notebook, load):
        parameters.check(notebook, DEFAULTS[notebook], load)

    def test_a_line_taken_out_of_the_cell(self, notebook, load):
        for name in DEFAULTS[notebook]:
            left = {key: value for key, value in DEFAULTS[notebook].items() if key != name}
            with pytest.raises(ConfigError, match=rf"^{notebook}: the parameters cell does not set {name}$"):
                parameters.check(notebook, left, load)

    @pytest.mark.slow
    def test_other_names_of_the_notebook_are_not_looked_at(self, notebook, load):
        parameters.check(notebook, {"np": np, "x": float("nan")} | DEFAULTS[notebook], load)


@pytest.mark.slow
@pytest.mark.parametrize(("notebook", "name"), PARAMETERS)
def test_wrong_types_and_ranges_and_unknown_names(notebook, name, load):
    default = DEFAULTS[notebook][name]
    wrong = list(WRONG[type(default)])
    if isinstance(default, str) and name not in FREE:
        wrong += ["no such thing", "no/such/file.traj"]
    if isinstance(default, str) and name not in MAY_BE_EMPTY:
        wrong += [""]
    if type(default) is int and (name not in ZERO_MEANS_ALL or f"{notebook} {name}" in ZERO_IS_WRONG):
        wrong += [0]
    for value in wrong:
        said = refused(notebook, load, **{name: value})
        assert said.startswith(f"{name} = {value!r}: "), said


@pytest.mark.parametrize("profile", profiles.available_profiles())
def test_values_of_the_profiles_pass(profile):
    for step in profiles.load_profile(profile).steps:
        parameters.check_values(step.name, step.parameters)


def test_a_notebook_that_is_none_of_the_studys_is_left_alone():
    parameters.check("my_own", {"dataset": 27})


class TestTheData:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("notebook", "values", "sentence"),
        [
            ("01_descriptors", {"dataset": "ethanol"}, "dataset = 'ethanol': ethanol holds no crystal"),
            ("01_descriptors", {"frame_number": 120}, "frame_number = 120: naphthalene has 120 crystals, counted from"),
            ("02_kernel_methods", {"crystal": "ethanol"}, "crystal = 'ethanol': ethanol holds no crystal"),
            ("02_kernel_methods", {"molecule_sizes": "15,602"}, "molecule_sizes = '15,602': the training part of eth"),
            ("02_kernel_methods", {"molecule_sizes": "60,15"}, "molecule_sizes = '60,15': must be whole numbers from"),
            ("02_kernel_methods", {"molecule_sizes": "60"}, "molecule_sizes = '60': must be two numbers at least"),
            ("02_kernel_methods", {"cost_sizes": "20,400"}, "cost_sizes = '20,400': the smallest must be 50"),
            ("02_kernel_methods", {"n_judged": 201}, "n_judged = 201: the test part of ethanol has 200 frames only"),
            ("03_neural_networks", {"n_crystal": 121}, "n_crystal = 121: naphthalene has 120 frames"),
            ("03_neural_networks", {"sizes_crystal": "7,22"}, "sizes_crystal = '7,22': the training part of naphth"),
            ("04_sampling", {"molecule": "naphthalene"}, "molecule = 'naphthalene': the frames must be of one molec"),
            ("04_sampling", {"n_test": 922}, "molecule = 'ethanol': ethanol has 1001 frames, n_train + n_calibration"),
            ("04_sampling", {"largest": 3}, "largest = 3: naphthalene has 0 crystals of so many atoms"),
            ("05_data_analysis", {"others": "27-like,ethanol"}, "others = '27-like,ethanol': ethanol holds no crystal"),
            ("05_data_analysis", {"dataset": "ethanol", "others": ""}, "others = '': must name a set with crystals"),
            ("07_fine_tuning", {"recipes": "short,shrt"}, "recipes = 'short,shrt': there is no recipe 'shrt'"),
            ("07_fine_tuning", {"recipes": "short,,thesis"}, "recipes = 'short,,thesis': must be names parted by"),
            ("07_fine_tuning", {"convergence_sets": "27-like"}, "convergence_sets = '27-like': 27-like holds Si and I"),
            ("07_fine_tuning", {"convergence_share": 1.5}, "convergence_share = 1.5: "),
            ("08_ablations", {"tables": "lambda,sise"}, "tables = 'lambda,sise': there is no ablation 'sise'"),
            ("08_ablations", {"tables": "lambda,borrow"}, "tables = 'lambda,borrow': the table 'borrow' needs a borr"),
            (
                "08_ablations",
                {"tables": "borrow", "borrow_dataset": "27-like"},
                "tables = 'borrow': must name one",
            ),
            ("08_ablations", {"dataset": "ethanol", "crystals_only": True}, "dataset = 'ethanol': ethanol holds no"),
            ("09_evaluation", {"left_out": "28-like"}, "left_out = '28-like': '28-like' is not one of the crystals"),
            ("09_evaluation", {"crystals": "27-like,27-like", "left_out": ""}, "crystals = '27-like,27-like': "),
            ("09_evaluation", {"max_frames": 2}, "crystals = '27-like,33-like': "),
            ("09_evaluation", {"sizes": "8,x"}, "sizes = '8,x': must be whole numbers"),
            ("10_single_run", {"settings": "{epochs: many}"}, "settings = '{epochs: many}': recipe short: epochs = 'm"),
            ("10_single_run", {"settings": "{epochs: 1"}, "settings = '{epochs: 1': is not YAML: "),
            ("10_single_run", {"settings": "{epoch: 1}"}, "settings = '{epoch: 1}': recipe short: epoch = 1: Extra"),
            ("10_single_run", {"n_train": 92}, "n_train = 92: the training part of naphthalene has 91 frames"),
            ("10_single_run", {"element_map": "Si"}, "element_map = 'Si': an element map reads 'Si=C, I=Cl'"),
            ("10_single_run", {"element_map": "Si=Q"}, "element_map = 'Si=Q': cannot map Si onto 'Q'"),
        ],
    )
    def test_what_a_notebook_needs_to_reach_its_end(self, notebook, values, sentence, load):
        assert refused(notebook, load, **values).startswith(sentence)

    @pytest.mark.slow
    @pytest.mark.parametrize("notebook", ["06_start_models", "07_fine_tuning", "09_evaluation", "10_single_run"])
    def test_elements_that_the_model_lacks_are_named_with_what_to_write(self, notebook, load):
        said = refused(notebook, load, dataset="27-like")
        assert said.startswith("dataset = '27-like': 27-like holds Si and I, for which ani2xt has no network: ")
        text = re.search(r"such as '([^']+)'$", said)[1]
        parameters.check(notebook, DEFAULTS[notebook] | {"dataset": "27-like", "element_map": text}, load)
        assert "holds I, for" in refused(notebook, load, dataset="27-like", element_map="Si=C")

    @pytest.mark.parametrize("notebook", ["00_start_here", "03_neural_networks", "08_ablations"])
    def test_without_an_element_map_the_thesis_donors_do(self, notebook, load):
        parameters.check(notebook, DEFAULTS[notebook] | {"dataset": "27-like"}, load)

    @pytest.mark.slow
    def test_nor_can_they_help_every_element(self, load, tmp_path):
        frames = [frame.copy() for frame in load("27-like").frames[:12]]
        for k, frame in enumerate(frames):
            frame.symbols[frame.symbols == "Si"] = "Ge"
            frame.info["energy"] = load("27-like").energies[k]
            frame.arrays["forces"] = load("27-like").forces[k]
        ase.io.write(tmp_path / "germanium.extxyz", frames)
        said = refused("00_start_here", load, dataset=str(tmp_path / "germanium.extxyz"))
        assert "germanium holds Ge, for which ani2xt has no network, and none that the thesis borrows" in said

    def test_a_damaged_file_is_said_with_the_parameter(self, load, tmp_path):
        (tmp_path / "a.traj").write_bytes(b"- of Ulm")
        said = refused("05_data_analysis", load, others=f"27-like,{tmp_path / 'a.traj'}")
        assert said.startswith(f"others = '27-like,{tmp_path}/a.traj': {tmp_path}/a.traj: ASE cannot read it")

    def test_a_folder_of_crystals(self, load, tmp_path):
        assert f"{tmp_path}: holds no trajectory" in refused("09_evaluation", load, crystals=str(tmp_path))

    def test_warnings_about_data_are_left_to_the_notebook(self, caplog):
        def read(name):
            logging.getLogger("tlmc.data.checks").warning("twice")
            return load_dataset(name)

        parameters.check("06_start_models", DEFAULTS["06_start_models"], read)
        assert not caplog.records
        logging.getLogger("tlmc.data.checks").warning("once")
        assert [record.message for record in caplog.records] == ["once"]


@pytest.mark.parametrize(
    ("notebook", "values", "sentence"),
    [
        ("00", {"epochs": 0}, "00_start_here: epochs = 0: "),
        ("07", {"n_seeds": 0}, "07_fine_tuning: n_seeds = 0: "),
        ("07", {"convergence_sets": "27-like"}, "07_fine_tuning: convergence_sets = '27-like': 27-like holds Si and I"),
        ("09", {"left_out": "x"}, "09_evaluation: left_out = 'x': "),
    ],
)
def test_a_study_says_it_before_a_notebook_runs(notebook, values, sentence, tmp_path):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        study.run_study("smoke", [notebook], parameters=values, output=tmp_path)
    assert not list(tmp_path.rglob("*"))
