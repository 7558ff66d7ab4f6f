"""Cost of descriptors and of their derivatives: this package against DScribe.

Both describe the same structures with the same parameters and threads, in turn (ours, theirs, ours, ...); the median of
the repetitions is reported, and how many times faster ours is. Crystals of 16 to 500 atoms. DScribe has derivatives of
these in crystals by finite differences only, which take hours for all atoms of a large cell: it is asked for those of
two atoms, and its time is scaled to all of them. Ours are always of all atoms; those of atoms' surroundings are asked
for in pieces of some centres, as the array of all takes gigabytes. Two atoms of an Ewald matrix of 144 atoms take
DScribe minutes: those derivatives end before.

Usage: ``python tests/benchmarks/descriptors.py`` on a quiet machine; needs the extra ``reference``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dscribe.descriptors
import psutil
import torch
from ase import Atoms
from ase.build import bulk

from tlmc import paths
from tlmc.data.loading import load_dataset
from tlmc.descriptors import SOAP, EwaldMatrix, SymmetryFunctions
from tlmc.files import write_json
from tlmc.provenance import git_revision, package_versions

R_CUT = 5.0
RADIAL = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]
ANGULAR = [(0.01, zeta, lambda_) for zeta in (1.0, 2.0, 4.0) for lambda_ in (1.0, -1.0)]
ACCURACY = 1e-6
CENTRES_AT_ONCE = 72
"""Centres whose derivatives are held at a time; 1 GB for SOAP in the largest cell."""
LOG = logging.getLogger("descriptors")


def structures() -> dict[int, Atoms]:
    """Return crystals by their number of atoms: sodium chloride, and 1, 2, 4, 8 and 14 cells of naphthalene."""
    frame = load_dataset("naphthalene").crystals().frames[0]
    frame.wrap()
    salt = bulk("NaCl", "rocksalt", 5.64, cubic=True).repeat((2, 1, 1))
    salt.rattle(0.02, seed=0)
    salt.wrap()
    cells = [salt, *(frame.repeat(times) for times in ((1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 7, 1)))]
    return {len(cell): cell for cell in cells}


def cases(frame: Atoms) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Return our descriptor, DScribe's, and what its ``create`` is told, by name."""
    species = sorted(set(frame.symbols))
    size = {"r_cut": R_CUT, "n_max": 8, "l_max": 6, "sigma": 0.5}
    theirs = dscribe.descriptors
    return {
        **{
            f"SOAP {basis}": (
                SOAP(species, basis=basis, **size),
                theirs.SOAP(species=species, rbf=basis, periodic=True, **size),
                {},
            )
            for basis in ("gto", "polynomial")
        },
        "ACSF": (
            SymmetryFunctions(species, R_CUT, [(0.0, 0.0), *RADIAL], ANGULAR),
            theirs.ACSF(species=species, r_cut=R_CUT, g2_params=RADIAL, g4_params=ANGULAR, periodic=True),
            {},
        ),
        "Ewald": (
            EwaldMatrix(len(frame), "none", ACCURACY),
            theirs.EwaldSumMatrix(n_atoms_max=len(frame), permutation="none"),
            {"accuracy": ACCURACY},
        ),
    }


def measure(
    name: str, quantity: str, n_atoms: int, ours: Callable[[], object], theirs: Callable[[], object], **options: Any
) -> dict[str, object]:
    """Time two functions in turn and return a row of the report."""
    times: dict[str, list[float]] = {"ours": [], "dscribe": []}
    spent, scale = 0.0, options["scale"]
    for repetition in range(options["repetitions"] + 1):
        for key, function in (("ours", ours), ("dscribe", theirs)):
            gc.collect()
            began = time.perf_counter()
            function()
            took = time.perf_counter() - began
            spent += took
            # the first round warms up, unless a single one is long enough
            if repetition or spent > options["seconds"]:
                times[key].append(took * 1e3 * (scale if key == "dscribe" else 1.0))
        if spent > options["seconds"] and times["dscribe"] and times["ours"]:
            break
    ours_ms, theirs_ms = (statistics.median(times[key]) for key in ("ours", "dscribe"))
    LOG.info(
        "%s %s, %d atoms: %.1f ms, DScribe %.1f ms, ratio %.2f",
        name,
        quantity,
        n_atoms,
        ours_ms,
        theirs_ms,
        theirs_ms / ours_ms,
    )
    return {
        "descriptor": name,
        "quantity": quantity,
        "atoms": n_atoms,
        "threads": torch.get_num_threads(),
        "ours_ms": round(ours_ms, 3),
        "dscribe_ms": round(theirs_ms, 3),
        "ratio": round(theirs_ms / ours_ms, 2),
        "ours_range_ms": [round(min(times["ours"]), 3), round(max(times["ours"]), 3)],
        "dscribe_range_ms": [round(min(times["dscribe"]), 3), round(max(times["dscribe"]), 3)],
        "dscribe_scaled_by": round(scale, 2),
        "repetitions": len(times["ours"]),
    }


def all_derivatives(descriptor: Any, frame: Atoms) -> None:
    """Compute the derivatives of all rows with respect to all atoms, a piece of the centres at a time."""
    if isinstance(descriptor, EwaldMatrix):
        descriptor.derivatives(frame)
        return
    for first in range(0, len(frame), CENTRES_AT_ONCE):
        descriptor.derivatives(frame, range(first, min(first + CENTRES_AT_ONCE, len(frame))))


def rows_of(frame: Atoms, repetitions: int, seconds: float, largest: dict[str, int]) -> list[dict[str, object]]:
    """Return the rows of one structure, values of all descriptors, then derivatives."""
    rows, n_atoms = [], len(frame)
    pace = {"repetitions": repetitions, "seconds": seconds}
    for name, (ours, theirs, told) in cases(frame).items():
        with torch.no_grad():
            rows.append(
                measure(
                    name,
                    "values",
                    n_atoms,
                    lambda ours=ours: ours(frame),
                    lambda theirs=theirs, told=told: theirs.create(frame, **told),
                    scale=1.0,
                    **pace,
                )
            )
            if n_atoms > largest["Ewald" if name == "Ewald" else "local"]:
                continue
            included = [0, n_atoms // 2]
            local = {} if name == "Ewald" else {"attach": True}
            rows.append(
                measure(
                    name,
                    "derivatives",
                    n_atoms,
                    lambda ours=ours: all_derivatives(ours, frame),
                    lambda theirs=theirs, local=local, included=included: theirs.derivatives(
                        frame, include=included, method="numerical", return_descriptor=False, **local
                    ),
                    scale=n_atoms / len(included),
                    **pace,
                )
            )
    return rows


def other_load(seconds: float = 2.0) -> float:
    """Return how many cores other processes keep busy right now."""
    return psutil.cpu_percent(interval=seconds) / 100.0 * (psutil.cpu_count() or 1)


def main() -> int:
    """Run the benchmark; return 1 without a report if the machine is busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=3.0, help="a pair of functions is not repeated beyond this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=int, default=504, help="derivatives up to this many atoms")
    parser.add_argument("--largest-ewald", type=int, default=72, help="those of the Ewald matrix")
    parser.add_argument("--atoms", type=int, nargs="+", default=None, help="sizes among those of the script")
    parser.add_argument("--busy", type=float, default=0.25, help="refuse above this many cores of other load")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output or paths.reports_dir() / "benchmarks" / "descriptors.json"
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    pace = (options.repetitions, options.seconds)
    for n_atoms, frame in structures().items():
        if options.atoms and n_atoms not in options.atoms:
            continue
        if (load := other_load()) > options.busy:
            LOG.error("other processes keep %.2f cores busy: nothing is reported", load)
            return 1
        largest = {"local": options.largest, "Ewald": options.largest_ewald}
        rows += [row | {"other_load": round(load, 2)} for row in rows_of(frame, *pace, largest)]
    means = {}
    for name, quantity in dict.fromkeys((row["descriptor"], row["quantity"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["descriptor"], row["quantity"]) == (name, quantity)]
        means[f"{name}, {quantity}"] = round(math.exp(statistics.mean(map(math.log, ratios))), 2)
        LOG.info("%s, %s: geometric mean of the ratios %.2f", name, quantity, means[f"{name}, {quantity}"])
    machine = {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()}
    # other load does not disturb a process that the system always runs first (chrt -f 10), and is told with the figures
    machine["real_time_priority"] = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER
    content = {"rows": rows, "geometric_mean_ratio": means, "machine": machine}
    write_json(output, content | {"versions": package_versions(), "git_revision": git_revision()})
    LOG.info("written to %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
