from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import duplicate_groups
from tlmc.data.loading import dataset_from_frames, load_dataset
from tlmc.data.splits import Split, SplitMethod, energy_groups, only_crystals, shrunk, split_dataset
from tlmc.errors import ConfigError, DataError

METHODS: tuple[SplitMethod, ...] = ("random", "blocks", "energy_groups")


def waters(energies: list[float], copies: dict[int, int] | None = None) -> Dataset:
    """Different water molecules with the given energies per atom; ``copies[k]`` is the frame that frame k repeats."""
    frames: list[Atoms] = []
    for k, energy in enumerate(energies):
        original = (copies or {}).get(k)
        if original is None:
            frame = molecule("H2O")
            frame.positions[1, 1] += 0.003 * k
            forces = np.full((3, 3), 0.1 * (k + 1) % 3)
        else:
            frame, energy = frames[original].copy(), energies[original]
            frame.rotate(77, (1, 2, 3))
            arrows = Atoms("H3", frames[original].calc.results["forces"])
            arrows.rotate(77, (1, 2, 3))
            forces = arrows.positions
        frame.calc = SinglePointCalculator(frame, energy=3 * energy, forces=forces)
        frames.append(frame)
    return dataset_from_frames(frames, name="waters", source="waters.extxyz")


def scattered(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(-5.0, -4.9, n).tolist()


def parts(split: Split) -> tuple[list[int], list[int], list[int]]:
    return split.train.tolist(), split.validation.tolist(), split.test.tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(10, 60),
    st.sampled_from(METHODS),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=6),
)
def test_parts_are_disjoint_cover_all_and_keep_copies_together(
    n: int, method: SplitMethod, seed: int, pairs: list[tuple[int, int]]
) -> None:
    copies = {max(pair): min(pair) for pair in pairs if pair[0] != pair[1] and max(pair) < n}
    copies = {k: original for k, original in copies.items() if original not in copies}
    dataset = waters(scattered(n, seed), copies)
    split = split_dataset(dataset, method=method, seed=seed)
    assert sorted(sum(parts(split), [])) == list(range(n))
    for indices in parts(split):
        assert indices
        assert indices == sorted(indices)
    part_of = {k: p for p, indices in enumerate(parts(split)) for k in indices}
    for k, original in enumerate(duplicate_groups(dataset.frames).tolist()):
        assert part_of[k] == part_of[original]
    for k, original in copies.items():
        assert part_of[k] == part_of[original]
    again = split_dataset(dataset, method=method, seed=seed)
    assert parts(again) == parts(split)
    assert again.hash == split.hash


@settings(deadline=None, max_examples=30)
@given(st.integers(6, 80), st.sampled_from(METHODS), st.integers(0, 1000))
def test_sizes_follow_from_the_fractions_alone(n: int, method: SplitMethod, seed: int) -> None:
    split = split_dataset(waters(scattered(n)), method=method, seed=seed)
    sizes = np.array([len(indices) for indices in parts(split)])
    assert np.all(np.abs(sizes - n * np.array([0.7, 0.1, 0.2])) < 1)
    assert sizes.tolist() == [len(indices) for indices in parts(split_dataset(waters(scattered(n))))]


@pytest.mark.parametrize(
    ("n", "fractions", "sizes"),
    [
        (170, (0.7, 0.1, 0.2), (119, 17, 34)),
        (122, (0.7, 0.1, 0.2), (85, 12, 25)),
        (10, (0.7, 0.1, 0.2), (7, 1, 2)),
        (10, (0.5, 0.25, 0.25), (5, 3, 2)),
        (3, (0.4, 0.3, 0.3), (1, 1, 1)),
    ],
)
def test_sizes(n: int, fractions: tuple[float, float, float], sizes: tuple[int, int, int]) -> None:
    for method in METHODS:
        split = split_dataset(waters(scattered(n)), fractions, method)
        assert (len(split.train), len(split.validation), len(split.test)) == sizes


@pytest.mark.parametrize("method", METHODS)
def test_sizes_are_exact_with_copies_that_fit(method: SplitMethod) -> None:
    # eight copies of one frame fit into training and test, three into each part
    copies = dict.fromkeys(range(1, 8), 0) | {20: 19, 21: 19}
    dataset = waters(scattered(40), copies)
    sizes = [[len(indices) for indices in parts(split_dataset(dataset, method=method, seed=k))] for k in range(20)]
    if method == "blocks":
        assert np.all(np.abs(np.array(sizes) - [28, 4, 8]) <= 8)
    else:
        assert sizes == [[28, 4, 8]] * 20


def test_seeds_differ_and_every_frame_gets_everywhere() -> None:
    dataset = waters(scattered(20))
    splits = [split_dataset(dataset, seed=seed) for seed in range(200)]
    assert len({split.hash for split in splits}) == 200
    chances = np.array([[np.sum([k in split.test for split in splits]) for k in range(20)]]) / 200
    # a frame is in the test set with probability 0.2 +- 0.028
    assert chances.min() > 0.2 - 5 * 0.028
    assert chances.max() < 0.2 + 5 * 0.028


def test_blocks_are_consecutive_in_an_order_of_the_seed() -> None:
    dataset = waters(scattered(40))
    first = set()
    for seed in range(30):
        split = split_dataset(dataset, method="blocks", seed=seed)
        for indices in parts(split):
            assert np.ptp(indices) == len(indices) - 1
        first.add([0 in indices for indices in parts(split)].index(True))
    assert first == {0, 1, 2}


def test_energy_groups_are_found_and_shared_out() -> None:
    rng = np.random.default_rng(1)
    wells = [-5.30, -5.22, -5.10]
    made = np.repeat([0, 1, 2], [60, 20, 20])
    energies = np.array(wells)[made] + rng.uniform(-0.01, 0.01, 100)
    order = rng.permutation(100)
    dataset = waters(energies[order].tolist())
    found = energy_groups(dataset)
    assert found.tolist() == made[order].tolist()
    for seed in range(10):
        split = split_dataset(dataset, method="energy_groups", seed=seed)
        assert [len(indices) for indices in parts(split)] == [70, 10, 20]
        for indices, fraction in zip(parts(split), (0.7, 0.1, 0.2), strict=True):
            share = np.bincount(found[indices], minlength=3)
            assert np.all(np.abs(share - fraction * np.array([60, 20, 20])) <= 1), share
            assert share.all()
    # frames inside a group are drawn
    assert len({split_dataset(dataset, method="energy_groups", seed=seed).hash for seed in range(10)}) == 10


def test_a_few_frames_far_away_join_the_nearer_group() -> None:
    near = np.linspace(-5.30, -5.29, 30).tolist()
    far = np.linspace(-5.10, -5.09, 30).tolist()
    dataset = waters([*near, *far, -5.15, -5.14])
    assert energy_groups(dataset).tolist() == [0] * 30 + [1] * 32
    assert energy_groups(dataset, smallest=2).max() == 2
    assert energy_groups(waters([-5.0, -4.0, -3.0])).tolist() == [0, 0, 0]


def test_compositions_are_groups_of_their_own() -> None:
    frames = []
    for k in range(24):
        frame = molecule("H2O" if k % 2 else "CH4")
        frame.positions[1] += 0.004 * k
        frame.calc = SinglePointCalculator(frame, energy=-5.0 * len(frame), forces=np.ones((len(frame), 3)))
        frames.append(frame)
    assert energy_groups(dataset_from_frames(frames, name="two")).tolist() == [0, 1] * 12


@pytest.mark.parametrize(
    ("n", "sentence"),
    [
        (4, r"waters.extxyz: 4 frames are fewer than the split needs: they give 3 train, 0 validation, 1 test for "),
        (2, r"waters.extxyz: 2 frames are fewer than the split needs: .* which need 5 frames$"),
    ],
)
def test_too_few_frames(n: int, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        split_dataset(waters(scattered(n)))
    assert len(split_dataset(waters(scattered(5))).validation) == 1


@pytest.mark.parametrize("method", METHODS)
def test_too_few_different_frames(method: SplitMethod) -> None:
    dataset = waters(scattered(12), {k: k % 2 for k in range(2, 12)})
    with pytest.raises(DataError, match="12 frames are fewer than the split needs: only 2 differ, and copies of one"):
        split_dataset(dataset, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distinct", [3, 4, 6])
def test_no_part_is_empty_if_all_frames_have_copies(method: SplitMethod, distinct: int) -> None:
    dataset = waters(scattered(12), {k: k % distinct for k in range(distinct, 12)})
    for seed in range(20):
        split = split_dataset(dataset, method=method, seed=seed)
        assert all(parts(split))
        assert sorted(sum(parts(split), [])) == list(range(12))


def test_arguments_out_of_range() -> None:
    dataset = waters(scattered(10))
    for fractions in [(0.8, 0.0, 0.2), (0.7, 0.1, 0.1), (0.7, 0.3), (float("nan"), 0.1, 0.2), (1.2, -0.4, 0.2)]:
        with pytest.raises(ConfigError, match=r"fractions must be three numbers above 0 of sum 1, got \("):
            split_dataset(dataset, fractions)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split method must be one of random, blocks, energy_groups, got 'scaffold'"):
        split_dataset(dataset, method="scaffold")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed must be an integer >= 0, got -1"):
        split_dataset(dataset, seed=-1)


def mixed(n_crystals: int, n_molecules: int, copies: dict[int, int] | None = None) -> Dataset:
    """Crystals of water and, behind them, single molecules of it, in boxes of vacuum."""
    n = n_crystals + n_molecules
    dataset = waters(scattered(n))
    originals = [(copies or {}).get(k, k) for k in range(n)]
    frames = [dataset.frames[k].copy() for k in originals]
    for k, (frame, original) in enumerate(zip(frames, originals, strict=True)):
        frame.set_cell([3.2, 3.2, 3.2] if k < n_crystals else [25.0, 25.0, 25.0])
        frame.pbc = True
        frame.calc = SinglePointCalculator(frame, energy=dataset.energies[original], forces=dataset.forces[original])
    found = dataset_from_frames(frames, name="mixed", source="mixed.extxyz")
    assert found.is_crystal.tolist() == [True] * n_crystals + [False] * n_molecules
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_every_part_gets_its_share_of_crystals_and_of_molecules(method: SplitMethod, seed: int) -> None:
    """Ten molecules of uracil once fell 7, 0 and 3, and all into one part with blocks."""
    dataset = mixed(92, 10)
    split = split_dataset(dataset, method=method, seed=seed)
    assert [int(dataset.is_crystal[part].sum()) for part in parts(split)] == [64, 9, 19]
    assert [int((~dataset.is_crystal[part]).sum()) for part in parts(split)] == [7, 1, 2]
    assert sorted(sum(parts(split), [])) == list(range(102))
    if method == "blocks":
        for part in parts(split):
            for kind in (True, False):
                own = [k for k in part if dataset.is_crystal[k] == kind]
                assert own == list(range(own[0], own[0] + len(own)))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(METHODS), st.integers(0, 99), st.integers(0, 8))
def test_sets_of_both_kinds_are_divided_whole(
    n_crystals: int, n_molecules: int, method: SplitMethod, seed: int, n_copies: int
) -> None:
    n = n_crystals + n_molecules
    if n < 5 + n_copies:
        return
    # copies of the first crystal, and of the last molecule but one
    copies = dict.fromkeys(range(1, min(n_copies, n_crystals)), 0)
    dataset = mixed(n_crystals, n_molecules, copies)
    split = split_dataset(dataset, method=method, seed=seed)
    assert all(parts(split))
    assert sorted(sum(parts(split), [])) == list(range(n))
    part_of = {k: p for p, indices in enumerate(parts(split)) for k in indices}
    assert len({part_of[k] for k in (0, *copies)}) == 1
    assert split_dataset(dataset, method=method, seed=seed).hash == split.hash
    if not copies and min(n_crystals, n_molecules) >= 10:
        for kind, total in ((True, n_crystals), (False, n_molecules)):
            counts = np.array([np.sum(dataset.is_crystal[part] == kind) for part in parts(split)])
            assert np.all(np.abs(counts - total * np.array([0.7, 0.1, 0.2])) <= 1)


@pytest.mark.parametrize(
    ("method", "seed", "digest"),
    [
        ("random", 0, "bf669d2b31b9ce2d"),
        ("random", 2, "dbaf74439a3ee1da"),
        ("blocks", 0, "a60a305394bee238"),
        ("energy_groups", 0, "5d2013cd77a32497"),
    ],
)
def test_crystals_alone_are_divided_as_in_the_committed_results(method: SplitMethod, seed: int, digest: str) -> None:
    data = load_dataset("naphthalene").crystals()
    assert split_dataset(data, method=method, seed=seed).hash[:16] == digest


def test_fewer_training_frames_are_of_both_kinds_and_nested() -> None:
    dataset = mixed(40, 20)
    split = split_dataset(dataset)
    assert [int(dataset.is_crystal[split.train].sum()), len(split.train)] == [28, 42]
    smaller: set[int] = set()
    for n in range(1, 43):
        train = shrunk(split, n, 3, dataset).train
        assert abs(int(dataset.is_crystal[train].sum()) - n * 28 / 42) <= 1
        assert smaller < set(train.tolist())
        smaller = set(train.tolist())
    crystals = dataset.crystals()
    parted = split_dataset(crystals)
    assert shrunk(parted, 9, 3, crystals).train.tolist() == shrunk(parted, 9, 3).train.tolist()


def test_molecules_that_are_left_out_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert only_crystals(mixed(5, 2)).is_crystal.tolist() == [True] * 5
    [record] = [record for record in caplog.records if record.name == "tlmc.data.splits"]
    assert record.levelname == "WARNING"
    assert "left out (2 of mixed): lattice energies" in record.message
    caplog.clear()
    only_crystals(mixed(5, 2).crystals())
    assert not [record for record in caplog.records if record.name == "tlmc.data.splits"]


def test_json_round_trip() -> None:
    split = split_dataset(waters(scattered(10)), method="blocks", seed=3)
    read = Split.from_json(json.loads(json.dumps(split.to_json())))
    assert (parts(read), read.method, read.seed, read.hash) == (parts(split), "blocks", 3, split.hash)
    assert read.train.dtype == np.int64
    other = Split(split.validation, split.train, split.test, "blocks", 3)
    assert other.hash != split.hash
    assert Split(*map(np.array, parts(split)), "by hand", 0).hash == split.hash


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": None}, "split: needs a method and an integer seed, got None and 0"),
        ({"test": None}, "split: test must be a list of frame indices >= 0, got None"),
        ({"test": [1, -1]}, r"split: test must be a list of frame indices >= 0, got \[1, -1\]"),
        ({"test": [True]}, r"split: test must be a list of frame indices >= 0, got \[True\]"),
        ({"test": [4, 2]}, "split: frame 2 is in train and in test"),
        ({"test": [4, 4]}, "split: frame 4 is in test and in test"),
    ],
)
def test_a_broken_record_is_refused(change: dict[str, object], sentence: str) -> None:
    good = {"method": "random", "seed": 0, "train": [0, 1, 2], "validation": [3], "test": [4]}
    assert parts(Split.from_json(good)) == ([0, 1, 2], [3], [4])
    with pytest.raises(DataError, match=sentence):
        Split.from_json(good | change)


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", ["02_acetic_acid", "04_ammonia", "06_benzene", "12_imidazole", "21_urea"])
def test_public_sets_have_copies_and_they_stay_together(name: str) -> None:
    dataset = load_dataset(f"molcrys-mace/{name}")
    groups = duplicate_groups(dataset.frames)
    assert np.any(groups != np.arange(len(dataset)))
    for method in METHODS:
        for seed in range(2):
            split = split_dataset(dataset, method=method, seed=seed)
            found = [set(groups[indices]) for indices in (split.train, split.validation, split.test)]
            assert sum(map(len, found)) == len(set.union(*found)) == len(np.unique(groups))
