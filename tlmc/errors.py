"""Errors a user can act on: one clear sentence that names the file, frame and value."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class OneSentence(BaseException):
    """An error that says everything in its sentence: a notebook shows that, in red, without a traceback.

    By hand in JupyterLab and in headless runs alike, since the kernel asks for this method; ``%debug`` still opens the
    place where it was raised.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31m{type(self).__name__}: {self}\x1b[0m"]


class TlmcError(OneSentence, ValueError):
    """Base class of all errors this package raises on purpose; the command line prints them without a traceback."""


class DataError(TlmcError):
    """A data file, frame or label that cannot be used."""


class ModelError(TlmcError):
    """A start model or checkpoint that cannot be loaded, or does not cover the data."""


class ConfigError(TlmcError):
    """A parameter, profile or notebook setting that is unknown or out of range."""


class StudyError(TlmcError):
    """A notebook of the study that failed or did not finish."""


class Interrupted(OneSentence, KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, in the midst of a training: the sentence says what is kept and how to go on.

    No `TlmcError`: what catches errors of one run and goes on with the next must not go on after an interrupt.
    """

    def __init__(self, sentence: str, number: int = signal.SIGINT) -> None:
        super().__init__(sentence)
        self.number = number
        """Signal that it was."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return the sentence for a module that an extra of this package brings, or None for any other.

    Parameters
    ----------
    error
        What an import raised.
    """
    from importlib.metadata import requires

    package = (error.name or "").partition(".")[0]
    for line in requires("tlmc") or ():
        requirement, _, marker = line.partition(";")
        extra = marker.partition("==")[2].strip(" \"'")
        # `test` repeats the others
        if extra and extra != "test" and re.split(r"[^\w.-]", requirement.strip())[0].lower() == package.lower():
            return f"this needs {package}, which is not installed: pip install 'tlmc[{extra}]'"
    return None


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that exist, the ones most like a wrong one first."""
    return sorted(known, key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio())


def problems_of(error: ValidationError) -> str:
    """Say in a line what pydantic found."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'content'} = {problem['input']!r:.80}: "
        # what pydantic puts before our own sentences
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    )
