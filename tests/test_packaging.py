"""The pins, the package's own description of what it needs, and the files around the package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
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
    others = {
        path.relative_to(ROOT / "tlmc").as_posix()
        for path in (ROOT / "tlmc").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == set(patterns)


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

    @pytest.mark.parametrize("target", ["study", "test", "test-cluster", "lint", "bench", "notebooks", "clean", "help"])
    def test_targets_exist_and_are_documented(self, target):
        self.dry_run(target)
        listing = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"make {target}\b +\w", listing) or target == "help"

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
