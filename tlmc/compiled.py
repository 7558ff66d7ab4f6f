"""C sources of the package, built with the machine's C compiler in about a second, once per machine.

What they compute is also written with torch operations, which serve machines without a compiler and which the tests
compare with. ``TLMC_KERNELS=off`` asks for those.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tlmc import paths
from tlmc.errors import ConfigError
from tlmc.files import atomic_path

_HEADER = Path(__file__).with_name("compiled.h")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
_LOG = logging.getLogger(__name__)


def load(source: Path, dtype: torch.dtype, functions: Mapping[str, Sequence[Any]], loss: str) -> ctypes.CDLL | None:
    """Return the functions of a C source, or None, with a warning, where they cannot be had.

    Parameters
    ----------
    source
        A file that includes ``compiled.h``.
    dtype
        float32 or float64: what its ``real`` numbers are.
    functions
        The argument types of every function; none returns anything.
    loss
        What the warning says first: what goes on without them.

    Raises
    ------
    ConfigError
        If ``TLMC_KERNELS`` is neither ``on`` nor ``off``.
    """
    wanted = os.environ.get("TLMC_KERNELS", "on")
    if wanted not in ("on", "off"):
        raise ConfigError(f"TLMC_KERNELS must be on or off, got {wanted!r}")
    if wanted == "off":
        return None
    try:
        library = ctypes.CDLL(str(_compile(source, dtype)))
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        _LOG.warning("%s: %s", loss, getattr(error, "stderr", "") or error)
        return None
    return library


def _compile(source: Path, dtype: torch.dtype) -> Path:
    """Compile a source for this machine unless that was done before; return the library."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: install one (gcc, clang) or set CC")
    command = [compiler, *_FLAGS, f"-DIS_DOUBLE={int(dtype == torch.float64)}"]
    key = hashlib.sha256(_HEADER.read_bytes() + source.read_bytes() + " ".join([*command, _processor()]).encode())
    library = paths.cache_dir() / "kernels" / f"{key.hexdigest()[:24]}.so"
    if not library.exists():
        command += [f"-I{_HEADER.parent}", str(source), "-lm"]
        with atomic_path(library) as temporary:
            subprocess.run([*command, "-o", str(temporary)], check=True, capture_output=True, text=True)
    return library


def _processor() -> str:
    """Return what ``-march=native`` depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
