"""Several processes: the run of one with the same batches, whatever the shares, also after a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist

from helpers.training import labelled, same_weights, student
from helpers.training_processes import CASES, settings
from tlmc.data.splits import split_dataset
from tlmc.errors import ConfigError
from tlmc.potentials.model_files import load_model
from tlmc.training.distributed import ContactError, Group, check_backend, launch, processes
from tlmc.training.fine_tuning import finetune

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORKER = ["-m", "helpers.training_processes"]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where two processes left their results; their launcher was killed in the midst of one case before."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"TLMC_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with open(folder / "killed.log", "w") as log:
        killed = subprocess.Popen([*TORCHRUN, *WORKER, str(folder), "killed"], env=environment, stdout=log, stderr=log)
        try:
            while not (folder / "runs" / "killed" / "history.csv").exists():
                assert killed.poll() is None, (folder / "killed.log").read_text()
                time.sleep(0.01)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    # nobody ends the processes of a launcher that is killed: they must notice
    pids = [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert "the launcher of this training is gone" in (folder / "killed.log").read_text()
    answer = subprocess.run([*TORCHRUN, *WORKER, str(folder), *CASES], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return folder


def end(folder, case, rank):
    model, metadata = load_model(folder / f"{case}-{rank}.safetensors")
    return model, pd.read_csv(folder / f"{case}-{rank}.csv"), metadata


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder, case, tmp_path, monkeypatch):
    """Weights, reference energies and learning curve; both processes end with the same bits."""
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    data = labelled()
    alone = finetune(student(), data, split_dataset(data, seed=0), settings(case))
    (first, history, metadata), (second, *_) = end(folder, case, 0), end(folder, case, 1)
    assert same_weights(first, second)
    tolerance = 1e-9 if alone.config.precision == "float64" else 1e-5
    measured = ["seconds", "cpu_seconds"]
    expected = alone.history.drop(columns=measured)
    pd.testing.assert_frame_equal(history.drop(columns=measured, errors="ignore"), expected, rtol=max(tolerance, 1e-7))
    for symbol in "HCO":
        for layer, expected in zip(first.networks[symbol], alone.potential.networks[symbol], strict=True):
            for part, other in zip(layer, expected, strict=True):
                torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance)
    assert first.reference.offsets == pytest.approx(alone.potential.reference.offsets, rel=1e-6)
    assert (0 < metadata["resumed_from"] < alone.config.epochs) == (case == "killed")


@pytest.mark.slow
def test_only_the_first_process_writes(folder):
    *_, first = end(folder, "even", 0)
    *_, second = end(folder, "even", 1)
    assert (first["run_dir"], second["run_dir"]) == (str(folder / "runs" / "even"), "None")
    stored, _ = load_model(folder / "runs" / "even" / "model.safetensors")
    assert same_weights(stored, end(folder, "even", 0)[0])


@pytest.mark.slow
def test_a_run_of_two_processes_is_known_to_one(folder, monkeypatch):
    """A finished run is read, whoever made it."""
    monkeypatch.setenv("TLMC_CACHE_DIR", str(folder / "cache"))
    data = labelled()
    run_dir = folder / "runs" / "killed"
    again = finetune(student(), data, split_dataset(data, seed=0), settings("killed"), run_dir)
    assert again.resumed_from == 40
    assert same_weights(again.potential, end(folder, "killed", 0)[0])


def test_shares_cover_a_batch():
    batch = np.arange(7)
    for size in (1, 2, 3, 9):
        shares = [Group(rank, size).share(batch) for rank in range(size)]
        assert sorted(np.concatenate(shares)) == batch.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged():
    with processes() as group:
        assert (group.rank, group.size, group.is_first) == (0, 1, True)
        tensor = torch.arange(3.0)
        assert group.sum_(tensor) is group.follow_(tensor) is tensor
        assert tensor.tolist() == [0.0, 1.0, 2.0]
        content = {"a": 1}
        assert group.from_first(content) is content
        with group.first_alone():
            assert not dist.is_initialized()


def test_missing_backends_and_variables_are_named(monkeypatch):
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(ConfigError, match=r"on cpu needs the backend gloo, which torch .* was built without"):
        check_backend("cpu")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="on cuda needs the backend nccl"):
        check_backend("cuda")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK must be an integer of at least 0, .* but is not set"), processes():
        pass
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK must be an integer of at least 0, .* but is 'one'"), processes():
        pass
    monkeypatch.setenv("RANK", "-1")
    with pytest.raises(ConfigError, match="RANK must be an integer of at least 0, .* but is '-1'"), processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be an integer of at least 1, .* but is '0'"), processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="device must be cpu or cuda, got 'cuda:0'"), processes("cuda:0"):
        pass


@pytest.mark.slow
def test_launched_processes_share_the_threads_and_hand_on_their_status(tmp_path, monkeypatch, capfd):
    for name in ("TLMC_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)

    def surroundings():
        launcher = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return dict(os.environ), handlers, launcher.level, torch.get_num_threads()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(' '.join(os.environ[n] for n in names))\n"
        "if sys.argv[2:] == ['fail']:\n"
        "    time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(2)\n"
        "if sys.argv[2:] == ['die']:\n"
        "    time.sleep(60) if os.environ['RANK'] == '0' else os.kill(os.getpid(), 9)\n"
    )
    before = surroundings()
    assert launch(2, [str(script), str(tmp_path)]) == 0
    assert surroundings() == before
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 2 2", "1 1 2 2"]
    assert launch(2, [str(script), str(tmp_path), "fail"]) == 2
    with pytest.raises(ContactError, match="process 1 ended with SIGKILL: the same command goes on"):
        launch(2, [str(script), str(tmp_path), "die"])
    assert surroundings() == before
    # a thread, a server's perhaps, may do the same
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(launch, 2, [str(script), str(tmp_path)]).result() == 0
    assert surroundings() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_launch_under_nohup_outlives_its_terminal(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "here, rank = pathlib.Path(sys.argv[1]), os.environ['RANK']\n"
        "(here / f'started-{rank}').touch()\n"
        "while not (here / 'go on').exists(): time.sleep(0.01)\n"
        "(here / f'done-{rank}').touch()\n"
    )
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from tlmc.training.distributed import launch\n"
        "sys.exit(launch(2, sys.argv[1:]))\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(script), str(tmp_path)])
    try:
        while not all((tmp_path / f"started-{rank}").exists() for rank in range(2)):
            assert launcher.poll() is None
            time.sleep(0.01)
        launcher.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        (tmp_path / "go on").touch()
        assert launcher.wait(60) == 0
    finally:
        launcher.kill()
        launcher.wait()
    assert all((tmp_path / f"done-{rank}").exists() for rank in range(2))
