"""What labels depend on, besides the frame: files, settings and versions of a method.

The name of a method says what it is meant to be. What it is may change under that name: a cutoff in ``my_vasp.py``, a
module beside it, the weights of a network. Labels are therefore kept under a fingerprint of all this, and a method that
changed begins anew.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from ase.calculators.calculator import BaseCalculator

from tlmc.errors import ConfigError
from tlmc.files import sha256_file, write_json
from tlmc.labelling.frames import plain
from tlmc.labelling.methods import CalculatorFactory, ImportedFactory, Method, TBLiteFactory, takes_frame
from tlmc.labelling.workers import in_processes

_NO_SETTING = frozenset(
    {"atoms", "results", "converged", "implemented_properties", "default_parameters", "discard_results_on_any_change"}
    | {"command", "directory", "label", "prefix", "profile", "txt", "name", "parallel", "nprocs", "verbosity"}
    | {"use_cache", "cache_api"}
)
"""Attributes of calculators that say where and how fast, not what."""
_NO_VARIABLE = re.compile(
    r"(SLURM|PBS|LSB|SGE|OMP|MKL|OPENBLAS|CUDA|TMP|TEMP|SCRATCH|HOME|USER|PATH|PWD|HOSTNAME|NSLOTS)"
)
"""Beginnings of the names of environment variables that differ from job to job."""


def identified(method: Method, folder: Path) -> Method:
    """Return the method with its identity, the facts behind which are written to the folder.

    The function that makes the calculator is called once, in a process of its own, unless it takes the frame.

    Parameters
    ----------
    method
        Returned as it is if it has an identity already.
    folder
        Gets ``method-<identity>.json``.

    Raises
    ------
    ConfigError
        If the calculator cannot be made.
    """
    if method.identity:
        return method
    known = facts(method)
    identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"method-{identity}.json"
    if not path.exists():
        write_json(path, known)
    return replace(method, identity=identity)


def facts(method: Method) -> dict[str, str]:
    """Return what labels of a method depend on, by name: fingerprints of files, settings, versions."""
    make = method.make
    if isinstance(make, TBLiteFactory):
        return {"level of theory": method.name, "factory": repr(make), "tblite": importlib.metadata.version("tblite")}
    own_name = isinstance(make, ImportedFactory) and method.name == make.target
    known = {} if own_name else {"level of theory": method.name}
    if isinstance(make, ImportedFactory):
        known["function"] = make.target.rpartition(":")[2]
    elif is_dataclass(make) or isinstance(make, functools.partial):
        known["factory"] = _text(make)
    else:
        known["factory"] = getattr(make, "__qualname__", type(make).__qualname__)
    known |= _code(make)
    [settings] = in_processes(_settings, [make], 1, quiet=True)
    return known | settings


def differences(folder: Path, old: str, new: str) -> str:
    """Say which facts differ between two identities that were used in a folder."""
    found = []
    for identity in (old, new):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found.append(json.loads((folder / f"method-{identity}.json").read_text(encoding="utf-8")))
    if len(found) < 2:
        return "another method"
    before, after = found
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return ", ".join(changed)


def _text(value: object) -> str:
    return str(plain(value))


# --- code ---


def _code(make: CalculatorFactory) -> dict[str, str]:
    """Return fingerprints of the user's files behind a factory, or the version of the package that it comes from."""
    place = _place(make)
    if place is None:
        return {}
    module, path = place
    if _installed(path):
        packages = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
        return {f"version of {name}": importlib.metadata.version(name) for name in packages if name != "tlmc"}
    known = {}
    for source in _local_sources(path):
        known[f"file {os.path.relpath(source, path.resolve().parent)}"] = sha256_file(source)
        for kind, name in _mentioned(source):
            if kind == "variable":
                value = os.environ.get(name)
                known[f"variable {name}"] = "" if value is None else hashlib.sha256(value.encode()).hexdigest()
            else:
                known[f"file {Path(name).name}"] = sha256_file(name)
    return known


def _place(make: Any) -> tuple[str, Path] | None:
    """Return module name and file of the code of a factory."""
    if isinstance(make, ImportedFactory):
        place = make.target.rpartition(":")[0]
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise ConfigError(f"no calculator at {make.target!r} (no such file)")
            return "", Path(place)
        try:
            spec = importlib.util.find_spec(place)
        except (ModuleNotFoundError, ValueError):
            spec = None
        if spec is None:
            raise ConfigError(f"no calculator at {make.target!r} (no module named {place!r})")
        return (place, Path(spec.origin)) if spec.origin and Path(spec.origin).is_file() else None
    while isinstance(make, functools.partial):
        make = make.func
    code = make if inspect.isfunction(make) or inspect.isclass(make) else type(make)
    with contextlib.suppress(TypeError, OSError):
        if (path := inspect.getsourcefile(code)) is not None and Path(path).is_file():
            return code.__module__, Path(path)
    return None


def _installed(path: Path | str) -> bool:
    """Tell whether code belongs to Python or an installed package, this one included, and not to the user."""
    homes = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    homes += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    resolved = Path(path).resolve()
    return any(resolved.is_relative_to(Path(home).resolve()) for home in homes)


def _local_sources(path: Path) -> list[Path]:
    """Return a file and the user's own modules that it imports, and those that they import."""
    places = [str(path.parent), *(place or "." for place in sys.path if not _installed(place))]
    finder = ModuleFinder(path=places, excludes=["tlmc"])
    found = {path.resolve()}
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # said when the file is run
        finder.run_script(str(path))
        files = [getattr(module, "__file__", None) for module in finder.modules.values()]
        found |= {Path(file).resolve() for file in files if file}
    return sorted(source for source in found if source.suffix == ".py" and not _installed(source))


def _mentioned(source: Path) -> Iterator[tuple[str, str]]:
    """Yield files that a source names in full or beside it, and environment variables that it reads."""
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):
        for node in ast.walk(ast.parse(source.read_bytes())):
            name: ast.expr | None = None
            if isinstance(node, ast.Call) and node.args and re.search(r"environ\.|getenv$", ast.unparse(node.func)):
                name = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
                name = node.slice
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and not _NO_VARIABLE.match(name.value):
                yield "variable", name.value
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                path = _file(source.parent / Path(node.value).expanduser() if 0 < len(node.value) < 256 else None)
                if path is not None and path.resolve() != source:
                    yield "file", str(path)


def _file(path: Path | None) -> Path | None:
    with contextlib.suppress(OSError, ValueError):
        if path is not None and path.is_file():
            return path
    return None


# --- settings ---


def _settings(make: CalculatorFactory) -> dict[str, str]:
    """Return the settings of a fresh calculator, made in an empty folder; none of one that is made for a frame."""
    if takes_frame(make.function() if isinstance(make, ImportedFactory) else make):
        return {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return settings_of(make())


def settings_of(calculator: BaseCalculator) -> dict[str, str]:
    """Return the class and the settings of a calculator, by name."""
    values = {key: value for key, value in getattr(calculator, "__dict__", {}).items() if not key.startswith("_")}
    parameters = getattr(calculator, "parameters", None)
    values |= dict(parameters) if isinstance(parameters, Mapping) else {}
    known = {"calculator": type(calculator).__name__}
    for key, value in values.items():
        if key not in _NO_SETTING and (text := _setting(value)):
            known[f"setting {key}"] = text
    return known


def _setting(value: Any) -> str:
    """Return a setting as text, "" for what has no lasting text: objects, and files that are there for a moment."""
    weights = getattr(value, "state_dict", None)
    if callable(weights):
        digest = hashlib.sha256()
        for name, tensor in weights().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes() if hasattr(tensor, "detach") else b"")
        return digest.hexdigest()
    if isinstance(value, list | tuple):
        return " ".join(_setting(item) for item in value)
    if isinstance(value, str | Path):
        path = _file(Path(value)) if 0 < len(str(value)) < 4096 else None
        if path is not None:
            return sha256_file(path)
        return "" if tempfile.gettempdir() in str(value) else str(value)
    text = _text(value)
    if "object" in text and "<" in text:
        return ""
    return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()
