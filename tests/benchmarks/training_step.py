"""Cost of one training step: the thesis loop against the engine on cached descriptors.

Both take the same weights, frames, labels, batch and threads, in turn (thesis, engine, thesis, ...), and the median of
the repetitions is reported, as a ratio. The thesis loop is what a torchani user writes: per structure a forward pass
(torchani's own neighbour list), forces by autograd with ``create_graph``, backward, and AdamW after every batch.

Usage: ``python tests/benchmarks/training_step.py`` on a quiet machine; needs ANI-2x and the public data sets.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from ase import Atoms
from torch import Tensor

from tlmc import paths
from tlmc.datasets import load_dataset
from tlmc.files import write_json
from tlmc.labelled import Dataset
from tlmc.potentials import load_start_model, to_torchani
from tlmc.potentials.model import Potential
from tlmc.provenance import git_revision, package_versions
from tlmc.training.cache import build_cache
from tlmc.training.engine import Engine, merge
from tlmc.training.loss import batch_loss
from tlmc.units import HARTREE

CRYSTALS = ("molcrys-mace/21_urea", "molcrys-mace/06_benzene", "molcrys-mace/23_succinic_acid")
LAMBDA = 0.9
T = TypeVar("T")
LOG = logging.getLogger("training_step")


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


def engine_step(model: Potential, dataset: Dataset, batches: list[list[int]]) -> Callable[[], None]:
    """Return a function that takes one optimiser step of the engine, merging its batch anew each time."""
    cache = build_cache(model, dataset.frames)
    engine = Engine(model, cache, (True,) * 4)
    engine.flat.grad = engine.gradient
    optimizer = torch.optim.AdamW([engine.flat], lr=1e-7, weight_decay=0.1, fused=True)
    energies = torch.from_numpy(dataset.energies) - model.atomic_reference(dataset.frames)
    forces = [torch.from_numpy(f)[s.order].float() for f, s in zip(dataset.forces, cache.structures, strict=True)]
    loss = partial(batch_loss, lambda_=LAMBDA)

    def step(indices: list[int]) -> None:
        batch = merge([cache[i] for i in indices])
        engine.loss_gradient(batch, energies[indices], torch.cat([forces[i] for i in indices]), loss)
        optimizer.step()

    return _cycle(step, batches)


def measure(model: Potential, name: str, batch: int, repetitions: int, threads: int) -> dict[str, object]:
    """Time both loops in turn on one crystal and return a row of the report."""
    dataset = load_dataset(name).crystals()
    dataset = dataset.subset(range(0, 8 * (len(dataset) // 8), len(dataset) // 8))
    batches = [list(range(first, first + batch)) for first in range(0, len(dataset), batch)]
    thesis, engine = thesis_step(model, dataset, batches), engine_step(model, dataset, batches)
    times: dict[str, list[float]] = {"thesis": [], "engine": []}
    for repetition in range(repetitions + 1):
        for key, step, count in (("thesis", thesis, 1), ("engine", engine, len(batches))):
            began = time.perf_counter()
            for _ in range(count):
                step()
            if repetition:  # the first round warms up
                times[key].append((time.perf_counter() - began) / (count * batch) * 1e3)
    thesis_ms, engine_ms = statistics.median(times["thesis"]), statistics.median(times["engine"])
    LOG.info(
        "%s batch %d: thesis %.1f ms, engine %.2f ms, ratio %.1f",
        name,
        batch,
        thesis_ms,
        engine_ms,
        thesis_ms / engine_ms,
    )
    return {
        "crystal": name,
        "atoms": len(dataset.frames[0]),
        "start_model": model.name,
        "batch": batch,
        "threads": threads,
        "thesis_ms": round(thesis_ms, 2),
        "engine_ms": round(engine_ms, 3),
        "ratio": round(thesis_ms / engine_ms, 2),
        "thesis_range_ms": [round(min(times["thesis"]), 2), round(max(times["thesis"]), 2)],
        "engine_range_ms": [round(min(times["engine"]), 3), round(max(times["engine"]), 3)],
    }


def other_load(seconds: float = 2.0) -> float:
    """Return how many cores other processes keep busy right now."""
    return psutil.cpu_percent(interval=seconds) / 100.0 * (psutil.cpu_count() or 1)


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


def main() -> int:
    """Run the benchmark; return 1 without a report if the machine is busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-model", default="ani2x", choices=("ani2x", "ani2xt"))
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--crystals", nargs="+", default=list(CRYSTALS))
    parser.add_argument("--busy", type=float, default=0.25, help="refuse above this many cores of other load")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message="The extensions", category=UserWarning)
    if options.repetitions < 5:
        parser.error("at least 5 repetitions")
    output = options.output or paths.reports_dir() / "benchmarks" / "training_step.json"
    torch.set_num_threads(options.threads)
    model = load_start_model(options.start_model)
    rows = []
    for batch in options.batch:
        for crystal in options.crystals:
            if (load := other_load()) > options.busy:
                LOG.error("other processes keep %.2f cores busy: nothing is reported", load)
                return 1
            rows.append(measure(model, crystal, batch, options.repetitions, options.threads))
    means = {
        str(batch): round(math.exp(statistics.mean(math.log(row["ratio"]) for row in rows if row["batch"] == batch)), 2)
        for batch in options.batch
    }
    for batch, mean in means.items():
        LOG.info("batch %s: geometric mean of the ratios %.1f", batch, mean)
    machine = {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    content = {"rows": rows, "geometric_mean_ratio": means, "repetitions": options.repetitions, "machine": machine}
    write_json(output, content | {"versions": package_versions(), "git_revision": git_revision()})
    LOG.info("written to %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
