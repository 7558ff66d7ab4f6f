"""Profiles, headless runs, resumption and the report, on small notebooks of their own."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import nbformat
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from nbformat import v4
from PIL import Image

from helpers.places import ROOT
from helpers.processes import heed_interrupts
from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError, StudyError
from tlmc.experiments.records import append_records
from tlmc.provenance import package_versions
from tlmc.study import outcomes, profiles
from tlmc.study import runner as study

# nbformat and the kernel's sockets warn about things outside this package
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FINISH = "from tlmc.study.outcomes import write_metrics\nwrite_metrics({name!r}, {{'answer': {answer}}})"


def write_notebook(folder: Path, name: str, parameters: str, *cells: str, answer: str | None = "1") -> None:
    code = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(v4.new_code_cell, cells)]
    if answer is not None:
        code.append(v4.new_code_cell(FINISH.format(name=name, answer=answer)))
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(v4.new_notebook(cells=code, metadata={"kernelspec": kernelspec}), folder / f"{name}.ipynb")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a checkout with two notebooks and a profile ``quick``, whose reports go to ``<root>/out``."""
    profile = tmp_path / "notebooks" / "profiles" / "quick"
    profile.mkdir(parents=True)
    write_notebook(
        tmp_path / "notebooks",
        "01_first",
        'profile_name = "smoke"\nlr = 0.1\nsteps = 3\nfast = True',
        "import logging, os, sys\nprint('kernel', sys.executable, profile_name, lr, steps, fast)\n"
        "logging.getLogger('tlmc.training.fine_tuning').info('epoch 1/2')",
        answer="lr * steps",
    )
    write_notebook(tmp_path / "notebooks", "02_second", "seed = 0", answer="seed")
    (profile / "01_first.yml").write_text("lr: 1e-3\nsteps: 2\n")
    (profile / "02_second.yml").write_text("")
    monkeypatch.setenv("TLMC_ROOT", str(tmp_path))
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path / "out"))
    return tmp_path


def metrics(root: Path, number: str) -> dict[str, float]:
    return json.loads((root / "out" / "metrics" / f"{number}.json").read_text())["metrics"]


def executed_text(root: Path, name: str, profile: str = "quick") -> str:
    notebook = nbformat.read(root / "out" / "executed" / profile / f"{name}.ipynb", as_version=4)
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


class TestProfile:
    def test_smoke_is_every_notebook_with_its_defaults(self, root):
        profile = profiles.load_profile("smoke")
        assert [step.name for step in profile.steps] == ["01_first", "02_second"]
        assert profile.steps[0].changes == {}
        assert profile.steps[0].parameters == {"profile_name": "smoke", "lr": 0.1, "steps": 3, "fast": True}
        assert profiles.available_profiles() == ("smoke", "quick")

    def test_yaml_values_take_the_types_of_the_defaults(self, root):
        # YAML 1.1 reads 1e-3 as text
        changes = profiles.load_profile("quick").steps[0].changes
        assert changes == {"profile_name": "quick", "lr": 0.001, "steps": 2}
        assert isinstance(changes["lr"], float)

    def test_overrides_reach_the_notebooks_that_have_them(self, root):
        first, second = profiles.load_profile("quick", parameters={"seed": "7"}).steps
        assert second.parameters == {"seed": 7}
        assert "seed" not in first.parameters

    @pytest.mark.parametrize("wanted", ["02", "02_second", "02_second.ipynb"])
    def test_notebooks_are_chosen_by_name_or_number(self, root, wanted):
        assert [step.name for step in profiles.load_profile("quick", [wanted]).steps] == ["02_second"]

    @pytest.mark.parametrize(
        ("yml", "sentence"),
        [
            ("epoch: 3", "unknown parameter 'epoch'; the notebook has profile_name, lr, steps, fast"),
            ("lr: fast", "lr must be of type float, got 'fast'"),
            ("steps: 2.5", "steps must be of type int, got 2.5"),
            ("steps: true", "steps must be of type int, got True"),
            ("profile_name: 3", "profile_name must be of type str, got 3"),
            ("fast: 7", "fast must be of type bool, got 7"),
            ("- lr", "must hold 'name: value' lines"),
            ("lr: [", "is not YAML"),
        ],
    )
    def test_wrong_parameters_are_refused_before_anything_runs(self, root, yml, sentence):
        path = root / "notebooks" / "profiles" / "quick" / "01_first.yml"
        path.write_text(yml)
        if yml.startswith("profile_name"):
            # the profile's name is set by the profile itself: give the wrong value from outside
            path.write_text("")
            with pytest.raises(ConfigError, match=re.escape(sentence)):
                study.run_study("quick", parameters={"profile_name": 3})
        else:
            with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
                study.run_study("quick")
            assert str(path) in str(caught.value)
        assert not (root / "out").exists()

    def test_an_unknown_override_lists_what_there_is(self, root):
        with pytest.raises(ConfigError, match="no notebook of this run has a parameter epochs; they have fast, lr"):
            profiles.load_profile("quick", parameters={"epochs": 3})

    def test_unknown_profile_and_notebook_list_what_there_is(self, root):
        with pytest.raises(ConfigError, match="no profile 'fast': there are smoke, quick"):
            profiles.load_profile("fast")
        with pytest.raises(ConfigError, match="'quick' has no notebook 03; it has 01_first, 02_second"):
            profiles.load_profile("quick", ["03"])

    def test_a_profile_names_one_start_model(self, root):
        write_notebook(root / "notebooks", "01_first", 'start_model = "ani2x"')
        write_notebook(root / "notebooks", "02_second", 'start_model = "ani2xt"')
        with pytest.raises(ConfigError, match=r"one start model.*01_first: ani2x, 02_second: ani2xt"):
            profiles.load_profile("smoke")
        assert profiles.load_profile("smoke", ["02"]).start_model == "ani2xt"

    @pytest.mark.parametrize(
        ("cell", "sentence"),
        [
            ("a = 1 + b", "may hold only literals, got 'a = 1 + b'"),
            ("a, b = 1, 2", "may hold only 'name = literal'"),
            ("import os", "may hold only 'name = literal', got 'import os'"),
            ("a = [1, 2]", "a parameter is a str, int, float or bool"),
        ],
    )
    def test_a_parameters_cell_holds_literals_only(self, root, cell, sentence):
        write_notebook(root / "notebooks", "01_first", cell)
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            profiles.notebook_defaults(root / "notebooks" / "01_first.ipynb")

    def test_a_notebook_needs_a_parameters_cell(self, root):
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("a = 1")]), root / "notebooks" / "01_first.ipynb")
        with pytest.raises(ConfigError, match="expected one cell tagged 'parameters', found 0"):
            profiles.load_profile("smoke")

    def test_a_profile_of_a_missing_notebook_names_the_file(self, root):
        (root / "notebooks" / "02_second.ipynb").unlink()
        with pytest.raises(ConfigError, match=r"02_second\.ipynb does not exist"):
            profiles.load_profile("quick")


class TestRun:
    @pytest.mark.slow
    def test_run_report_and_resumption(self, root, monkeypatch, tmp_path_factory):
        # a kernelspec and a start-up file of the user's, which must not be used
        user = tmp_path_factory.mktemp("user")
        kernel = user / "kernels" / "python3"
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": ["/nonexistent/python", "-m", "ipykernel"], "display_name": "x", "language": "python"})
        )
        startup = user / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "00.py").write_text("print('from the start-up file')")
        monkeypatch.setenv("JUPYTER_PATH", str(user))
        monkeypatch.setenv("IPYTHONDIR", str(user / "ipython"))

        index = study.run_study("quick")
        assert index == root / "out" / "index.html"
        assert metrics(root, "01") == {"answer": 0.002}
        text = executed_text(root, "01_first")
        assert f"kernel {sys.executable} quick 0.001 2 True" in text
        assert "start-up" not in text
        assert "epoch 1/2\n" in text
        assert os.environ["JUPYTER_PATH"] == str(user)
        page = index.read_text()
        assert "<h1>Start model: none</h1>" in page
        assert "executed/quick/html/01_first.html" in page
        assert (root / "out" / "executed" / "quick" / "html" / "01_first.html").is_file()

        # nothing has changed: nothing runs
        times = {path: path.stat().st_mtime_ns for path in (root / "out" / "metrics").glob("[0-9]*.json")}
        study.run_study("quick")
        assert {path: path.stat().st_mtime_ns for path in times} == times
        # another parameter in the second notebook: the first is not run again
        study.run_study("quick", parameters={"seed": 5})
        assert metrics(root, "02") == {"answer": 5}
        assert (root / "out" / "metrics" / "01.json").stat().st_mtime_ns == times[root / "out" / "metrics" / "01.json"]
        # another parameter in the first: what comes after it is run again
        second = (root / "out" / "metrics" / "02.json").stat().st_mtime_ns
        study.run_study("quick", parameters={"seed": 5, "steps": 4})
        assert metrics(root, "01") == {"answer": 0.004}
        assert (root / "out" / "metrics" / "02.json").stat().st_mtime_ns > second

    def test_only_the_source_counts_not_the_stored_outputs(self, root):
        study.run_study("quick", ["02"])
        written = (root / "out" / "metrics" / "02.json").stat().st_mtime_ns
        path = root / "notebooks" / "02_second.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].outputs = [v4.new_output("stream", text="stored")]
        nbformat.write(notebook, path)
        study.run_study("quick", ["02"])
        assert (root / "out" / "metrics" / "02.json").stat().st_mtime_ns == written
        notebook.cells[0].source = "seed = 0\nmore = 1"
        nbformat.write(notebook, path)
        study.run_study("quick", ["02"])
        rerun = (root / "out" / "metrics" / "02.json").stat().st_mtime_ns
        assert rerun > written
        study.run_study("quick", ["02"], force=True)
        assert (root / "out" / "metrics" / "02.json").stat().st_mtime_ns > rerun

    @pytest.mark.slow
    def test_a_failing_cell_is_named_and_the_next_run_goes_on_from_there(self, root):
        write_notebook(root / "notebooks", "02_second", "seed = 0", "x = 1\nseed / (x - 1)", answer="seed")
        with pytest.raises(StudyError) as caught:
            study.run_study("quick")
        sentence = str(caught.value)
        assert re.match(r"02_second failed in cell \d+ \(x = 1\): ZeroDivisionError: division by zero; ", sentence)
        assert sentence.endswith(str(root / "out" / "executed" / "quick" / "02_second.ipynb"))
        assert not (root / "out" / "metrics" / "02.json").exists()
        first = (root / "out" / "metrics" / "01.json").stat().st_mtime_ns
        write_notebook(root / "notebooks", "02_second", "seed = 0", answer="seed")
        study.run_study("quick")
        assert (root / "out" / "metrics" / "01.json").stat().st_mtime_ns == first

    def test_a_notebook_without_metrics_is_not_complete(self, root):
        target = root / "out" / "metrics" / "02.json"
        target.parent.mkdir(parents=True)
        # left by an earlier run: that the file is there proves nothing
        target.write_text("{}")
        write_notebook(root / "notebooks", "02_second", "seed = 0", answer=None)
        with pytest.raises(StudyError, match=r"02_second ended without writing .*02\.json"):
            study.run_study("quick", ["02"])
        assert outcomes.read_record(root / "out", "quick", "02_second") is None

    def test_a_dead_kernel_is_said_to_be_one(self, root):
        write_notebook(root / "notebooks", "02_second", "seed = 0", "import os\nos.kill(os.getpid(), 9)")
        with pytest.raises(StudyError, match="02_second: the kernel died"):
            study.run_study("quick", ["02"])

    def test_metrics_replaced_by_another_profile_are_not_taken_for_this_ones(self, root):
        study.run_study("quick", ["01"])
        study.run_study("smoke", ["01"])
        assert metrics(root, "01") == {"answer": pytest.approx(0.3)}
        assert outcomes.read_record(root / "out", "quick", "01_first") is None
        study.run_study("quick", ["01"])
        assert metrics(root, "01") == {"answer": 0.002}

    @pytest.mark.slow
    def test_an_interrupted_run_leaves_no_kernel_and_no_record(self, root, tmp_path):
        write_notebook(
            root / "notebooks",
            "02_second",
            "seed = 0",
            f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
            "time.sleep(600)",
        )
        code = "from tlmc.study import runner; runner.run_study('quick')"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in errors
        assert outcomes.read_record(root / "out", "quick", "01_first") is not None
        assert outcomes.read_record(root / "out", "quick", "02_second") is None
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


class TestFolders:
    def test_a_front_page_or_metrics_of_somebody_are_not_replaced(self, root, tmp_path):
        for name in ("index.html", "metrics/01.json", "metrics/02.json"):
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"my": "page"}')
            with pytest.raises(ConfigError, match=f"{name} is not of a study, and this one would replace it"):
                study.run_study("quick", output=tmp_path / "mine")
            assert path.read_text() == '{"my": "page"}'
            path.unlink()
        (tmp_path / "mine" / "letter.txt").write_text("mine")
        with pytest.raises(ConfigError, match="mine holds files, but none of a study"):
            study.run_study("quick", output=tmp_path / "mine")
        with pytest.raises(ConfigError, match=r"letter\.txt is a file, not a folder"):
            study.run_study("quick", output=tmp_path / "mine" / "letter.txt")
        assert [path.name for path in (tmp_path / "mine").rglob("*") if path.is_file()] == ["letter.txt"]

    def test_its_own_reports_are_taken_again(self, root, tmp_path):
        first = study.run_study("quick", ["01"], output=tmp_path / "mine")
        (tmp_path / "mine" / "letter.txt").write_text("mine")
        assert study.run_study("quick", output=tmp_path / "mine") == first
        assert (tmp_path / "mine" / "letter.txt").read_text() == "mine"

    def test_the_environment_is_as_it_was_and_kernels_see_absolute_folders(self, root, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TLMC_CACHE_DIR", "my-cache")
        monkeypatch.delenv("TLMC_DATA_DIR", raising=False)
        monkeypatch.delenv("TLMC_REPORTS_DIR")
        before = dict(os.environ)
        with study.kernel_environment(Path("out")):
            assert os.environ["TLMC_CACHE_DIR"] == str(tmp_path / "my-cache")
            assert os.environ["TLMC_REPORTS_DIR"] == str(tmp_path / "out")
            assert "TLMC_DATA_DIR" not in os.environ
            del os.environ["MPLBACKEND"]
        assert dict(os.environ) == before
        with pytest.raises(RuntimeError), study.kernel_environment(Path("out")):
            raise RuntimeError
        assert dict(os.environ) == before

    def test_profiles_and_notebooks_that_are_still_being_written_are_none(self, root):
        (root / "notebooks" / "profiles" / "quick" / ".02_second-x1.yml").write_text("")
        (root / "notebooks" / "profiles" / ".half").mkdir()
        (root / "notebooks" / "profiles" / ".half" / "01_first.yml").write_text("")
        assert [step.name for step in profiles.load_profile("quick").steps] == ["01_first", "02_second"]
        assert profiles.available_profiles() == ("smoke", "quick")


class TestReport:
    def test_front_page_shows_table_figures_and_sources(self, root):
        row = {"study": "quick", "dataset": "urea", "start_model": "ani2xt", "recipe": "short", "seed": 0}
        row |= {"split": "test", "quantity": "force_rmse_vector", "unit": "eV/A", "value": 0.0531, "n_train": 80}
        append_records([row | {"run_key": "r"}], root / "out" / "metrics")
        figures = root / "out" / "figures"
        figures.mkdir()
        # of this run, of an earlier one, of none
        for name, colour, age in (("01_new", "red", -60), ("01_old", "blue", 3600), ("other", "blue", -60)):
            Image.new("RGB", (2600, 100), colour).save(figures / f"{name}.png")
            os.utime(figures / f"{name}.png", (time.time() - age,) * 2)
        page = study.run_study("quick").read_text()
        (data,) = re.findall('src="data:image/webp;base64,([^"]*)"', page)
        embedded = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert embedded.size == (1300, 50)  # for a screen; the file is for print
        assert embedded.getpixel((650, 25))[0] > 200
        assert "<td>short</td>" in page
        assert "0.0531" in page
        assert "answer</th><td>0.002</td>" in page
        for name, version in package_versions().items():
            assert f"{name} {version}" in page
        recorded = json.loads((root / "out" / "metrics" / "01.json").read_text())
        assert recorded["git_revision"] in page
        summary = json.loads((root / "out" / "metrics" / "study_quick.json").read_text())
        assert [notebook["name"] for notebook in summary["notebooks"]] == ["01_first", "02_second"]
        assert summary["seconds"] == pytest.approx(sum(n["seconds"] for n in summary["notebooks"]), abs=0.06)
        for notebook in summary["notebooks"]:
            assert f'<td class="number">{notebook["seconds"]:.0f}</td>' in page

    def test_what_has_not_run_is_said(self, root):
        page = study.run_study("quick", ["02"]).read_text()
        assert "not run yet: 01_first." in page
        assert "no run has recorded a result there yet" in page

    def test_text_from_a_notebook_is_escaped(self, root):
        write_notebook(root / "notebooks", "02_second", "seed = 0", answer="'<script>'")
        page = study.run_study("quick", ["02"]).read_text()
        assert "&lt;script&gt;" in page
        assert "<script>" not in page


class TestOwnData:
    """``tlmc study --data FOLDER``, on notebooks that say what they were given."""

    @pytest.fixture
    def checkout(self, root):
        parameters = 'start_model = "ani2xt"\ndataset = "naphthalene"\nelement_map = ""\n{}'
        write_notebook(
            root / "notebooks", "05_data", parameters.format('others = "27-like"'), answer="[dataset, others]"
        )
        # the thesis' layout: a crystal with silicon and iodine, and its number 32
        write_notebook(
            root / "notebooks",
            "09_all",
            parameters.format('crystals = "27-like"\nborrow_dataset = ""\nleft_out = "27-like"'),
            answer="[dataset, crystals, element_map, borrow_dataset, left_out]",
        )
        for name in ("05_data", "09_all"):
            (root / "notebooks" / "profiles" / "quick" / f"{name}.yml").write_text("")
        return root

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "crystals of mine"
        folder.mkdir()
        for name, number in (("27-like", 32), ("33-like", 33)):
            # TLMC_ROOT is elsewhere, so an embedded set is no name here
            path = ROOT / "data" / f"{name}.extxyz.xz"
            dataset = load_dataset(path).crystals().subset(range(0, 130, 13))
            frames = []
            for k, frame in enumerate(dataset.frames):
                frames.append(frame.copy())
                frames[-1].calc = SinglePointCalculator(frame, energy=dataset.energies[k], forces=dataset.forces[k])
            ase.io.write(folder / f"{number}.traj", frames)
        return folder

    def test_notebooks_about_data_are_given_the_folder(self, checkout, folder):
        page = study.run_study("quick", data=folder)
        reports = checkout / "out" / "own" / "crystals of mine"
        assert page == reports / "index.html"
        first, second = str(folder / "32.traj"), str(folder / "33.traj")
        assert json.loads((reports / "metrics" / "05.json").read_text())["metrics"]["answer"] == [first, second]
        answer = json.loads((reports / "metrics" / "09.json").read_text())["metrics"]["answer"]
        assert answer == [first, str(folder), "Si=C, I=Cl", first, "32"]
        # 01 and 02 are about other things
        assert not (reports / "metrics" / "01.json").exists()
        summary = json.loads((reports / "metrics" / "study_quick.json").read_text())
        assert [facts["name"] for facts in summary["datasets"]] == ["32", "33"]
        assert all(facts["hash"] in page.read_text() for facts in summary["datasets"])

    def test_a_single_crystal_of_known_elements(self, checkout, folder):
        (folder / "32.traj").unlink()
        study.run_study("quick", data=folder)
        reports = checkout / "out" / "own" / "crystals of mine"
        [first, others] = json.loads((reports / "metrics" / "05.json").read_text())["metrics"]["answer"]
        assert (first, others) == (str(folder / "33.traj"), "")
        assert json.loads((reports / "metrics" / "09.json").read_text())["metrics"]["answer"][2:] == ["", "", "33"]

    def test_changed_data_are_studied_again(self, checkout, folder):
        study.run_study("quick", ["09"], data=folder)
        reports = checkout / "out" / "own" / "crystals of mine"
        first = outcomes.read_record(reports, "quick", "09_all")
        study.run_study("quick", ["09"], data=folder)
        assert outcomes.read_record(reports, "quick", "09_all") == first
        frames = ase.io.read(folder / "33.traj", ":-1")
        ase.io.write(folder / "33.traj", frames)
        study.run_study("quick", ["09"], data=folder)
        assert outcomes.read_record(reports, "quick", "09_all").inputs != first.inputs

    def test_a_bad_file_is_said_in_one_sentence_before_anything_runs(self, checkout, folder):
        (folder / "28.traj").write_bytes(b"- of Ulm")
        with pytest.raises(DataError, match=r"28\.traj: ASE cannot read it"):
            study.run_study("quick", data=folder)
        assert not list((checkout / "out").rglob("*.ipynb"))


class TestWriteMetrics:
    def test_content(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        path = outcomes.write_metrics("07_fine_tuning", {"force_rmse_vector_eV_per_A": 0.05})
        assert path == tmp_path / "metrics" / "07.json"
        content = json.loads(path.read_text())
        assert content["notebook"] == "07_fine_tuning"
        assert content["metrics"] == {"force_rmse_vector_eV_per_A": 0.05}
        assert content["versions"] == package_versions()

    def test_names_and_values_are_checked(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        with pytest.raises(ConfigError, match="named like '07_fine_tuning', got 'fine_tuning'"):
            outcomes.write_metrics("fine_tuning", {})
        with pytest.raises(ConfigError, match="07_fine_tuning: a metric is not a finite number"):
            outcomes.write_metrics("07_fine_tuning", {"x": float("nan")})
        assert not (tmp_path / "metrics").exists() or not list((tmp_path / "metrics").iterdir())
