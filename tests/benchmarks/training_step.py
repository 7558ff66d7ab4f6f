"""Cost of fine-tuning: the thesis loop against the engine on cached descriptors.

Both take the same weights, frames, labels, batch and threads, in turn (thesis, engine, thesis, ...), and the median of
the repetitions is reported, as a ratio. The thesis loop is what a torchani user writes: per structure a forward pass
(torchani's own neighbour list), forces by autograd with ``create_graph``, backward, and AdamW after every batch.

Also measured: an epoch with validation, the time to a target error from a fresh process (cache cold and warm), cache
build and size, peak memory, energy and forces with the ASE calculator against torchani's own model, and how the engine
grows with atoms per cell and with structures.

Usage: ``python tests/benchmarks/training_step.py`` on a quiet machine; needs ANI-2x and the public data sets. A busy
machine is refused; ``--busy 99`` measures all the same, and the report says that it is not reportable.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from ase import Atoms
from torch import Tensor

from tlmc import paths
from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset
from tlmc.data.splits import split_dataset
from tlmc.families.ani import to_torchani
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.compiled_sweeps import library
from tlmc.families.ani.engine import Engine
from tlmc.families.ani.model import Potential
from tlmc.files import write_json
from tlmc.potentials import TlmcCalculator, load_start_model
from tlmc.provenance import git_revision, package_versions
from tlmc.training.config import recipe
from tlmc.training.fine_tuning import finetune
from tlmc.training.loss import batch_loss
from tlmc.training.optimizer import Update
from tlmc.units import HARTREE

CRYSTALS = (
    "molcrys-mace/21_urea",
    "molcrys-mace/06_benzene",
    "molcrys-mace/11_formamide",
    "molcrys-mace/23_succinic_acid",
    "naphthalene",
)
TARGET_CRYSTAL = "molcrys-mace/21_urea"
LAMBDA = 0.9
T = TypeVar("T")
LOG = logging.getLogger("training_step")


class BusyError(RuntimeError):
    """Another process keeps the machine busy."""


def thesis_step(model: Potential, dataset: Dataset, batches: list[list[int]]) -> Callable[[], None]:
    """Return a function that takes one optimiser step of the thesis loop, cycling through the batches."""
    network = to_torchani(model)
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-7, weight_decay=0.1)
    samples = [[_sample(dataset, i) for i in batch] for batch in batches]

    def step(samples: list[tuple[Tensor, ...]]) -> None:
        optimizer.zero_grad()
        for numbers, positions, cell, pbc, energy, forces in samples:
            positions = positions.clone().requires_grad_(True)
            predicted = network((numbers, positions), cell, pbc).energies * HARTREE
            gradient = torch.autograd.grad(predicted.sum(), positions, create_graph=True)[0]
            n_atoms = numbers.shape[1]
            force_term = (gradient + forces).square().sum() / n_atoms
            loss = LAMBDA * force_term + (1 - LAMBDA) * ((predicted - energy) / n_atoms).square().sum()
            (loss / len(samples)).backward()
        optimizer.step()

    return _cycle(step, samples)


def thesis_validation(model: Potential, dataset: Dataset) -> Callable[[], None]:
    """Return a function that validates one structure with torchani, cycling through the structures."""
    network = to_torchani(model)

    def validate(sample: tuple[Tensor, ...]) -> None:
        numbers, positions, cell, pbc, _, _ = sample
        positions = positions.clone().requires_grad_(True)
        energies = network((numbers, positions), cell, pbc).energies
        torch.autograd.grad(energies.sum(), positions)

    return _cycle(validate, [_sample(dataset, i) for i in range(len(dataset))])


def engine_step(model: Potential, dataset: Dataset, batches: list[list[int]]) -> Callable[[], None]:
    """Return a function that takes one optimiser step of the engine, merging its batch anew each time."""
    cache = build_cache(model, dataset.frames)
    engine = Engine(model, cache, (True,) * 4)
    update = Update(
        engine.flat, torch.zeros_like(engine.flat), torch.zeros_like(engine.flat), engine.gradient, 1e-7, 0.1, 1
    )
    energies = torch.from_numpy(dataset.energies) - model.atomic_reference(dataset.frames)
    forces = [torch.from_numpy(f)[s.order].float() for f, s in zip(dataset.forces, cache.structures, strict=True)]
    loss = partial(batch_loss, lambda_=LAMBDA)

    def step(indices: list[int]) -> None:
        batch = merge([cache[i] for i in indices])
        engine.loss_gradient(batch, energies[indices], torch.cat([forces[i] for i in indices]), loss, update)

    return _cycle(step, batches)


def measure(model: Potential, name: str, batch: int, repetitions: int, threads: int) -> dict[str, Any]:
    """Time both loops in turn on one crystal and return a row of the report."""
    dataset = _some(name)
    batches = [list(range(first, first + batch)) for first in range(0, len(dataset), batch)]
    thesis, engine = thesis_step(model, dataset, batches), engine_step(model, dataset, batches)
    times = _in_turn({"thesis": (thesis, 1, batch), "engine": (engine, 2 * len(batches), batch)}, repetitions)
    row = _row(model, name, len(dataset.frames[0]), threads) | {"batch": batch} | _ratio(times)
    LOG.info("%(start_model)s %(crystal)s batch %(batch)d: thesis %(thesis_ms).1f ms, engine %(engine_ms).2f ms, "
             "ratio %(ratio).1f", row)  # fmt: skip
    return row


def measure_epoch(model: Potential, name: str, repetitions: int, threads: int) -> dict[str, Any]:
    """Compare an epoch with validation at batch 2: engine epochs as they are, the thesis loop from its parts."""
    dataset = load_dataset(name).crystals()
    parts = split_dataset(dataset, seed=0)
    n_train, n_validation = len(parts.train), len(parts.validation)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TLMC_CACHE_DIR"] = folder
        config = recipe("thesis", epochs=repetitions, lr=1e-7)
        history = finetune(model, dataset, parts, config, progress=False, threads=threads).history
    some = _some(name)
    step = thesis_step(model, some, [[i, i + 1] for i in range(0, 8, 2)])
    times = _in_turn({"step": (step, 1, 2), "validate": (thesis_validation(model, some), 4, 1)}, repetitions)
    thesis = [n_train * s + n_validation * v for s, v in zip(times["step"], times["validate"], strict=True)]
    row = _row(model, name, len(dataset.frames[0]), threads) | {
        "structures": [n_train, n_validation],
        "thesis": "time per training and per validation structure, times their number",
    }
    row |= _ratio({"thesis": thesis, "engine": (1e3 * history["seconds"]).tolist()})
    LOG.info("%(start_model)s %(crystal)s epoch: thesis %(thesis_ms).0f ms, engine %(engine_ms).1f ms, "
             "ratio %(ratio).1f", row)  # fmt: skip
    return row


def measure_inference(model: Potential, name: str, repetitions: int, threads: int) -> dict[str, Any]:
    """Compare energy and forces of a moving crystal: torchani's own model and the ASE calculator."""
    frame = load_dataset(name).crystals().frames[0].copy()
    frame.calc = TlmcCalculator(model)
    network, rng = to_torchani(model), np.random.default_rng(0)

    def ours() -> None:
        frame.positions += rng.normal(scale=0.003, size=frame.positions.shape)
        frame.get_forces()

    def stock() -> None:
        positions = torch.from_numpy(frame.positions).float()[None].requires_grad_()
        arrays = torch.from_numpy(frame.cell.array).float(), torch.from_numpy(frame.pbc)
        energies = network((torch.from_numpy(frame.numbers)[None], positions), *arrays).energies
        torch.autograd.grad(energies.sum(), positions)

    times = _in_turn({"thesis": (stock, 3, 1), "engine": (ours, 3, 1)}, repetitions)
    row = _row(model, name, len(frame), threads) | _ratio(times)
    renamed = {key.replace("thesis", "torchani").replace("engine", "calculator"): value for key, value in row.items()}
    LOG.info("%(start_model)s %(crystal)s inference: torchani %(torchani_ms).1f ms, calculator %(calculator_ms).1f ms, "
             "ratio %(ratio).1f", renamed)  # fmt: skip
    return renamed


def measure_cache(model: Potential, name: str) -> dict[str, Any]:
    """Time the build of a cache per structure and weigh it."""
    frames = _some(name).frames
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for repetition in range(3):
            began = time.perf_counter()
            cache = build_cache(model, frames, folder=Path(folder) / str(repetition))
            seconds.append((time.perf_counter() - began) / len(frames))
        size = sum(file.stat().st_size for file in cache.folder.iterdir())
    n_atoms = sum(map(len, frames))
    row = {
        "crystal": name,
        "atoms": len(frames[0]),
        "seconds_per_structure": round(statistics.median(seconds), 4),
        "seconds_per_100_atoms": round(statistics.median(seconds) * 100 / len(frames[0]), 4),
        "bytes_per_atom": round(size / n_atoms),
    }
    LOG.info("%(crystal)s cache: %(seconds_per_structure).3f s per structure, %(bytes_per_atom)d bytes per atom", row)
    return row


TRAIN = """
import json, resource, sys, time
began = time.perf_counter()
from tlmc import finetune, load_dataset, load_start_model, recipe, split_dataset
import torch
torch.set_num_threads(int(sys.argv[3]))
model, data = load_start_model(sys.argv[1]), load_dataset(sys.argv[2]).crystals()
result = finetune(model, data, split_dataset(data, seed=0), recipe(**json.loads(sys.argv[4])), progress=False,
                  threads=int(sys.argv[3]))
from tlmc.evaluation import evaluate
from tlmc.potentials import predict
test = data.subset(split_dataset(data, seed=0).test)
seconds = time.perf_counter() - began
error = evaluate(test, predict(result.potential, test.frames))["force_rmse_vector"].value
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "epochs_seconds": result.history["seconds"].sum(), "error": error,
                  "peak_bytes": peak}))
"""


def measure_target(model: Potential, epoch: dict[str, Any], threads: int) -> dict[str, Any]:
    """Time to the test force error of the thesis protocol (100 epochs, urea), from fresh processes.

    The thesis protocol is run with the engine, which takes the same steps to rounding, and its epochs are multiplied by
    the measured ratio of an epoch: the loop itself takes a quarter of an hour. Then ever costlier trainings
    start from nothing until one reaches that error, and that one is repeated with its cache warm.
    """

    def train(folder: str, **settings: Any) -> dict[str, Any]:
        command = [sys.executable, "-c", TRAIN, model.name, TARGET_CRYSTAL, str(threads), json.dumps(settings)]
        environment = os.environ | {"TLMC_CACHE_DIR": folder, "PYTHONWARNINGS": "ignore"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return answer

    with _empty_cache() as folder:
        thesis = train(folder, name="thesis")
    loop_seconds = thesis["epochs_seconds"] * epoch["ratio"]
    row: dict[str, Any] = {
        "crystal": TARGET_CRYSTAL,
        "start_model": model.name,
        "target_force_rmse_vector": thesis["error"],
        "thesis_seconds": loop_seconds,
        "thesis": "engine's time for the same 100 epochs, times the measured ratio of an epoch",
        "engine_seconds_same_protocol": thesis["seconds"],
        "peak_memory_bytes": thesis["peak_bytes"],
        "reached": False,
    }
    # by rising cost
    candidates: list[dict[str, Any]] = [
        *({"name": "rich", "members": 2, "epochs": epochs} for epochs in (20, 30, 40, 60)),
        {"name": "rich", "members": 4},
        {"name": "short"},
    ]
    for settings in candidates:
        with _empty_cache() as folder:
            cold = train(folder, **settings)
            if cold["error"] > thesis["error"]:
                continue
            warm = train(folder, **settings)
        row |= {
            "reached": True,
            "settings": settings,
            "error": cold["error"],
            "cold_seconds": cold["seconds"],
            "warm_seconds": warm["seconds"],
            "ratio_cold": loop_seconds / cold["seconds"],
            "ratio_warm": loop_seconds / warm["seconds"],
        }
        break
    LOG.info("time to target: %s", row)
    return row


@contextmanager
def _empty_cache() -> Iterator[str]:
    """Yield a cache folder that holds start models, which are downloads, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        models = paths.cache_dir() / "start-models"
        if models.is_dir():
            shutil.copytree(models, Path(folder) / models.name)
        yield folder


def measure_growth(model: Potential, threads: int) -> list[dict[str, Any]]:
    """Engine step per structure against atoms per cell (urea, supercells) and against the structures in a batch."""
    dataset = _some(TARGET_CRYSTAL)
    rows = []
    for cells, batch in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2), (8, 2)):
        repeat = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}[cells]
        larger = replace(
            dataset,
            frames=tuple(frame.repeat(repeat) for frame in dataset.frames),
            energies=dataset.energies * cells,
            forces=tuple(np.tile(f, (cells, 1)) for f in dataset.forces),
        )
        step = engine_step(model, larger, [list(range(f, f + batch)) for f in range(0, 8, batch)])
        times = _in_turn({"engine": (step, 4, batch)}, 7)["engine"]
        rows.append(
            {"atoms": len(larger.frames[0]), "batch": batch, "threads": threads,
             "engine_ms_per_structure": round(statistics.median(times), 3)}
        )  # fmt: skip
        LOG.info("growth: %s", rows[-1])
    return rows


def other_load(seconds: float = 2.0) -> float:
    """Return how many cores other processes keep busy right now."""
    return psutil.cpu_percent(interval=seconds) / 100.0 * (psutil.cpu_count() or 1)


def gemm_peak() -> float:
    """Return the best rate of a float32 matrix product on this machine, GFlop/s."""
    a, best = torch.randn(768, 768), math.inf
    for _ in range(20):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2e-9 * len(a) ** 3 / best


def _some(name: str) -> Dataset:
    """Return eight crystals of a set, spread over it."""
    dataset = load_dataset(name).crystals()
    return dataset.subset(range(0, 8 * (len(dataset) // 8), len(dataset) // 8))


def _in_turn(functions: dict[str, tuple[Callable[[], None], int, int]], repetitions: int) -> dict[str, list[float]]:
    """Time functions in turn; each comes with calls per repetition and structures per call. Return ms per structure."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, (function, calls, structures) in functions.items():
            began = time.perf_counter()
            for _ in range(calls):
                function()
            if repetition:  # the first round warms up
                times[name].append((time.perf_counter() - began) / (calls * structures) * 1e3)
    return times


def _row(model: Potential, name: str, atoms: int, threads: int) -> dict[str, Any]:
    return {"crystal": name, "atoms": atoms, "start_model": model.name, "threads": threads}


def _ratio(times: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    content: dict[str, Any] = {f"{name}_ms": round(value, 3) for name, value in medians.items()}
    content["ratio"] = round(medians["thesis"] / medians["engine"], 2)
    ranges = {f"{name}_range_ms": [round(min(v), 3), round(max(v), 3)] for name, v in times.items()}
    return content | ranges


def _sample(dataset: Dataset, index: int) -> tuple[Tensor, ...]:
    frame: Atoms = dataset.frames[index]
    return (
        torch.from_numpy(frame.numbers)[None],
        torch.from_numpy(frame.positions).float()[None],
        torch.from_numpy(frame.cell.array).float(),
        torch.from_numpy(frame.pbc),
        torch.tensor([dataset.energies[index]]).float(),
        torch.from_numpy(dataset.forces[index]).float()[None],
    )


def _cycle(step: Callable[[T], None], items: list[T]) -> Callable[[], None]:
    def endless() -> Iterator[T]:
        while True:
            yield from items

    iterator = endless()
    return lambda: step(next(iterator))


def _means(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, float]:
    """Return geometric means of the ratios, over the crystals, per value of the keys."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(" ".join(str(row[key]) for key in keys), []).append(math.log(row["ratio"]))
    return {name: round(math.exp(statistics.mean(values)), 2) for name, values in groups.items()}


def main() -> int:
    """Run the benchmark; return 1 without a report if the machine is busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-models", nargs="+", default=["ani2x", "ani2xt"], choices=("ani2x", "ani2xt"))
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--crystals", nargs="+", default=list(CRYSTALS))
    parser.add_argument("--busy", type=float, default=0.25, help="refuse above this many cores of other load")
    parser.add_argument("--steps-only", action="store_true", help="leave out all but the training step")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("tlmc").setLevel(logging.ERROR)  # what is odd in the data is known
    warnings.filterwarnings("ignore", message="The extensions", category=UserWarning)
    if options.repetitions < 5:
        parser.error("at least 5 repetitions")
    output = options.output or paths.reports_dir() / "benchmarks" / "training_step.json"
    torch.set_num_threads(options.threads)
    common: dict[str, Any] = {"repetitions": options.repetitions, "threads": options.threads}
    began, loads = time.perf_counter(), []

    def quiet() -> None:
        loads.append(other_load(1.0))
        if loads[-1] > options.busy:
            raise BusyError(f"other processes keep {loads[-1]:.2f} cores busy: nothing is reported")

    rows, epochs, inference, growth = [], [], [], []
    target: dict[str, Any] = {}
    cache_dir = os.environ.get("TLMC_CACHE_DIR")
    try:
        quiet()
        peak = gemm_peak()
        models = [load_start_model(name) for name in options.start_models]
        for model in models:
            for crystal in options.crystals:
                for batch in options.batch:
                    quiet()
                    rows.append(measure(model, crystal, batch, **common))
                if not options.steps_only:
                    quiet()
                    epochs.append(measure_epoch(model, crystal, **common))
                    _restore("TLMC_CACHE_DIR", cache_dir)
        caches = [] if options.steps_only else [measure_cache(models[0], crystal) for crystal in options.crystals]
        if not options.steps_only:
            quiet()
            inference = [measure_inference(model, "molcrys-mace/23_succinic_acid", **common) for model in models]
            quiet()
            growth = measure_growth(models[0], options.threads)
            urea = next((e for e in epochs if e["crystal"] == TARGET_CRYSTAL), None)
            if urea is not None:
                quiet()
                target = measure_target(models[0], urea, options.threads)
    except BusyError as error:
        LOG.error("%s", error)
        return 1
    means = _means(rows, ("start_model", "batch")) | {
        f"all models {batch}": mean for batch, mean in _means(rows, ("batch",)).items()
    }
    epoch_means = _means(epochs, ("start_model",))
    LOG.info("geometric means: steps %s, epochs %s; %.0f s in all", means, epoch_means, time.perf_counter() - began)
    reportable = max(loads) <= 0.25 and library(torch.float32) is not None
    content = {
        "reportable": reportable,
        "largest_other_load": round(max(loads), 2),
        "rows": rows,
        "geometric_mean_ratio": means,
        "epochs": epochs,
        "geometric_mean_ratio_epoch": epoch_means,
        "time_to_target": target,
        "inference": inference,
        "cache": caches,
        "growth": growth,
        "repetitions": options.repetitions,
        "gemm_gflop_per_second": round(peak),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
    }
    write_json(output, content | {"versions": package_versions(), "git_revision": git_revision()})
    LOG.info("written to %s%s", output, "" if reportable else ", NOT reportable: the machine was busy")
    return 0


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
