"""The map of the house in CONTRIBUTING.md: imports follow the flow, no circle, no module hidden behind a function."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import tlmc
from tlmc.paths import project_root
from tlmc.potentials.registry import families

PACKAGE = Path(tlmc.__file__).parent
GUIDE = project_root() / "CONTRIBUTING.md"
FLOW = re.findall(r"^\| `(\w+)/` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
"""Folders as the table of CONTRIBUTING.md lists them: each imports the ones above it only."""
MODULES = {
    ".".join(("tlmc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path, *, at_import: bool) -> set[str]:
    """Return the modules of the package that a module names; those it needs when it is imported, or all of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden |= {inner for part in node.body for inner in ast.walk(part)}
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES}


def room(module: str) -> str | None:
    """Return the folder of a module; None for what lies on top, which every folder may import."""
    part = module.split(".")[1:2]
    return part[0] if part and part[0] in FLOW else None


def test_the_map_names_every_folder():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(FLOW) == folders


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_flow(module):
    own = room(module)
    for other in imported(MODULES[module], at_import=False):
        theirs = room(other)
        if own is None:
            assert theirs is None, f"{module} lies below all folders, imports {other}"
        elif theirs is not None and theirs != own:
            assert FLOW.index(theirs) < FLOW.index(own), f"{module} imports {other} against the flow"


def test_there_is_no_circle():
    needs = {name: imported(path, at_import=True) - {name} for name, path in MODULES.items()}
    done: list[str] = []
    while free := [name for name in needs if name not in done and not needs[name] - set(done)]:
        done += free
    assert not set(needs) - set(done), f"a circle is among {sorted(set(needs) - set(done))}"


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_module_is_hidden_behind_a_name_of_its_package(module):
    package = importlib.import_module(module)
    for found in pkgutil.iter_modules(package.__path__):
        value = getattr(package, found.name, None)
        assert value is None or isinstance(value, ModuleType), f"{module}.{found.name} is a module and something else"


def test_a_family_is_known_to_its_own_folder_only():
    folders = {path.parent.name for path in PACKAGE.glob("families/*/family.py")}
    assert set(families()) == folders
    generic = [name for name in MODULES if room(name) in ("data", "potentials", "training")]
    for name in generic:
        assert not any(room(other) == "families" for other in imported(MODULES[name], at_import=False)), name


def test_every_module_says_what_it_is():
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_paths_and_targets_of_the_guide_exist():
    text = GUIDE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tlmc|tests|notebooks|docs|data)/[\w./*-]*)`", text):
        assert list(project_root().glob(path.rstrip("/"))), path
    targets = subprocess.run(["make", "help"], cwd=project_root(), capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"make {target}\b", targets), target
