"""Build wheel and sdist, install the wheel into an empty environment, and use it there: no checkout, no notebooks.

Run by ``make test-dist`` and by the continuous integration, not by pytest: it takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USE = """
import importlib.util, sys
from ase.build import molecule
from tlmc import compiled
from tlmc.potentials import TlmcCalculator, load_start_model
from tlmc.families.ani.compiled_sweeps import library
import torch

atoms = molecule("CH3OH")
atoms.calc = TlmcCalculator(load_start_model("ani2xt"))
assert abs(atoms.get_potential_energy() + 3147.64045) < 1e-3, atoms.get_potential_energy()
slow = {"pandas", "matplotlib", "papermill", "nbformat", "IPython"} & set(sys.modules)
assert not slow, slow
assert importlib.util.find_spec("papermill") is None, "the environment is not empty"
own = library(torch.float32)
assert own is not None and "site-packages" in own._name, own
"""


def run(*command: str | Path, folder: Path, expected: int = 0, **variables: str) -> str:
    """Run a command with a clean environment; return what it said."""
    kept = ("PATH", "HOME", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "SSL_CERT_FILE")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | variables
    print("$", *command, flush=True)
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != expected:
        sys.exit(f"exit status {done.returncode}, not {expected}:\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory(prefix="tlmc-dist-") as name:
        folder = Path(name)
        source = folder / "source"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in filter(None, tracked.split("\0")):
            if (ROOT / file).is_file():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, source / file)
        venv.create(folder / "empty", with_pip=True)
        python = folder / "empty" / "bin" / "python"
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", "setuptools>=77", folder=folder)
        build = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
        for hook in ("build_sdist", "build_wheel"):
            run(python, "-c", build, hook, folder, folder=source)
        [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = archive.getnames()
        assert any(file.endswith("compiled_sweeps.c") for file in names), "the sdist lacks the C sources"
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        run(*pip, "install", "-c", ROOT / "constraints.txt", torch, wheel, folder=folder)
        cache = {"TLMC_CACHE_DIR": str(folder / "cache"), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "2"}
        print(run(python, "-c", USE, folder=folder, **cache))
        tlmc = folder / "empty" / "bin" / "tlmc"
        assert "finetune" in run(tlmc, "--help", folder=folder, **cache)
        shutil.copy2(ROOT / "data" / "naphthalene.extxyz", folder / "own.extxyz")
        run(tlmc, "-q", "finetune", "own.extxyz", "--epochs", "1", folder=folder, **cache)
        assert list((folder / "tlmc-runs" / "runs").glob("*/model.safetensors")), "no model in ./tlmc-runs"
        said = run(tlmc, "study", folder=folder, expected=2, **cache)
        assert "papermill" in said or "notebooks" in said, said
    print("wheel and sdist: built, installed, used")


if __name__ == "__main__":
    main()
