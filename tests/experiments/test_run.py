from __future__ import annotations

import pytest

from tlmc.errors import ConfigError, ModelError
from tlmc.experiments.records import read_records
from tlmc.experiments.run import Run, execute, read_run, run_key, write_run


def test_a_run_survives_its_file(tmp_path):
    run = Run(dataset="naphthalene", start_model="ani2xt", settings={"lambda_": 0.5}, n_train=20, seed=3)
    write_run(run, tmp_path / "run.yml")
    assert read_run(tmp_path / "run.yml") == run
    assert "crystals_only" not in (tmp_path / "run.yml").read_text()


def test_names_say_what_differs_and_slugs_change_with_everything():
    run = Run(dataset="molcrys-mace/21_urea", settings={"lambda_": 0.5, "batch_size": 4})
    assert run.name == "short, batch_size 4, lambda_ 0.5"
    assert run.config.recipe == run.name
    assert run.config.lambda_ == 0.5
    others = [run.model_copy(update=change) for change in ({"seed": 1}, {"n_train": 9}, {"label": "a/b c"}, {})]
    slugs = [other.slug for other in others]
    assert len(set(slugs)) == 4
    assert slugs[3] == run.slug
    assert all("/" not in slug and " " not in slug for slug in slugs)


def test_names_say_how_the_data_differ():
    run = Run(dataset="27-like", element_map={"Si": "C"})
    changes = [{}, {"borrow": "extend"}, {"split": "blocks"}, {"crystals_only": True}, {"element_map": {"Si": "N"}}]
    names = [run.model_copy(update=change).name for change in changes]
    assert names[0] == "short, Si=C"
    assert len(set(names)) == 5
    assert Run(dataset="a", borrow="extend").name == "short"  # nothing is borrowed
    assert run.model_copy(update={"label": "mine", "split": "blocks"}).name == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dataset: a\nbatch: 3\n", "batch = 3: Extra inputs are not permitted"),
        ("dataset: a\nsettings: {batch: 3}\n", "batch = 3: Extra inputs"),
        ("dataset: a\nseed: -1\n", "seed = -1: Input should be greater"),
        ("dataset: [a\n", "is not YAML"),
        ("", "content = None"),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path, text, sentence):
    (tmp_path / "run.yml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_run(tmp_path / "run.yml")
    with pytest.raises(ConfigError, match=r"other.yml does not exist"):
        read_run(tmp_path / "other.yml")


@pytest.mark.slow
def test_a_run_uses_its_part_of_the_data_and_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path))
    run = Run(
        dataset="27-like",
        crystals_only=True,
        start_model="ani2xt",
        settings={"epochs": 1},
        n_train=6,
        element_map={"Si": "C", "I": "Cl"},
        borrow="extend",
        seed=2,
    )
    experiment = execute(run, study="trial")
    assert run.name == "short, epochs 1, crystals only, Si=C, I=Cl, extend"
    assert len(experiment.split.train) == 6
    assert experiment.dataset.is_crystal.all()
    assert experiment.result.potential.symbols[-2:] == ("Si", "I")
    records = read_records(study="trial", quantity="force_rmse_vector").query("recipe == @run.name")
    assert sorted(records["split"]) == ["molecules", "test", "validation"]
    assert records[["n_train", "seed"]].drop_duplicates().to_numpy().tolist() == [[6, 2]]
    assert set(records["run_key"]) == {run_key(run)}
    assert set(records["data_hash"]) == {experiment.dataset.hash}
    assert set(records["split_hash"]) == {experiment.split.hash}


def test_a_run_can_take_the_first_members():
    run = Run(dataset="naphthalene", start_model="ani2xt", settings={"members": 2})
    with pytest.raises(ModelError, match=r"has 1 member\(s\), cannot take the first 2"):
        execute(run)
