"""Candidate packings in the order of their energies: by the labels, and by models before and after fine-tuning.

Crystal structure prediction asks which of many packings is lowest, and the differences are a few hundredths of an eV
per molecule. A small RMSE does not answer that: errors that are alike for all packings leave their order as it is, and
errors that differ from packing to packing turn it round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, spearmanr

from tlmc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tlmc.data.dataset import Dataset
    from tlmc.potentials.model import Predictions

LABELS: Final = "labels"
"""Column of the labelled energies."""


def packing_energies(
    dataset: Dataset,
    predictions: Mapping[str, Predictions],
    n_molecules: ArrayLike,
    groups: Sequence[str],
    represent: Literal["mean", "lowest"] = "mean",
) -> pd.DataFrame:
    """Return the energy per molecule of each packing, by the labels and by models.

    Parameters
    ----------
    dataset
        Labels. For an honest answer, frames that the models have not been trained on.
    predictions
        By model, for the same frames.
    n_molecules
        Molecules (formula units) in each frame, shape ``(n_frames,)``.
    groups
        Packing of each frame; frames without one (``""``) are candidates of their own.
    represent
        What stands for a packing of several frames: the ``"mean"`` over them, or the frame of ``"lowest"`` labelled
        energy per molecule, the one nearest to a relaxed structure.

    Returns
    -------
    DataFrame
        A row per packing, by rising labelled energy, indexed by ``packing``: ``n_frames``, and in eV per molecule
        `LABELS` and a column per model, each relative to its own value for the packing that is lowest by the labels.
        A model that finds another packing lower has a negative number there.

    Raises
    ------
    DataError
        If there are fewer than two packings, lengths differ from the number of frames, frames do not hold the same
        molecule (energies of other compositions have no common zero), or an energy is not finite.
    ConfigError
        If ``represent`` is neither.
    """
    if represent not in ("mean", "lowest"):
        raise ConfigError(f"represent must be mean or lowest, got {represent!r}")
    molecules = np.asarray(n_molecules, dtype=np.float64)
    columns = {LABELS: dataset.energies} | {name: side.energies for name, side in predictions.items()}
    lengths = {"n_molecules": len(molecules), "groups": len(groups)} | {k: len(v) for k, v in columns.items()}
    wrong = [f"{length} {name}" for name, length in lengths.items() if length != len(dataset)]
    if wrong:
        raise DataError(f"{dataset.name}: a ranking of {len(dataset)} frames got {', '.join(wrong)}")
    _check_molecules(dataset, molecules)
    for name, energies in columns.items():
        not_finite = np.flatnonzero(~np.isfinite(energies))
        if not_finite.size:
            k = int(not_finite[0])
            raise DataError(f"{dataset.name}: frame {dataset.frame_numbers[k]} has the energy {energies[k]} by {name}")
    members: defaultdict[str, list[int]] = defaultdict(list)
    for k, group in enumerate(groups):
        members[group or f"frame {dataset.frame_numbers[k]}"].append(k)
    if len(members) < 2:
        raise DataError(f"{dataset.name}: a ranking needs at least two packings, got {', '.join(members) or 'none'}")
    table = pd.DataFrame({name: np.asarray(values) / molecules for name, values in columns.items()})
    rows = {}
    for packing, chosen in members.items():
        frames = table.iloc[chosen]
        values = frames.mean() if represent == "mean" else frames.iloc[int(frames[LABELS].to_numpy().argmin())]
        rows[packing] = {"n_frames": len(chosen), **values}
    result = pd.DataFrame(rows).T.rename_axis("packing").sort_values(LABELS)
    result["n_frames"] = result["n_frames"].astype(int)
    result[list(columns)] -= result[list(columns)].iloc[0]
    return result


def _check_molecules(dataset: Dataset, molecules: NDArray[np.float64]) -> None:
    """Make sure that all frames are made of one molecule, so that energies per molecule can be compared."""
    first: dict[str, float] = {}
    for frame, number, n in zip(dataset.frames, dataset.frame_numbers, molecules, strict=True):
        if not (np.isfinite(n) and n > 0):
            raise DataError(f"{dataset.name}: frame {number} cannot consist of {n:g} molecules")
        content = {symbol: count / n for symbol, count in sorted(frame.symbols.formula.count().items())}
        first = first or content
        if content.keys() != first.keys() or not np.allclose(list(content.values()), list(first.values())):
            here, there = (" ".join(f"{s}{c:g}" for s, c in one.items()) for one in (content, first))
            raise DataError(
                f"{dataset.name}: frame {number} is made of {here}, the first one of {there}: energies per molecule of "
                "different compositions have no order"
            )


def ranking_table(energies: pd.DataFrame) -> pd.DataFrame:
    r"""Tell how well each model orders the packings.

    Parameters
    ----------
    energies
        As :func:`packing_energies` returns.

    Returns
    -------
    DataFrame
        A row per model: Kendall's ``kendall`` (:math:`\tau_b`, right minus wrong pairs over all pairs), Spearman's
        ``spearman``, ``pairs_in_wrong_order`` (share), ``rank_of_lowest`` (place that the model gives to the packing of
        lowest label, 1 is right), ``regret`` (labelled energy of the model's favourite above the lowest, eV per
        molecule) and ``rmse`` of the energy differences, each column's mean taken away (eV per molecule).

    Raises
    ------
    DataError
        If a column is constant or not finite, so that it orders nothing.
    """
    labels = energies[LABELS]
    first, second = np.triu_indices(len(labels), k=1)
    by_label = np.sign(labels.to_numpy()[second] - labels.to_numpy()[first])
    rows = {}
    for model in energies.columns.drop(["n_frames", LABELS]):
        values = energies[model]
        if not (np.isfinite(values).all() and np.isfinite(labels).all()):
            raise DataError(f"energies of {len(labels)} packings by {model} or their labels are not all finite")
        if values.nunique() < 2 or labels.nunique() < 2:
            raise DataError(f"energies of {len(labels)} packings by {model} or their labels are all equal")
        by_model = np.sign(values.to_numpy()[second] - values.to_numpy()[first])
        difference = (values - values.mean()) - (labels - labels.mean())
        rows[model] = {
            "kendall": float(kendalltau(labels, values).statistic),
            "spearman": float(spearmanr(labels, values).statistic),
            "pairs_in_wrong_order": float((by_label * by_model < 0).mean()),
            "rank_of_lowest": 1 + int((values < values.iloc[int(labels.argmin())]).sum()),
            "regret": float(labels.iloc[int(values.argmin())] - labels.min()),
            "rmse": float(np.sqrt((difference**2).mean())),
        }
    return pd.DataFrame(rows).T.rename_axis("model").astype({"rank_of_lowest": int})
