"""The house style, and what every figure needs of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from tlmc.errors import ConfigError, DataError
from tlmc.files import atomic_path
from tlmc.paths import reports_dir

P = ParamSpec("P")
T = TypeVar("T")

COLUMN: Final = 3.35
"""Width in inches of one column of a two-column page; two columns are 6.9."""

PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's colours, the lightest last."""

ELEMENT_COLOURS: Final = {
    "H": "#BBBBBB",
    "C": "#444444",
    "N": "#0072B2",
    "O": "#D55E00",
    "F": "#56B4E9",
    "S": "#F0E442",
    "Cl": "#009E73",
    "Si": "#CC79A7",
    "Cu": "#E69F00",
    "I": "#7A4B94",
}

STYLE: Final[dict[Any, Any]] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.hashsalt": "tlmc",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=list(PALETTE)),
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.2,
    "legend.fontsize": 7,
    "legend.frameon": False,
}
_TICKS: Final[dict[str, Any]] = {"labelsize": 7, "width": 0.6}
REFERENCE_LINE: Final[dict[str, Any]] = {"color": "0.4", "linewidth": 0.8, "linestyle": "--"}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function draw in the house style, whatever the settings outside it."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        _load_backend()
        with plt.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


@cache
def _load_backend() -> None:
    """Load the backend now, as the first figure would: a notebook's backend turns on that figures are shown.

    Loaded inside `rc_context`, it would be turned off again at its end, and only the first figure would be seen.
    """
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]


@styled
def subplots(
    n_rows: int = 1, n_columns: int = 1, *, width: float = COLUMN, aspect: float = 0.75
) -> tuple[Figure, NDArray[Any]]:
    """Open a figure in the house style.

    Parameters
    ----------
    n_rows, n_columns
        Panels.
    width
        Of the figure, inches.
    aspect
        Height of a panel over its width.

    Returns
    -------
    tuple
        The figure and its axes, shape ``(n_rows, n_columns)``.
    """
    size = (width, width / n_columns * aspect * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    return figure, axes


@styled
def save_figure(figure: Figure, name: str, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Save a figure under ``reports/figures``, whole or not at all; the same figure gives the same bytes.

    Parameters
    ----------
    figure
        What to save.
    name
        File name without ending.
    formats
        Endings that matplotlib knows.

    Returns
    -------
    list of Path
        One file per format.

    Raises
    ------
    ConfigError
        If the name is not a plain file name, or a format is unknown.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"figure name {name!r} must be letters, digits, '_', '-' and '.'")
    known = figure.canvas.get_supported_filetypes()
    unknown = [ending for ending in formats if ending not in known]
    if unknown:
        raise ConfigError(f"unknown figure format {', '.join(unknown)}: choose from {', '.join(sorted(known))}")
    # dates and versions would make every run a change in git
    anonymous = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    anonymous["svg"] = {"Date": None, "Creator": None}
    targets = [reports_dir() / "figures" / f"{name}.{ending}" for ending in formats]
    for target, ending in zip(targets, formats, strict=True):
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=ending, metadata=anonymous.get(ending))
    return targets


def axes_or_new(ax: Axes | None, aspect: float = 0.75) -> Axes:
    """Return the axes, or new ones in a figure of their own."""
    if ax is not None:
        return ax
    return cast(Axes, subplots(aspect=aspect)[1][0, 0])


def finish(ax: Axes) -> Axes:
    """Return the axes after what the style cannot do."""
    # ticks are made when the figure is drawn, which may be after the style is gone
    ax.tick_params(which="both", **_TICKS)
    return ax


def log_axis(ax: Axes, lowest: float, highest: float) -> None:
    """Make the y axis logarithmic, with numbers as they are spoken: 0.2, 0.05."""
    ax.set_yscale("log")
    log_ticks(ax.yaxis, highest / lowest)


def log_ticks(axis: Axis, ratio: float) -> None:
    """Number a logarithmic axis whose highest value is ``ratio`` times the lowest."""
    subs = (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
    axis.set_major_locator(MaxNLocator(nbins=5) if 1 < ratio < 4 else LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_above(ax: Axes, ncols: int, left: float = 0.0, **spacing: float) -> None:
    """Put the legend above the panel, where anything may lie."""
    ax.legend(loc="lower left", bbox_to_anchor=(left, 1), ncols=ncols, **cast(Any, spacing))


def colorbar_beside(axes: list[Axes], points: ScalarMappable, label: str) -> Colorbar:
    """Explain the colours beside the panels."""
    bar = axes[0].figure.colorbar(points, ax=axes, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(which="both", **_TICKS)
    return bar


def colours(n: int) -> list[Any]:
    """Return ``n`` colours: those of the palette while they last, else from viridis."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0, 1, n)]


def require_columns(table: pd.DataFrame, what: str, columns: Sequence[str]) -> None:
    """Refuse a table that is empty or lacks a column, with a sentence that begins with ``what``."""
    if table.empty or not set(columns) <= set(table.columns):
        wanted, got = f"{', '.join(columns[:-1])} and {columns[-1]}", ", ".join(map(str, table.columns))
        raise DataError(f"{what} columns {wanted}, got {len(table)} rows of {got}")
