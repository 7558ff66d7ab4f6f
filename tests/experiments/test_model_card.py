"""The page about a model is for people, and is never stopped by what a file or its folder lacks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from helpers.potential_references import toy_potential
from tlmc.data.loading import dataset_from_frames
from tlmc.experiments.experiment import run_experiment
from tlmc.experiments.model_card import model_facts, model_page
from tlmc.families.ani import average, relabel
from tlmc.potentials import predict
from tlmc.potentials.model_files import load_tensors, save_model, save_tensors
from tlmc.training.config import recipe


def methanol(n_frames=12):
    frames = []
    for k in range(n_frames):
        frame = molecule("CH3OH")
        frame.rattle(0.05, seed=k)
        said = predict(toy_potential(members=1, seed=9), [frame])
        frame.calc = SinglePointCalculator(frame, energy=said.energies[0], forces=said.forces[0])
        frames.append(frame)
    return dataset_from_frames(frames, name="methanol", source="memory", level_of_theory="toy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = recipe("short", epochs=2, layers="last", members=2)
    start = relabel(toy_potential(dtype=torch.float32), {"Si": "C"})
    return run_experiment(start, methanol(), config, run_dir=folder)


def test_a_fine_tuned_model(run):
    facts = model_facts(str(run.run_dir / "model.safetensors"))
    json.dumps(facts, allow_nan=False)
    page = model_page(facts)
    assert page["what it is"] == "fine-tuned from toy-first2, 2 members"
    assert page["trained on"] == f"methanol: 12 frames, {len(run.split.train)} to train, 1 to validate"
    assert page["recipe"].startswith("short: epochs 2, batch_size 2, lambda 0.1, lr 0.0003, schedule cosine, loss mse")
    assert page["recipe"].endswith("members 2, layers last, weight_decay 0.01")
    metric = run.stages["short"].metrics
    assert (
        f"short: forces {metric['force_rmse_vector'].value:.4f} eV/A (vector RMSE), energies "
        f"{1000 * metric['energy_rmse_per_atom'].value:.2f} meV/atom (RMSE)"
    ) in page["test errors"]
    assert page["validation errors"].endswith("epoch 2")
    assert page["committee"].startswith("no: only the mean of its 2 members is a prediction")
    assert page["borrowed elements"].startswith("Si from C: treated as their donors")
    assert "float32" in page["precision"]
    assert f"run {run.result.run_key}" in page["made by"]
    assert (
        "elements other than C, H, O, those of its training data: energies are refused" in page["what it does not know"]
    )
    for value in page.values():
        assert "{" not in value  # no raw dictionaries


def test_the_lines_of_usage_work(run):
    page = model_page(model_facts(str(run.run_dir / "model.safetensors")))
    frame = molecule("CH3OH")
    names = {"atoms": frame}
    exec("\n".join(page["how to use it"].splitlines()[:-1]), names)  # our own text, about a file of ours
    assert frame.get_potential_energy() == pytest.approx(predict(run.result.potential, [frame]).energies[0], rel=1e-6)


def test_level_of_theory_of_the_file_or_the_registry(run, tmp_path):
    page = model_page(model_facts(str(run.run_dir / "model.safetensors")))
    assert page["level of theory"].startswith("unknown: neither the file nor the registry")
    data = {"name": "molcrys-mace/21_urea", "frames": 3}
    save_model(toy_potential(), tmp_path / "model.safetensors", {"data": data})
    assert model_page(model_facts(str(tmp_path / "model.safetensors")))["level of theory"].startswith("periodic DFT")
    save_model(toy_potential(), tmp_path / "model.safetensors", {"data": data, "level_of_theory": "r2SCAN"})
    assert model_page(model_facts(str(tmp_path / "model.safetensors")))["level of theory"] == "r2SCAN"


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (None, "there is no metrics.json beside the file"),
        ("{", "holds none (JSONDecodeError"),
        ("[]", "holds none (TypeError"),
        ('{"run_key": "1", "test": {"start": {}}}', "holds none (KeyError"),
        ('{"run_key": "other", "test": {}}', "belongs to run other"),
    ],
)
def test_errors_of_another_run_are_not_shown(tmp_path, metrics, sentence):
    path = tmp_path / "model.safetensors"
    save_model(toy_potential(), path, {"run_key": "mine"})
    if metrics is not None:
        path.with_name("metrics.json").write_text(metrics)
    assert sentence in model_page(model_facts(str(path)))["test errors"]


def test_a_file_of_another_name_does_not_get_the_errors_of_the_model(run):
    path = run.run_dir / "last.safetensors"
    path.write_bytes((run.run_dir / "model.safetensors").read_bytes())
    page = model_page(model_facts(str(path)))
    assert page["test errors"].startswith("unknown: a run keeps those of its model.safetensors only")


def test_means_files_without_a_word_and_strange_ones(tmp_path):
    path = tmp_path / "mean.safetensors"
    other = dataclasses.replace(toy_potential(seed=3))
    save_model(average([toy_potential(), other]), path, {"mean_of": {"a.safetensors": "1", "b.safetensors": "2"}})
    page = model_page(model_facts(str(path)))
    assert page["what it is"] == "the mean of 2 models fine-tuned from toy (6 members in all)"
    assert page["mean of"] == "a.safetensors, b.safetensors"
    assert page["committee"].startswith("no:")
    save_model(toy_potential(), path)
    page = model_page(model_facts(str(path)))
    assert page["what it is"] == "a model that descends from toy, 3 members; the file does not say how"
    assert page["committee"].startswith("yes: its 3 members")
    strange = {"data": 3, "split": None, "config": ["x"], "metrics": {"validation_force_rmse_vector": "x"}}
    strange["run_key"] = 5
    save_model(toy_potential(), path, strange)
    page = model_page(model_facts(str(path)))
    assert "trained on" not in page
    assert "validation errors" not in page
    tensors, description = load_tensors(path)
    save_tensors(path, tensors, description | {"metadata": {"config": {"recipe": "sweep", "lr": None}}})
    assert model_page(model_facts(str(path)))["recipe"] == "sweep (no recipe of this version): lr None"


def test_a_start_model(ani2xt):
    facts = model_facts("ani2xt")
    page = model_page(facts)
    assert page["name"] == "ani2xt"
    assert page["described in"] == "doi:10.1021/acs.jcim.2c00817"
    assert ani2xt.fingerprint in page["fingerprint"]
    assert "crystals: it was trained on molecules" in page["what it does not know"]
    assert facts["bytes"] == Path(facts["file"]).stat().st_size
    assert np.isfinite(facts["model"]["r_cut"])
