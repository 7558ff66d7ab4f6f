"""Figures of labels, errors and trainings, each ``f(data, ax=None) -> ax`` in one house style.

Without ``ax`` a function opens a figure one column wide (85 mm). The style is applied around each call and leaves
``matplotlib.rcParams`` as they were. Colours are those of Okabe and Ito, and viridis, which colour-blind readers tell
apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeVar, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from ase import units
from ase.data import atomic_numbers, covalent_radii
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from tlmc.analysis import outliers as find_outliers
from tlmc.analysis import relative_energies
from tlmc.errors import ConfigError, DataError
from tlmc.evaluation.metrics import Metric, frame_force_rms
from tlmc.files import atomic_path
from tlmc.paths import reports_dir

if TYPE_CHECKING:
    from tlmc.datasets import Dataset
    from tlmc.descriptors.aev import AEVParameters
    from tlmc.potentials.calculator import Predictions
    from tlmc.splits import Split

P = ParamSpec("P")
T = TypeVar("T")
Array = NDArray[np.float64]
Quantity = Literal["force", "force_component", "energy"]

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
_REFERENCE: Final[dict[str, Any]] = {"color": "0.4", "linewidth": 0.8, "linestyle": "--"}
_PAPER: Final[dict[str, Any]] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
_HEXBIN_FROM: Final = 3000
"""Points from which single markers cover one another."""

_G_PER_CM3: Final = 1e24 * units._amu * 1e3
"""g/cm^3 per atomic mass unit and cubic Angstrom."""


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


@styled
def parity(
    labels: ArrayLike,
    predictions: ArrayLike,
    ax: Axes | None = None,
    *,
    quantity: Quantity = "force",
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
    note: str = "",
) -> Axes:
    """Draw predictions against labels with the line y = x, coloured by the density of points on a log scale.

    Parameters
    ----------
    labels, predictions
        For ``force`` vectors in eV/Angstrom, shape ``(n, 3)``: their lengths are drawn, and the RMSE in the panel is
        that of the error vector. For ``force_component`` any shape, eV/Angstrom. For ``energy`` energies per atom,
        shape ``(n,)``, eV/atom, with the RMSE in meV/atom.
    ax
        Where to draw.
    quantity
        What the numbers are.
    limits
        Of both axes; by default they hold all points.
    colorbar
        Whether to explain the colours: points in a hexagon, or within 2 % of the axis where single points are drawn.
    note
        A line below the RMSE.

    Raises
    ------
    DataError
        If the shapes differ or do not fit the quantity, or there are no points.
    """
    x, y = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if x.shape != y.shape or x.size == 0 or (quantity == "force" and (x.ndim != 2 or x.shape[1] != 3)):
        wanted = "(n, 3)" if quantity == "force" else "one shape"
        raise DataError(f"parity of {quantity} needs labels and predictions of {wanted}, got {x.shape} and {y.shape}")
    if quantity == "force":
        text = f"RMSE {np.sqrt(((x - y) ** 2).sum(axis=1).mean()):.3f} eV/Å (vector)"
        x, y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    elif quantity == "force_component":
        text = f"RMSE {np.sqrt(((x - y) ** 2).mean()):.3f} eV/Å (component)"
    else:
        text = f"RMSE {_significant(1000 * np.sqrt(((x - y) ** 2).mean()))} meV/atom"
    x, y = x.ravel(), y.ravel()
    ax = _axes(ax, aspect=0.88)
    lower, upper = limits if limits is not None else _limits(np.concatenate([x, y]), quantity)
    points = _density(ax, x, y, (lower, upper))
    ax.plot([lower, upper], [lower, upper], zorder=3, **_REFERENCE)
    symbol = {"force": "|F| (eV/Å)", "force_component": "force component (eV/Å)", "energy": "E/N (eV/atom)"}[quantity]
    ax.set(xlim=(lower, upper), ylim=(lower, upper), xlabel=f"label {symbol}", ylabel=f"predicted {symbol}")
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    span = upper - lower
    x, y = (x - lower) / span, (y - lower) / span
    left, right = ((x < 0.6) & (y > 0.84)).sum(), ((x > 0.4) & (y < 0.16)).sum()
    corner: dict[str, Any] = {"xy": (0.04, 0.96), "ha": "left", "va": "top"}
    if right < left:
        corner = {"xy": (0.97, 0.04), "ha": "right", "va": "bottom"}
    ax.annotate("\n".join(filter(None, (text, note))), xycoords="axes fraction", fontsize=7, bbox=_PAPER, **corner)
    if colorbar:
        _colorbar([ax], points)
    return _finish(ax)


@styled
def parity_grid(
    dataset: Dataset,
    before: Predictions,
    after: Predictions,
    *,
    titles: tuple[str, str] = ("before fine-tuning", "after fine-tuning"),
    remove_offset: bool = True,
) -> Figure:
    """Draw parity before | after fine-tuning, lengths of forces above energies per atom (thesis figures 4.6 to 4.10).

    Parameters
    ----------
    dataset
        Labels, the test set as a rule.
    before, after
        Predictions for its frames.
    titles
        Of the two columns.
    remove_offset
        Take the mean error per atom from the energies ``before``, and say so in the panel: a start model's zero of
        energy is arbitrary, and hundreds of eV away from that of many codes.

    Returns
    -------
    Figure
        Two columns wide; the panels of a row share their axes and colours.
    """
    figure, axes = plt.subplots(2, 2, figsize=(1.75 * COLUMN, 1.6 * COLUMN), sharex="row", sharey="row")
    n_atoms = np.asarray(dataset.n_atoms)
    labels = dataset.energies / n_atoms
    energies = [np.asarray(side.energies) / n_atoms for side in (before, after)]
    offset = float((energies[0] - labels).mean())
    if remove_offset:
        energies[0] = energies[0] - offset
    offset_note = f"offset {offset:+.4g} eV/atom removed".replace("-", "−") if remove_offset else ""
    force = np.concatenate(dataset.forces)
    forces = [np.concatenate(side.forces) for side in (before, after)]
    rows: tuple[tuple[Quantity, Array, list[Array]], ...] = (("force", force, forces), ("energy", labels, energies))
    for row, (quantity, label, sides) in zip(axes, rows, strict=True):
        drawn = [label, *sides] if quantity == "energy" else [np.linalg.norm(part, axis=1) for part in (label, *sides)]
        limits = _limits(np.concatenate(drawn), quantity)
        for ax, side in zip(row, sides, strict=True):
            note = offset_note if quantity == "energy" and side is energies[0] else ""
            parity(label, side, ax, quantity=quantity, limits=limits, colorbar=False, note=note)
        points = [ax.collections[0] for ax in row]
        highest = max(collection.get_clim()[1] for collection in points)
        for collection in points:
            collection.set_clim(1, highest)
        _colorbar(list(row), points[0])
        row[1].set_ylabel("")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
        ax.set_xlabel("label |F| (eV/Å)")
    return figure


@styled
def residual_histogram(
    residuals: ArrayLike | Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    quantity: Literal["energy", "force_component"] = "force_component",
    bins: int | None = None,
) -> Axes:
    """Draw the distribution of errors, counts on a log scale, so that the tails show.

    Parameters
    ----------
    residuals
        Predicted minus label, any shape, in eV/Angstrom or eV/atom; or several such by name, drawn over one another.
    ax
        Where to draw.
    quantity
        What the errors are of; energies are drawn in meV/atom.
    bins
        Over the range of all errors, symmetric about zero; by default 21 to 101, the more the more errors there are.

    Raises
    ------
    DataError
        If a set is empty or holds NaN or infinity.
    """
    named = residuals if isinstance(residuals, Mapping) else {"": residuals}
    factor, unit = (1000.0, "meV/atom") if quantity == "energy" else (1.0, "eV/Å")
    values = {name: factor * np.asarray(part, dtype=np.float64).ravel() for name, part in named.items()}
    for name, part in values.items():
        if part.size == 0 or not np.isfinite(part).all():
            raise DataError(f"residuals {name!r} must be finite numbers, at least one, got {part.size} values")
    ax = _axes(ax)
    span = max(float(np.abs(part).max()) for part in values.values()) or 1.0
    if bins is None:
        bins = int(np.clip(2 * np.sqrt(max(part.size for part in values.values())), 20, 100)) // 2 * 2 + 1
    edges = np.linspace(-span, span, bins + 1).tolist()
    for colour, (name, part) in zip(PALETTE, values.items(), strict=False):
        label = f"{name}: RMSE {_significant(np.sqrt((part**2).mean()))} {unit}".removeprefix(": ")
        ax.hist(part, edges, histtype="stepfilled", color=colour, alpha=0.25)
        ax.hist(part, edges, histtype="step", color=colour, label=label)
    ax.axvline(0, **_REFERENCE)
    ax.set_yscale("log")
    # room above the highest bin for the legend
    ax.set_ylim(0.7, ax.get_ylim()[1] * 4 ** len(values))
    what = "energy" if quantity == "energy" else "force component"
    ax.set(xlabel=f"error of {what} ({unit})", ylabel="frames" if quantity == "energy" else "force components")
    ax.legend(loc="upper left", frameon=True, edgecolor="none", framealpha=0.9)
    return _finish(ax)


_CURVES: Final = {
    "loss": "loss",
    "force_rmse_vector": "force RMSE, vector (eV/Å)",
    "energy_rmse_per_atom": "energy RMSE (meV/atom)",
    "lr": "learning rate",
}


@styled
def learning_curve(
    history: pd.DataFrame,
    ax: Axes | None = None,
    *,
    quantity: Literal["loss", "force_rmse_vector", "energy_rmse_per_atom", "lr"] = "loss",
    best_epoch: int | None = None,
) -> Axes:
    """Draw one quantity against the epoch, training and validation, on a log scale.

    Parameters
    ----------
    history
        A row per epoch: ``epoch`` and ``train_<quantity>``, ``validation_<quantity>`` (one may be absent), or ``lr``.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.
    best_epoch
        Marked by a vertical line.

    Raises
    ------
    DataError
        If the history is empty or lacks the columns.
    """
    columns = {"lr": ""} if quantity == "lr" else {f"{part}_{quantity}": part for part in ("train", "validation")}
    present = {column: part for column, part in columns.items() if column in history}
    if "epoch" not in history or not present or history.empty:
        raise DataError(
            f"a learning curve of {quantity} needs columns epoch and {' or '.join(columns)}, "
            f"got {len(history)} rows of {', '.join(map(str, history.columns))}"
        )
    ax = _axes(ax)
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    few = "o" if len(history) < 15 else ""
    for column, part in present.items():
        ax.plot(
            history["epoch"],
            factor * history[column],
            color=PALETTE[0] if part != "validation" else PALETTE[1],
            label=part or None,
            marker=few,
            markersize=2.5,
        )
    if best_epoch is not None:
        ax.axvline(best_epoch, **_REFERENCE, label=f"best, epoch {best_epoch}")
    drawn = factor * history[list(present)].to_numpy(dtype=np.float64)
    # a schedule may end at zero, which a log axis leaves out; a training that diverged holds NaN
    positive = drawn[np.isfinite(drawn) & (drawn > 0)]
    if positive.size:
        _log_axis(ax, float(positive.min()), float(positive.max()))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="epoch", ylabel=_CURVES[quantity])
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return _finish(ax)


@styled
def learning_curves(history: pd.DataFrame, *, best_epoch: int | None = None) -> Figure:
    """Draw loss, force and energy error and the learning rate of a training, one panel each.

    Parameters
    ----------
    history
        As ``FinetuneResult.history``.
    best_epoch
        Marked in the panels of errors.
    """
    figure, axes = subplots(2, 2, width=2 * COLUMN, aspect=0.68)
    for ax, quantity in zip(axes.flat, _CURVES, strict=True):
        learning_curve(
            history,
            ax,
            quantity=cast(Any, quantity),
            best_epoch=None if quantity == "lr" else best_epoch,
        )
        if ax is not axes[0, 0] and ax.get_legend() is not None:
            ax.get_legend().remove()
    return figure


@styled
def energy_histogram(
    dataset: Dataset, ax: Axes | None = None, *, groups: Sequence[object] | NDArray[Any] | None = None, bins: int = 40
) -> Axes:
    """Draw the distribution of energies per atom, stacked by group.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    groups
        What each frame belongs to, shape ``(n_frames,)``; by default crystals and molecules.
    bins
        Over the range of energies.
    """
    named = _by_group(dataset, groups)
    energies = dataset.energies / np.asarray(dataset.n_atoms)
    ax = _axes(ax)
    ax.hist(
        [energies[chosen] for chosen in named.values()],
        bins,
        stacked=True,
        color=_colours(len(named)),
        label=[f"{name} ({chosen.sum()})" for name, chosen in named.items()],
        edgecolor="white",
        linewidth=0.3,
    )
    ax.set(xlabel="E/N (eV/atom)", ylabel="frames")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    ax.legend()
    return _finish(ax)


@styled
def force_histogram(dataset: Dataset, ax: Axes | None = None, *, bins: int = 60, log: bool = False) -> Axes:
    """Draw the distribution of the lengths of forces, stacked by element.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    bins
        From zero to the largest force.
    log
        Counts on a log scale, which shows the tail; the heights of stacked parts then cannot be compared.
    """
    symbols = np.concatenate([frame.get_chemical_symbols() for frame in dataset.frames])
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    elements = sorted(set(symbols.tolist()))
    ax = _axes(ax)
    ax.hist(
        [lengths[symbols == element] for element in elements],
        np.linspace(0, lengths.max() or 1.0, bins + 1).tolist(),
        stacked=True,
        log=log,
        color=[ELEMENT_COLOURS.get(element, "#8C6D31") for element in elements],
        label=elements,
    )
    ax.set(xlabel="|F| (eV/Å)", ylabel="atoms", xlim=(0, None))
    ax.legend(reverse=True)
    return _finish(ax)


@styled
def density_landscape(
    dataset: Dataset, ax: Axes | None = None, *, groups: Sequence[object] | NDArray[Any] | None = None
) -> Axes:
    """Draw the energy per atom above the lowest one against the density of the crystals; molecules are left out.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    groups
        What each frame belongs to, shape ``(n_frames,)``, told apart by colour; by default all are alike.

    Raises
    ------
    DataError
        If there is no crystal.
    """
    crystal = np.asarray(dataset.is_crystal)
    if not crystal.any():
        raise DataError(f"{dataset.name}: none of {len(dataset)} frames is a crystal, so there is no density")
    density = np.array(
        [
            frame.get_masses().sum() / frame.get_volume() * _G_PER_CM3 if chosen else np.nan
            for frame, chosen in zip(dataset.frames, crystal, strict=True)
        ]
    )
    energies = 1000 * dataset.energies / np.asarray(dataset.n_atoms)
    energies = energies - energies[crystal].min()
    named = {"": crystal} if groups is None else _by_group(dataset, groups)
    ax = _axes(ax)
    for colour, (name, chosen) in zip(_colours(len(named)), named.items(), strict=True):
        part = chosen & crystal
        if not part.any():
            continue
        ax.scatter(density[part], energies[part], s=9, color=colour, alpha=0.7, linewidth=0, label=name)
    ax.set(xlabel="density (g/cm³)", ylabel="E/N above the lowest (meV/atom)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if groups is not None:
        ax.legend()
    return _finish(ax)


@styled
def outliers(
    data: Dataset | pd.DataFrame, ax: Axes | None = None, *, column: str = "force_rms", n_sd: float = 5.0
) -> Axes:
    """Draw a force of each frame against its number and name those beyond the mean plus some standard deviations.

    Parameters
    ----------
    data
        Labels, of which the RMS force of each frame is drawn, or a table with the columns ``frame`` and ``column``,
        such as :func:`tlmc.evaluation.per_frame` returns.
    ax
        Where to draw.
    column
        Of the table: ``force_rms``, ``force_rmse_vector`` or ``force_max_error``, eV/Angstrom.
    n_sd
        Standard deviations above the mean (the thesis: 5).

    Raises
    ------
    DataError
        If the table is empty or lacks a column.
    """
    if not isinstance(data, pd.DataFrame):
        data = pd.DataFrame({"frame": data.frame_numbers, "force_rms": frame_force_rms(data)})
    if data.empty or not {"frame", column} <= set(data.columns):
        raise DataError(
            f"outliers need columns frame and {column}, got {len(data)} rows of {', '.join(map(str, data.columns))}"
        )
    frames, values = data["frame"].to_numpy(), data[column].to_numpy(dtype=np.float64)
    bound = values.mean() + n_sd * values.std()
    beyond = values > bound
    ax = _axes(ax)
    ax.scatter(frames[~beyond], values[~beyond], s=6, color=PALETTE[0], linewidth=0)
    ax.scatter(frames[beyond], values[beyond], s=12, color=PALETTE[1], marker="D", linewidth=0)
    for frame, value in zip(frames[beyond], values[beyond], strict=True):
        ax.annotate(str(frame), (frame, value), xytext=(3, 2), textcoords="offset points", fontsize=6)
    ax.axhline(values.mean(), **_REFERENCE | {"linestyle": ":"}, label="mean")
    ax.axhline(bound, **_REFERENCE, label=f"mean + {n_sd:g} sd")
    titles = {
        "force_rms": "RMS force",
        "force_rmse_vector": "force RMSE, vector",
        "force_max_error": "largest force error",
    }
    ax.set(
        xlabel="frame", ylabel=f"{titles.get(column, column)} (eV/Å)", ylim=(0, 1.1 * max(bound, values.max()) or 1.0)
    )
    # above the panel: anywhere in it points may lie
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _finish(ax)


@styled
def force_outliers(dataset: Dataset, ax: Axes | None = None, *, n_sd: float = 5.0, n_named: int = 8) -> Axes:
    """Draw the length of every force against the number of its frame, those of `tlmc.analysis.outliers` marked.

    Parameters
    ----------
    dataset
        Labels.
    ax
        Where to draw.
    n_sd
        Standard deviations above the mean of all forces (the thesis: 5).
    n_named
        Frames that are named at most, the largest forces first.
    """
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    frames = np.repeat(dataset.frame_numbers, dataset.n_atoms)
    bound = lengths.mean() + n_sd * lengths.std()
    beyond = lengths > bound
    ax = _axes(ax)
    ax.scatter(frames[~beyond], lengths[~beyond], s=1.5, color=PALETTE[0], alpha=0.5, linewidth=0, rasterized=True)
    ax.scatter(frames[beyond], lengths[beyond], s=12, color=PALETTE[1], marker="D", linewidth=0)
    table = find_outliers(dataset, n_sd)
    largest = table[table["quantity"] == "force"].drop_duplicates("frame").head(n_named)
    for frame, value in zip(largest["frame"], largest["value"], strict=True):
        ax.annotate(str(frame), (frame, value), xytext=(3, 2), textcoords="offset points", fontsize=6)
    ax.axhline(lengths.mean(), **_REFERENCE | {"linestyle": ":"}, label="mean")
    ax.axhline(bound, **_REFERENCE, label=f"mean + {n_sd:g} sd")
    ax.set(xlabel="frame", ylabel="|F| (eV/Å)", ylim=(0, 1.1 * max(bound, lengths.max()) or 1.0))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _finish(ax)


@styled
def neighbour_distances(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how near the atoms of each pair of elements come, beside the length of a single bond between them.

    Parameters
    ----------
    table
        As :func:`tlmc.analysis.nearest_neighbours` returns.
    ax
        Where to draw; by default a figure whose height grows with the number of pairs.

    Raises
    ------
    DataError
        If there is no pair, or a column is missing.
    """
    columns = ["element", "neighbour", "shortest", "frame", "mean", "sd"]
    if table.empty or not set(columns) <= set(table.columns):
        raise DataError(
            f"neighbour distances need columns {', '.join(columns)}, "
            f"got {len(table)} rows of {', '.join(map(str, table.columns))}"
        )
    place = np.arange(len(table))
    mean, shortest = table["mean"].to_numpy(dtype=np.float64), table["shortest"].to_numpy(dtype=np.float64)
    radius = {symbol: covalent_radii[atomic_numbers[symbol]] for symbol in {*table["element"], *table["neighbour"]}}
    bond = [radius[first] + radius[second] for first, second in zip(table["element"], table["neighbour"], strict=True)]
    ax = _axes(ax, aspect=0.3 + 0.055 * len(table))
    ax.plot(bond, place, "|", color="0.5", markersize=9, label="sum of covalent radii")
    ax.hlines(place, shortest, mean, color="0.8", linewidth=0.8, zorder=0)
    ax.errorbar(mean, place, xerr=table["sd"], fmt="o", markersize=3, color=PALETTE[0], label="mean ± sd")
    ax.plot(shortest, place, "D", markersize=3, color=PALETTE[1], label="shortest")
    ax.set_yticks(place, [f"{a} to {b}" for a, b in zip(table["element"], table["neighbour"], strict=True)])
    ax.set(xlabel="distance to the nearest such neighbour (Å)", ylabel="atom to neighbour", xlim=(0, None))
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=3, columnspacing=1, handletextpad=0.3)
    return _finish(ax)


@styled
def split_coverage(dataset: Dataset, split: Split) -> Figure:
    """Draw whether the parts of a split cover the same energies (left) and forces (right).

    The right panel shows the share of atoms with a larger force, on a log scale: where the curve of the test part ends
    further right than that of the training part, the model is asked about forces it has not seen.

    Parameters
    ----------
    dataset
        All frames.
    split
        Their parts.
    """
    parts = {name: getattr(split, name) for name in ("train", "validation", "test")}
    energies = 1000 * relative_energies(dataset)
    # a fixed seed: points are spread so that they do not cover one another, and stay where they are
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(dataset))
    figure, axes = subplots(1, 2, width=2 * COLUMN)
    left, right = axes[0]
    for place, (colour, (name, chosen)) in enumerate(zip(PALETTE, parts.items(), strict=False)):
        left.scatter(energies[chosen], place + spread[chosen], s=7, color=colour, alpha=0.7, linewidth=0)
        lengths = np.sort(np.linalg.norm(np.concatenate([dataset.forces[k] for k in chosen]), axis=1))
        right.step(lengths, 1 - np.arange(len(lengths)) / len(lengths), where="pre", color=colour, label=name)
        right.plot(lengths[-1], 1 / len(lengths), "o", markersize=3, color=colour)
    left.set_yticks(range(len(parts)), [f"{name}\n({len(chosen)})" for name, chosen in parts.items()])
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.set(xlabel="E/N above the lowest (meV/atom)")
    right.set_yscale("log")
    right.set(xlabel="|F| (eV/Å)", ylabel="share of atoms with a larger |F|", xlim=(0, None))
    right.legend()
    for ax in (left, right):
        _finish(ax)
    return figure


@styled
def error_by_element(results: Mapping[str, Mapping[str, Metric]], ax: Axes | None = None) -> Axes:
    """Draw the vector RMSE of forces of each element as bars.

    Parameters
    ----------
    results
        Metrics of :func:`tlmc.evaluation.evaluate` by name, such as ``{"before": ..., "after": ...}``.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If no element is there.
    """
    prefix = "force_rmse_vector_"
    # an element is one capital and perhaps one small letter; "below_2" and "above_2" are ranges
    elements = sorted(
        {
            name.removeprefix(prefix)
            for metrics in results.values()
            for name in metrics
            if re.fullmatch(f"{prefix}[A-Z][a-z]?", name)
        }
    )
    if not elements:
        raise DataError(f"no {prefix}<element> in the metrics of {', '.join(results) or 'nothing'}")
    ax = _axes(ax)
    width = 0.8 / len(results)
    for i, (colour, (name, metrics)) in enumerate(zip(_colours(len(results)), results.items(), strict=True)):
        present = [
            (k, metrics[prefix + element].value) for k, element in enumerate(elements) if prefix + element in metrics
        ]
        bars = ax.bar(
            [k + (i - (len(results) - 1) / 2) * width for k, _ in present],
            [value for _, value in present],
            width,
            color=colour,
            label=name,
        )
        ax.bar_label(bars, fmt="%.2g", fontsize=6, padding=1)
    ax.set_xticks(range(len(elements)), elements)
    ax.set(ylabel="force RMSE, vector (eV/Å)")
    ax.margins(y=0.15)
    ax.legend()
    return _finish(ax)


@styled
def validation_curves(
    histories: Mapping[str, Sequence[pd.DataFrame]],
    ax: Axes | None = None,
    *,
    quantity: Literal["force_rmse_vector", "energy_rmse_per_atom"] = "force_rmse_vector",
) -> Axes:
    """Draw how the validation error of several trainings falls, on log axes, a line per run, a colour per name.

    Parameters
    ----------
    histories
        Under each name (of a recipe, say) the histories of its runs (``FinetuneResult.history``), seeds as a rule.
    ax
        Where to draw.
    quantity
        Energies are drawn in meV/atom.

    Raises
    ------
    DataError
        If there is no run, or a history is empty or lacks the columns.
    """
    column = f"validation_{quantity}"
    factor = 1000.0 if quantity == "energy_rmse_per_atom" else 1.0
    ax = _axes(ax)
    drawn = []
    for colour, (name, runs) in zip(_colours(len(histories)), histories.items(), strict=True):
        for i, history in enumerate(runs):
            if history.empty or not {"epoch", column} <= set(history.columns):
                raise DataError(
                    f"validation curves of {name} need columns epoch and {column}, "
                    f"got {len(history)} rows of {', '.join(map(str, history.columns))}"
                )
            values = factor * history[column].to_numpy(dtype=np.float64)
            drawn.append(values[np.isfinite(values) & (values > 0)])
            marker = "o" if len(history) < 15 else ""
            label = name if i == 0 else None
            ax.plot(history["epoch"], values, color=colour, alpha=0.8, marker=marker, markersize=2.5, label=label)
    if not drawn:
        raise DataError("validation curves need at least one run, got none")
    if any(values.size for values in drawn):
        _log_axis(ax, *(float(extreme(np.concatenate(drawn))) for extreme in (np.min, np.max)))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set(xlabel="epoch, validation part", ylabel=_CURVES[quantity])
    ax.legend()
    return _finish(ax)


@styled
def error_against_force(tables: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw the force error of each frame against the size of its labelled forces, on log axes.

    The line is where the error is as large as the force, as of a model that predicts zero.

    Parameters
    ----------
    tables
        By name, tables as :func:`tlmc.evaluation.per_frame` returns them.
    ax
        Where to draw.

    Raises
    ------
    DataError
        If there is no table, or one is empty or lacks a column.
    """
    if not tables:
        raise DataError("errors against forces need at least one table, got none")
    ax = _axes(ax, aspect=0.88)
    both = []
    for colour, (name, table) in zip(_colours(len(tables)), tables.items(), strict=True):
        if table.empty or not {"force_rms", "force_rmse_vector"} <= set(table.columns):
            raise DataError(
                f"{name}: errors against forces need columns force_rms and force_rmse_vector, "
                f"got {len(table)} rows of {', '.join(map(str, table.columns))}"
            )
        both.append(table["force_rms"].to_numpy(dtype=np.float64))
        ax.scatter(
            table["force_rms"], table["force_rmse_vector"], s=9, color=colour, alpha=0.7, linewidth=0, label=name
        )
    force = np.concatenate(both)
    ends = [float(force[force > 0].min(initial=1.0)), float(force.max(initial=1.0))]
    ax.plot(ends, ends, zorder=0, **_REFERENCE)
    ax.set_xscale("log")
    _log_ticks(ax.xaxis, ends[1] / ends[0])
    _log_axis(ax, *ax.get_ylim())
    ax.set(xlabel="RMS of the labelled |F| of a frame (eV/Å)", ylabel="force RMSE of the frame, vector (eV/Å)")
    # above the panel: anywhere in it points may lie
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _finish(ax)


@styled
def energy_volume(
    volumes: ArrayLike,
    curves: Mapping[str, ArrayLike],
    ax: Axes | None = None,
    *,
    points: tuple[ArrayLike, ArrayLike] | None = None,
) -> Axes:
    """Draw energy against volume according to several models.

    Parameters
    ----------
    volumes
        Angstrom^3 per molecule (or per anything else, the same for all), shape ``(n,)``.
    curves
        Energies by name, eV per molecule on a common zero, each of shape ``(n,)``.
    ax
        Where to draw.
    points
        Volumes and energies of labelled frames, drawn as grey points as far as they lie near the curves.

    Raises
    ------
    DataError
        If there is no curve, or a curve is not as long as the volumes.
    """
    x = np.asarray(volumes, dtype=np.float64)
    lines = {name: np.asarray(energies, dtype=np.float64) for name, energies in curves.items()}
    wrong = {name: energies.shape for name, energies in lines.items() if energies.shape != x.shape}
    if not lines or wrong or x.ndim != 1 or x.size == 0:
        raise DataError(f"energy curves need {x.shape} energies each, got {wrong or 'none'}")
    ax = _axes(ax)
    if points is not None:
        places, energies = (np.asarray(part, dtype=np.float64) for part in points)
        inside = (places >= x.min()) & (places <= x.max())
        ax.scatter(places[inside], energies[inside], s=7, color="0.6", linewidth=0, label="labelled frames")
    for colour, (name, energies) in zip(_colours(len(lines)), lines.items(), strict=True):
        ax.plot(x, energies, color=colour, marker="o", markersize=2.5, label=name)
        lowest = int(np.argmin(energies))
        ax.plot(x[lowest], energies[lowest], "D", color=colour, markersize=5, markerfacecolor="none")
    ax.axhline(0, **_REFERENCE | {"linestyle": ":"})
    lower, upper = min(e.min() for e in lines.values()), max(e.max() for e in lines.values())
    # hot frames lie far above and would flatten the curves
    ax.set_ylim(lower - 0.2 * (upper - lower or 1.0), upper + (upper - lower or 1.0))
    ax.set(xlabel="volume (Å³ per molecule)", ylabel="energy (eV per molecule)")
    # above the panel: anywhere in it points may lie
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1)
    return _finish(ax)


@styled
def environment_vector(vector: ArrayLike, parameters: AEVParameters, symbols: Sequence[str]) -> Figure:
    """Draw the atomic environment vector of one atom: radial terms left, angular terms right; zero blocks left out.

    Parameters
    ----------
    vector
        Shape ``(parameters.length(len(symbols)),)``, a row of :func:`tlmc.descriptors.aev.aev`.
    parameters
        Constants of the descriptor.
    symbols
        Elements in the order of their channels.

    Returns
    -------
    Figure
        Two columns wide. Left, a line per neighbour element over the distances that the terms are centred on. Right, a
        band per pair of neighbour elements; in it a row per mean distance, a column per angle.

    Raises
    ------
    DataError
        If the vector has another length, or is zero throughout (an atom without neighbours).
    """
    values = np.asarray(vector, dtype=np.float64)
    if values.shape != (parameters.length(len(symbols)),) or not values.any():
        raise DataError(
            f"an environment vector of {len(symbols)} elements has {parameters.length(len(symbols))} numbers, not all "
            f"zero; got shape {values.shape}, {np.count_nonzero(values)} of them not zero"
        )
    n_first_angular = len(symbols) * parameters.n_radial
    radial = dict(zip(symbols, values[:n_first_angular].reshape(len(symbols), -1), strict=True))
    pairs = [f"{a}, {b}" for a, b in combinations_with_replacement(symbols, 2)]
    shape = (len(pairs), len(parameters.shifts_angular), len(parameters.sections))
    angular = dict(zip(pairs, values[n_first_angular:].reshape(shape), strict=True))
    figure, axes = subplots(1, 2, width=2 * COLUMN)
    left, right = axes[0]
    for symbol, part in radial.items():
        if part.any():
            colour = ELEMENT_COLOURS.get(symbol, "#8C6D31")
            left.plot(parameters.shifts_radial, part, "o-", markersize=2.5, color=colour, label=symbol)
    left.axvline(parameters.r_cut_radial, **_REFERENCE, label="cutoff")
    left.set(xlabel="distance $R_s$ (Å)", ylabel="radial term", ylim=(0, None))
    # above the panel: peaks may lie anywhere in it
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    present = {pair: part for pair, part in angular.items() if part.any()}
    if present:
        n_rows = len(parameters.shifts_angular)
        image = np.concatenate(list(present.values()))
        drawn = right.imshow(image, cmap="viridis", aspect="auto", interpolation="nearest")
        right.hlines(np.arange(1, len(present)) * n_rows - 0.5, -0.5, image.shape[1] - 0.5, color="white", linewidth=1)
        right.set_yticks(np.arange(len(present)) * n_rows + (n_rows - 1) / 2, list(present))
        columns = np.unique(np.linspace(0, image.shape[1] - 1, 4).astype(int))
        right.set_xticks(columns, [f"{np.degrees(parameters.sections[k]):.0f}°" for k in columns])
        bar = figure.colorbar(drawn, ax=right, shrink=0.8, aspect=25, pad=0.02)
        bar.set_label("angular term")
        bar.outline.set_linewidth(0.4)
        bar.ax.tick_params(which="both", **_TICKS)
    right.set(xlabel="angle $\\theta_s$", ylabel="pair of neighbours")
    for ax in (left, right):
        _finish(ax)
    return figure


def _axes(ax: Axes | None, aspect: float = 0.75) -> Axes:
    if ax is not None:
        return ax
    return cast(Axes, subplots(aspect=aspect)[1][0, 0])


def _finish(ax: Axes) -> Axes:
    # ticks are made when the figure is drawn, which may be after the style is gone
    ax.tick_params(which="both", **_TICKS)
    return ax


def _limits(values: Array, quantity: Quantity) -> tuple[float, float]:
    lower, upper = float(values.min()), float(values.max())
    margin = 0.04 * (upper - lower) or 0.5
    return (0.0 if quantity == "force" else lower - margin, upper + margin)


def _density(ax: Axes, x: Array, y: Array, limits: tuple[float, float]) -> ScalarMappable:
    """Draw points coloured by how many lie near: hexagons where they are many, else markers."""
    lower, upper = limits
    if len(x) >= _HEXBIN_FROM:
        points: Any = ax.hexbin(
            x, y, gridsize=70, extent=(lower, upper, lower, upper), mincnt=1, linewidths=0.1, rasterized=True
        )
        highest = float(points.get_array().max())
    else:
        near = cKDTree(np.column_stack([x, y]))
        count = near.query_ball_point(near.data, 0.02 * (upper - lower), return_length=True)
        order = np.argsort(count, kind="stable")
        points = ax.scatter(x[order], y[order], c=count[order], s=7, linewidth=0)
        highest = float(count.max())
    points.set_norm(LogNorm(1, max(highest, 2.0)))
    points.set_cmap("viridis")
    return cast(ScalarMappable, points)


def _colorbar(axes: list[Axes], points: ScalarMappable) -> None:
    bar = axes[0].figure.colorbar(points, ax=axes, shrink=0.8, aspect=25, pad=0.02)
    bar.set_label("points nearby")
    bar.outline.set_linewidth(0.4)
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(which="both", **_TICKS)


def _log_axis(ax: Axes, lowest: float, highest: float) -> None:
    """Make the y axis logarithmic, with numbers as they are spoken: 0.2, 0.05."""
    ax.set_yscale("log")
    _log_ticks(ax.yaxis, highest / lowest)


def _log_ticks(axis: Axis, ratio: float) -> None:
    subs = (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
    axis.set_major_locator(MaxNLocator(nbins=5) if 1 < ratio < 4 else LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_group(dataset: Dataset, groups: Sequence[object] | NDArray[Any] | None) -> dict[str, NDArray[np.bool_]]:
    """Return what frames belong to each group, by name."""
    if groups is None:
        crystal = np.asarray(dataset.is_crystal)
        named = {"crystals": crystal, "molecules": ~crystal}
        return {name: chosen for name, chosen in named.items() if chosen.any()}
    labels = np.array([str(group) for group in groups])
    if labels.shape != (len(dataset),):
        raise DataError(f"{dataset.name}: {len(dataset)} frames, but groups for {len(labels)}")
    # in the order of appearance of numbers as numbers: "10" after "9"
    return {name: labels == name for name in sorted(set(labels.tolist()), key=lambda name: (len(name), name))}


def _colours(n: int) -> list[Any]:
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0, 1, n)]


def _significant(value: float) -> str:
    """Format a number with two to three significant digits and without an exponent."""
    digits = 2 if value == 0 else int(np.clip(2 - np.floor(np.log10(abs(value))), 0, 6))
    return f"{value:.{digits}f}"
