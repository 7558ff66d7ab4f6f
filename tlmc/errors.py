"""Errors a user can act on: one clear sentence that names the file, frame and value."""

from __future__ import annotations

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


def problems_of(error: ValidationError) -> str:
    """Say in a line what pydantic found."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'content'} = {problem['input']!r:.80}: "
        # what pydantic puts before our own sentences
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    )
