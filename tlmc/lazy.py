"""Packages whose names are loaded with their module when first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def loaded_at_use(package: str, contents: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, so that to import one of its modules does not load all others.

    Parameters
    ----------
    package
        Its ``__name__``.
    contents
        Module of the package to the names that it has; no module may be called like a name.
    """
    modules = {name: module for module, names in contents.items() for name in names}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get
