from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.places import ROOT
from helpers.training import labelled
from tlmc.data.loading import load_dataset
from tlmc.data.splits import shrunk, split_dataset
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import Metric
from tlmc.experiments import records
from tlmc.experiments.records import (
    COLUMNS,
    append_records,
    check_comparable,
    comparison_table,
    format_comparison,
    identity,
    read_records,
    rows_from_metrics,
    told_apart,
)


def row(**changes):
    return {
        "study": "laptop",
        "dataset": "naphthalene",
        "start_model": "ani2xt",
        "recipe": "short",
        "seed": 0,
        "split": "test",
        "quantity": "force_rmse_vector",
        "unit": "eV/A",
        "value": 0.05,
        "n_train": 84,
        "run_key": "a1",
        "data_hash": "d1",
        "split_hash": "s1",
        "split_method": "random",
        "part_hash": "p1",
        "start_hash": "m1",
    } | changes


def earlier(**changes):
    """A row as versions wrote it that did not know what it was of."""
    return {name: value for name, value in row(**changes).items() if name not in records.IDENTITY}


class TestAppend:
    def test_round_trip(self, tmp_path):
        rows = [row(value=0.1 + 0.2), row(quantity="energy_rmse_per_atom", unit="eV/atom", value=1e-3 / 3)]
        path = append_records(rows, tmp_path)
        assert path == tmp_path / "summary.parquet"
        read = read_records(tmp_path)
        assert list(read.columns) == list(COLUMNS)
        assert read["value"].tolist() == [1e-3 / 3, 0.1 + 0.2]
        assert json.loads((tmp_path / "summary.json").read_text()) == read.to_dict("records")

    def test_default_folder_is_that_of_the_reports(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
        assert append_records([row()]) == tmp_path / "metrics" / "summary.parquet"
        assert len(read_records()) == 1

    def test_same_key_replaces(self, tmp_path):
        append_records([row(), row(seed=1)], tmp_path)
        append_records([row(value=0.04)], tmp_path)
        read = read_records(tmp_path)
        assert dict(zip(read["seed"], read["value"], strict=True)) == {0: 0.04, 1: 0.05}

    @pytest.mark.parametrize(
        "change", [{name: 7 if name in ("seed", "n_train") else "other"} for name in (*records.CELL, "quantity")]
    )
    def test_evaluations_and_quantities_stand_side_by_side(self, tmp_path, change):
        append_records([row(), row(**change)], tmp_path)
        assert len(read_records(tmp_path)) == 2

    def test_a_later_run_takes_the_place_of_the_whole_evaluation(self, tmp_path):
        append_records([row(), row(quantity="force_rmse_vector_O"), row(seed=1)], tmp_path)
        append_records([row(run_key="later", value=0.04)], tmp_path)
        read = read_records(tmp_path)
        assert read["run_key"].tolist() == ["later", row()["run_key"]]
        assert read["value"].tolist() == [0.04, 0.05]

    def test_what_says_nothing_of_its_frames_is_kept_until_something_does(self, tmp_path):
        append_records([earlier(), earlier(seed=1)], tmp_path)
        assert set(read_records(tmp_path)["data_hash"]) == {records.UNKNOWN}
        append_records([row(run_key="later", value=0.04)], tmp_path)
        read = read_records(tmp_path).set_index("seed")
        assert read["data_hash"].to_dict() == {0: "d1", 1: records.UNKNOWN}
        assert read.loc[0, "value"] == 0.04

    def test_a_record_of_an_earlier_version_is_read(self, tmp_path):
        schema = pa.schema([field for field in records.SCHEMA if field.name not in records.IDENTITY])
        pq.write_table(pa.Table.from_pylist([earlier()], schema=schema), tmp_path / "summary.parquet")
        assert read_records(tmp_path).to_dict("records") == [row() | dict.fromkeys(records.IDENTITY, "unknown")]
        append_records([row(seed=1)], tmp_path)
        assert read_records(tmp_path)["part_hash"].tolist() == ["unknown", "p1"]

    def test_order_of_appending_leaves_the_same_files(self, tmp_path):
        rows = [row(seed=seed, recipe=recipe) for seed in (2, 10, 0) for recipe in ("thesis", "short")]
        for item in rows:
            append_records([item], tmp_path / "one")
        append_records(reversed(rows), tmp_path / "two")
        for name in ("summary.parquet", "summary.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert read_records(tmp_path / "one")["seed"].tolist() == [0, 2, 10, 0, 2, 10]

    def test_json_has_a_line_per_row(self, tmp_path):
        append_records([row(seed=seed) for seed in range(3)], tmp_path)
        before = (tmp_path / "summary.json").read_text().splitlines()
        append_records([row(seed=1, value=0.06)], tmp_path)
        after = (tmp_path / "summary.json").read_text().splitlines()
        assert [a != b for a, b in zip(before, after, strict=True)] == [False, False, True, False, False]

    def test_types_in_the_file(self, tmp_path):
        append_records([row(seed=np.int32(3), value=np.float32(0.5), n_train=np.int64(2))], tmp_path)
        table = pq.read_table(tmp_path / "summary.parquet")
        assert table.schema.equals(records.SCHEMA)
        assert all(column.null_count == 0 for column in table.columns)

    def test_a_table_is_taken_too(self, tmp_path):
        append_records([row(), row(seed=1)], tmp_path / "a")
        append_records(read_records(tmp_path / "a"), tmp_path / "b")
        pd.testing.assert_frame_equal(read_records(tmp_path / "a"), read_records(tmp_path / "b"))

    @pytest.mark.slow
    def test_processes_that_append_at_once_lose_nothing(self, tmp_path):
        script = (
            "import sys; from tlmc.experiments.records import append_records\n"
            "row, folder, first = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
            "for seed in range(first, first + 15): append_records([row | {'seed': seed}], folder)\n"
        )
        workers = [
            subprocess.Popen([sys.executable, "-c", script, repr(row()), str(tmp_path), str(100 * i)]) for i in range(3)
        ]
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
        expected = [100 * i + k for i in range(3) for k in range(15)]
        assert read_records(tmp_path)["seed"].tolist() == expected
        assert len(json.loads((tmp_path / "summary.json").read_text())) == len(expected)
        assert {path.name for path in tmp_path.iterdir()} - {".summary.lock"} == {"summary.parquet", "summary.json"}

    def test_a_text_without_its_table_is_not_replaced(self, tmp_path):
        (tmp_path / "summary.json").write_text("mine")
        with pytest.raises(DataError, match=r"summary\.json is there without summary\.parquet, and would be replaced"):
            append_records([row()], tmp_path)
        assert (tmp_path / "summary.json").read_text() == "mine"

    def test_a_lock_that_is_never_freed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "_LOCK_SECONDS", 0.05)
        holder = records.FileLock(tmp_path / ".summary.lock")
        with holder, pytest.raises(DataError, match=r"\.summary\.lock is held by another process"):
            append_records([row()], tmp_path)
        assert not (tmp_path / "summary.parquet").exists()


class TestBadRows:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": math.nan}, "value must be a finite number, got nan"),
            ({"value": math.inf}, "value must be a finite number, got inf"),
            ({"value": "0.05"}, "value must be a finite number, got '0.05'"),
            ({"value": None}, "value must be a finite number, got None"),
            ({"value": True}, "value must be a finite number, got True"),
            ({"seed": -1}, "seed must be an integer >= 0, got -1"),
            ({"seed": 1.0}, "seed must be an integer >= 0, got 1.0"),
            ({"n_train": True}, "n_train must be an integer >= 0, got True"),
            ({"recipe": ""}, "recipe must be text that is not empty, got ''"),
            ({"dataset": None}, "dataset must be text that is not empty, got None"),
        ],
    )
    def test_values(self, tmp_path, change, message):
        append_records([row()], tmp_path)
        before = (tmp_path / "summary.parquet").read_bytes()
        with pytest.raises(DataError, match=f"record of 'force_rmse_vector': {message}"):
            append_records([row(seed=5), row(**change)], tmp_path)
        assert (tmp_path / "summary.parquet").read_bytes() == before

    def test_columns(self, tmp_path):
        short = row()
        del short["unit"]
        with pytest.raises(ConfigError, match="lacks unit: columns are study"):
            append_records([short], tmp_path)
        with pytest.raises(ConfigError, match="lacks unit and has unknown units"):
            append_records([short | {"units": "eV"}], tmp_path)
        assert not list(tmp_path.iterdir())


class TestRead:
    def test_filters(self, tmp_path):
        append_records([row(seed=seed, recipe=recipe) for seed in range(3) for recipe in ("thesis", "short")], tmp_path)
        assert len(read_records(tmp_path, recipe="short")) == 3
        assert read_records(tmp_path, recipe="short", seed=[0, 2])["seed"].tolist() == [0, 2]
        assert read_records(tmp_path, dataset="urea").empty

    def test_unknown_column(self, tmp_path):
        append_records([row()], tmp_path)
        with pytest.raises(ConfigError, match="no column crystal in the record"):
            read_records(tmp_path, crystal="urea")

    def test_no_record_yet(self, tmp_path):
        with pytest.raises(DataError, match=r"summary\.parquet does not exist"):
            read_records(tmp_path)

    def test_unreadable(self, tmp_path):
        (tmp_path / "summary.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError, match=r"summary\.parquet cannot be read as Parquet"):
            read_records(tmp_path)
        with pytest.raises(DataError, match="cannot be read"):
            append_records([row()], tmp_path)
        assert (tmp_path / "summary.parquet").read_bytes() == b"PAR1 no"

    def test_another_table(self, tmp_path):
        pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "summary.parquet")
        with pytest.raises(DataError, match="is not a record of results: its columns are x"):
            read_records(tmp_path)


def test_rows_from_metrics(tmp_path):
    metrics = {"energy_rmse_per_atom": Metric(0.002, "eV/atom"), "energy_correlation": Metric(0.99, "1")}
    rows = rows_from_metrics(
        metrics,
        study="laptop",
        dataset="urea",
        start_model="ani2x",
        recipe="start",
        seed=0,
        split="test",
        n_train=0,
        run_key="r",
    )
    append_records(rows, tmp_path)
    read = read_records(tmp_path).set_index("quantity")
    assert read.loc["energy_rmse_per_atom", ["value", "unit"]].tolist() == [0.002, "eV/atom"]
    assert read.loc["energy_correlation", ["value", "unit", "start_model"]].tolist() == [0.99, "1", "ani2x"]


@pytest.fixture
def recorded():
    """Five recipes, three seeds of the short one."""
    values = {
        "thesis": [(0.050, 0.0027)],
        "short": [(0.053, 0.0010), (0.055, 0.0012), (0.057, 0.0008)],
        "start": [(1.13, 0.3)],
        "scratch": [(0.9, 0.01)],
        "start, offset refitted": [(1.13, 0.02)],
    }
    rows = []
    for recipe, seeds in values.items():
        for seed, (force, energy) in enumerate(seeds):
            common = {"recipe": recipe, "seed": seed, "n_train": 0 if recipe == "start" else 100, "run_key": recipe}
            rows += [
                row(**common, value=force),
                row(**common, quantity="force_rmse_component", value=force / math.sqrt(3)),
                row(**common, quantity="energy_rmse_per_atom", unit="eV/atom", value=energy),
                row(**common, value=9.0, split="train"),
                row(**common, value=0.9, quantity="energy_correlation", unit="1"),
            ]
    return pd.DataFrame(rows)


class TestComparison:
    def test_values(self, recorded):
        table = comparison_table(recorded).set_index("recipe")
        assert table.index.tolist() == ["scratch", "start", "start, offset refitted", "thesis", "short"]
        assert table["n_seeds"].tolist() == [1, 1, 1, 1, 3]
        assert table.loc["short", "F vector (eV/A)"] == pytest.approx(0.055)
        assert table.loc["short", "F vector (eV/A) spread"] == pytest.approx(0.002)
        assert table.loc["short", "F component (eV/A)"] == pytest.approx(0.055 / math.sqrt(3))
        assert table.loc["short", "E (meV/atom)"] == pytest.approx(1.0)
        assert table.loc["short", "E (meV/atom) spread"] == pytest.approx(0.2)
        assert table.loc["thesis", "E (meV/atom)"] == pytest.approx(2.7)
        assert math.isnan(table.loc["thesis", "E (meV/atom) spread"])

    def test_groups_are_kept_apart(self, recorded):
        both = pd.concat(
            [recorded, recorded.assign(dataset="urea"), recorded[recorded["recipe"] == "short"].assign(n_train=25)]
        )
        table = comparison_table(both)
        assert len(table) == 11
        assert table["dataset"].tolist() == ["naphthalene"] * 6 + ["urea"] * 5
        assert table.loc[table["recipe"] == "short", "n_train"].tolist() == [25, 100, 100]

    def test_other_recipes_follow(self, recorded):
        more = pd.concat([recorded, recorded[recorded["recipe"] == "thesis"].assign(recipe="another")])
        assert comparison_table(more)["recipe"].tolist()[-2:] == ["short", "another"]

    def test_a_quantity_that_was_not_recorded(self, recorded):
        table = comparison_table(recorded[recorded["quantity"] != "force_rmse_component"])
        assert table["F component (eV/A)"].isna().all()
        assert (format_comparison(table)["F component (eV/A)"] == "-").all()

    def test_another_unit(self, recorded):
        with pytest.raises(DataError, match="force_rmse_vector is recorded in meV/A, not eV/A"):
            comparison_table(recorded.replace({"unit": {"eV/A": "meV/A"}}))

    def test_nothing_to_show(self, recorded):
        with pytest.raises(DataError, match="no energy or force errors of the 'validation' part among 35 records"):
            comparison_table(recorded, split="validation")

    def test_as_text(self, recorded):
        text = format_comparison(comparison_table(recorded))
        assert list(text.columns) == ["recipe", "F vector (eV/A)", "F component (eV/A)", "E (meV/atom)"]
        assert text["F vector (eV/A)"].tolist() == ["0.9000", "1.1300", "1.1300", "0.0500", "0.0550 ± 0.0020"]
        assert text["E (meV/atom)"].tolist() == ["10.00", "300.00", "20.00", "2.70", "1.00 ± 0.20"]

    def test_text_names_what_differs(self, recorded):
        text = format_comparison(comparison_table(pd.concat([recorded, recorded.assign(dataset="urea", n_train=50)])))
        assert list(text.columns[:3]) == ["dataset", "n_train", "recipe"]


def random_and_blocks():
    """Two recipes and their start models, one on a random split, the other on blocks; three seeds."""
    rows = []
    for seed in range(3):
        for recipe, method, force in (("short", "random", 0.05), ("thesis", "blocks", 0.09)):
            own = {"seed": seed, "part_hash": f"{method}{seed}", "split_method": method, "run_key": f"{recipe}{seed}"}
            rows += [
                row(recipe=recipe, value=force, **own),
                row(recipe="start, offset refitted", value=force * 9, **own),
            ]
    return pd.DataFrame(rows)


class TestIdentity:
    def test_a_split_of_the_same_name_stands_beside_the_other(self, tmp_path):
        both = random_and_blocks()
        for method in ("random", "blocks"):
            append_records(both[both["split_method"] == method], tmp_path)
        starts = read_records(tmp_path, recipe="start, offset refitted")
        assert len(starts) == 6
        assert set(starts["split_method"]) == {"random", "blocks"}

    def test_tables_refuse_to_mix_splits_and_say_how_to_tell_them_apart(self):
        with pytest.raises(
            DataError, match="as the split under one name differ: study 'laptop', dataset 'naphthalene'"
        ) as e:
            comparison_table(random_and_blocks())
        sentence = str(e.value)
        assert "'short' (part_hash random0, random, 84 training frames)" in sentence
        assert "'thesis' (part_hash blocks0, blocks, 84 training frames)" in sentence
        assert "--record" in sentence
        assert "read_records(..., part_hash=...)" in sentence

    def test_data_that_changed_are_not_compared_with_what_they_were(self):
        rows = [row(), row(recipe="thesis", data_hash="d2", part_hash="p2")]
        with pytest.raises(DataError, match=r"as the data under one name differ: .*data_hash d1.*data_hash d2"):
            comparison_table(pd.DataFrame(rows))
        # and what is not known is not taken for the same
        with pytest.raises(DataError, match="data_hash unknown"):
            comparison_table(pd.DataFrame([row(), row(recipe="thesis") | dict.fromkeys(records.IDENTITY, "unknown")]))

    def test_told_apart_they_have_rows_of_their_own(self):
        table = comparison_table(told_apart(random_and_blocks()))
        assert table[["dataset", "recipe", "n_seeds"]].to_numpy().tolist() == [
            ["naphthalene (blocks)", "start, offset refitted", 3],
            ["naphthalene (blocks)", "thesis", 3],
            ["naphthalene (random)", "start, offset refitted", 3],
            ["naphthalene (random)", "short", 3],
        ]
        frames = pd.DataFrame([row(), row(recipe="thesis", data_hash="d2", part_hash="p2", split_method="blocks")])
        assert comparison_table(told_apart(frames))["dataset"].tolist() == [
            "naphthalene (data d1)",
            "naphthalene (data d2)",
        ]
        same = pd.DataFrame([row(), row(recipe="thesis"), row(recipe="thesis", n_train=20, split_hash="s2")])
        pd.testing.assert_frame_equal(told_apart(same), same)
        comparison_table(same)

    def test_start_models_of_one_name(self):
        starts = [row(recipe="start", n_train=0, value=0.7), row(recipe="start", n_train=0, value=0.7 + 1e-7)]
        starts[1] |= {"start_hash": "m2"}
        # borrowed elements that are copied answer as those that are relabelled
        assert len(comparison_table(pd.DataFrame(starts))) == 1
        starts[1] |= {"value": 0.8}
        with pytest.raises(DataError, match=r"several start models of the name ani2xt \(start_hash m1, m2\)"):
            comparison_table(pd.DataFrame(starts))
        table = comparison_table(told_apart(pd.DataFrame(starts)))
        assert table["dataset"].tolist() == ["naphthalene (start m1)", "naphthalene (start m2)"]

    def test_what_an_identity_changes_with(self):
        data = labelled(20)
        parts = split_dataset(data)
        first = identity(data, parts, "test", "m")
        assert first["data_hash"] == data.hash
        assert first["split_hash"] == parts.hash
        fewer = identity(data, shrunk(parts, 5), "test", "m")
        assert (fewer["part_hash"], fewer["split_method"]) == (first["part_hash"], "random")
        assert fewer["split_hash"] != first["split_hash"]
        others = [
            identity(data, parts, "validation", "m"),
            identity(data, split_dataset(data, seed=1), "test", "m"),
            identity(data.subset(range(19, -1, -1)), parts, "test", "m"),
        ]
        assert len({first["part_hash"], *(other["part_hash"] for other in others)}) == 4

    def test_the_reference_is_of_the_data_and_splits_of_today(self):
        """Runs of the committed record and new ones can be compared."""
        reference = read_records(ROOT / "reports" / "metrics")
        for name, crystals in (("naphthalene", False), ("27-like", True)):
            data = load_dataset(name)
            data = data.crystals() if crystals else data
            parts = split_dataset(data)
            rows = reference[(reference["dataset"] == name) & (reference["seed"] == 0) & (reference["split"] == "test")]
            assert set(rows["data_hash"]) == {data.hash}
            assert set(rows["part_hash"]) == {identity(data, parts, "test", "")["part_hash"]}
            assert parts.hash in set(rows["split_hash"])

    def test_every_study_of_the_reference_can_be_compared(self):
        reference = read_records(ROOT / "reports" / "metrics")
        assert not (reference["data_hash"] == records.UNKNOWN).any()
        for _, rows in reference.groupby("study"):
            comparison_table(rows)
            assert (told_apart(rows)["dataset"] == rows["dataset"]).all()
        # notebook 09 sets these beside each other
        check_comparable(reference[reference["study"].isin(["peer", "public-dft"])], among=["dataset"])
