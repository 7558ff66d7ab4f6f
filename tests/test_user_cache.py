"""The suite leaves the cache of the user who runs it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ase.build import molecule

from helpers.places import ROOT
from helpers.potential_references import toy_potential
from tlmc.families.ani import build_cache
from tlmc.families.ani.compiled_sweeps import library
from tlmc.paths import cache_dir, user_cache_dir


def tree(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Return every path below a folder with its time of change and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted([folder, *folder.rglob("*")])
    }


@pytest.mark.parametrize("number", [1, 2])
def test_probe(number):
    """What writes to a cache: descriptors, compiled code. The test below starts it, too, in two workers."""
    users = [Path(folder) for folder in os.environ.get("TLMC_USERS_CACHES", "").split(os.pathsep) if folder]
    for folder in (cache_dir(), user_cache_dir()):
        assert not any(folder.is_relative_to(user) for user in users)
    cache = build_cache(toy_potential(), [molecule("H2O")] * number, torch.float64, None)
    assert cache.folder.is_relative_to(cache_dir())
    found = library(torch.float64)
    assert (found is not None) == bool(list((cache_dir() / "compiled").glob("*.so")))
    if log := os.environ.get("TLMC_PROBE_LOG"):
        weights = (cache_dir() / "start-models" / "weights.pt").read_text()
        with open(log, "a") as file:
            file.write(f"{os.environ['PYTEST_XDIST_WORKER']} {cache_dir()} {weights}\n")


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_the_users_cache_is_untouched(tmp_path, named):
    """Whether TLMC_CACHE_DIR names it or not; workers share one cache, which has a copy of the user's weights."""
    default, other = tmp_path / "home" / ".cache" / "tlmc", tmp_path / "named"
    for folder in (default, other):
        (folder / "start-models").mkdir(parents=True)
        (folder / "start-models" / "weights.pt").write_text(folder.name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for name in ("TLMC_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name)
    environment |= {"HOME": str(tmp_path / "home"), "TLMC_PROBE_LOG": str(tmp_path / "log")}
    environment |= {"TLMC_USERS_CACHES": os.pathsep.join(map(str, (default, other)))}
    environment |= {"TLMC_CACHE_DIR": str(other)} if named else {}
    before = tree(default), tree(other)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "load"]
    command += [f"{ROOT / 'tests' / 'test_user_cache.py'}::test_probe"]
    answer = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
    assert (tree(default), tree(other)) == before
    workers, caches, weights = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert set(workers) == {"gw0", "gw1"}
    assert len(set(caches)) == 1
    assert set(weights) == {"named" if named else "tlmc"}
    # nothing is left of it either
    assert not Path(caches[0]).exists()
