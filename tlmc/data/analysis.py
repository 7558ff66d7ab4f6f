"""What a labelled set holds: energies and groups, forces by element, outliers, densities, distances, environments.

Everything returns arrays or tables; `tlmc.plots` draws them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from ase import Atoms, units
from numpy.typing import ArrayLike, NDArray

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import contacts, element_counts
from tlmc.data.splits import energy_groups
from tlmc.descriptors.soap import SOAP
from tlmc.equality import equal_by_content
from tlmc.errors import DataError

FloatArray = NDArray[np.float64]

_G_PER_CM3: Final = 1e24 / units.mol
"""g/cm^3 per atomic mass unit and cubic Angstrom."""


def relative_energies(dataset: Dataset) -> FloatArray:
    """Return energies per atom above the lowest frame of the same composition, eV/atom, shape ``(n_frames,)``.

    Frames are compared where their atoms come in the same proportions, so a molecule shows how far it lies above its
    crystal.
    """
    per_atom = dataset.energies / dataset.n_atoms
    members = defaultdict(list)
    for k, frame in enumerate(dataset.frames):
        members[frame.symbols.formula.reduce()[0].format("hill")].append(k)
    relative = np.empty(len(dataset))
    for chosen in members.values():
        relative[chosen] = per_atom[chosen] - per_atom[chosen].min()
    return relative


def force_magnitudes(dataset: Dataset) -> dict[str, FloatArray]:
    """Return the lengths of all force vectors of each element, eV/Angstrom, in the order of frames and atoms."""
    numbers = np.concatenate([frame.numbers for frame in dataset.frames])
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    return {element: lengths[numbers == Atoms(element).numbers[0]] for element in dataset.elements}


def density(frame: Atoms) -> float:
    """Return the mass density of a periodic frame, g/cm^3.

    Raises
    ------
    DataError
        If the frame has no cell with a volume.
    """
    if frame.cell.rank < 3:
        raise DataError(f"{frame.get_chemical_formula()} has no cell, so no density")
    return float(frame.get_masses().sum() / frame.get_volume() * _G_PER_CM3)


def packings(dataset: Dataset) -> list[str]:
    """Return which packing each frame belongs to, as far as the file says.

    Returns
    -------
    list of str
        Space group and number of the packing, ``"P21/c (12)"``, or ``""``.
    """
    return [
        f"{frame.info['space_group']} ({frame.info['packing']})" if {"space_group", "packing"} <= {*frame.info} else ""
        for frame in dataset.frames
    ]


def frame_table(dataset: Dataset) -> pd.DataFrame:
    """Return one row per frame.

    Returns
    -------
    pandas.DataFrame
        Columns ``frame`` (number in the source), ``formula``, ``n_atoms``, ``kind`` (crystal or molecule), ``group``
        (what the file calls it, else empty), ``packing`` (see `packings`), ``energy_per_atom`` and
        ``relative_energy`` (eV/atom), ``energy_group`` (see `tlmc.data.splits.energy_groups`), ``force_rms`` and
        ``force_max`` (of force vectors, eV/Angstrom), and for crystals ``density`` (g/cm^3), ``volume_per_atom``
        (Angstrom^3) and ``pressure`` (GPa, where the stress is known), NaN otherwise.
    """
    crystal = dataset.is_crystal
    squared = [(forces**2).sum(axis=1) for forces in dataset.forces]
    pressures = [
        -stress[:3].mean() / units.GPa if stress is not None and periodic else np.nan
        for stress, periodic in zip(dataset.stresses, crystal, strict=True)
    ]
    return pd.DataFrame(
        {
            "frame": dataset.frame_numbers,
            "formula": [frame.get_chemical_formula() for frame in dataset.frames],
            "n_atoms": dataset.n_atoms,
            "kind": np.where(crystal, "crystal", "molecule"),
            "group": [str(frame.info.get("group", "")) for frame in dataset.frames],
            "packing": packings(dataset),
            "energy_per_atom": dataset.energies / dataset.n_atoms,
            "relative_energy": relative_energies(dataset),
            "energy_group": energy_groups(dataset),
            "force_rms": [float(np.sqrt(values.mean())) for values in squared],
            "force_max": [float(np.sqrt(values.max())) for values in squared],
            "density": [density(f) if c else np.nan for f, c in zip(dataset.frames, crystal, strict=True)],
            "volume_per_atom": [
                f.get_volume() / len(f) if c else np.nan for f, c in zip(dataset.frames, crystal, strict=True)
            ],
            "pressure": pressures,
        }
    )


def outliers(dataset: Dataset, n_sd: float = 5.0) -> pd.DataFrame:
    """Return energies and forces beyond the mean plus some standard deviations (thesis, chapter 4: 5).

    Energies are taken per atom above the lowest, crystals and molecules apart; forces are the lengths of the vectors
    on all atoms.

    Returns
    -------
    pandas.DataFrame
        Rows from the largest ``excess`` down, with columns ``frame`` (number in the source), ``quantity`` (energy or
        force), ``atom`` and ``element`` (of a force; -1 and empty for an energy), ``value`` and ``threshold``
        (eV/atom or eV/Angstrom), ``unit`` and ``excess`` (standard deviations above the mean).
    """
    rows = []
    energies = relative_energies(dataset)
    for chosen in (np.flatnonzero(dataset.is_crystal), np.flatnonzero(~dataset.is_crystal)):
        for k, threshold, excess in _beyond(energies[chosen], n_sd):
            frame = int(chosen[k])
            rows.append((dataset.frame_numbers[frame], "energy", -1, "", energies[frame], threshold, "eV/atom", excess))
    lengths = np.linalg.norm(np.concatenate(dataset.forces), axis=1)
    starts = np.concatenate([[0], np.cumsum(dataset.n_atoms)])
    for k, threshold, excess in _beyond(lengths, n_sd):
        frame = int(np.searchsorted(starts, k, side="right")) - 1
        atom = int(k - starts[frame])
        element = dataset.frames[frame].symbols[atom]
        number = dataset.frame_numbers[frame]
        rows.append((number, "force", atom, element, lengths[k], threshold, "eV/Angstrom", excess))
    columns = ["frame", "quantity", "atom", "element", "value", "threshold", "unit", "excess"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("excess", ascending=False, kind="stable", ignore_index=True)


def _beyond(values: FloatArray, n_sd: float) -> Iterator[tuple[int, float, float]]:
    """Yield place, threshold and excess in standard deviations of every value beyond the threshold."""
    if not values.size or not values.std():
        return
    threshold = values.mean() + n_sd * values.std()
    for k in np.flatnonzero(values > threshold):
        yield int(k), float(threshold), float((values[k] - values.mean()) / values.std())


def nearest_neighbours(dataset: Dataset, r_cut: float = 6.0) -> pd.DataFrame:
    """Return how near the atoms of each pair of elements come, periodic images included.

    Parameters
    ----------
    dataset
        Labels are not looked at.
    r_cut
        Largest distance searched, Angstrom.

    Returns
    -------
    pandas.DataFrame
        A row per ordered pair of elements with columns ``element`` and ``neighbour``, ``shortest`` (the smallest
        distance), ``frame`` (the number of the frame that has it), ``mean`` and ``sd`` (of the distances from the atoms
        of ``element`` to their nearest ``neighbour``, those without one within `r_cut` left out), all in Angstrom.
        Pairs that never come within `r_cut` have no row.
    """
    nearest: defaultdict[tuple[str, str], list[FloatArray]] = defaultdict(list)
    shortest: dict[tuple[str, str], tuple[float, int]] = {}
    for frame, number in zip(dataset.frames, dataset.frame_numbers, strict=True):
        symbols = np.array(frame.get_chemical_symbols())
        pairs = contacts(frame, r_cut)
        for neighbour in dataset.elements:
            closest = np.full(len(frame), np.inf)
            for atoms, others in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
                chosen = symbols[others] == neighbour
                np.minimum.at(closest, atoms[chosen], pairs.distance[chosen])
            for element in dataset.elements:
                found = closest[(symbols == element) & np.isfinite(closest)]
                if found.size:
                    pair = element, neighbour
                    nearest[pair].append(found)
                    shortest[pair] = min(shortest.get(pair, (np.inf, -1)), (float(found.min()), int(number)))
    rows = []
    for pair in sorted(nearest):
        values = np.concatenate(nearest[pair])
        rows.append((*pair, *shortest[pair], float(values.mean()), float(values.std())))
    return pd.DataFrame(rows, columns=["element", "neighbour", "shortest", "frame", "mean", "sd"])


def summary_table(dataset: Dataset) -> pd.DataFrame:
    """Return the numbers that describe a set, crystals and molecules apart (thesis, Table 3.1).

    Returns
    -------
    pandas.DataFrame
        Tidy rows with columns ``dataset``, ``kind`` (crystal or molecule), ``quantity``, ``value`` and ``unit``; tables
        of several sets can be concatenated and pivoted.
    """
    frames = frame_table(dataset)
    beyond = outliers(dataset)
    parts = [
        _summary(dataset.subset(np.flatnonzero(frames["kind"] == kind)), rows, beyond).assign(kind=kind)
        for kind, rows in frames.groupby("kind", sort=True)
    ]
    table = pd.concat(parts, ignore_index=True).assign(dataset=dataset.name)
    return table[["dataset", "kind", "quantity", "value", "unit"]]


def _summary(dataset: Dataset, rows: pd.DataFrame, beyond: pd.DataFrame) -> pd.DataFrame:
    """Return quantity, value and unit of the frames of one kind."""
    forces = force_magnitudes(dataset)
    lengths = np.concatenate(list(forces.values()))
    found = beyond[beyond["frame"].isin(rows["frame"])]
    numbers: list[tuple[str, float, str]] = [
        ("frames", len(rows), ""),
        ("atoms_smallest", rows["n_atoms"].min(), ""),
        ("atoms_largest", rows["n_atoms"].max(), ""),
        ("energy_lowest", rows["energy_per_atom"].min(), "eV/atom"),
        ("energy_range", np.ptp(rows["relative_energy"]), "eV/atom"),
        ("energy_sd", rows["relative_energy"].std(ddof=0), "eV/atom"),
        ("energy_groups", rows["energy_group"].nunique(), ""),
        ("energy_group_width", rows.groupby("energy_group")["relative_energy"].agg(np.ptp).mean(), "eV/atom"),
        ("force_mean", lengths.mean(), "eV/Angstrom"),
        ("force_rms", np.sqrt((lengths**2).mean()), "eV/Angstrom"),
        ("force_max", lengths.max(), "eV/Angstrom"),
        ("force_below_2", (lengths < 2).mean(), "fraction"),
    ]
    numbers += [(f"force_mean_{element}", values.mean(), "eV/Angstrom") for element, values in forces.items()]
    numbers += [(f"force_max_{element}", values.max(), "eV/Angstrom") for element, values in forces.items()]
    numbers += [(f"outliers_{what}", (found["quantity"] == what).sum(), "") for what in ("energy", "force")]
    if rows["density"].notna().all():
        numbers += [
            ("density_lowest", rows["density"].min(), "g/cm^3"),
            ("density_mean", rows["density"].mean(), "g/cm^3"),
            ("density_highest", rows["density"].max(), "g/cm^3"),
            ("volume_per_atom", rows["volume_per_atom"].mean(), "Angstrom^3"),
        ]
    numbers += [
        (f"shortest_{element}-{neighbour}", shortest, "Angstrom")
        for element, neighbour, shortest, *_ in nearest_neighbours(dataset).itertuples(index=False)
        if element <= neighbour
    ]
    table = pd.DataFrame(numbers, columns=["quantity", "value", "unit"])
    table["value"] = table["value"].astype(float)
    return table


def averaged_soap(frames: Sequence[Atoms], r_cut: float = 5.0, n_max: int = 4, l_max: int = 4) -> FloatArray:
    """Return the SOAP power spectrum averaged over the atoms of each frame, scaled to unit length.

    Parameters
    ----------
    frames
        ``n_frames`` structures; every element that occurs in one of them has channels.
    r_cut, n_max, l_max
        Of `tlmc.descriptors.soap.SOAP`; cutoff in Angstrom.

    Returns
    -------
    NDArray
        Shape ``(n_frames, n_features)``; a scalar product of two rows is the SOAP kernel of two frames.
    """
    soap = SOAP(list(element_counts(frames)), r_cut, n_max, l_max, sigma=0.5, average="outer", cutoff="cosine")
    # frame by frame: neighbour lists of a whole set at once would fill the memory
    rows = np.stack([np.asarray(soap(frame)).reshape(-1) for frame in frames])
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float64)


@equal_by_content
class DescriptorMap(NamedTuple):
    """Principal components of one descriptor vector per frame."""

    scores: FloatArray
    """Shape ``(n_frames, n_components)``, in the units of the normalised descriptor, origin at the mean of the fit."""
    explained: FloatArray
    """Share of the variance of the fitted frames along each component, shape ``(n_components,)``."""
    distances: FloatArray
    """Distance of each frame to the nearest fitted frame other than itself, in all components, ``(n_frames,)``."""


def descriptor_map(
    dataset: Dataset,
    fitted_on: ArrayLike | None = None,
    n_components: int = 2,
    r_cut: float = 5.0,
    n_max: int = 4,
    l_max: int = 4,
) -> DescriptorMap:
    r"""Lay the frames out by what their atoms see: principal components of SOAP vectors averaged over each frame.

    The averaged power spectra ``p_k`` are scaled to unit length, so that a scalar product of two is the SOAP kernel of
    two frames. With the singular value decomposition of the centred rows, :math:`P - \bar p = U S V^T`, the scores are
    :math:`(P - \bar p) V`, and component c explains :math:`S_c^2 / \sum S^2` of the variance.

    Parameters
    ----------
    dataset
        Labels are not looked at.
    fitted_on
        Indices of the frames that mean, components and `DescriptorMap.distances` refer to, such as the training part;
        by default all.
    n_components
        Of the map.
    r_cut, n_max, l_max
        Of `tlmc.descriptors.soap.SOAP`; cutoff in Angstrom.

    Raises
    ------
    DataError
        If there are fewer than two fitted frames.
    """
    fitted = np.arange(len(dataset)) if fitted_on is None else np.asarray(fitted_on)
    if len(fitted) < 2:
        raise DataError(f"{dataset.name}: a map needs at least two frames, got {len(fitted)}")
    rows = averaged_soap(dataset.frames, r_cut, n_max, l_max)
    centred = rows - rows[fitted].mean(axis=0)
    _, values, directions = np.linalg.svd(centred[fitted], full_matrices=False)
    # the sign of a component is free: its largest entry is made positive, the same on every machine
    directions = directions[:n_components]
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    squared = ((rows[:, None] - rows[fitted][None]) ** 2).sum(axis=-1)
    squared[fitted, np.arange(len(fitted))] = np.inf
    return DescriptorMap(
        scores=centred @ directions.T,
        explained=values[:n_components] ** 2 / (values**2).sum(),
        distances=np.sqrt(squared.min(axis=1)),
    )
