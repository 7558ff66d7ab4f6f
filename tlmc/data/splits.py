"""Seeded division of a data set into training, validation and test parts; equal geometries stay together."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tlmc.arguments import checked
from tlmc.data.dataset import Dataset
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, DataError

SplitMethod = Literal["random", "blocks", "energy_groups"]

_LOG = logging.getLogger(__name__)
_PARTS = ("train", "validation", "test")

# A gap between neighbouring energies this many times wider than the median gap separates two groups.
_GROUP_GAP = 8.0


@equal_by_content
@dataclass(frozen=True, eq=False)
class Split:
    """Indices into one `Dataset`, ascending in each part."""

    train: NDArray[np.int64]
    """Frames that weights, and energy offsets, are fitted on."""
    validation: NDArray[np.int64]
    """Frames that steer the training: learning rate, early stopping, choice of checkpoint."""
    test: NDArray[np.int64]
    """Frames that nothing is chosen by; reported errors are theirs."""
    method: str
    """How the parts were drawn."""
    seed: int
    """Seed they were drawn with."""

    @property
    def hash(self) -> str:
        """SHA-256 of the three parts, whatever method and seed they came from."""
        text = ";".join(",".join(map(str, getattr(self, part).tolist())) for part in _PARTS)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; `from_json` reads them back."""
        parts: dict[str, Any] = {part: getattr(self, part).tolist() for part in _PARTS}
        return {"method": self.method, "seed": self.seed, **parts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Split:
        """Read what `to_json` wrote.

        Raises
        ------
        DataError
            If a field is missing or of another type, or a frame is in two parts or twice in one.
        """
        method, seed = content.get("method"), content.get("seed")
        if not isinstance(method, str) or not isinstance(seed, int):
            raise DataError(f"split: needs a method and an integer seed, got {method!r} and {seed!r}")
        seen: dict[int, str] = {}
        for part in _PARTS:
            indices = content.get(part)
            if not isinstance(indices, list) or not all(type(k) is int and k >= 0 for k in indices):
                raise DataError(f"split: {part} must be a list of frame indices >= 0, got {indices!r:.80}")
            for k in indices:
                if k in seen:
                    raise DataError(f"split: frame {k} is in {seen[k]} and in {part}")
                seen[k] = part
        train, validation, test = (np.array(content[part], dtype=np.int64) for part in _PARTS)
        return cls(train, validation, test, method, seed)


@checked
def split_dataset(
    dataset: Dataset,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    method: SplitMethod = "random",
    seed: int = 0,
) -> Split:
    """Divide the frames of a data set into training, validation and test parts.

    - ``"random"``: every frame has the same chance to be in a part.
    - ``"blocks"``: three runs of consecutive frames, in an order along the file that the seed draws; for trajectories,
      whose neighbouring frames are nearly the same, so that a random test set would flatter the model.
    - ``"energy_groups"``: like ``"random"``, but every part gets its share, up to one frame, of each group that
      `energy_groups` finds (candidate crystals come in groups; thesis, chapter 4).

    Crystals and isolated molecules (`Dataset.is_crystal`) of a set that holds both are divided each by itself, so that
    every part gets its share of either, up to one frame: a lattice energy needs both, and a set has few molecules.

    Frames of one geometry (`Dataset.duplicates`) go to one part together: a copy of a training frame in the test set
    measures memory. Sizes, of either kind, follow from the fractions by largest remainder; they are exact unless a set
    of copies is larger than the part it must fit in or, with ``"blocks"``, lies across a boundary.

    Parameters
    ----------
    dataset
        Checked frames, ``n_frames``.
    fractions
        Training, validation and test share, each above zero, of sum 1.
    method
        How frames are drawn.
    seed
        Same data, arguments and seed give the same split.

    Returns
    -------
    Split
        Disjoint parts that cover the data set, none empty.

    Raises
    ------
    ConfigError
        If a fraction, the method or the seed is out of range.
    DataError
        If a part would be empty; the sentence says how many frames are needed.
    """
    if method not in get_args(SplitMethod):
        raise ConfigError(f"split method must be one of {', '.join(get_args(SplitMethod))}, got {method!r}")
    if len(fractions) != 3 or not all(f > 0 for f in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-9):
        raise ConfigError(f"fractions must be three numbers above 0 of sum 1, got {fractions}")
    if seed < 0:
        raise ConfigError(f"seed must be an integer >= 0, got {seed}")
    sizes = _shares(len(dataset), np.array(fractions))
    if not sizes.all():
        needed = next(n for n in count(len(dataset) + 1) if _shares(n, np.array(fractions)).all())
        raise DataError(
            f"{dataset.source}: {len(dataset)} frames are fewer than the split needs: they give {_sizes(sizes)} for "
            f"fractions {fractions}, which need {needed} frames"
        )
    rng = np.random.default_rng(seed)
    copies: defaultdict[int, list[int]] = defaultdict(list)
    for k, first in enumerate(dataset.duplicates.tolist()):
        copies[first].append(k)
    units = [np.array(members) for members in copies.values()]
    if len(units) < 3:
        raise DataError(
            f"{dataset.source}: {len(dataset)} frames are fewer than the split needs: only {len(units)} differ, and "
            "copies of one geometry cannot be in different parts"
        )
    kinds = [[unit for unit in units if dataset.is_crystal[unit[0]] == kind] for kind in (True, False)]
    part = np.empty(len(dataset), dtype=np.int64)
    order = rng.permutation(3) if method == "blocks" else None
    groups = energy_groups(dataset) if method == "energy_groups" else np.zeros(len(dataset), dtype=np.int64)
    drawn = []
    for kind in filter(None, kinds):
        own = _shares(sum(map(len, kind)), np.array(fractions))
        drawn += _draw(kind, own, groups, rng, part) if order is None else _blocks(kind, own, order, part)
    _fill_empty(part, drawn)
    train, validation, test = (np.flatnonzero(part == p).astype(np.int64) for p in range(3))
    return Split(train, validation, test, method, int(seed))


def only_crystals(dataset: Dataset) -> Dataset:
    """Return the frames that are crystals, for training or judging a model; molecules left out are warned of.

    What a model says about an isolated molecule is undefined if it was trained without any: the energies of both kinds
    are off by different constants, which a lattice energy holds in full.
    """
    crystals = dataset.crystals()
    if 0 < len(crystals) < len(dataset):
        warn_of_left_out({dataset.name: len(dataset) - len(crystals)})
    return crystals


def warn_of_left_out(molecules: Mapping[str, int]) -> None:
    """Say that isolated molecules, so many of each set, are left out, and what follows."""
    listed = ", ".join(f"{count} of {name}" for name, count in molecules.items())
    _LOG.warning(
        "isolated molecules are left out (%s): lattice energies, which are differences between crystal and molecule, "
        "cannot be had from a model trained without them", listed
    )  # fmt: skip


def shrunk(split: Split, n_train: int, seed: int = 0, dataset: Dataset | None = None) -> Split:
    """Return a split with fewer training frames and the same validation and test part.

    The frames are the first of a random order, so that with one seed the smaller parts are contained in the larger. Of
    a `dataset` with crystals and isolated molecules, each part has its share of either, up to one frame.

    Raises
    ------
    ConfigError
        If there are not so many training frames.
    """
    if not 1 <= n_train <= len(split.train):
        raise ConfigError(f"n_train must lie between 1 and the {len(split.train)} training frames, got {n_train}")
    order = np.random.default_rng(seed).permutation(split.train)
    if dataset is not None:
        place = np.empty(len(order))
        for kind in (True, False):
            own = np.flatnonzero(dataset.is_crystal[order] == kind)
            place[own] = (np.arange(len(own)) + 0.5) / max(1, len(own))
        order = order[np.argsort(place, kind="stable")]
    chosen = order[:n_train]
    return Split(np.sort(chosen), split.validation, split.test, f"{split.method}, {n_train} for training", split.seed)


def energy_groups(dataset: Dataset, smallest: int = 10) -> NDArray[np.int64]:
    """Find the groups that the energies per atom of a data set fall into.

    Frames of one composition are sorted by E/N_a and parted at every gap wider than 8 times their median gap; a group
    of fewer than `smallest` frames then joins the neighbour across the narrower gap, until none is left or only one.

    Parameters
    ----------
    dataset
        Checked frames, ``n_frames``.
    smallest
        Frames that a group must have, so that each part of a split can get a share.

    Returns
    -------
    NDArray
        Group of each frame, shape ``(n_frames,)``, numbered from 0: by composition, then by rising energy.
    """
    per_atom = dataset.energies / dataset.n_atoms
    compositions: defaultdict[str, list[int]] = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        compositions[frame.symbols.formula.reduce()[0].format("hill")].append(k)
    label = np.zeros(len(dataset), dtype=np.int64)
    n_groups = 0
    for _, found in sorted(compositions.items()):
        members = np.array(found)
        members = members[np.argsort(per_atom[members], kind="stable")]
        gaps = np.diff(per_atom[members])
        # equal energies, of copies, say nothing about how closely a group is filled
        wide = gaps > _GROUP_GAP * np.median(gaps[gaps > 0]) if gaps.any() else np.zeros(len(gaps), dtype=np.bool_)
        edges = [0, *(np.flatnonzero(wide) + 1).tolist(), len(members)]
        while len(edges) > 2:
            lengths = np.diff(edges)
            k = int(lengths.argmin())
            if lengths[k] >= smallest:
                break
            left = gaps[edges[k] - 1] if k else np.inf
            right = gaps[edges[k + 1] - 1] if k + 1 < len(lengths) else np.inf
            del edges[k if left <= right else k + 1]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            label[members[start:end]] = n_groups
            n_groups += 1
    return label


def _sizes(sizes: NDArray[np.int64]) -> str:
    return ", ".join(f"{size} {part}" for size, part in zip(sizes, _PARTS, strict=True))


def _shares(total: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Divide a number of frames in proportion to weights by largest remainder; a tie goes to the smaller part."""
    exact = total * weights / weights.sum()
    # 0.7 * 170 is 118.99999999999999
    shares: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    order = np.lexsort((weights, -np.round(exact - shares, 9)))
    shares[order[: total - shares.sum()]] += 1
    return shares


def _blocks(
    units: list[NDArray[np.int64]], sizes: NDArray[np.int64], order: NDArray[np.int64], part: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Cut the units, in the order of their first frames, where the sizes come closest; return them."""
    seen = np.cumsum([0, *map(len, units)])
    inner = [int(np.abs(seen - goal).argmin()) for goal in np.cumsum(sizes[order])[:2]]
    if len(units) >= 3:
        # however many copies a frame has, each part keeps one unit if there are three
        inner[0] = max(1, min(inner[0], len(units) - 2))
        inner[1] = max(inner[0] + 1, min(inner[1], len(units) - 1))
    edges = [0, *inner, len(units)]
    for p, start, end in zip(order, edges[:-1], edges[1:], strict=True):
        for unit in units[start:end]:
            part[unit] = p
    return units


def _draw(
    units: list[NDArray[np.int64]],
    sizes: NDArray[np.int64],
    groups: NDArray[np.int64],
    rng: np.random.Generator,
    part: NDArray[np.int64],
) -> list[NDArray[np.int64]]:
    """Draw a part for every unit: first sets of copies, largest first, then single frames group by group.

    Returns the units in the order of a draw.
    """
    room = sizes.copy()
    shuffled = [units[k] for k in rng.permutation(len(units))]
    for unit in sorted((unit for unit in shuffled if len(unit) > 1), key=len, reverse=True):
        fits = np.where(room >= len(unit), room, 0)
        p = int(rng.choice(3, p=fits / fits.sum())) if fits.any() else int(room.argmax())
        part[unit] = p
        room[p] -= len(unit)
    singles = np.array([unit[0] for unit in shuffled if len(unit) == 1], dtype=np.int64)
    singles = singles[np.argsort(groups[singles], kind="stable")]
    room = np.maximum(room, 0)
    goal = _shares(len(singles), room.astype(np.float64)) if len(singles) else room
    given = np.zeros(3, dtype=np.int64)
    for done, k in enumerate(singles, start=1):
        # the part furthest behind its share is next, so that any run of frames is divided in proportion
        behind = np.where(given < goal, goal * (done / len(singles)) - given, -np.inf)
        p = int(behind.argmax())
        part[k] = p
        given[p] += 1
    return shuffled


def _fill_empty(part: NDArray[np.int64], units: list[NDArray[np.int64]]) -> None:
    """Give a part too small for any set of copies one nevertheless: the smallest of the part that has most."""
    for empty in np.flatnonzero(np.bincount(part, minlength=3) == 0):
        donor = np.bincount([part[unit[0]] for unit in units], minlength=3).argmax()
        part[min((unit for unit in units if part[unit[0]] == donor), key=len)] = empty
