"""Where things live: the project's folders and the user's caches, resolved without looking at the shell's folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE_DIR = Path(__file__).resolve().parent


def project_root() -> Path:
    """Return the checkout that holds ``notebooks/`` and ``data/`` (or ``TLMC_ROOT``).

    Raises
    ------
    FileNotFoundError
        If the package was installed without its checkout and ``TLMC_ROOT`` is not set.
    """
    root = Path(os.environ.get("TLMC_ROOT", PACKAGE_DIR.parent)).resolve()
    if not (root / "notebooks").is_dir():
        raise FileNotFoundError(f"{root} holds no notebooks/ folder: set TLMC_ROOT to the checkout of tlmc")
    return root


def data_dir() -> Path:
    """Return the folder of the embedded data sets."""
    return project_root() / "data"


def reports_dir() -> Path:
    """Return the folder of figures, tables and metrics (``TLMC_REPORTS_DIR`` moves it)."""
    return Path(os.environ.get("TLMC_REPORTS_DIR", project_root() / "reports")).resolve()


def cache_dir() -> Path:
    """Return the folder of downloads and descriptor caches (``TLMC_CACHE_DIR`` moves it)."""
    return Path(os.environ.get("TLMC_CACHE_DIR", platformdirs.user_cache_dir("tlmc"))).resolve()


def mirror_dir() -> Path | None:
    """Return the local mirror of public data sets, ``TLMC_DATA_DIR``, if one is named."""
    value = os.environ.get("TLMC_DATA_DIR")
    return Path(value).resolve() if value else None
