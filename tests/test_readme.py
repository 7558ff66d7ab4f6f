"""The README's numbers and names are those of the files it speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tlmc.evaluation import comparison_table, format_comparison, read_records

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- table: study=(\S+) dataset=(\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def markdown(study: str, dataset: str) -> str:
    """The table of a study as the README should show it."""
    records = read_records(ROOT / "reports" / "metrics", study=study, dataset=dataset)
    table = format_comparison(comparison_table(records))
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"


@pytest.mark.parametrize(("study", "dataset", "shown"), TABLE.findall(README))
def test_tables_are_those_of_the_reference_run(study, dataset, shown):
    assert shown == markdown(study, dataset)


def test_there_is_a_table():
    assert TABLE.search(README)


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
