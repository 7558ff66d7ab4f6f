"""Progress bars of loops that take long: drawn where somebody watches, silent in headless runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

_T = TypeVar("_T")


def watched(steps: Iterable[_T], name: str, total: int | None = None) -> Iterator[_T]:
    """Go through the steps of a loop under a bar that disappears with the last one."""
    yield from tqdm(steps, desc=name, total=total, disable=not is_watched(), leave=False)


def is_watched() -> bool:
    """Tell whether there is a terminal, or a notebook that somebody has open."""
    if sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return False
    # every request to run a cell says whether somebody is there to answer questions; headless runs (papermill,
    # nbconvert, nbval) say that nobody is, whatever they were started from
    return bool(kernel.get_parent().get("content", {}).get("allow_stdin", False))
