"""Compile the C code of the package into the wheel, where there is a compiler; all else is said in pyproject.toml.

What fails to compile is left out with a warning: the package then compiles at first use (:mod:`tlmc.compiled`), or does
without. So does a checkout (``pip install -e``), where sources change and a machine's own processor is known.
"""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tlmc import shipped  # noqa: E402

OPENMP = "-fopenmp"


def extensions() -> list[Extension]:
    """Return every library that a wheel for this machine may hold."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    found = []
    for source in shipped.sources():
        for precision in shipped.precisions(source):
            for capability, flags in shipped.CAPABILITIES.items() if x86 else [("DEFAULT", ())]:
                library = shipped.library(source, precision, capability).relative_to(ROOT)
                found.append(
                    Extension(
                        ".".join(library.with_suffix("").parts),
                        [str(source.relative_to(ROOT))],
                        depends=[str(shipped.HEADER.relative_to(ROOT))],
                        include_dirs=[str(shipped.HEADER.parent.relative_to(ROOT))],
                        define_macros=[("IS_DOUBLE", str(int(precision == "float64")))],
                        # after those that Python itself was compiled with, some of which keep loops from being turned
                        # into vector instructions
                        extra_compile_args=["-fstrict-overflow", "-g0", *shipped.FLAGS, *flags, OPENMP],
                        extra_link_args=[OPENMP, "-lm"],
                        optional=True,
                    )
                )
    return found


class BuildLibraries(build_ext):
    """Build plain libraries: no module of Python, hence no version of it in a name."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            self.extensions = []
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # objects of one source for different processors must not be taken for each other
        folder, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            with suppress(CompileError, LinkError):
                return super().build_extension(ext)
            # as Apple's compiler, which has no OpenMP: one thread
            ext.extra_compile_args = ["-fopenmp-simd" if a == OPENMP else a for a in ext.extra_compile_args]
            ext.extra_link_args = [a for a in ext.extra_link_args if a != OPENMP]
            return super().build_extension(ext)
        finally:
            self.build_temp = folder


class Wheel(bdist_wheel):
    """A wheel for every version of Python, on one kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel})
