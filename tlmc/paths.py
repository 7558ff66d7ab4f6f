"""Where things live: the project's folders and the user's caches."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from tlmc.errors import ConfigError

PACKAGE_DIR = Path(__file__).resolve().parent
OWN_REPORTS = "tlmc-runs"
"""The reports folder, in the shell's folder, of a package that was installed without its checkout."""


class NoCheckoutError(ConfigError, FileNotFoundError):
    """Something needs the notebooks or the embedded data, which an installed package lacks."""


def project_root() -> Path:
    """Return the checkout that holds ``notebooks/`` and ``data/`` (or ``TLMC_ROOT``).

    Raises
    ------
    NoCheckoutError
        If the package was installed without its checkout and ``TLMC_ROOT`` is not set, or not to a checkout.
    """
    named = _named("TLMC_ROOT")
    if named is not None:
        if not (named / "notebooks").is_dir():
            raise NoCheckoutError(f"{named} holds no notebooks/ folder: set TLMC_ROOT to the checkout of tlmc")
        return named
    root = _own_checkout()
    if root is None:
        raise NoCheckoutError(
            f"this needs the notebooks and data of the checkout of tlmc, and {PACKAGE_DIR} was installed without: "
            "clone it and set TLMC_ROOT to it"
        )
    return root


def data_dir() -> Path:
    """Return the folder of the embedded data sets."""
    return project_root() / "data"


def reports_dir() -> Path:
    """Return the folder of runs, figures, tables and metrics.

    It is what ``TLMC_REPORTS_DIR`` names, else ``reports/`` of the checkout, else, for a package that was installed
    without, ``tlmc-runs`` in the current folder.
    """
    named = _named("TLMC_REPORTS_DIR")
    if named is not None:
        return named
    if _named("TLMC_ROOT") is None and _own_checkout() is None:
        return Path(OWN_REPORTS).resolve()
    return project_root() / "reports"


def cache_dir() -> Path:
    """Return the folder of downloads and descriptor caches (``TLMC_CACHE_DIR`` moves it)."""
    return _named("TLMC_CACHE_DIR") or user_cache_dir()


def user_cache_dir() -> Path:
    """Return this user's folder for caches, whatever ``TLMC_CACHE_DIR`` says."""
    return Path(platformdirs.user_cache_dir("tlmc")).resolve()


def mirror_dir() -> Path | None:
    """Return the local mirror of public data sets, ``TLMC_DATA_DIR``, if one is named.

    Raises
    ------
    ConfigError
        If there is no such folder: everything would be downloaded instead.
    """
    named = _named("TLMC_DATA_DIR")
    if named is not None and not named.is_dir():
        raise ConfigError(f"TLMC_DATA_DIR is {str(named)!r}, which does not exist")
    return named


def _own_checkout() -> Path | None:
    """Return the checkout that this package is part of, if it is; site-packages may hold a folder notebooks, too."""
    root = PACKAGE_DIR.parent
    return root if (root / "notebooks").is_dir() and (root / "pyproject.toml").is_file() else None


def _named(variable: str) -> Path | None:
    """Return the folder that a variable names; an empty one, which would be the current folder, names none."""
    value = os.environ.get(variable)
    if not value:
        return None
    try:
        path = Path(value).expanduser().resolve()
    except RuntimeError as error:
        raise ConfigError(f"{variable} is {value!r}, but there is no such home folder") from error
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{variable} is {value!r}, which is not a folder")
    return path
