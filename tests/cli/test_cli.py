"""The command line, on a small data set of its own: what it writes, and the sentence that wrong input gets."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kcal, mol
from rich.console import Console
from typer.testing import CliRunner

from helpers.argon import argon
from helpers.processes import heed_interrupts
from tlmc.cli import main as cli
from tlmc.data.loading import load_dataset
from tlmc.errors import DataError
from tlmc.experiments.records import comparison_table, read_records
from tlmc.families.ani import scratch
from tlmc.potentials.calculator import predict
from tlmc.potentials.model_files import load_model, load_tensors, save_model

N_FRAMES = 20
OFFSET = 0.3
"""eV/atom by which the labels are off the start model's energies."""


@pytest.fixture
def tlmc(monkeypatch):
    """Return a function that runs a command and gives its exit code, standard output and error in one line each."""
    loggers = [logging.getLogger(name) for name in ("tlmc", "papermill")]
    saved = [(logger, logger.level, logger.handlers) for logger in loggers]
    monkeypatch.setattr(cli, "out", Console(width=200))
    monkeypatch.setattr(cli, "err", Console(stderr=True, width=200))

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())

    yield run
    for logger, level, handlers in saved:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="module")
def frames(ani2xt):
    """Return rattled methanol, labelled with the start model's energies plus an offset and its forces plus noise."""
    rng = np.random.default_rng(0)
    rattled = []
    for _ in range(N_FRAMES):
        frame = molecule("CH3OH")
        frame.positions += rng.normal(scale=0.05, size=frame.positions.shape)
        rattled.append(frame)
    labels = predict(ani2xt, rattled)
    for frame, energy, forces in zip(rattled, labels.energies, labels.forces, strict=True):
        noisy = forces + rng.normal(scale=0.02, size=forces.shape)
        frame.calc = SinglePointCalculator(frame, energy=energy + OFFSET * len(frame), forces=noisy)
    return rattled


@pytest.fixture
def data(frames, tmp_path, monkeypatch):
    """Return the labelled file in a folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "methanol.extxyz"
    ase.io.write(path, frames)
    return path


@pytest.fixture
def start(ani2xt, data):
    """Return the start model as a file, so that a test's own cache can stay empty."""
    from tlmc.potentials.model_files import save_model

    path = data.parent / "start.safetensors"
    save_model(ani2xt, path)
    return path


class TestFinetune:
    def test_a_training_that_diverged_leaves_no_model(self, tlmc, data, start):
        options = ("--start-model", start, "--lr", "1e6", "--epochs", 1, "--batch-size", 99, "--run-dir", "run")
        code, _, error = tlmc("-q", "finetune", data, *options)
        assert code == 2
        assert "the training diverged" in error
        assert "lower lr (1000000.0)" in error
        assert not {"model.safetensors", "metrics.json"} & {path.name for path in Path("run").iterdir()}

    def test_errors_of_crystals_and_molecules_are_told_apart(self, tlmc, start):
        naphthalene = load_dataset("naphthalene").subset([*range(8), *range(-8, 0)])
        assert naphthalene.is_crystal.tolist() == [True] * 8 + [False] * 8
        frames = []
        for frame, energy, forces in zip(naphthalene.frames, naphthalene.energies, naphthalene.forces, strict=True):
            frames.append(frame.copy())
            frames[-1].calc = SinglePointCalculator(frames[-1], energy=energy, forces=forces)
        ase.io.write("mixed.extxyz", frames)
        options = ("--start-model", start, "--epochs", 1, "--lr", "1e-6")
        code, text, error = tlmc("-q", "finetune", "mixed.extxyz", *options, "--run-dir", "both")
        assert code == 0, error
        assert [text.count(f"│ {kind} │") for kind in ("crystals", "molecules")] == [3, 3]
        content = json.loads(Path("both", "metrics.json").read_text())
        assert set(content["test_by_kind"]["short"]) == {"crystals", "molecules"}
        assert "left out" not in error

        code, text, error = tlmc("-q", "finetune", "mixed.extxyz", *options, "--run-dir", "one", "--crystals-only")
        assert code == 0, error
        assert "isolated molecules are left out (8 of mixed)" in error
        assert "test_by_kind" not in json.loads(Path("one", "metrics.json").read_text())

        code, text, _ = tlmc("-q", "evaluate", "both/model.safetensors", "mixed.extxyz", "--output", "result")
        assert code == 0
        content = json.loads(Path("result", "metrics.json").read_text())
        apart = content["metrics_by_kind"]
        mean = np.mean([apart[kind]["energy_rmse_per_atom"]["value"] ** 2 for kind in ("crystals", "molecules")]) ** 0.5
        assert content["metrics"]["energy_rmse_per_atom"]["value"] == pytest.approx(mean)
        assert text.index("crystals") < text.index("molecules") < text.index("all")

    def test_run_folder_and_record(self, tlmc, data, start, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(data.parent / "reports"))
        code, text, _ = tlmc(
            "-q", "finetune", data, "--start-model", start, "--epochs", 3, "--set", "batch_size=4", "--record", "mine"
        )
        assert code == 0
        [folder] = (data.parent / "reports" / "runs").glob("methanol-ani2xt-short-0-*")
        assert f"run: {folder}" in text
        assert {p.name for p in folder.iterdir()} >= {
            "model.safetensors", "history.csv", "split.json", "metrics.json", "parity.png", "run.json",
        }  # fmt: skip
        assert (folder / "parity.png").read_bytes().startswith(b"\x89PNG")
        assert len(pd.read_csv(folder / "history.csv")) == 3
        content = json.loads((folder / "metrics.json").read_text())
        test = content["test"]
        assert list(test) == ["start", "start, offset refitted", "short"]
        # labels are the start model's own, off by a constant: the refit removes it, forces stay noise
        assert test["start"]["energy_rmse_per_atom"]["value"] == pytest.approx(OFFSET, rel=1e-3)
        assert test["start, offset refitted"]["energy_rmse_per_atom"]["value"] < 1e-4
        assert test["start"]["force_rmse_component"]["value"] == pytest.approx(0.02, rel=0.3)
        _, metadata = load_model(folder / "model.safetensors")
        assert metadata["config"]["batch_size"] == 4
        records = read_records(data.parent / "reports" / "metrics")
        assert set(records["study"]) == {"mine"}
        assert set(records["recipe"]) == set(test)
        assert set(records.loc[records["recipe"] == "start", "n_train"]) == {0}
        assert set(records.loc[records["recipe"] == "short", "n_train"]) == {content["n_train"]}

        # the same command again finds the run finished; other settings in the same folder are refused
        assert tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 3, "--set", "batch_size=4")[0] == 0
        code, _, error = tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 4, "--run-dir", folder)
        assert code == 2
        assert "holds another run" in error

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    @pytest.mark.parametrize("processes", [1, 2])
    def test_an_interrupted_run_loses_no_whole_epoch(self, data, start, number, status, processes):
        command = [sys.executable, "-m", "tlmc.cli", "finetune", str(data), "--start-model", str(start)]
        command += ["--epochs", "100000", "--run-dir", "run", "--processes", str(processes)]
        # into a file, since nobody empties a pipe while this waits
        with open("log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heed_interrupts)
        deadline = time.monotonic() + 100
        while " epoch 3/" not in Path("log").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(timeout=60) == status
        errors = Path("log").read_text()
        assert "Traceback" not in errors
        told = re.findall(r"interrupted after epoch (\d+) of 100000, which is kept in run: the same call", errors)
        assert len(told) == 1, errors
        assert int(told[0]) >= 3
        assert not Path("run", "model.safetensors").exists()
        assert len(pd.read_csv(Path("run", "history.csv"))) == int(told[0])
        assert load_tensors(Path("run", "state.safetensors"))[1]["state"]["epoch"] == int(told[0])

    def test_two_processes(self, tlmc, data, start):
        """One speaks and writes; the result is that of one process with the same batches."""
        options = ["--start-model", start, "--epochs", 2, "--batch-size", 3, "--set", "precision=float64"]
        command = [sys.executable, "-m", "tlmc.cli", "finetune", data, "--processes", 2, "--run-dir", "two"]
        command = [str(argument) for argument in [*command, *options]]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert [answer.stderr.count(f"epoch {epoch}/2") for epoch in (1, 2)] == [1, 1]
        assert answer.stdout.count("run: two") == 1
        assert Path("two", "parity.png").is_file()
        assert tlmc("-q", "finetune", data, "--run-dir", "one", *options)[0] == 0
        two, one = (json.loads(Path(folder, "metrics.json").read_text()) for folder in ("two", "one"))
        assert two["run_key"] == one["run_key"]
        for name, metric in one["test"]["short"].items():
            assert two["test"]["short"][name]["value"] == pytest.approx(metric["value"], rel=1e-5), name

        answer = subprocess.run([*command, "--set", "lambda_=0.5"], capture_output=True, text=True)
        assert answer.returncode == 2
        assert "two holds another run: config.lambda_ (0.1 there, 0.5 now)" in answer.stderr
        assert "Traceback" not in answer.stderr

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--set", "lambda=1"], "lambda = 1: Extra inputs are not permitted; the settings are lambda_, "),
            (["--set", "lambda_=2"], "recipe short: lambda_ = 2: Input should be less than or equal to 1"),
            (["--set", "lambda_"], "--set takes NAME=VALUE, got 'lambda_'"),
            (
                ["--recipe", "long"],
                "there is no recipe 'long': choose one of ",
            ),
            (["--epochs", "0"], "epochs = 0: Input should be greater than or equal to 1"),
            (["--map", "Si"], "--map takes NAME=VALUE, got 'Si'"),
            (["--map", "Si=Xx"], "cannot map Si onto 'Xx'"),
            (["--start-model", "ani3"], "unknown start model 'ani3': choose one of ani2x, ani2xt"),
            (["--start-model", "none.safetensors"], "none.safetensors does not exist"),
            (["--crystals-only"], "0 frames are fewer than the split needs"),
            (["--units", "furlong"], "units must be one of eV"),
            (["--device", "gpu"], "device must be cpu, cuda or cuda:N, got 'gpu'"),
            (["--device", "cuda:77"], "device 'cuda:77' is not there: torch"),
            (["--processes", "2", "--device", "cuda:77"], "device 'cuda:77' is not there: torch"),
            (["--processes", "2", "--map", "Si=Xx"], "cannot map Si onto 'Xx'"),
            (["--energy-key", "REF_energy", "--forces-key", "REF_forces"], "REF_energy"),
        ],
    )
    def test_wrong_input_gets_one_sentence(self, tlmc, data, start, arguments, sentence):
        if "--start-model" not in arguments:
            arguments = ["--start-model", start, *arguments]
        code, out, error = tlmc("finetune", data, "--run-dir", "run", *arguments)
        assert code == 2
        assert sentence in error
        assert "Traceback" not in error
        assert not Path("run").exists()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("--set", "seed=3"), "--set seed=3 is overruled by --seed"),
            (("--set", "epochs=3", "--epochs", 1), "--set epochs=3 is overruled by --epochs"),
            (("--set", "lr=[1"), "--set lr=[1 is not YAML"),
            (("--set", "recipe=start"), "'start' names the errors of the start model"),
        ],
    )
    def test_a_setting_that_would_count_for_nothing_is_refused(self, tlmc, data, start, arguments, sentence):
        code, _, error = tlmc("-q", "finetune", data, "--start-model", start, "--run-dir", "run", *arguments)
        assert code == 2
        assert sentence in error
        assert not Path("run").exists()

    def test_an_element_without_a_network_is_named(self, tlmc, data, start, frames):
        changed = [frame.copy() for frame in frames]
        for frame, labelled in zip(changed, frames, strict=True):
            frame.symbols[0] = "Si"
            frame.calc = SinglePointCalculator(frame, **labelled.calc.results)
        ase.io.write("silicon.extxyz", changed)
        code, _, error = tlmc("-q", "finetune", "silicon.extxyz", "--start-model", start, "--run-dir", "run")
        assert code == 2
        assert "has no network for Si" in error
        code, *_ = tlmc(
            "-q", "finetune", "silicon.extxyz", "--start-model", start, "--epochs", 1, "--map", "Si=C",
            "--run-dir", "mapped",
        )  # fmt: skip
        assert code == 0
        assert load_model("mapped/model.safetensors")[0].element_map == {"Si": "C"}


class TestEvaluate:
    def test_table_and_files(self, tlmc, data, start):
        code, text, _ = tlmc("-q", "evaluate", start, data, "--output", "result")
        assert code == 0
        content = json.loads(Path("result", "metrics.json").read_text())
        assert content["metrics"]["energy_rmse_per_atom"] == {
            "value": pytest.approx(OFFSET, rel=1e-3), "unit": "eV/atom",
        }  # fmt: skip
        assert "energy_rmse_per_atom" in text
        assert len(pd.read_csv("result/per_frame.csv")) == N_FRAMES

    def test_refit_on_the_training_part(self, tlmc, data, start):
        split = {"method": "blocks", "seed": 0, "train": [0, 1, 2], "validation": [3], "test": [4, 5]}
        Path("split.json").write_text(json.dumps(split))
        code, *_ = tlmc("-q", "evaluate", start, data, "--split", "split.json", "--refit", "--output", "result")
        assert code == 0
        content = json.loads(Path("result", "metrics.json").read_text())
        assert content["metrics"]["energy_rmse_per_atom"]["value"] < 1e-4
        assert len(pd.read_csv("result/per_frame.csv")) == 2

    def test_models_trained_on_different_data_are_named_when_averaged(self, tlmc, start, ani2xt):
        for k, (name, model) in enumerate((("one", ani2xt), ("two", scratch(ani2xt, seed=1)))):
            save_model(model, f"{name}.safetensors", {"data": {"name": name, "hash": str(k), "frames": 3}})
        code, _, error = tlmc("-q", "average", "one.safetensors", "two.safetensors", "-o", "mean.safetensors")
        assert code == 0
        assert "trained on different data: one (3 frames), two (3 frames)" in error
        code, _, error = tlmc("-q", "average", "one.safetensors", "one.safetensors", "-o", "twice.safetensors")
        assert code == 2
        assert "models 1 and 2 are one and the same" in error
        assert not Path("twice.safetensors").exists()

    def test_the_mean_of_two_runs_is_a_model_with_errors_on_record(self, tlmc, data, start, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(data.parent / "reports"))
        settings = ("--start-model", start, "--epochs", 1)
        for run, rate in (("one", 1e-4), ("two", 1e-3)):
            assert tlmc("-q", "finetune", data, *settings, "--lr", rate, "--run-dir", run)[0] == 0
        code, text, error = tlmc(
            "-q", "average", "one/model.safetensors", "two/model.safetensors", "-o", "mean.safetensors"
        )
        assert code == 0
        assert "mean of 2 models" in text
        assert "different data" not in error
        code, text, _ = tlmc("-q", "info", "mean.safetensors")
        assert "the mean of 2 models fine-tuned from" in text
        model, metadata = load_model("mean.safetensors")
        assert model.members == 2 * load_model("one/model.safetensors")[0].members
        assert list(metadata["mean_of"]) == ["one/model.safetensors", "two/model.safetensors"]
        code, _, error = tlmc("-q", "average", "one/model.safetensors", "two/model.safetensors", "-o", start)
        assert (code, "is no mean of models, and would be replaced" in error) == (2, True)
        before = Path("one", "metrics.json").read_bytes()
        code, _, error = tlmc("-q", "evaluate", "mean.safetensors", data, "--output", "one")
        assert (code, "is not of tlmc evaluate, which would replace it" in error) == (2, True)
        assert Path("one", "metrics.json").read_bytes() == before
        record = ("--split", "one/split.json", "--part", "validation", "--record", "trial", "--label", "mean")
        assert tlmc("-q", "evaluate", "mean.safetensors", data, *record)[0] == 0
        rows = read_records(data.parent / "reports" / "metrics", study="trial")
        assert set(rows["recipe"]) == {"mean"}
        assert set(rows["split"]) == {"validation"}
        code, _, error = tlmc("-q", "evaluate", "mean.safetensors", data, "--record", "trial")
        assert (code, "--record needs the --split of a run" in error) == (2, True)
        code, _, error = tlmc("-q", "average", "one/model.safetensors", start, "-o", "mean.pt")
        assert (code, "mean.pt must end in .safetensors" in error) == (2, True)

    def test_splits_stand_beside_each_other_on_record_and_are_not_compared(self, tlmc, data, start, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(data.parent / "reports"))
        for recipe, split in (("short", "random"), ("thesis", "blocks")):
            named = ("--recipe", recipe, "--split", split, "--record", "trial")
            assert tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 1, *named)[0] == 0
        records = read_records(data.parent / "reports" / "metrics", quantity="force_rmse_vector", split="test")
        assert records["recipe"].value_counts().to_dict() == {
            "start": 2, "start, offset refitted": 2, "short": 1, "thesis": 1,
        }  # fmt: skip
        with pytest.raises(DataError, match=r"as the split under one name differ: study 'trial'.*, random,.*, blocks,"):
            comparison_table(records)

    def test_a_name_for_the_results_leads_to_no_other_folder(self, tlmc, data, start, monkeypatch):
        reports = data.parent / "reports"
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(reports))
        for name in ("../../../elsewhere", "/tmp/a", "x" * 300):
            named = ("--set", f"recipe={name}", "--epochs", 1)
            code, text, _ = tlmc("-q", "finetune", data, "--start-model", start, *named)
            assert code == 0
            assert name[:9] in text
        folders = list(reports.glob("runs/*"))
        assert len(folders) == 3
        assert all((folder / "model.safetensors").is_file() and (folder / "parity.png").is_file() for folder in folders)

    def test_home_is_found_where_no_shell_looks(self, tlmc, data, start, monkeypatch):
        home = data.parent / "home"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        assert tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 1, "--run-dir=~/run")[0] == 0
        assert (home / "run" / "parity.png").is_file()
        assert not Path("~").exists()

    def test_a_mean_replaces_none_of_its_models(self, tlmc, start, ani2xt):
        save_model(ani2xt, "mean.safetensors", {"mean_of": {}})
        save_model(scratch(ani2xt, seed=1), "one.safetensors")
        code, _, error = tlmc("-q", "average", "one.safetensors", "mean.safetensors", "-o", "mean.safetensors")
        assert code == 2
        assert "is one of the models to average, and would be replaced" in error

    def test_a_folder_with_other_files_is_no_run_folder(self, tlmc, data, start):
        Path("mine").mkdir()
        for name in ("split.json", "metrics.json", "model.safetensors"):
            Path("mine", name).write_text("mine")
        code, _, error = tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 1, "--run-dir", "mine")
        assert (code, "mine holds files that are not those of a run" in error) == (2, True)
        assert {path.read_text() for path in Path("mine").iterdir()} == {"mine"}

    def test_a_split_of_a_run_on_other_frames_is_refused(self, tlmc, data, start):
        assert tlmc("-q", "finetune", data, "--start-model", start, "--epochs", 1, "--run-dir", "run")[0] == 0
        ase.io.write("fewer.extxyz", ase.io.read(data, ":-1"))
        code, _, error = tlmc("-q", "evaluate", start, "fewer.extxyz", "--split", "run/split.json")
        assert code == 2
        assert f"belongs to a run on {N_FRAMES} frames of methanol, not on these {N_FRAMES - 1} of fewer" in error

    @pytest.mark.parametrize(
        ("split", "sentence"),
        [
            ("{", "split.json is not a split"),
            ("[1]", "split.json is not a split"),
            ("{}", "split.json is not a split: split: needs a method"),
            (
                json.dumps({"method": "random", "seed": 0, "train": [0], "validation": [1], "test": [N_FRAMES]}),
                f"split.json names frame {N_FRAMES}, but methanol holds {N_FRAMES}",
            ),
        ],
    )
    def test_a_split_of_other_data_is_refused(self, tlmc, data, start, split, sentence):
        Path("split.json").write_text(split)
        code, _, error = tlmc("-q", "evaluate", start, data, "--split", "split.json")
        assert code == 2
        assert sentence in error


class TestFetchAndInfo:
    def test_list_names_models_and_all_public_sets(self, tlmc):
        code, text, _ = tlmc("fetch", "--list")
        assert code == 0
        for name in ("ani2x", "ani2xt", "molcrys-mace/21_urea", "molcrys-mace/squaric_acid", "naphthalene"):
            assert name in text

    def test_fetching_nothing_or_the_unknown(self, tlmc):
        assert tlmc("fetch")[::2] == (2, "name what to fetch, or see tlmc fetch --list")
        code, _, error = tlmc("fetch", "ani2xt", "ani3")
        assert (code, error) == (2, "nothing to fetch under the name ani3: see tlmc fetch --list")

    def test_fetching_a_start_model(self, tlmc, ani2xt):
        code, text, _ = tlmc("-q", "fetch", "ani2xt")
        assert code == 0
        assert ani2xt.fingerprint[:16] in text

    @pytest.mark.needs_mirror
    def test_fetching_a_public_set_from_the_mirror(self, tlmc):
        code, text, _ = tlmc("-q", "fetch", "molcrys-mace/21_urea")
        assert code == 0
        assert "180 frames" in text
        assert str(Path(os.environ["TLMC_DATA_DIR"]).resolve()) in text

    def test_info_on_data(self, tlmc, data):
        code, text, _ = tlmc("-q", "info", data)
        assert code == 0
        assert f"{N_FRAMES}: 0 of crystals, {N_FRAMES} of isolated molecules" in text
        assert f"H ({4 * N_FRAMES} atoms), C ({N_FRAMES} atoms), O ({N_FRAMES} atoms)" in text

    def test_info_on_data_of_other_names_and_units(self, tlmc, tmp_path):
        crystals = []
        for frame in argon(3):
            results, crystal = frame.calc.results, Atoms(frame.symbols, frame.positions, cell=frame.cell, pbc=True)
            crystal.info = {"E": results["energy"] / kcal * mol, "S": results["stress"] / kcal * mol, "charge": 0}
            crystal.info["name"] = "no stress"
            crystal.arrays["F"] = results["forces"] / kcal * mol
            crystals.append(crystal)
        atom = Atoms("Ar", info={"E": -1 / kcal * mol})
        path = tmp_path / "a.extxyz"
        ase.io.write(path, [atom, *crystals])
        code, _, sentence = tlmc("info", path)
        assert code == 2
        assert "name energy_key (--energy-key) and forces_key (--forces-key)" in sentence
        keys = ("--energy-key", "E", "--forces-key", "F", "--units", "kcal/mol")
        code, text, messages = tlmc("info", path, *keys)
        assert code == 0
        assert "units of the file kcal/mol, kcal/mol/Angstrom frames 3: 3 of crystals" in text
        assert "stress in 0 frames charge states charge 0: 3 frames free atoms Ar -1.000000 eV, from isolated" in text
        assert "frame 0: isolated atoms, taken as energies of free atoms (Ar -1 eV) and for nothing else" in messages
        code, text, _ = tlmc("-q", "info", path, *keys, "--stress-key", "S")
        assert code == 0
        assert "stress in 3 frames" in text
        code, _, sentence = tlmc("-q", "info", path, *keys, "--stress-key", "name")
        assert (code, "stress 'name' is not numeric: 'no stress'" in sentence) == (2, True)
        for subject in ([], ["ani2xt"]):
            code, _, sentence = tlmc("-q", "info", *subject, "--units", "eV")
            assert (code, "go with a data set" in sentence) == (2, True)

    def test_info_on_a_model(self, tlmc, start, ani2xt, monkeypatch):
        monkeypatch.setattr(cli, "out", Console(width=60))
        code, text, _ = tlmc("-q", "info", start)
        assert code == 0
        # in full, however narrow the terminal is
        assert ani2xt.fingerprint in text.replace(" ", "")
        assert "what it does not know" in text
        assert "{" not in text
        code, text, _ = tlmc("-q", "info", start, "--json")
        assert code == 0
        facts = json.loads(text)
        assert facts["model"]["fingerprint"] == ani2xt.fingerprint
        assert "git_revision" in facts["metadata"]

    def test_info_for_machines(self, tlmc, data):
        code, text, _ = tlmc("-q", "info", data, "--json")
        assert code == 0
        assert json.loads(text)["name"] == Path(data).stem

    def test_info_on_the_installation(self, tlmc, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("TLMC_DATA_DIR", str(tmp_path))
        monkeypatch.setattr("tlmc.families.ani.pretrained.reachable", lambda name: name == "ani2xt")
        monkeypatch.setenv("TORCHANI_DATA_DIR", str(tmp_path / "torchani"))
        code, text, _ = tlmc("-q", "info")
        assert code == 0
        assert "start model ani2x not reachable" in text
        assert "start model ani2xt can be fetched" in text
        assert f"data mirror {tmp_path}" in text


class TestLabel:
    def test_labels_by_a_calculator_of_ones_own(self, tlmc, data, frames):
        Path("mine.py").write_text("from ase.calculators.emt import EMT\n\ndef calculator():\n    return EMT()\n")
        code, text, _ = tlmc(
            "-q", "label", data, "-o", "out.extxyz", "--method", "mine.py:calculator", "--level-of-theory", "EMT"
        )
        assert code == 0
        assert f"{N_FRAMES} frames labelled with EMT" in text
        labelled = ase.io.read("out.extxyz", ":")
        assert {frame.info["level_of_theory"] for frame in labelled} == {"EMT"}
        assert np.isfinite([frame.get_potential_energy() for frame in labelled]).all()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([], "name a file of structures, or a recipe with --recipe"),
            (["--recipe", "none"], "unknown recipe 'none'; known are 27-like"),
            (["methanol.extxyz", "--method", "magic"], "unknown method 'magic'"),
            (["absent.extxyz"], "absent.extxyz"),
            (["--recipe", "naphthalene", "--level-of-theory", "x"], "--level-of-theory goes with a --method"),
        ],
    )
    def test_wrong_input_gets_one_sentence(self, tlmc, data, arguments, sentence):
        code, _, error = tlmc("label", *arguments)
        assert code == 2
        assert sentence in error


class TestSevenNet:
    def test_fine_tune_evaluate_and_tell(self, tlmc, data, monkeypatch):
        """A start model of another family, through the same commands."""
        reports = data.parent / "sevennet"
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(reports))
        named = ("--start-model", "sevennet", "--recipe", "sevennet")
        code, text, _ = tlmc("-q", "finetune", data, *named, "--epochs", 1, "--record", "mine")
        assert code == 0
        assert "methanol: errors on 4 test frames, trained on 14" in text
        assert set(read_records(reports / "metrics")["start_model"]) == {"sevennet"}
        [model] = reports.glob("runs/*/model.safetensors")
        code, text, _ = tlmc("-q", "evaluate", model, data)
        assert code == 0
        assert f"on {N_FRAMES} frames of methanol" in text
        assert "force_rmse_vector" in text
        code, text, _ = tlmc("-q", "info", model)
        assert code == 0
        assert "sevennet" in text
        assert "atoms more than 25 A apart: nothing acts" in text

    def test_settings_of_another_family(self, tlmc, data):
        code, _, text = tlmc("-q", "finetune", data, "--start-model", "sevennet", "--recipe", "rich")
        assert code == 2
        assert text.startswith("models of the family sevennet train with richer = None only, got ")

    def test_without_the_package(self, tlmc, data, monkeypatch):
        monkeypatch.setattr("tlmc.families.sevennet.family.SevenNetFamily.is_installed", staticmethod(lambda: False))
        code, _, text = tlmc("-q", "finetune", data, "--start-model", "sevennet")
        assert (code, text) == (2, "SevenNet-0 needs the package sevenn: pip install 'tlmc[sevennet]'")


class TestStudy:
    def test_unknown_profile_and_parameter(self, tlmc, tmp_path, monkeypatch):
        (tmp_path / "notebooks").mkdir()
        monkeypatch.setenv("TLMC_ROOT", str(tmp_path))
        assert tlmc("study", "--profile", "huge")[::2] == (2, "no profile 'huge': there are smoke")
        assert tlmc("study", "-p", "epochs")[::2] == (2, "--parameter takes NAME=VALUE, got 'epochs'")

    def test_without_a_checkout(self, tlmc, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_ROOT", str(tmp_path))
        code, _, error = tlmc("study")
        assert code == 2
        assert "holds no notebooks/ folder: set TLMC_ROOT to the checkout of tlmc" in error


class TestCaseStudy:
    """Trainings and tables are those of `test_casestudy`; here is what the command makes of its arguments."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "own"
        folder.mkdir()
        dataset = load_dataset("33-like").crystals().subset(range(0, 141, 14))
        frames = []
        for k, frame in enumerate(dataset.frames):
            frames.append(frame.copy())
            frames[-1].calc = SinglePointCalculator(frame, energy=dataset.energies[k], forces=dataset.forces[k])
        ase.io.write(folder / "33.traj", frames)
        return folder

    def test_tables_and_figures_of_a_folder(self, tlmc, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("TLMC_REPORTS_DIR", str(tmp_path / "reports"))
        code, text, _ = tlmc("casestudy", folder, "--epochs", 1, "--sizes", "4", "--record", "mine")
        assert code == 0
        assert "fine-tuned" in text
        assert "0.0924" in text
        assert (tmp_path / "reports" / "tables" / "mine_sizes.csv").is_file()
        assert (tmp_path / "reports" / "figures" / "mine_parity_33.png").is_file()
        monkeypatch.setattr(cli, "out", Console(width=80))
        _, text, _ = tlmc("casestudy", folder, "--epochs", 1)
        assert "0.0924" in text
        assert "…" not in text

    def test_wrong_arguments_get_one_sentence(self, tlmc, folder, tmp_path):
        assert tlmc("casestudy", folder, "--sizes", "4,x")[0::2] == (
            2,
            "a number of training frames must be a positive integer, got 'x'",
        )
        code, _, error = tlmc("casestudy", tmp_path)
        assert code == 2
        assert "holds no trajectory" in error
        (folder / "34.traj").write_bytes(b"x")
        code, _, error = tlmc("study", "--data", folder)
        assert code == 2
        assert "34.traj: ASE cannot read it" in error


class TestCommon:
    def test_help_names_the_environment(self, tlmc):
        _, text, _ = tlmc("--help")
        for name in ("TLMC_DATA_DIR", "TORCHANI_DATA_DIR", "TLMC_CACHE_DIR", "TLMC_REPORTS_DIR", "TLMC_THREADS"):
            assert name in text

    @pytest.mark.parametrize(
        "command", ["study", "finetune", "casestudy", "evaluate", "average", "fetch", "info", "label"]
    )
    def test_every_command_shows_examples(self, tlmc, command):
        code, text, _ = tlmc(command, "--help")
        assert code == 0
        assert f"Examples tlmc {command}" in text

    @pytest.mark.parametrize("value", ["0", "two", "-1"])
    def test_threads_must_be_a_positive_number(self, tlmc, monkeypatch, value):
        monkeypatch.setenv("TLMC_THREADS", value)
        code, _, error = tlmc("fetch", "--list")
        assert (code, error) == (2, f"TLMC_THREADS must be a positive integer, got {value!r}")

    @pytest.mark.slow
    def test_threads_reach_torch(self):
        code = "from tlmc.cli import app; app(['info'], standalone_mode=False)"
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"TLMC_THREADS": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert " 1 threads" in answer.stdout

    def test_a_full_disk_gets_one_sentence(self, tlmc, data, start, monkeypatch):
        def full(*_args: object, **_kwargs: object) -> None:
            raise OSError(28, "No space left on device", "run/metrics.json")

        monkeypatch.setattr(cli, "write_json", full)
        code, _, error = tlmc("-q", "evaluate", start, data, "--output", "result")
        assert code == 2
        assert error == "run/metrics.json: No space left on device"
