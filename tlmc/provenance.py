"""Where a result comes from: versions of the packages, the git revision, and a fingerprint of this package's code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import version

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
    """Return the versions of Python and of the packages in `PACKAGES`."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def git_revision() -> str:
    """Return the commit of the checkout, with ``+`` where tracked files differ from it; ``""`` outside a checkout.

    ``reports/`` does not count: a study writes there while it runs.
    """
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
    """Return the SHA-256 over the source files of this package, names included."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE_DIR.rglob("*")):
        if path.suffix in (".py", ".json", ".html"):
            digest.update(f"{path.relative_to(PACKAGE_DIR).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
