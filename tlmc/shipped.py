"""The C code that an installed package has ready-made: what its files are called, and what the compiler is told.

A wheel serves processors that the one which builds it does not know, so every source is compiled for several kinds, and
:mod:`tlmc.compiled` takes the best that the machine has. The kinds are torch's own, which torch recognises by just
these instruction sets. (Several versions of each function in one file, as GCC's ``target_clones`` makes them, all get
the preprocessor's one width of vectors, and need the loader of GNU/Linux.) The files are plain C libraries, without
anything of Python's, so that one wheel serves every version of Python.

``setup.py`` reads this module where nothing else is installed: it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

FLAGS: Final = ("-O3", "-fno-math-errno", "-fno-trapping-math")
"""Of every build, this one or that at first use; what else it may do to numbers is up to the source."""
HEADER: Final = Path(__file__).with_name("compiled.h")
CAPABILITIES: Final = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
"""Flags for each kind of processor, as ``torch.backends.cpu.get_cpu_capability`` names them; each runs what follows
it. Kinds that are not listed run the last."""


def sources() -> list[Path]:
    """Return the C sources of the package."""
    return sorted(HEADER.parent.rglob("*.c"))


def precisions(source: Path) -> list[str]:
    """Return for which numbers a source is compiled, ``["float32", "float64"]``: its own line says so.

    Raises
    ------
    ValueError
        If it has no line ``/* Precisions: ... */``.
    """
    line = re.search(r"^/\* Precisions: ([\w, ]+) \*/$", source.read_text(encoding="utf-8"), re.MULTILINE)
    if line is None:
        raise ValueError(f"{source} does not say for which numbers it is, as in /* Precisions: float32, float64 */")
    return line[1].split(", ")


def library(source: Path, precision: str, capability: str) -> Path:
    """Return where the library of a source is, if the package has it.

    A library of other sources than those beside it has another name, so it is never taken for theirs.
    """
    digest = hashlib.sha256(HEADER.read_bytes() + b"\0" + source.read_bytes()).hexdigest()[:12]
    return source.with_name(f"{source.stem}-{digest}-{precision}-{capability.lower()}.so")


def usable(capability: str) -> list[str]:
    """Return the kinds of libraries that a processor runs, best first.

    Parameters
    ----------
    capability
        What torch says of the processor.
    """
    names = list(CAPABILITIES)
    return names[names.index(capability) if capability in names else -1 :]
