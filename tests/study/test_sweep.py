"""Sweeps: descriptions, plans, single runs, and the Snakefile, carried out with a training of one epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import tlmc.study.parameters
from helpers.places import ROOT
from tlmc import potentials, provenance
from tlmc.cli import main as cli
from tlmc.errors import ConfigError, DataError, StudyError
from tlmc.experiments import run as runs
from tlmc.experiments.records import append_records, read_records
from tlmc.experiments.run import Run
from tlmc.files import WRITTEN_LIST, write_json, write_text
from tlmc.paths import project_root
from tlmc.study import sweep as sweeps
from tlmc.study.profiles import notebook_defaults

# nbformat and the kernel's sockets warn about things outside this package
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NOTEBOOK = ROOT / "notebooks" / f"{sweeps.NOTEBOOK}.ipynb"

GOOD = """\
study: trial
base: {start_model: ani2xt, settings: {epochs: 1, batch_size: 4}}
runs:
  - {dataset: naphthalene}
  - {dataset: 27-like, element_map: {Si: C, I: Cl}, borrow: extend, settings: {lr: 1.0e-5}}
grid:
  seed: [0, 3]
  settings: [{}, {lambda_: 0.5, batch_size: 8}]
"""


@pytest.fixture
def description(tmp_path):
    path = tmp_path / "sweep.yml"
    path.write_text(GOOD)
    return path


def parameters(folder: Path) -> dict[str, dict]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(folder.glob("parameters/*.yml"))}


class TestDescription:
    def test_every_run_meets_every_point_of_the_grid_and_settings_add_up(self, description):
        study, found = sweeps.read_sweep(description)
        assert study == "trial"
        assert len(found) == 8
        assert {(run.dataset, run.seed, run.settings["batch_size"]) for run in found} == {
            (dataset, seed, size) for dataset in ("naphthalene", "27-like") for seed in (0, 3) for size in (4, 8)
        }
        assert found[0].settings == {"epochs": 1, "batch_size": 4}
        assert found[-1].settings == {"epochs": 1, "batch_size": 8, "lr": 1e-5, "lambda_": 0.5}
        assert found[-1].element_map == {"Si": "C", "I": "Cl"}

    def test_a_run_that_is_named_twice_is_carried_out_once(self, description):
        description.write_text("study: a\nruns: [{dataset: naphthalene}]\ngrid: {seed: [1, 1, 2]}\n")
        assert [run.seed for run in sweeps.read_sweep(description)[1]] == [1, 2]

    def test_a_file_is_looked_for_beside_the_description(self, description, tmp_path, monkeypatch):
        (tmp_path / "mine.extxyz").write_text("")
        description.write_text("study: a\nruns: [{dataset: mine.extxyz}]\n")
        monkeypatch.chdir("/")
        [run] = sweeps.read_sweep(description)[1]
        assert run.dataset == str(tmp_path / "mine.extxyz")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("base: {}\n", "study = .*Field required"),
            ("study: a\nsweep: {}\n", "sweep = {}: Extra inputs"),
            ("study: a\nruns: []\n", r"runs = \[\]: List should have at least 1 item"),
            ("study: ''\nbase: {dataset: naphthalene}\n", "study = '': String should have at least 1"),
            ("study: a\nbase: {dataset: naphthalene}\ngrid: {seed: []}\n", r"grid.seed = \[\]: List should have at"),
            (
                "study: a\nbase: {dataset: naphthalene, settings: 3}\ngrid: {settings: [{lr: 1.0e-3}]}\n",
                "settings = 3: Input should be",
            ),
            ("study: a\nbase: {dataset: naphthalene, label: start}\n", "'start' names the errors of the start model"),
            ("study: a\nbase: {dataset: naphthalene, settings: {seed: 3}}\n", "seed is a field of the run"),
            ("study: a\ngrid: {seed: 3}\n", "grid.seed = 3: Input should be a valid list"),
            ("study: a\nbase: {dataset: naphthalene, batch: 3}\n", "batch = 3: Extra inputs"),
            ("study: a\nbase: {dataset: naphthalene}\ngrid: {settings: [{batch: 3}]}\n", "'batch': 3.*Extra inputs"),
            ("study: a\nbase: {dataset: naphthalene}\ngrid: {settings: [lr]}\n", "settings = 'lr': Input should be"),
            ("study: a\nbase: {dataset: naphthalene, recipe: fast}\n", "there is no recipe 'fast'"),
            ("study: [\n", "is not YAML"),
        ],
    )
    def test_a_wrong_one_gets_a_sentence_and_nothing_is_planned(self, description, text, sentence, tmp_path):
        description.write_text(text)
        with pytest.raises(ConfigError, match=f"(?s)^{description}.*{sentence}"):
            sweeps.plan(description, tmp_path / "sweep")
        assert not (tmp_path / "sweep").exists()

    def test_an_unknown_data_set_gets_the_nearest_names(self, description):
        description.write_text("study: a\nbase: {dataset: naphtalene}\n")
        with pytest.raises(DataError, match="^naphtalene: neither a file nor .* did you mean naphthalene"):
            sweeps.read_sweep(description)

    @pytest.mark.parametrize("path", sorted((ROOT / "notebooks/sweeps").glob("*.yml")), ids=lambda path: path.stem)
    def test_those_of_the_project_can_be_read(self, path):
        assert sweeps.read_sweep(path)[1]


class TestPlan:
    @pytest.mark.slow
    def test_parameters_are_those_of_the_notebook_and_make_the_run_again(self, description, tmp_path):
        names = sweeps.plan(description, tmp_path / "sweep")
        files = parameters(tmp_path / "sweep")
        assert sorted(names) == list(files)
        # where it runs and who watches is not part of a run
        assert set(files[names[0]]) == set(notebook_defaults(NOTEBOOK)) - {"device", "interactive"}
        cells = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
        [source] = [cell.source for cell in cells.values() if "runs.Run(" in cell.source]
        for run in sweeps.read_sweep(description)[1]:
            # the notebook's own cell, with what papermill puts before it
            scope = notebook_defaults(NOTEBOOK) | files[run.slug]
            scope |= {"parameters": tlmc.study.parameters, "runs": runs, "potentials": potentials, "yaml": yaml}
            exec(source, scope)
            assert scope["run"] == run
            assert scope["profile_name"] == "trial"

    def test_an_unchanged_file_is_left_alone(self, description, tmp_path):
        sweeps.plan(description, tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parameters/*.yml")}
        description.write_text(GOOD.replace("[0, 3]", "[0, 3, 4]"))
        sweeps.plan(description, tmp_path)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parameters/*.yml")}
        assert len(before) == 8
        assert len(after) == 12
        assert {path: after[path] for path in before} == before

    def test_runs_that_are_gone_leave_the_plan_and_other_files_stay(self, description, tmp_path):
        sweeps.plan(description, tmp_path)
        (tmp_path / "parameters" / "mine.yml").write_text("a: 1\n")
        description.write_text(GOOD.replace("[0, 3]", "[0]"))
        names = sweeps.plan(description, tmp_path)
        assert sorted(parameters(tmp_path)) == sorted([*names, "mine"])

    def test_a_planned_file_that_was_changed_by_hand_is_neither_replaced_nor_removed(self, description, tmp_path):
        name = sweeps.plan(description, tmp_path)[-1]
        path = sweeps.parameters_file(tmp_path, name)
        path.write_text(path.read_text().replace("seed: 3", "seed: 7"))
        assert "seed: 7" in path.read_text()
        before = {file: file.read_text() for file in tmp_path.glob("parameters/*.yml")}
        with pytest.raises(ConfigError, match=f"{name}.yml is not as it was planned"):
            sweeps.plan(description, tmp_path)
        description.write_text(GOOD.replace("[0, 3]", "[0]"))
        sweeps.plan(description, tmp_path)
        assert path.read_text() == before[path]

    @pytest.mark.slow
    def test_files_change_with_data_and_code(self, description, tmp_path, monkeypatch):
        data = tmp_path / "mine.extxyz"
        data.write_text("one")
        description.write_text("study: a\nruns: [{dataset: mine.extxyz}, {dataset: naphthalene}]\n")

        def texts() -> dict[str, str]:
            sweeps._shared_inputs.cache_clear()
            sweeps.plan(description, tmp_path)
            return {path.stem: path.read_text() for path in tmp_path.glob("parameters/*.yml")}

        first = texts()
        assert texts() == first
        data.write_text("two")
        second = texts()
        assert {name.partition("-")[0] for name in first if first[name] != second[name]} == {"mine"}
        monkeypatch.setattr(sweeps, "program_hash", lambda module: "other")
        third = texts()
        assert not set(second.values()) & set(third.values())
        sweeps._shared_inputs.cache_clear()


class TestProgramHash:
    def change(self, tmp_path: Path, monkeypatch, name: str, old: str, new: str) -> bool:
        """Tell whether a change of a file of the package changes the hash."""
        package = tmp_path / "tlmc"
        if not package.exists():
            subprocess.run(["cp", "-r", str(provenance.PACKAGE_DIR), str(package)], check=True)
        monkeypatch.setattr(provenance, "PACKAGE_DIR", package)
        before = provenance.program_hash("tlmc.experiments.run")
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new, 1))
        return provenance.program_hash("tlmc.experiments.run") != before

    def test_comments_docstrings_and_unreached_modules_do_not_count(self, tmp_path, monkeypatch):
        assert not self.change(tmp_path, monkeypatch, "data/splits.py", '"""', '"""Anew: ')
        commented = "import annotations  # why"
        assert not self.change(tmp_path, monkeypatch, "data/splits.py", "import annotations", commented)
        assert not self.change(tmp_path, monkeypatch, "plots/errors.py", "import", "import os, sys\nimport")

    @pytest.mark.slow
    def test_code_counts_however_far_away(self, tmp_path, monkeypatch):
        assert self.change(tmp_path, monkeypatch, "units.py", "import annotations", "import annotations\nA = 1")
        assert self.change(tmp_path, monkeypatch, "families/ani/compiled_sweeps.c", "double", "float")
        assert self.change(tmp_path, monkeypatch, "compiled.h", "double", "float")
        assert self.change(tmp_path, monkeypatch, "registry.json", "fingerprint", "finger")
        assert self.change(tmp_path, monkeypatch, "training/__init__.py", "import annotations", "import division")
        # no import names a family, which is found by its folder
        assert self.change(tmp_path, monkeypatch, "families/ani/learner.py", "import annotations", "import division")


def snakemake(folder: Path, *arguments: str) -> tuple[int, str]:
    """Call the project's Snakefile with the descriptions and for the reports of a folder."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["-c1", *arguments, "--config", f"sweeps={folder / 'descriptions'}"]
    environment = os.environ | {"TLMC_REPORTS_DIR": str(folder / "reports"), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return answer.returncode, answer.stdout + answer.stderr


DESCRIPTION = """\
study: tiny
base: {start_model: ani2xt, settings: {epochs: 1}, n_train: 6}
runs:
  - {dataset: naphthalene}
"""
# the start model knows neither silicon nor iodine
BAD = "  - {dataset: 27-like, label: bad}\n"
MORE = "  - {dataset: naphthalene, seed: 1}\n"


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """Let Snakemake carry out a good and a bad run; return the folder, and exit status and text of Snakemake."""
    folder = tmp_path_factory.mktemp("snakemake")
    description = folder / "descriptions" / "tiny.yml"
    description.parent.mkdir()
    description.write_text(DESCRIPTION + BAD)
    sweep = folder / "reports" / "sweeps" / "tiny"
    bad = sweeps.plan(description, sweep)[1]
    # one after the other, the failing one first
    return folder, snakemake(folder, "tiny", "--prioritize", str(sweep / "results" / bad / "metrics.json"))


@pytest.fixture
def sweep(carried_out):
    """Return the folder of a sweep with a finished run, a failed one and one that has not been tried."""
    folder = carried_out[0]
    (folder / "descriptions" / "tiny.yml").write_text(DESCRIPTION + BAD + MORE)
    sweeps.plan(folder / "descriptions" / "tiny.yml", folder / "reports" / "sweeps" / "tiny")
    return folder / "reports" / "sweeps" / "tiny"


@pytest.mark.slow
class TestSnakefile:
    """The whole way, on this machine; tests/cluster goes it under a real Slurm.

    All tests of what it leaves are in this class: one process of a parallel run carries the sweep out for them.
    """

    @pytest.mark.slow
    def test_a_failed_run_is_retried_and_named_while_the_others_go_on(self, carried_out):
        folder, (code, text) = carried_out
        assert code == 1, text
        assert text.index("wildcards: sweep=tiny, run=27_like") < text.index("wildcards: sweep=tiny, run=naphthalene")
        assert text.count("Trying to restart job") == 1, text
        [line] = [line for line in text.splitlines() if line.startswith("failed: ")]
        assert line.startswith("failed: 27_like-ani2xt-bad-6-seed0-")
        assert "27-like holds Si and I, for which ani2xt has no network" in line
        sweep = folder / "reports" / "sweeps" / "tiny"
        assert [path.parent.name.partition("-")[0] for path in sweep.glob("results/*/metrics.json")] == ["naphthalene"]
        assert (sweep / "unfinished.csv").is_file()
        assert not (sweep / "table.csv").exists()

    def test_nothing_is_computed_twice(self, carried_out):
        folder, _ = carried_out
        (folder / "descriptions" / "tiny.yml").write_text(DESCRIPTION)
        sweep = folder / "reports" / "sweeps" / "tiny"
        before = {path: path.stat().st_mtime_ns for path in sweep.glob("results/*/*")}
        code, text = snakemake(folder, "tiny")
        assert code == 0, text
        assert "rule run" not in text
        assert "rule table" in text
        assert {path: path.stat().st_mtime_ns for path in sweep.glob("results/*/*")} == before
        assert pd.read_csv(sweep / "table.csv")["recipe"].tolist() == [
            "start",
            "start, offset refitted",
            "short, epochs 1",
        ]
        assert not (sweep / "unfinished.csv").exists()
        assert "Nothing to be done" in snakemake(folder, "tiny")[1]

    def test_what_a_run_leaves(self, sweep):
        [path] = sweep.glob("results/*/metrics.json")
        content = json.loads(path.read_text())
        assert content["run"] == path.parent.name
        assert content["parameters"]["n_train"] == 6
        assert content["notebook"] == sweeps.NOTEBOOK
        assert content["inputs"] in sweeps.parameters_file(sweep, path.parent.name).read_text().partition("\n")[0]
        force = content["metrics"]["force_rmse_vector_eV_per_A"]
        rows = [row for row in content["records"] if row["split"] == "test" and row["quantity"] == "force_rmse_vector"]
        recorded = {row["recipe"]: row["value"] for row in rows}
        assert recorded == pytest.approx(force)
        assert not (path.parent / "error.txt").exists()
        assert next(path.parent.glob("runs/*/model.safetensors")).stat().st_size > 0

    def test_what_is_collected(self, sweep):
        state = sweeps.collect(sweep)
        assert len(state.finished) == len(state.failed) == len(state.waiting) == 1
        [(name, sentence)] = state.failed.items()
        assert name.startswith("27_like")
        assert "27-like holds Si and I, for which ani2xt has no network" in sentence
        assert state.records["dataset"].unique().tolist() == ["naphthalene"]
        assert np.isfinite(state.records["value"]).all()

    def test_the_command_that_collects_writes_a_table_and_names_the_rest(self, sweep, monkeypatch, tmp_path):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        monkeypatch.setattr(cli, "err", Console(stderr=True, width=500))
        answer = CliRunner().invoke(cli.app, ["sweep", "collect", str(sweep)])
        assert answer.exit_code == 2
        assert "failed: 27_like" in answer.stderr
        assert "not done: naphthalene" in answer.stderr
        table = pd.read_csv(sweep / "unfinished.csv")
        assert table["recipe"].tolist() == ["start", "start, offset refitted", "short, epochs 1"]
        assert set(read_records(study="tiny")["recipe"]) == set(table["recipe"])


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_profiles_name_only_what_the_snakefile_has(profile):
    content = yaml.safe_load((ROOT / "notebooks/sweeps" / profile / "config.yaml").read_text())
    assert content["executor"] == profile
    assert content["keep-going"] is True
    text = (ROOT / "Snakefile").read_text()
    assert all(f"rule {rule}:" in text for rule in content.get("set-resources", {}))


class TestRun:
    def test_an_interrupted_training_is_kept_unless_its_inputs_have_changed(self, description, tmp_path, monkeypatch):
        name = sweeps.plan(description, tmp_path)[0]
        parameters, results = sweeps.parameters_file(tmp_path, name), tmp_path / "results" / name
        state, devices = results / "runs" / "state", []

        def stopped(step, target, metrics):
            if not state.exists():
                write_text(state, str(step.parameters["dataset"]))
            devices.append(step.changes["device"])
            raise StudyError("no more time")

        monkeypatch.setattr(sweeps, "execute_notebook", stopped)
        for _ in range(2):
            with pytest.raises(StudyError):
                sweeps.carry_out(parameters, results)
            assert sweeps.collect(tmp_path).failed == {name: "no more time"}
            kept = state.stat().st_mtime_ns
        # another device is no other run
        with pytest.raises(StudyError):
            sweeps.carry_out(parameters, results, "cuda")
        assert devices == ["cpu", "cpu", "cuda"]
        assert state.stat().st_mtime_ns == kept
        state.write_text("of other code")
        own = state.with_name("notes.txt")
        own.write_text("mine")  # put there while the run was under way
        monkeypatch.setattr(sweeps, "_shared_inputs", lambda: {"program": "other"})
        with pytest.raises(StudyError):
            sweeps.carry_out(parameters, results)
        assert state.read_text() == "naphthalene"
        assert own.read_text() == "mine"

    def test_wrong_parameters_are_refused_before_the_notebook_runs(self, tmp_path):
        (tmp_path / "a.yml").write_text("dataset: naphthalene\nepochs: 3\n")
        with pytest.raises(ConfigError, match=r"a\.yml .*: unknown parameter 'epochs'"):
            sweeps.carry_out(tmp_path / "a.yml", tmp_path / "results")
        with pytest.raises(ConfigError, match=r"b\.yml does not exist"):
            sweeps.carry_out(tmp_path / "b.yml", tmp_path / "results")
        assert not (tmp_path / "results").exists()

    @pytest.fixture
    def planned(self, description, tmp_path, monkeypatch):
        """Return a parameters file and a function that carries it out into a folder, without a kernel."""
        [*names] = sweeps.plan(description, tmp_path / "sweep")
        program = ["code"]
        monkeypatch.setattr(sweeps, "_shared_inputs", lambda: {"program": program[0]})

        def execute(step, target, metrics):
            assert target.is_absolute()
            assert metrics == Path(os.environ["TLMC_REPORTS_DIR"], "metrics", "10.json")
            write_json(metrics, {"notebook": "10_single_run"})
            write_text(target.parent / "runs" / "a" / "state", program[0])
            append_records([], metrics.parent)
            return 1.0

        monkeypatch.setattr(sweeps, "execute_notebook", execute)
        file = sweeps.parameters_file(tmp_path / "sweep", names[0])

        def carry_out(folder, code="code"):
            program[0] = code
            return sweeps.carry_out(file, Path(folder))

        return file, carry_out

    def test_the_result_belongs_to_the_plan(self, planned, tmp_path):
        content = json.loads(planned[1](tmp_path / "results").read_text())
        digest = sweeps.inputs_hash(yaml.safe_load(planned[0].read_text()))
        assert content["inputs"] == digest
        assert (tmp_path / "results" / "inputs.txt").read_text() == f"{digest}\n"

    def test_a_file_of_data_is_found_from_the_folder_of_the_notebook(self, planned, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_text(tmp_path / "mine.extxyz", "")
        write_text(tmp_path / "mine.yml", "dataset: mine.extxyz\n")
        seen = []
        monkeypatch.setattr(sweeps, "execute_notebook", lambda step, *_: seen.append(step.changes["dataset"]) or 1.0)
        with pytest.raises(FileNotFoundError):  # no metrics
            sweeps.carry_out(Path("mine.yml"), Path("results"))
        assert seen == [str(tmp_path / "mine.extxyz")]

    @pytest.mark.parametrize("folder", [".", "sub/..", "sub"])
    def test_a_folder_with_files_of_others_is_refused(self, planned, tmp_path, monkeypatch, folder):
        mine = [tmp_path / "own" / name for name in ("thesis.tex", "sub/data.csv", "metrics.json", "inputs.txt")]
        for path in mine:
            write_text(path, "mine")
        monkeypatch.chdir(tmp_path / "own")
        for code in ("code", "other code"):
            with pytest.raises(ConfigError, match="holds files that are not those of a run of a sweep .*name another"):
                planned[1](folder, code)
        assert [path.read_text() for path in mine] == ["mine"] * 4

    def test_what_a_user_adds_stays_when_the_inputs_change(self, planned, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert planned[1]("results") == tmp_path / "results" / "metrics.json"
        outside = tmp_path / "sweep" / "letter.txt"
        write_text(outside, "mine")
        (tmp_path / "results" / "link").symlink_to(tmp_path / "sweep")
        with (tmp_path / "results" / "written_by_tlmc.txt").open("a") as stream:
            stream.write("../sweep/letter.txt\nlink/letter.txt\n/etc/hostname\n\n..\n.\n")
        mine = [tmp_path / "results" / name for name in ("notes.txt", "runs/a/notes.txt", "figures/mine.png")]
        for path in mine:
            write_text(path, "mine")
        stale = tmp_path / "results" / "tables" / "stale.csv"
        monkeypatch.setenv(WRITTEN_LIST, str(tmp_path / "results" / "written_by_tlmc.txt"))
        write_text(stale, "of the run")
        monkeypatch.delenv(WRITTEN_LIST)
        planned[1]("results")
        assert stale.exists()
        planned[1]("results", "other code")
        assert not stale.parent.exists()
        assert (tmp_path / "results" / "runs" / "a" / "state").read_text() == "other code"
        assert [path.read_text() for path in [*mine, outside]] == ["mine"] * 4
        assert Path("/etc/hostname").exists()
        assert WRITTEN_LIST not in os.environ


class TestNames:
    def test_runs_that_differ_in_the_data_or_borrowing_have_names_of_their_own(self, description):
        base = "{dataset: 27-like, element_map: {Si: C, I: Cl}, settings: {epochs: 1}}"
        description.write_text(
            f"study: a\nbase: {base}\ngrid: {{borrow: [relabel, extend], split: [random, blocks], "
            "crystals_only: [true, false]}\n"
        )
        assert len({run.name for run in sweeps.read_sweep(description)[1]}) == 8

    def test_labels_that_hide_a_difference_are_refused(self, description, tmp_path):
        description.write_text(
            "study: a\nbase: {dataset: 27-like, element_map: {Si: C, I: Cl}, label: mine}\n"
            "grid: {borrow: [relabel, extend]}\n"
        )
        sentence = r"both called 'mine', seed 0, and differ in borrow \('relabel', 'extend'\): give them labels"
        with pytest.raises(ConfigError, match=sentence):
            sweeps.plan(description, tmp_path / "sweep")
        assert not (tmp_path / "sweep").exists()


class TestCollect:
    def test_files_that_are_still_being_written_are_no_runs(self, description, tmp_path):
        names = sweeps.plan(description, tmp_path)
        for name in (".half-x1.yml", "mine.yml"):
            (tmp_path / "parameters" / name).write_text("dataset: a\n")
        assert sorted(sweeps.collect(tmp_path).waiting) == sorted(names)

    def test_a_table_of_somebody_is_left_alone(self, tmp_path):
        table = pd.DataFrame({"study": ["a"], "dataset": ["b"], "start_model": ["c"], "recipe": ["d"]})
        assert sweeps.write_table(table, tmp_path, complete=False).name == "unfinished.csv"
        assert sweeps.write_table(table, tmp_path, complete=True).name == "table.csv"
        assert not (tmp_path / "unfinished.csv").exists()
        for name in ("unfinished.csv", "table.csv"):
            (tmp_path / name).write_text("x,y\n1,2\n")
            with pytest.raises(ConfigError, match=f"{name} is not the table of a sweep"):
                sweeps.write_table(table, tmp_path, complete=True)
            assert (tmp_path / name).read_text() == "x,y\n1,2\n"
            (tmp_path / name).unlink()

    def test_a_run_that_was_killed_is_a_failed_one(self, description, tmp_path):
        name = sweeps.plan(description, tmp_path)[0]
        code = (
            "import os, sys; from pathlib import Path; from tlmc.study import sweep as sweeps\n"
            "sweeps.execute_notebook = lambda *_: os._exit(9)\n"
            "sweeps.carry_out(Path(sys.argv[1]), Path(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, sweeps.parameters_file(tmp_path, name), tmp_path / "results" / name]
        assert subprocess.run(command, check=False).returncode == 9
        assert "did not end: killed" in sweeps.collect(tmp_path).failed[name]

    def test_the_start_model_counts_once_per_split(self, description, tmp_path):
        description.write_text(GOOD.replace("[0, 3]", "[0]"))
        row = {"study": "trial", "dataset": "a", "start_model": "ani2xt", "seed": 0, "split": "test", "n_train": 0}
        row |= {"quantity": "force_rmse_vector", "unit": "eV/A", "value": 1.0}
        for name in sweeps.plan(description, tmp_path):
            rows = [row | {"recipe": recipe, "run_key": name} for recipe in ("start", name)]
            path = tmp_path / "results" / name / "metrics.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"records": rows}))
        records = sweeps.collect(tmp_path).records
        assert records["recipe"].value_counts().tolist() == [1] * 5

    def test_a_folder_without_a_plan(self, tmp_path):
        with pytest.raises(ConfigError, match="make a plan first"):
            sweeps.collect(tmp_path)


def test_the_notebook_is_where_the_checkout_is():
    assert project_root() / "notebooks" / f"{sweeps.NOTEBOOK}.ipynb" == NOTEBOOK
    assert Run.model_fields.keys() - {"recipe"} < notebook_defaults(NOTEBOOK).keys()
