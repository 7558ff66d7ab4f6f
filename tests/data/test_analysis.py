from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.random import default_rng

from tlmc.data.analysis import (
    density,
    descriptor_map,
    force_magnitudes,
    frame_table,
    nearest_neighbours,
    outliers,
    packings,
    relative_energies,
    summary_table,
)
from tlmc.data.dataset import Dataset
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.errors import DataError


def labelled(frame: Atoms, energy: float, forces: np.ndarray, **labels: np.ndarray) -> Atoms:
    frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces, **labels)
    return frame


@pytest.fixture(scope="module")
def mixed() -> Dataset:
    """Return sixty crystals of salt and six pairs of its ions in vacuum, written in turns from frame 0."""
    rng = default_rng(0)
    frames = []
    for k in range(66):
        if k % 11 == 0:
            frame = Atoms("NaCl", [[8, 8, 8], [8, 8, 10.4 + 0.01 * k]], cell=[18.0] * 3, pbc=True)
            frames.append(labelled(frame, 2 * (-3.0 + 0.001 * k), rng.uniform(0.1, 0.2, (2, 3))))
        else:
            frame = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
            frame.info["group"] = "cold" if k < 33 else "hot"
            frame.rattle(0.02, rng=rng)
            stress = np.array([-0.01, -0.02, -0.03, 1.0, 1.0, 1.0])
            forces = rng.uniform(0.1, 0.2, (8, 3)) * np.where(frame.symbols == "Na", 1, 2)[:, None]
            frames.append(labelled(frame, 8 * (-3.5 + 0.001 * k), forces, stress=stress))
    frames[40].calc.results["forces"][5] = [3.0, 0.0, 4.0]
    frames[20].calc.results["energy"] += 8.0
    return dataset_from_frames(frames, name="salt")


def test_relative_energies_compare_like_with_like(mixed: Dataset) -> None:
    relative = relative_energies(mixed)
    assert relative[1] == 0
    assert relative[2] == pytest.approx(0.001)
    # the ion pair has the composition of the crystal
    assert relative[0] == pytest.approx(-3.0 + 3.499)
    other = Atoms("Na", cell=[4] * 3, pbc=True)
    joined = dataset_from_frames([*_with_labels(mixed, 3), labelled(other, -50.0, np.zeros((1, 3)))], name="joined")
    assert relative_energies(joined) == pytest.approx([*relative[:3], 0.0])


def _with_labels(dataset: Dataset, count: int) -> list[Atoms]:
    parts = zip(dataset.frames[:count], dataset.energies, dataset.forces, strict=False)
    return [labelled(frame.copy(), float(energy), forces) for frame, energy, forces in parts]


def test_force_magnitudes_by_element(mixed: Dataset) -> None:
    lengths = force_magnitudes(mixed)
    assert list(lengths) == ["Na", "Cl"]
    assert len(lengths["Na"]) == len(lengths["Cl"]) == 60 * 4 + 6
    everything = np.linalg.norm(np.concatenate(mixed.forces), axis=1)
    assert np.concatenate(list(lengths.values())).sum() == pytest.approx(everything.sum())
    assert lengths["Cl"].mean() > 1.5 * lengths["Na"].mean()


def test_density_of_salt() -> None:
    salt = bulk("NaCl", "rocksalt", a=5.64)
    # a handbook has 2.17 g/cm^3
    assert density(salt) == pytest.approx(2.17, abs=0.01)
    with pytest.raises(DataError, match="Ar has no cell, so no density"):
        density(Atoms("Ar"))


def test_frame_table(mixed: Dataset) -> None:
    chosen = mixed.subset([12, 11, 40])
    table = frame_table(chosen)
    assert table["frame"].tolist() == [12, 11, 40]
    assert table["kind"].tolist() == ["crystal", "molecule", "crystal"]
    assert table["group"].tolist() == ["cold", "", "hot"]
    assert table["n_atoms"].tolist() == [8, 2, 8]
    assert table["energy_per_atom"].tolist() == pytest.approx([-3.488, -2.989, -3.46])
    assert table["relative_energy"].tolist() == pytest.approx([0, 0.499, 0.028])
    assert table["force_max"][2] == pytest.approx(5.0)
    squared = (chosen.forces[2] ** 2).sum(axis=1)
    assert table["force_rms"][2] == pytest.approx(np.sqrt(squared.mean()))
    assert table["volume_per_atom"][0] == pytest.approx(5.6**3 / 8)
    assert table["pressure"][0] == pytest.approx(0.02 / units.GPa)
    assert table.loc[1, ["density", "volume_per_atom", "pressure"]].isna().all()


def test_outliers_are_named(mixed: Dataset) -> None:
    # frames of the source keep their numbers
    table = outliers(mixed.subset(np.arange(10, 66)))
    assert table["frame"].tolist() == [40, 20]
    assert table["quantity"].tolist() == ["force", "energy"]
    force, energy = table.iloc[0], table.iloc[1]
    assert (force["atom"], force["element"]) == (5, mixed.frames[40].symbols[5])
    assert force["value"] == pytest.approx(5.0)
    assert energy["value"] == pytest.approx(relative_energies(mixed)[20], abs=0.02)
    lengths = np.linalg.norm(np.concatenate(mixed.forces[10:]), axis=1)
    assert force["threshold"] == pytest.approx(lengths.mean() + 5 * lengths.std())
    assert force["excess"] == pytest.approx((5.0 - lengths.mean()) / lengths.std())
    assert table["unit"].tolist() == ["eV/Angstrom", "eV/atom"]
    assert set(outliers(mixed, n_sd=1.0)["frame"]) > {20, 40}
    assert outliers(mixed.subset([1])).empty


def test_nearest_neighbours_of_salt_and_of_a_free_molecule() -> None:
    salt = labelled(bulk("NaCl", "rocksalt", a=5.6), -7.0, np.zeros((2, 3)))
    table = nearest_neighbours(dataset_from_frames([salt], name="salt")).set_index(["element", "neighbour"])
    assert table["shortest"].to_dict() == pytest.approx(
        {
            ("Cl", "Cl"): 5.6 / np.sqrt(2),
            ("Cl", "Na"): 2.8,
            ("Na", "Cl"): 2.8,
            ("Na", "Na"): 5.6 / np.sqrt(2),
        }
    )
    water = Atoms("OH2", [[0, 0, 0], [1, 0, 0], [0, 0.9, 0]])
    ion = Atoms("OH", [[0, 0, 0], [0.98, 0, 0]])
    frames = [labelled(water, -14.0, np.full((3, 3), 0.1)), labelled(ion, -9.0, np.full((2, 3), 0.1))]
    table = nearest_neighbours(dataset_from_frames(frames, name="water")).set_index(["element", "neighbour"])
    assert ("O", "O") not in table.index
    assert table.loc[("H", "O"), ["shortest", "frame", "mean"]].tolist() == pytest.approx([0.9, 0, 2.88 / 3])
    assert table.loc[("O", "H"), "mean"] == pytest.approx((0.9 + 0.98) / 2)
    assert table.loc[("H", "O"), "sd"] == pytest.approx(np.std([1.0, 0.9, 0.98]))


def test_summary_of_the_embedded_set() -> None:
    dataset = load_dataset("naphthalene")
    table = summary_table(dataset)
    assert table.columns.tolist() == ["dataset", "kind", "quantity", "value", "unit"]
    assert not table["value"].isna().any()
    values = table.set_index(["kind", "quantity"])["value"]
    assert values.index.is_unique
    assert values["crystal", "frames"] == 120
    assert values["molecule", "frames"] == 10
    per_atom = dataset.crystals().energies / 36
    assert values["crystal", "energy_range"] == pytest.approx(np.ptp(per_atom))
    lengths = np.linalg.norm(np.concatenate(dataset.crystals().forces), axis=1)
    assert values["crystal", "force_max"] == pytest.approx(lengths.max())
    assert values["crystal", "force_below_2"] == pytest.approx((lengths < 2).mean())
    assert 1.0 < values["crystal", "density_lowest"] < 1.2369 < values["crystal", "density_highest"] < 1.5
    assert ("molecule", "density_mean") not in values.index
    assert 0.95 < values["crystal", "shortest_C-H"] < 1.09
    assert ("crystal", "shortest_H-C") not in values.index
    assert values["crystal", "outliers_force"] + values["molecule", "outliers_force"] == len(outliers(dataset))


def test_summaries_of_several_sets_pivot(mixed: Dataset) -> None:
    crystals = mixed.crystals()
    tables = [summary_table(crystals), summary_table(mixed).assign(dataset="all")]
    wide = pd.concat(tables).pivot(index="quantity", columns=["dataset", "kind"], values="value")
    assert wide.columns.tolist() == [("salt", "crystal"), ("all", "crystal"), ("all", "molecule")]
    assert wide.loc["frames"].tolist() == [60, 60, 6]
    assert wide.loc["energy_range", ("salt", "crystal")] == pytest.approx(1.019)


def test_packings_are_named_where_the_file_names_them() -> None:
    frames = []
    for info in ({"space_group": "P21/c", "packing": 12}, {"packing": 3}, {}):
        frame = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
        frame.info |= info
        frames.append(labelled(frame, -28.0 - 0.01 * len(frames), np.full((8, 3), 0.1)))
    dataset = dataset_from_frames(frames, name="salt")
    assert packings(dataset) == ["P21/c (12)", "", ""]
    assert frame_table(dataset)["packing"].tolist() == packings(dataset)


class TestDescriptorMap:
    def salt(self, scales: list[float]) -> Dataset:
        frames = [
            labelled(bulk("NaCl", "rocksalt", a=5.6 * scale, cubic=True), -28.0 - k, np.full((8, 3), 0.1))
            for k, scale in enumerate(scales)
        ]
        return dataset_from_frames(frames, name="salt")

    def test_strain_is_one_dimensional_and_keeps_its_order(self) -> None:
        strains = [0.98, 0.985, 0.99, 0.995, 1.0, 1.005]
        mapped = descriptor_map(self.salt(strains))
        assert mapped.scores.shape == (6, 2)
        assert mapped.explained[0] > 0.95
        steps = np.diff(mapped.scores[:, 0])
        assert (steps > 0).all() or (steps < 0).all()
        assert mapped.scores.mean(axis=0) == pytest.approx(0.0, abs=1e-12)

    def test_all_components_keep_the_distances_of_the_fitted_frames(self) -> None:
        dataset = self.salt([0.97, 0.99, 1.0, 1.02])
        mapped = descriptor_map(dataset, n_components=3)
        assert mapped.explained.sum() == pytest.approx(1.0)
        gaps = np.linalg.norm(mapped.scores[:, None] - mapped.scores[None], axis=-1)
        np.fill_diagonal(gaps, np.inf)
        assert gaps.min(axis=1) == pytest.approx(mapped.distances, rel=1e-6)

    def test_a_frame_far_from_the_fitted_ones_is_told(self) -> None:
        mapped = descriptor_map(self.salt([0.99, 0.995, 1.0, 1.005, 1.1]), fitted_on=[0, 1, 2, 3])
        assert mapped.distances[4] > 5 * mapped.distances[:4].max()

    def test_the_map_does_not_depend_on_the_cell_chosen(self) -> None:
        dataset = self.salt([0.99, 1.0, 1.01])
        doubled = dataset_from_frames(
            [
                labelled(frame.repeat((1, 1, 2)), 2 * energy, np.full((16, 3), 0.1))
                for frame, energy in zip(dataset.frames, dataset.energies, strict=True)
            ],
            name="salt",
        )
        assert descriptor_map(doubled).scores == pytest.approx(descriptor_map(dataset).scores, abs=1e-9)

    def test_one_frame_is_no_map(self) -> None:
        with pytest.raises(DataError, match="salt: a map needs at least two frames, got 1"):
            descriptor_map(self.salt([1.0]))
