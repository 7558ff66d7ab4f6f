"""Fine-tuning: it learns, resumes to the same bits, honours its options and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from jupyter_client.manager import start_new_kernel

from helpers.potential_references import toy_potential
from helpers.training import labelled, quick, same_weights, student, teacher
from tlmc.data.loading import load_dataset
from tlmc.data.splits import Split, split_dataset
from tlmc.errors import ConfigError, DataError, Interrupted, ModelError
from tlmc.evaluation import evaluate
from tlmc.families.ani import learner, to_torchani
from tlmc.families.ani.transfer import first_members
from tlmc.potentials import predict
from tlmc.potentials.model_files import load_model, save_model
from tlmc.training import run_folder
from tlmc.training.config import FinetuneConfig, recipe
from tlmc.training.distributed import ContactError
from tlmc.training.fine_tuning import finetune
from tlmc.training.trainer import Trainer
from tlmc.units import HARTREE

"""The module, whose name the package gives to its function."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))


def stop_at_step(patch, number, act=None):
    """Interrupt a training in a step of it, the steps of all its epochs counted."""
    step = Trainer._step

    def stop(self, n_structures, share, errors, update):
        step(self, n_structures, share, errors, update)
        if update.step == number:
            if act is None:
                raise KeyboardInterrupt
            act()

    patch.setattr(Trainer, "_step", stop)


def test_it_learns_and_the_result_carries_its_reference():
    data = labelled(40)
    parts = split_dataset(data, seed=0)
    result = finetune(student(), data, parts, quick(epochs=40))
    assert result.history["train_loss"].iloc[-1] < 0.2 * result.history["train_loss"].iloc[0]
    test = data.subset(parts.test)
    before, after = (
        evaluate(test, predict(student(), test.frames)),
        evaluate(test, predict(result.potential, test.frames)),
    )
    assert after["force_rmse_vector"].value < 0.5 * before["force_rmse_vector"].value
    assert after["energy_rmse_per_atom"].value < 0.1 * before["energy_rmse_per_atom"].value
    assert result.potential.reference is not None


def test_validation_errors_of_the_curve_are_those_of_the_result():
    data = labelled()
    parts = split_dataset(data, seed=0)
    result = finetune(student(), data, parts, quick())
    validation = data.subset(parts.validation)
    metrics = evaluate(validation, predict(result.potential, validation.frames))
    last = result.history.iloc[-1]
    assert metrics["force_rmse_vector"].value == pytest.approx(last["validation_force_rmse_vector"], rel=1e-4)
    assert metrics["energy_rmse_per_atom"].value == pytest.approx(last["validation_energy_rmse_per_atom"], rel=1e-3)


def test_one_epoch_equals_the_thesis_loop_on_torchani():
    """Same batches, torchani's own autograd and torch's AdamW: the same weights to rounding, decay included."""
    data, config = labelled(12), recipe("thesis", epochs=1, seed=3, precision="float64", lr=1e-3)
    parts = split_dataset(data, seed=0)
    start = student().to(torch.float64)
    result = finetune(start, data, parts, config)
    network = to_torchani(start).double().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    offsets = result.potential.atomic_reference(data.frames)
    order = np.random.default_rng([config.seed, 0]).permutation(parts.train)
    for first in range(0, len(order), 2):
        optimizer.zero_grad()
        batch = order[first : first + 2]
        for i in batch:
            frame = data.frames[i]
            positions = torch.tensor(frame.positions)[None].requires_grad_()
            species = network.species_converter(torch.tensor(frame.numbers)[None])
            aevs = network.aev_computer(species, positions, torch.tensor(frame.cell.array), torch.tensor(frame.pbc))
            energy = network.neural_networks(species, aevs).sum() * HARTREE
            forces = -torch.autograd.grad(energy, positions, create_graph=True)[0][0]
            n = len(frame)
            loss = 0.9 * (forces - torch.from_numpy(data.forces[i])).square().sum() / n
            loss = loss + 0.1 * ((energy + offsets[i] - data.energies[i]) / n) ** 2
            (loss / len(batch)).backward()
        optimizer.step()
    networks = network.neural_networks
    for number, name in enumerate(("layers.0", "layers.1", "layers.2", "final_layer")):
        for symbol in "HCO":
            members = [m.atomics[symbol].get_submodule(name) for m in networks.members]
            expected = torch.stack([m.weight.detach().t() for m in members])
            torch.testing.assert_close(result.potential.networks[symbol][number].weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.9},
        {"schedule": "plateau", "plateau_patience": 0},
        {"layers": "hidden"},
        {"warmup_epochs": 1.5, "clip_norm": 0.1, "loss": "huber", "keep": "best"},
        {"richer": {"parameters": {"r_cut": 3.0, "n_max": 2, "l_max": 2}}},
    ],
    ids=["plain", "ema", "plateau", "hidden", "all options", "richer"],
)
def test_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch, changes):
    data, config = labelled(), quick(epochs=5, **changes)
    parts = split_dataset(data, seed=0)
    whole = finetune(student(), data, parts, config)
    with monkeypatch.context() as patch:
        # in the second of 7 steps of the fourth epoch, before any checkpoint is due
        stop_at_step(patch, 23)
        with pytest.raises(Interrupted, match=r"after epoch 3 of 5, which is kept in .*run: the same call.* goes on"):
            finetune(student(), data, parts, config, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = finetune(student(), data, parts, config, tmp_path / "run")
    assert resumed.resumed_from == 3
    assert same_weights(resumed.potential, whole.potential)
    columns = [c for c in whole.history if c not in ("seconds", "cpu_seconds")]
    pd.testing.assert_frame_equal(resumed.history[columns], whole.history[columns], check_exact=True)
    stored = load_model(tmp_path / "run" / "model.safetensors")[0]
    assert same_weights(stored, whole.potential)
    again = finetune(student(), data, parts, config, tmp_path / "run")
    assert same_weights(again.potential, whole.potential)
    assert again.best_epoch == whole.best_epoch


def test_fewer_members_train_as_a_smaller_start_model_does():
    data = labelled()
    parts = split_dataset(data, seed=0)
    two = finetune(student(), data, parts, quick(members=2))
    assert two.potential.members == 2
    assert same_weights(two.potential, finetune(first_members(student(), 2), data, parts, quick()).potential)


def test_richer_columns_are_fitted_on_the_training_part_and_learn():
    data = labelled()
    parts = split_dataset(data, seed=0)
    settings = {"parameters": {"r_cut": 3.0, "n_max": 2, "l_max": 2}, "scale": 0.3}
    plain, richer = (finetune(student(), data, parts, quick(richer=value)).potential for value in (None, settings))
    assert plain.enrichment is None
    assert richer.enrichment.parameters["species"] == ["C", "H", "O"]
    train = torch.cat([richer.enrichment.columns(data.frames[k]) for k in parts.train])
    assert train.mean(0).abs().max() < 1e-9
    assert richer.networks["C"][0].weight[:, plain.n_columns :].abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"richer.compression = 'zip'"):
        quick(richer={"compression": "zip"})


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_weights(tmp_path):
    """SIGKILL, not a polite interrupt: whatever was half-written must not matter."""
    script = textwrap.dedent("""
        import sys, pathlib
        sys.path.insert(0, sys.argv[1])
        import test_fine_tuning as t
        data = t.labelled()
        parts, config = t.split_dataset(data, seed=0), t.quick(epochs=150)
        t.finetune(t.student(), data, parts, config, sys.argv[2], checkpoint_seconds=0.0)
    """)
    environment = os.environ | {"TLMC_CACHE_DIR": str(tmp_path / "cache")}
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(run)], env=environment)
    try:
        while not (run / "history.csv").exists():
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "model.safetensors").exists()
    data, config = labelled(), quick(epochs=150)
    parts = split_dataset(data, seed=0)
    resumed = finetune(student(), data, parts, config, run)
    assert 0 < resumed.resumed_from < 150
    assert same_weights(resumed.potential, finetune(student(), data, parts, config).potential)


def test_seeds_decide_the_run():
    data = labelled()
    parts = split_dataset(data, seed=0)
    runs = [finetune(student(), data, parts, quick(epochs=2, seed=seed)) for seed in (0, 0, 1)]
    assert same_weights(runs[0].potential, runs[1].potential)
    assert not same_weights(runs[0].potential, runs[2].potential)
    assert runs[0].run_key == runs[1].run_key != runs[2].run_key


def test_frozen_layers_stay_and_elements_without_frames_too():
    data = labelled()
    tuned = finetune(student(), data, split_dataset(data, seed=0), quick(epochs=1, layers="hidden")).potential
    for number, (before, after) in enumerate(zip(student().networks["C"], tuned.networks["C"], strict=True)):
        assert torch.equal(before.weight, after.weight) == (number in (0, 3))
    assert torch.equal(student().networks["Cl"][1].weight, tuned.networks["Cl"][1].weight)


def test_schedules():
    data = labelled()
    parts = split_dataset(data, seed=0)

    def rates(**changes):
        return finetune(student(), data, parts, quick(epochs=6, **changes)).history["lr"].tolist()

    assert rates(schedule="constant") == [3e-3] * 6
    cosine = rates(schedule="cosine")
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] < 0.05 * 3e-3
    warm = rates(schedule="constant", warmup_epochs=3.0)
    assert warm[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    halved = rates(schedule="plateau", plateau_patience=0, lr=1e-7)
    assert all(math.log2(1e-7 / rate) == pytest.approx(round(math.log2(1e-7 / rate))) for rate in halved)


def test_early_stopping_and_best_weights():
    data = labelled()
    parts = split_dataset(data, seed=0)
    config = quick(epochs=30, lr=0.1, schedule="constant", early_stopping=2, keep="best", clip_norm=1e-3)
    result = finetune(student(), data, parts, config)
    assert len(result.history) == result.best_epoch + 2 < 30
    validation = data.subset(parts.validation)
    metrics = evaluate(validation, predict(result.potential, validation.frames))
    best = result.history.iloc[result.best_epoch - 1]
    assert metrics["force_rmse_vector"].value == pytest.approx(best["validation_force_rmse_vector"], rel=1e-3)


def test_run_folder_holds_everything(tmp_path):
    data = labelled()
    parts = split_dataset(data, seed=0)
    result = finetune(student(), data, parts, quick(), tmp_path / "run", tensorboard=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "run.json",
        "split.json",
        "history.csv",
        "model.safetensors",
        "tensorboard",
    }
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 4
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    _, metadata = load_model(tmp_path / "run" / "model.safetensors")
    assert metadata["data"]["hash"] == data.hash
    assert metadata["start_model"]["fingerprint"] == "made up"
    assert metadata["run_key"] == result.run_key
    assert metadata["config"]["lambda_"] == 0.1
    assert metadata["metrics"]["epoch"] == 4
    assert (
        Split.from_json(json.loads((tmp_path / "run" / "split.json").read_text())).train.tolist()
        == parts.train.tolist()
    )


def test_headless_runs_log_a_line_per_epoch(caplog):
    data = labelled()
    with caplog.at_level(logging.INFO, logger="tlmc"):
        finetune(student(), data, split_dataset(data, seed=0), quick(), progress=False)
    lines = [record.message for record in caplog.records if "epoch" in record.message]
    assert len(lines) == 4
    assert "short epoch 4/4" in lines[-1]
    assert "meV" in lines[-1]


def test_another_run_in_the_folder_is_refused(tmp_path):
    data = labelled()
    parts = split_dataset(data, seed=0)
    finetune(student(), data, parts, quick(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run holds another run: config.lr \(0.003 there, 0.1 now\)"):
        finetune(student(), data, parts, quick(epochs=1, lr=0.1), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run: data.hash"):
        finetune(student(), labelled(seed=4), parts, quick(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run: start_model.weights"):
        finetune(teacher(), data, parts, quick(epochs=1), tmp_path / "run")


def test_bad_input_is_refused_before_work_starts(tmp_path):
    data = labelled()
    parts = split_dataset(data, seed=0)
    with pytest.raises(ModelError, match=r"toy has no network for C \(1 atoms\), O \(1 atoms\) in CH4O"):
        finetune(toy_potential(symbols=("H", "S")), data, parts, quick(), tmp_path / "run")
    with pytest.raises(DataError, match="the train part of the split names frame 19, but methanol holds 10"):
        finetune(student(), data.subset(range(10)), dataclasses.replace(parts, train=np.array([19])), quick())
    with pytest.raises(DataError, match="the validation part of the split of methanol is empty"):
        finetune(student(), data, dataclasses.replace(parts, validation=np.array([], dtype=np.int64)), quick())
    with pytest.raises(ModelError, match=r"toy has 3 member\(s\), cannot take the first 4"):
        finetune(student(), data, parts, quick(members=4), tmp_path / "run")
    with pytest.raises(ConfigError, match="tensorboard needs a run_dir"):
        finetune(student(), data, parts, quick(), tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_named():
    data = labelled()
    with pytest.raises(
        ModelError, match=r"the loss became (nan|inf) in epoch \d+, step \d+: lower lr \(1e\+20\) or set clip_norm"
    ):
        finetune(student(), data, split_dataset(data, seed=0), quick(lr=1e20))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "best"},
        {"ema_decay": 0.5},
        {"rank": 2, "replay": 0.5},
        {"warm_start": "ridge"},
        {"init": "scratch"},
        {"layers": "last"},
        {"precision": "float64", "lr": 1e200},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_a_last_step_that_diverges_is_refused(tmp_path, changes):
    """One batch, one epoch: no loss is looked at after the only step."""
    data = labelled()
    parts = split_dataset(data, seed=0)
    config = quick(**({"lr": 1e6, "epochs": 1, "batch_size": 100} | changes))
    with pytest.raises(ModelError, match=r"the training diverged: .* after epoch 1.*: lower lr \("):
        finetune(student(), data, parts, config)
    for _ in range(2):  # nothing is left that a second call takes for a result
        with pytest.raises(ModelError, match=r"the training diverged: .*run holds no finished run"):
            finetune(student(), data, parts, config, tmp_path / "run")
        there = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
        assert there == {"run.json", "split.json", "history.csv"}


def test_divergence_that_stays_finite_is_refused():
    data = labelled()
    parts = split_dataset(data, seed=0)
    with pytest.raises(
        ModelError, match=r"diverged: validation errors F \S+ eV/A, E \S+ meV/atom after epoch \d, F 3.6"
    ):
        finetune(student(), data, parts, quick(lr=1.0, schedule="constant"))


def test_a_result_worse_than_the_start_model_is_warned_of(caplog):
    data = labelled()
    parts = split_dataset(data, seed=0)
    finetune(teacher(), data, parts, quick(lr=1e-2, epochs=1))
    [warning] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("the training made the model worse: validation errors F ")
    caplog.clear()
    finetune(student(), data, parts, quick(epochs=20))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_what_an_older_version_kept_of_a_divergence_is_no_result(tmp_path):
    data, config = labelled(), quick(epochs=1)
    parts = split_dataset(data, seed=0)
    finetune(student(), data, parts, config, tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    model, metadata = load_model(path)
    metadata["metrics"]["validation_force_rmse_vector"] = 2e27
    save_model(model, path, metadata)
    with pytest.raises(ModelError, match="is of a training that diverged, force RMSE 2e\\+27 eV/A: delete .*run"):
        finetune(student(), data, parts, config, tmp_path / "run")


def test_a_warm_start_without_a_solution_is_refused(monkeypatch):
    data = labelled()
    parts = split_dataset(data, seed=0)

    def fail(engine, *_):
        engine.flat.fill_(math.nan)

    monkeypatch.setattr(learner, "ridge_start", fail)
    with pytest.raises(ModelError, match=r"the warm start has no finite solution: raise ridge \(0.01\)"):
        finetune(student(), data, parts, quick(warm_start="ridge"))


def test_sigterm_and_an_impatient_second_interrupt_lose_nothing(tmp_path, monkeypatch):
    """Schedulers send SIGTERM; launchers, and people, interrupt twice."""
    data, config = labelled(), quick()
    parts = split_dataset(data, seed=0)
    save = run_folder.save_tensors

    def interrupted_again(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    with monkeypatch.context() as patch:
        stop_at_step(patch, 17, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(run_folder, "save_tensors", interrupted_again)
        with pytest.raises(Interrupted, match="after epoch 2 of 4") as caught:
            finetune(student(), data, parts, config, tmp_path / "run")
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = finetune(student(), data, parts, config, tmp_path / "run")
    assert resumed.resumed_from == 2
    assert same_weights(resumed.potential, finetune(student(), data, parts, config).potential)


def test_an_interrupt_says_what_is_kept(tmp_path, monkeypatch):
    data, config = labelled(), quick()
    parts = split_dataset(data, seed=0)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 17)
        with pytest.raises(Interrupted, match="a training without a run_dir keeps nothing, the same call begins anew"):
            finetune(student(), data, parts, config)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        with pytest.raises(Interrupted, match="in the first epoch of 4: nothing is kept yet, the same call begins"):
            finetune(student(), data, parts, config, tmp_path / "run")
    assert not (tmp_path / "run" / "state.safetensors").exists()

    def lose_contact():
        raise ContactError("gone")

    with monkeypatch.context() as patch:  # another process of the training ended
        stop_at_step(patch, 10, lose_contact)
        with pytest.raises(ContactError, match="gone"):
            finetune(student(), data, parts, config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(learner, "build_cache", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="it is as it was, the same call goes on"):
            finetune(student(), data, parts, config, tmp_path / "run")
        with pytest.raises(Interrupted, match="before the first of 4 epochs: descriptors are kept once all of"):
            finetune(student(), data, parts, config, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "_tidy", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="the training had ended and is kept in"):
            finetune(student(), data, parts, config, tmp_path / "run")
    assert finetune(student(), data, parts, config, tmp_path / "run").resumed_from == 4


def test_an_interrupt_is_no_error_that_a_loop_over_runs_goes_on_after():
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)


def test_a_finished_run_that_was_killed_before_its_state_was_removed(tmp_path, monkeypatch):
    data, config = labelled(), quick(keep="best", lr=1e-2, schedule="constant")
    parts, run = split_dataset(data, seed=0), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "_tidy", lambda _: None)
        first = finetune(student(), data, parts, config, run)
    for name in ("best.safetensors", "last.safetensors", "notes.txt"):
        (run / name).write_text("somebody else's")
    assert (run / "state.safetensors").exists()
    again = finetune(student(), data, parts, config, run)
    assert same_weights(again.potential, first.potential)
    assert again.best_epoch == first.best_epoch
    pd.testing.assert_frame_equal(again.history, first.history, check_exact=True)
    names = {path.name for path in run.iterdir()}
    assert "state.safetensors" not in names
    assert names >= {"best.safetensors", "last.safetensors", "notes.txt"}


@pytest.mark.parametrize(
    "text", [None, "", "epoch,lr\n1,2\n", "epoch,validation_score\n", "epoch,validation_score\n1,x\n"]
)
def test_a_finished_run_without_its_curve_is_refused(tmp_path, text):
    data, config, run = labelled(), quick(epochs=1), tmp_path / "run"
    parts = split_dataset(data, seed=0)
    finetune(student(), data, parts, config, run)
    (run / "history.csv").unlink()
    if text is not None:
        (run / "history.csv").write_text(text)
    with pytest.raises(DataError, match=r"history.csv is not the learning curve of the finished run beside it: "):
        finetune(student(), data, parts, config, run)


def test_no_bar_hangs_where_the_descriptors_are_there(capfd):
    data = labelled()
    parts = split_dataset(data, seed=0)
    finetune(student(), data, parts, quick(epochs=1), progress=False)
    capfd.readouterr()
    finetune(student(), data, parts, quick(epochs=1), progress=True)
    shown = capfd.readouterr().err
    assert "short" in shown
    assert "descriptors" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("somebody_is_there", [True, False])
def test_notebooks_show_a_bar_and_a_sentence_where_somebody_has_them_open(tmp_path, somebody_is_there):
    """By the messages of a real kernel: headless runs tell it that nobody can answer questions."""
    code = f"""
        import os, signal, sys, warnings
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        warnings.simplefilter("ignore")  # of tqdm, where ipywidgets are missing
        import pytest, test_fine_tuning as t
        data = t.labelled()
        parts = t.split_dataset(data, seed=0)
        t.stop_at_step(pytest.MonkeyPatch(), 17, lambda: os.kill(os.getpid(), signal.SIGINT))
        t.finetune(t.student(), data, parts, t.quick(), {str(tmp_path / "run")!r})
    """
    environment = os.environ | {"TLMC_CACHE_DIR": str(tmp_path / "cache"), "IPYTHONDIR": str(tmp_path)}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    messages = []
    try:
        client.allow_stdin = somebody_is_there
        reply = client.execute_interactive(textwrap.dedent(code), output_hook=messages.append, timeout=100)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    content = reply["content"]
    assert (content["status"], content["ename"]) == ("error", "Interrupted")
    assert "after epoch 2 of 4, which is kept in" in content["evalue"]
    [error] = [message["content"] for message in messages if message["msg_type"] == "error"]
    assert len(error["traceback"]) == 1
    assert error["traceback"][0].count("\n") == 0
    shown = json.dumps([message["content"] for message in messages if message["msg_type"] != "error"], default=str)
    assert ("0%" in shown or "FloatProgress" in shown or "HBox" in shown) == somebody_is_there, shown


def test_unknown_and_wrong_settings():
    with pytest.raises(ConfigError, match=r"no recipe 'Short': choose one of short, .*thesis"):
        recipe("Short")
    known = r"Extra inputs are not permitted; the settings are lambda_, .*epochs"
    with pytest.raises(ConfigError, match=rf"recipe short: lambda = 0.1: {known}"):
        recipe("short", **{"lambda": 0.1})
    with pytest.raises(ConfigError, match=r"richer.n_max = 3: Extra .*; the settings of richer are .*parameters"):
        recipe("rich", richer={"n_max": 3})
    with pytest.raises(ConfigError, match="recipe short: lambda_ = 2: .*less than or equal to 1"):
        recipe("short", lambda_=2)
    assert recipe("thesis", lr="1e-3").lr == 1e-3  # YAML reads 1e-3 as a string


def test_thesis_protocol_is_the_default():
    config = FinetuneConfig()
    assert (config.epochs, config.batch_size, config.lambda_, config.lr, config.weight_decay) == (
        100,
        2,
        0.9,
        1e-4,
        0.1,
    )
    assert (config.schedule, config.plateau_patience, config.layers, config.loss) == ("plateau", 5, "all", "mse")


@pytest.mark.slow
@pytest.mark.needs_mirror
def test_real_start_model_on_real_dft_improves_in_a_few_epochs(ani2x):
    data = load_dataset("molcrys-mace/21_urea").crystals()
    parts = split_dataset(data, seed=0)
    result = finetune(ani2x, data, parts, recipe("short", epochs=6))
    test = data.subset(parts.test)
    before, after = evaluate(test, predict(ani2x, test.frames)), evaluate(test, predict(result.potential, test.frames))
    assert before["force_rmse_vector"].value > 0.8
    assert after["force_rmse_vector"].value < 0.15
    assert after["energy_rmse_per_atom"].value < 0.01


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    data = labelled(12)
    split, config = split_dataset(data), FinetuneConfig(epochs=1)
    (tmp_path / "run").mkdir()
    code = (
        "import sys; from pathlib import Path; from tlmc.files import held\n"
        f"with held(Path({str(tmp_path / 'run')!r})):\n    print('at work', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"at work\n"
        with pytest.raises(DataError, match="another process is at work in .*run"):
            finetune(toy_potential(), data, split, config, tmp_path / "run")
        other.communicate()
    finetune(toy_potential(), data, split, config, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("text", [b"\xff", b"[1]", b"{"])
def test_a_description_that_is_none_gets_a_sentence(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text)
    data = labelled(12)
    with pytest.raises(ConfigError, match=r"run.json is not readable"):
        finetune(toy_potential(), data, split_dataset(data), FinetuneConfig(epochs=1), tmp_path)
