"""The rules that notebooks keep: short cells, no definitions, one parameters cell, stored outputs, a last act."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from typing import Any

import nbformat
import pytest
import yaml
from nbformat import v4

from helpers.places import ROOT
from tlmc.errors import ConfigError
from tlmc.study import profiles
from tlmc.thesis.casestudy import THESIS_TABLE

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*/*.yml"))

LINES, CELLS = 15, 30
LOOPS_OF = re.compile(r"\b(backward|zero_grad|step)\s*\(")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def problems(notebook: Any, name: str) -> list[str]:
    """Return what a notebook does against the rules, a sentence each."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if len(code) > CELLS:
        found.append(f"{len(code)} code cells, at most {CELLS}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(f"kernelspec is {notebook.metadata.get('kernelspec')}, not python3")
    for key in ("papermill", "widgets"):
        if key in notebook.metadata:
            found.append(f"metadata of {key}: run make strip")
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} parameters cells, not 1")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            before = notebook.cells[number - 1] if number else None
            if before is None or before.cell_type != "markdown":
                found.append(f"cell {number} has no markdown before it")
            found += [f"cell {number} {problem}" for problem in problems_of_cell(cell)]
    if not code or f'write_metrics("{name}"' not in code[-1].source:
        found.append(f'the last code cell does not call write_metrics("{name}", ...)')
    if not any(cell.get("outputs") for cell in code):
        found.append("no stored outputs: run make notebooks")
    counts = [cell.get("execution_count") for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}: run make notebooks")
    return found


def problems_of_cell(cell: Any) -> list[str]:
    found = []
    if len(cell.source.splitlines()) > LINES:
        found.append(f"has {len(cell.source.splitlines())} lines, at most {LINES}")
    if re.search(r";\s*$", cell.source):
        found.append("ends with ';', which is not honoured: write _ = ...")
    for key in ("papermill", "execution"):
        if key in cell.metadata:
            found.append(f"has metadata of {key}: run make strip")
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            found.append(f"has a stored error: {output.ename}")
        if any("widget-state" in kind for kind in output.get("data", {})):
            found.append("has widget state")
    if re.search(r"^\s*[%!]", cell.source, re.MULTILINE):
        return [*found, "has a line for IPython only (% or !)"]
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(f"defines {node.name}")
        if isinstance(node, ast.For | ast.While) and LOOPS_OF.search(ast.unparse(node)):
            found.append("trains in a loop")
    return found


# "0.06967 against 0.06730 eV/Å", "0.2 to 0.4 eV/atom", "0.01 eV per molecule"; not the eV/Å² of a spring constant
RESULT = re.compile(
    r"(?:(?<![\w.$])(\d+(?:\.\d+)?) (?:to|against|and) )?(?<![\w.$])(\d+(?:\.\d+)?) ?"
    r"(?:m?eV/(?:atom|Å|A|molecule)(?![\w²^])|m?eV per (?:atom|molecule)|kJ/mol)"
)
TABLES = {f"{value:.5f}" for row in THESIS_TABLE.values() for pair in row.values() for value in pair}
QUOTED = TABLES | {
    # thesis, tables 4.2 to 4.5; its data (section 4.1: spans, groups, usual and largest forces); its marks of usable
    *("0.27907", "0.07823", "0.06967", "0.06804", "0.07065", "0.90252", "0.26778", "0.00092", "0.00148", "0.00158"),
    *("0.15", "0.05", "2", "17", "0.2", "0.4", "0.01"),
    # 0.01 eV in kJ/mol, and Nyman & Day 2015 on pairs of polymorphs
    *("1", "2"),
}
"""Numbers with a unit of results that prose may quote from elsewhere, as printed there."""


def numbers_in_prose(notebook: Any) -> list[str]:
    """Return the energies and forces that markdown states, up to the questions, which invent numbers to reckon with."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text, questions, _ = cell.source.partition("## Questions")
            found += [number for match in RESULT.findall(text) for number in match if number]
            if questions:
                break
    return found


def reported_numbers() -> set[str]:
    """Return all results of the reference run, with three to five significant digits, in eV and meV."""
    values: list[float] = []
    todo: list[Any] = [json.loads(path.read_text()) for path in (ROOT / "reports" / "metrics").glob("*.json")]
    while todo:
        item = todo.pop()
        if isinstance(item, dict | list):
            todo += item.values() if isinstance(item, dict) else item
        elif isinstance(item, float):
            values.append(item)
    return {f"{factor * value:.{n}g}" for value in values for factor in (1, 1000) for n in (3, 4, 5)}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEveryNotebook:
    def test_keeps_the_rules(self, path):
        assert problems(nbformat.read(path, as_version=4), path.stem) == []

    def test_numbers_in_its_prose_are_quoted_or_reported(self, path):
        stated = set(numbers_in_prose(nbformat.read(path, as_version=4))) - QUOTED
        assert stated <= (reported_numbers() if stated else set())

    def test_is_valid_and_named_by_number(self, path):
        nbformat.validate(nbformat.read(path, as_version=4))
        assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)

    def test_parameters_are_literals_one_a_line_with_the_smoke_profile(self, path):
        defaults = profiles.notebook_defaults(path)
        [cell] = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        lines = [line for line in cell.source.splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(defaults)
        # papermill reads comments after a value, and trips over '=' in them
        assert not [line for line in cell.source.splitlines() if "#" in line and "=" in line.partition("#")[2]]
        assert defaults.get("profile_name") == "smoke"

    def test_begins_with_a_title_and_asks_questions(self, path):
        text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
        assert text.startswith("# ")
        headings = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
        wanted = ["aim", "what you need", "theory", "parameters", "practice", "discussion", "questions"]
        positions = [next((i for i, h in enumerate(headings) if h.startswith(name)), None) for name in wanted]
        assert None not in positions, dict(zip(wanted, positions, strict=True))
        assert positions == sorted(positions)


def test_the_first_notebook_maps_the_others():
    start = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in start.cells if cell.cell_type == "markdown")
    assert [path.stem for path in NOTEBOOKS if f"| `{path.stem}` |" not in text] == []


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_profile_files_name_parameters_of_their_notebook(path):
    defaults = profiles.notebook_defaults(ROOT / "notebooks" / f"{path.stem}.ipynb")
    assert set(yaml.safe_load(path.read_text()) or {}) <= set(defaults)


@pytest.mark.parametrize("name", profiles.available_profiles())
def test_profiles_load_and_pin_their_start_model(name):
    profile = profiles.load_profile(name)
    # a fresh machine reaches ani2xt through the package index alone; the thesis' own model is that of the full profile
    assert profile.start_model == ("ani2x" if name == "full" else "ani2xt")
    assert all(step.parameters.get("profile_name", name) == name for step in profile.steps)


def test_laptop_and_full_run_every_notebook():
    for name in ("laptop", "full"):
        assert [step.notebook for step in profiles.load_profile(name).steps] == NOTEBOOKS


def good_notebook() -> Any:
    """Return a notebook that keeps the rules."""
    cells: list[Any] = []
    for number, source in enumerate(("import os", "a = 1", 'write_metrics("07_x", {})'), start=1):
        cell = v4.new_code_cell(source, execution_count=number)
        cell.outputs = [v4.new_output("stream", text="x")]
        cells += [v4.new_markdown_cell("text"), cell]
    cells[3].metadata["tags"] = ["parameters"]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def with_source(notebook: Any, source: str) -> None:
    notebook.cells[1].source = source


class TestTheRulesThemselves:
    def test_numbers_in_prose_are_found(self):
        notebook = good_notebook()
        notebook.cells[0].source = "From 0.061 to 0.06730 eV/Å, 1.25 meV/atom, a spring of 30 eV/Å², 0.9 of all."
        notebook.cells[2].source = "## Questions\n\nAn error of 0.77 eV/Å?"
        assert numbers_in_prose(notebook) == ["0.061", "0.06730", "1.25"]

    def test_a_good_notebook_passes(self):
        assert problems(good_notebook(), "07_x") == []

    @pytest.mark.parametrize(
        ("source", "problem"),
        [
            ("def f():\n    return 1", "cell 1 defines f"),
            ("class A:\n    pass", "cell 1 defines A"),
            ("if True:\n    def g():\n        pass", "cell 1 defines g"),
            ("\n".join(f"a{i} = {i}" for i in range(16)), "cell 1 has 16 lines, at most 15"),
            ("for _ in range(3):\n    loss.backward()", "cell 1 trains in a loop"),
            ("while True:\n    optimizer.step()", "cell 1 trains in a loop"),
            ("plt.plot(x);", "cell 1 ends with ';', which is not honoured: write _ = ..."),
            ("%matplotlib inline", "cell 1 has a line for IPython only (% or !)"),
        ],
    )
    def test_a_bad_cell_is_found(self, source, problem):
        notebook = good_notebook()
        with_source(notebook, source)
        assert problem in problems(notebook, "07_x")

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda nb: nb.metadata.update(papermill={}), "metadata of papermill: run make strip"),
            (lambda nb: nb.metadata.update(widgets={}), "metadata of widgets: run make strip"),
            (lambda nb: nb.metadata.kernelspec.update(name="tlmc"), "not python3"),
            (lambda nb: nb.cells[1].metadata.update(execution={}), "cell 1 has metadata of execution: run make strip"),
            (lambda nb: nb.cells[3].metadata.pop("tags"), "0 parameters cells, not 1"),
            (lambda nb: nb.cells[1].metadata.update(tags=["parameters"]), "2 parameters cells, not 1"),
            (lambda nb: nb.cells.pop(2), "cell 2 has no markdown before it"),
            (lambda nb: nb.cells.pop(), "the last code cell does not call write_metrics"),
            (lambda nb: nb.cells[1].update(execution_count=None), "execution counts are [None, 2, 3]"),
            (lambda nb: [cell.pop("outputs", None) for cell in nb.cells], "no stored outputs"),
            (lambda nb: nb.cells.extend(nb.cells[:2] * CELLS), "33 code cells, at most 30"),
        ],
    )
    def test_a_bad_notebook_is_found(self, change, problem):
        notebook = good_notebook()
        change(notebook)
        assert any(problem in found for found in problems(notebook, "07_x"))

    def test_a_stored_error_is_found(self):
        notebook = good_notebook()
        notebook.cells[1].outputs = [v4.new_output("error", ename="ValueError", evalue="x", traceback=[])]
        assert "cell 1 has a stored error: ValueError" in problems(notebook, "07_x")


def test_a_profile_of_an_unknown_key_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks" / "profiles" / "bad"
    folder.mkdir(parents=True)
    nbformat.write(good_notebook(), tmp_path / "notebooks" / "07_x.ipynb")
    (folder / "07_x.yml").write_text("b: 1\n")
    monkeypatch.setenv("TLMC_ROOT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bad/07_x\.yml \(07_x\): unknown parameter 'b'; the notebook has a"):
        profiles.load_profile("bad")


@pytest.mark.slow
def test_the_comparison_of_notebooks_writes_to_a_folder_of_its_own(tmp_path):
    """Run nbval as `make test` does, on a notebook that tells where it would write."""
    (tmp_path / "conftest.py").write_text((ROOT / "notebooks" / "conftest.py").read_text())
    cell = v4.new_code_cell(
        "import os\nprint('took 3.2 s'); os.environ['TLMC_REPORTS_DIR'].split('-')[1]",
        execution_count=1,
        metadata={"tags": ["nbval-check-output"]},
    )
    cell.outputs = [
        v4.new_output("stream", text="took 97 s\n"),
        v4.new_output("execute_result", data={"text/plain": "'nbval'"}, execution_count=1),
    ]
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    wrong = v4.new_code_cell("1 + 1", execution_count=1, metadata={"tags": ["nbval-check-output"]})
    wrong.outputs = [v4.new_output("execute_result", data={"text/plain": "3"}, execution_count=1)]
    nbformat.write(v4.new_notebook(cells=[wrong]), tmp_path / "b.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "-q"]
    command += ["--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg")]
    answer = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "1 failed, 1 passed" in answer.stdout, answer.stdout + answer.stderr
