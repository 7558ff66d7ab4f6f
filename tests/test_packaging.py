"""The pins, the package's own description of what it needs, and the files around the package."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution, distribution, packages_distributions, version
from pathlib import Path

import ase.io
import pytest
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.places import ROOT
from helpers.training import labelled, student
from tlmc.potentials.model_files import save_model

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
PINNED = {canonicalize_name(name): pin for name, pin in PINS.items()}
# pip is pinned by the Makefile
UNPINNED = {"tlmc", "pip"}


def requirements_of(name: str, extras: frozenset[str]) -> list[Requirement]:
    """Return what an installed distribution requires on this machine."""
    parsed = map(Requirement, distribution(name).requires or [])
    environments = [{"extra": extra} for extra in (extras or {""})]
    return [r for r in parsed if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


def closure() -> dict[str, set[str]]:
    """Return every distribution that ``pip install tlmc[test]`` brings, with what asks for it."""
    found: dict[str, set[str]] = {}
    todo, done = [("tlmc", frozenset({"test"}))], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        for requirement in requirements_of(name, extras):
            child = canonicalize_name(requirement.name)
            found.setdefault(child, set()).add(name)
            todo.append((child, frozenset(requirement.extras)))
    return found


def test_everything_that_is_installed_is_pinned():
    # CUDA's libraries come with the torch of some platforms only, and torch pins them itself
    missing = {name: asks for name, asks in closure().items() if name not in PINNED | dict.fromkeys(UNPINNED, "")}
    assert {n: a for n, a in missing.items() if not n.startswith(("nvidia-", "cuda-", "triton"))} == {}


def test_installed_versions_are_the_pinned_ones():
    different = {}
    for name in closure():
        if name in PINNED and version(name).partition("+")[0] != PINNED[name]:
            different[name] = (version(name), PINNED[name])
    assert different == {}, "run make install"


def test_pins_are_exact_and_listed_once():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)
    assert len({canonicalize_name(line.split("==")[0]) for line in lines}) == len(lines)


def test_pins_satisfy_the_declared_ranges():
    declared = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for text in declared:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name not in UNPINNED:
            assert requirement.specifier.contains(PINNED[name]), text


def test_environment_yml_carries_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip_section] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip_section == (ROOT / "constraints.txt").read_text().split()
    conda = dict(entry.split("=") for entry in environment["dependencies"] if isinstance(entry, str))
    assert conda["pip"] == re.search(r"^PIP_VERSION := (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(conda["python"])


def test_torch_is_the_version_torchani_allows():
    assert PINNED["torch"] == "2.13.0"
    assert version("torchani").startswith("2.9.")


def imported_by_package() -> set[str]:
    """Return the top-level modules that the package's files import."""
    names = set()
    for path in (ROOT / "tlmc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"tlmc", "__future__"}


def test_every_import_is_a_declared_dependency():
    declared = {
        canonicalize_name(Requirement(text).name)
        for text in [
            *PROJECT["dependencies"],
            *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
        ]
    }
    owners = packages_distributions()
    # a package of an extra that is not installed goes by the name of its module
    found = {
        module: {canonicalize_name(name) for name in owners.get(module, [module])} for module in imported_by_package()
    }
    assert {module for module, names in found.items() if not names & declared} == set()


def test_package_holds_its_data_files():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tlmc"]
    others = {path for path in (ROOT / "tlmc").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    named = [set((ROOT / "tlmc").glob(pattern)) for pattern in patterns]
    assert all(named)
    assert others == set().union(*named)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder with a wheel and a source distribution, made from a copy of what the package is built of."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT / "tlmc", source / "tlmc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    answer = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built):
    """Return a function that runs the package of the wheel, and nothing of the checkout, in a folder of the user's."""
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built / "site-packages")
    (built / "here").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TLMC_")}
    environment |= {
        "PYTHONPATH": str(built / "site-packages"),
        "TLMC_CACHE_DIR": str(built / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=built / "here",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_distributions_hold_the_whole_package(built):
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tlmc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == modules
    inside = f"tlmc-{PROJECT['version']}"
    with tarfile.open(archive) as opened:
        files = {name.removeprefix(f"{inside}/") for name in opened.getnames()}
    assert modules | {"LICENSE", "README.md", "pyproject.toml"} <= files


def test_the_wheel_says_what_it_needs(built, installed):
    facts = PathDistribution(built / "site-packages" / f"tlmc-{PROJECT['version']}.dist-info")
    required = {str(Requirement(text)) for text in facts.requires or [] if "extra ==" not in text}
    assert required == {str(Requirement(text)) for text in PROJECT["dependencies"]}
    assert set(facts.metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert [(entry.name, entry.value) for entry in facts.entry_points] == [("tlmc", "tlmc.cli:app")]
    assert "Operating System :: POSIX :: Linux" in facts.metadata.get_all("Classifier")
    assert facts.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_folder(built, installed):
    """On the user's file, with results beside it; what needs the checkout says so in a sentence."""
    frames = []
    data = labelled()
    for frame, energy, forces in zip(data.frames, data.energies, data.forces, strict=True):
        frame = frame.copy()
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        frames.append(frame)
    here = built / "here"
    ase.io.write(here / "my.extxyz", frames)
    save_model(student(), here / "start.safetensors")
    cli = ("-m", "tlmc.cli")
    answer = installed(*cli, "finetune", "my.extxyz", "--start-model", "start.safetensors", "--epochs", 2)
    assert answer.returncode == 0, answer.stderr
    [model] = (here / "tlmc-runs" / "runs").glob("my-*/model.safetensors")
    assert {path.name for path in here.iterdir()} == {"my.extxyz", "start.safetensors", "tlmc-runs"}
    code = f"""
import sys, tlmc
from typer.testing import CliRunner
from tlmc.cli import app
assert tlmc.__file__.startswith({str(built)!r})
for arguments in (
    ["evaluate", {str(model)!r}, "my.extxyz"], ["fetch", "--list"], ["study"], ["finetune", "naphthalene"],
    ["info", "qwertz"],
):
    result = CliRunner().invoke(app, arguments)
    sys.stdout.write(f"{{result.exit_code}} {{' '.join(result.output.split())}}\\n")
"""
    answer = installed("-c", code)
    assert answer.returncode == 0, answer.stderr
    evaluated, listed, studied, embedded, unknown = answer.stdout.splitlines()
    assert re.match(r"0 .*force_rmse_vector", evaluated)
    assert "molcrys-mace/21_urea" in listed
    assert "naphthalene " not in listed.replace("13_naphthalene", "")
    assert studied.startswith("2 this needs the notebooks and data of the checkout of tlmc, and ")
    assert embedded.startswith("2 naphthalene: neither a file nor a known data set; ")
    checkout = "The embedded sets come with the checkout of tlmc only: set TLMC_ROOT to one"
    assert embedded.endswith(f"? {checkout}")
    assert unknown.endswith(f"known names. {checkout}")


def test_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"] == version("tlmc")
    assert citation["license"] == PROJECT["license"]
    assert PROJECT["version"] in version("tlmc")


def test_no_printing_and_no_pickle_in_the_package():
    for path in (ROOT / "tlmc").rglob("*.py"):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        assert not calls & {"print", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"}, path


def test_import_of_the_command_line_is_light():
    # --help must answer at once, and importing must not read files or reach for the network
    code = (
        "import sys, tlmc.cli; print(sorted({'torch', 'ase', 'matplotlib', 'papermill', 'pandas'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert answer.stdout.strip() == "[]"


class TestMake:
    def dry_run(self, *arguments: str) -> str:
        command = ["make", "--no-print-directory", "-C", str(ROOT), "-n", "-W", "constraints.txt", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @pytest.mark.parametrize(
        "target", ["study", "test", "test-fast", "test-cluster", "lint", "bench", "notebooks", "clean", "help"]
    )
    def test_targets_exist_and_are_documented(self, target):
        self.dry_run(target)
        listing = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"make {target}\b +\w", listing) or target == "help"

    def test_the_fast_tests_are_a_part_of_all(self):
        fast, whole = self.dry_run("test-fast"), self.dry_run("test")
        assert '-m "not slow"' in fast
        assert "-m mypy" not in fast
        assert "-m slow" not in whole
        assert "not slow" not in whole
        assert "ruff check" in fast

    def test_folders_of_numerical_tests_exist_and_hold_tests(self):
        [folders] = re.findall(r"^NUMERICAL := \$\(addprefix tests/,(.+)\)$", (ROOT / "Makefile").read_text(), re.M)
        for name in folders.split():
            assert list((ROOT / "tests" / name).rglob("test_*.py")), name

    @pytest.mark.parametrize("target", ["study", "test"])
    def test_changed_pins_are_installed_before_anything_runs(self, target):
        lines = self.dry_run(target)
        install = lines.index("pip install --quiet --disable-pip-version-check -c")
        assert "-c constraints.txt" in lines[install:].replace("  ", " ")
        assert "grep '^torch==' constraints.txt" in lines
        assert lines.index("-m pytest" if target == "test" else "-m tlmc.cli study --profile laptop") > install

    @pytest.mark.parametrize("interpreter", ["/nonexistent/python", "old"])
    def test_an_unusable_interpreter_gets_a_sentence(self, tmp_path, interpreter):
        if interpreter == "old":
            script = tmp_path / "python3"
            script.write_text("#!/bin/sh\nexit 1\n")
            script.chmod(0o755)
            interpreter = str(script)
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        answer = subprocess.run(
            ["make", "-C", str(tmp_path), "install", f"PYTHON={interpreter}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode != 0
        assert f"{interpreter} does not start or is older than Python 3.11" in answer.stderr
        assert not (tmp_path / ".venv").exists()

    def test_no_interpreter_at_all_gets_a_sentence(self, tmp_path):
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            (tmp_path / name).write_text((ROOT / name).read_text())
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("make", "sh", "grep"):
            found = next(Path(f) for f in (f"/usr/bin/{tool}", f"/bin/{tool}") if Path(f).exists())
            (tools / tool).symlink_to(found)
        answer = subprocess.run(
            ["make", "-C", str(tmp_path), "install"],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(tools), "HOME": str(tmp_path)},
        )
        assert answer.returncode != 0
        assert "tlmc needs Python 3.11 or newer" in answer.stderr


def test_ci_script_is_executable_and_demands_the_mirrors():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "TLMC_REQUIRE_MIRROR=1" in script.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("required", ["0", "1"])
def test_a_skipped_mirror_test_fails_where_mirrors_are_required(tmp_path, required):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.needs_mirror\ndef test_it():\n    pass\n")
    environment = {name: value for name, value in os.environ.items() if name != "TLMC_DATA_DIR"}
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment | {"TLMC_REQUIRE_MIRROR": required, "TORCHANI_DATA_DIR": str(tmp_path)},
    )
    assert "needs the folders named by TLMC_DATA_DIR" in answer.stdout
    assert (answer.returncode == 0) == (required == "0")
