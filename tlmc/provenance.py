"""Where a result comes from: versions of the packages, the git revision, and a fingerprint of this package's code."""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tlmc.paths import PACKAGE_DIR

PACKAGES = (
    "tlmc",
    "torch",
    "torchani",
    "ase",
    "numpy",
    "scipy",
    "pandas",
    "vesin",
    "pydantic",
    "papermill",
    "matplotlib",
)
"""Distributions whose version can change a number in a report."""


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # those of an extra
            found[name] = version(name)
    return found


def git_revision() -> str:
    """Return the commit of the checkout, with ``+`` where tracked files differ from it; ``""`` outside a checkout.

    ``reports/`` does not count: a study writes there while it runs.
    """
    if not (PACKAGE_DIR.parent / ".git").exists():
        return ""  # a virtual environment may lie in the repository of something else
    git = ["git", "-C", str(PACKAGE_DIR)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        changes = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)reports"],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if changes.returncode == 1 else "") if head.returncode == 0 else ""


def code_hash() -> str:
    """Return the SHA-256 over the files of this package, whatever their kind, names included.

    What Python (``__pycache__``) or a compiler made of them and hidden files, of editors for instance, do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE_DIR.rglob("*")):
        name = path.relative_to(PACKAGE_DIR)
        made = path.suffix == ".so" or "__pycache__" in name.parts
        if path.is_file() and not made and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def program_hash(module: str) -> str:
    """Return the SHA-256 over what a module of this package and all that it imports do.

    Comments, docstrings and layout do not count, nor do modules that it does not reach, so that work which took hours
    is not thrown away for them. A file beside a module with its name and another suffix (``compiled_sums.c``) belongs
    to it, as does a file of the package that it names (``"registry.json"``). What reaches the registry of start models
    reaches all families.

    Parameters
    ----------
    module
        Full name, ``"tlmc.experiments.run"``.
    """
    digest = hashlib.sha256()
    for name, (path, tree) in sorted(_reached(module).items()):
        digest.update(f"{name}\n{ast.dump(_without_texts(tree))}\n".encode())
        for other in sorted(_files_of(path, tree)):
            digest.update(other.read_bytes())
    return digest.hexdigest()


def _files_of(path: Path, tree: ast.Module) -> set[Path]:
    """Return the files that belong to a module and are no modules."""
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    beside = {
        folder / name
        for folder in {path.parent, PACKAGE_DIR}
        for name in named
        if re.fullmatch(r"\w+\.\w+", name) and (folder / name).is_file()
    }
    found = beside | set(path.parent.glob(f"{path.stem}.*"))
    return {other for other in found if other.suffix not in (".py", ".pyc")}


def _reached(module: str) -> dict[str, tuple[Path, ast.Module]]:
    """Return the modules of this package that a module imports, directly or not, anywhere in their code."""
    found: dict[str, tuple[Path, ast.Module]] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = PACKAGE_DIR.parent.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
        todo.append(name.rpartition(".")[0])
        for node in ast.walk(found[name][1]):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if name == "tlmc.potentials.registry":
            # families are found by their folder, so that no import names them
            found_there = sorted((PACKAGE_DIR / "families").rglob("*.py"))
            todo += [".".join(("tlmc", *path.relative_to(PACKAGE_DIR).with_suffix("").parts)) for path in found_there]
        todo = [other for other in todo if other.partition(".")[0] == PACKAGE_DIR.name]
    return found


def _without_texts(tree: ast.Module) -> ast.Module:
    """Drop docstrings, and the strings after fields that document them."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
