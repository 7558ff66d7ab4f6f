"""The README's numbers and names are those of the files it speaks of."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from helpers.places import ROOT
from tlmc.experiments.records import comparison_table, format_comparison, read_records

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- table: study=(\S+) dataset=(\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def markdown(study: str, dataset: str) -> str:
    """The table of a study as the README should show it."""
    records = read_records(ROOT / "reports" / "metrics", study=study, dataset=dataset)
    table = format_comparison(comparison_table(records))
    return as_markdown(list(table.columns), table.to_numpy().tolist())


def as_markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table as it stands between two comments."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


@pytest.mark.parametrize(("study", "dataset", "shown"), TABLE.findall(README))
def test_tables_are_those_of_the_reference_run(study, dataset, shown):
    assert shown == markdown(study, dataset)


PUBLIC = re.compile(r"<!-- public crystals: ([^>]+) -->\n(.*?)<!-- end of table -->", re.DOTALL)
REPORTS_README = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")


def public_crystals(recipes: list[str]) -> str:
    """Test errors on the public crystals, force vector and energy, means over three seeds and their geometric means."""
    records = read_records(ROOT / "reports" / "metrics", study="public-dft", split="test")
    records = records[records["recipe"].isin(recipes)]
    # the start model's offset was fitted on a quarter of the training frames, too
    records = records[records["n_train"] == records.groupby(["dataset", "recipe"])["n_train"].transform("max")]
    parts = []
    for quantity, factor, digits in (("force_rmse_vector", 1.0, 4), ("energy_rmse_per_atom", 1000.0, 2)):
        errors = records[records["quantity"] == quantity].groupby(["dataset", "recipe"])["value"]
        assert (errors.size() == 3).all()
        means = factor * errors.mean().unstack()[recipes]
        assert means.shape == (8, len(recipes))
        means.loc["geometric mean"] = np.exp(np.log(means).mean())
        parts.append(means.map(f"{{:.{digits}f}}".format))
    both = parts[0] + ", " + parts[1]
    rows = [[str(name).rpartition("/")[2], *row] for name, row in zip(both.index, both.to_numpy(), strict=True)]
    return as_markdown(["crystal", *recipes], rows)


@pytest.mark.parametrize(("recipes", "shown"), PUBLIC.findall(REPORTS_README))
def test_errors_on_public_crystals_are_those_of_the_record(recipes, shown):
    assert shown == public_crystals(recipes.split("; "))


def test_there_are_tables():
    assert TABLE.search(README)
    assert len(PUBLIC.findall(REPORTS_README)) == 2


def test_every_notebook_has_a_row_and_every_row_a_notebook():
    listed = re.findall(r"^\| `(\d\d_\w+)` \|", README, re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_files_it_points_at_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_commands_it_shows_exist():
    help_text = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", README)):
        assert re.search(rf"^{target}:", help_text, re.MULTILINE), target


LAPTOP = ROOT / "reports" / "metrics" / "study_laptop.json"


def spoken(seconds: float) -> str:
    """A run time as the README says it: to five seconds below a minute, else to whole minutes."""
    return f"{max(5, 5 * round(seconds / 5))} s" if seconds < 57.5 else f"{round(seconds / 60)} min"


@pytest.mark.skipif(not LAPTOP.is_file(), reason="no run of profile laptop is committed that says its times")
def test_run_times_are_those_of_the_reference_run():
    run = json.loads(LAPTOP.read_text())
    rows = dict(re.findall(r"^\| `(\d\d_\w+)` \|.*\| ([^|]+) \|$", README, re.MULTILINE))
    times = {notebook["name"]: spoken(notebook["seconds"]) for notebook in run["notebooks"]}
    assert {name: rows.get(name) for name in times} == times
    [total] = re.findall(r"leaves reports/index.html, in (\d+) minutes on 2 cores", README)
    assert f"{total} min" == spoken(run["seconds"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "5 s"), (16, "15 s"), (18, "20 s"), (56, "55 s"), (59, "1 min"), (202, "3 min")]
)
def test_times_are_rounded(seconds, text):
    assert spoken(seconds) == text
