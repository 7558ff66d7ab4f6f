from __future__ import annotations

import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from hypothesis import given
from hypothesis import strategies as st

from tlmc.errors import DataError, ModelError
from tlmc.potentials.reference import ReferenceEnergies, fit_reference


def test_per_atom_is_the_mean_residual_per_atom_whatever_the_frame_size() -> None:
    water = molecule("H2O")
    crystal = Atoms("H8O4", positions=np.arange(36.0).reshape(12, 3))
    labels, predictions = np.array([-10.0, -40.0]), np.array([-7.0, -16.0])
    reference = fit_reference([water, crystal], labels, predictions)
    assert reference.mode == "per_atom"
    # residuals per atom: -3/3 and -24/12
    assert reference.offsets == {"H": -1.5, "O": -1.5}
    assert reference.energies([water, crystal]).tolist() == [-4.5, -18.0]


@given(st.integers(0, 2**32 - 1))
def test_the_fit_minimises_the_error_of_the_energy_per_atom(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [Atoms(f"C{rng.integers(1, 5)}H{rng.integers(1, 9)}O{rng.integers(1, 4)}") for _ in range(12)]
    n_atoms = np.array([len(frame) for frame in frames])
    labels, predictions = rng.normal(scale=50, size=(2, 12))
    for mode in ("per_atom", "per_element"):
        reference = fit_reference(frames, labels, predictions, mode)

        def error(shift: dict[str, float], reference: ReferenceEnergies = reference) -> float:
            moved = ReferenceEnergies({e: v + shift[e] for e, v in reference.offsets.items()}, reference.mode)
            return float(np.mean(((labels - predictions - moved.energies(frames)) / n_atoms) ** 2))

        best = error(dict.fromkeys("CHO", 0.0))
        for _ in range(5):
            step = rng.normal(scale=1e-2, size=3) if mode == "per_element" else np.full(3, rng.normal(scale=1e-2))
            assert error(dict(zip("CHO", step.tolist(), strict=True))) >= best - 1e-12


def test_per_element_finds_offsets_that_the_labels_were_made_with() -> None:
    frames = [molecule(name) for name in ("CH4", "H2O", "C2H6", "CH3OH", "CO2")]
    made = ReferenceEnergies({"C": -1030.25, "H": -13.5, "O": -2040.125}, "per_element")
    predictions = np.linspace(-3, 4, len(frames))
    reference = fit_reference(frames, predictions + made.energies(frames), predictions)
    assert reference.mode == "per_element"
    for symbol, value in made.offsets.items():
        assert reference.offsets[symbol] == pytest.approx(value, abs=1e-9)


def test_undetermined_offsets_are_of_minimum_norm_and_still_fit() -> None:
    frames = [molecule("CO2"), molecule("CO2")]
    reference = fit_reference(frames, [-30.0, -30.0], [0.0, 0.0], "per_element")
    # c + 2 o = -30 has its smallest solution along (1, 2)
    assert reference.offsets == pytest.approx({"C": -6.0, "O": -12.0})
    assert reference.energies(frames) == pytest.approx([-30.0, -30.0])


def test_auto_tells_isomers_and_multiples_from_other_compositions() -> None:
    ethanol, ether = molecule("CH3CH2OH"), molecule("CH3OCH3")
    assert fit_reference([ethanol, ether, ethanol + ether], np.zeros(3), np.ones(3)).mode == "per_atom"
    assert fit_reference([ethanol, molecule("CH3OH")], np.zeros(2), np.ones(2)).mode == "per_element"


def test_json_round_trip_is_exact() -> None:
    reference = ReferenceEnergies({"H": -0.1 / 3, "O": 1e-17}, "per_element")
    assert ReferenceEnergies.from_json(json.loads(json.dumps(reference.to_json()))) == reference


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"offsets": {"H": 1.0}}, "mode must be per_atom or per_element, got None"),
        ({"mode": "per_atom"}, "offsets must map elements to eV, got None"),
        ({"mode": "per_atom", "offsets": {"H": float("nan")}}, "the offset of H must be a finite number, got nan"),
        ({"mode": "per_atom", "offsets": {"H": "1"}}, "the offset of H must be a finite number, got '1'"),
    ],
)
def test_a_broken_record_is_refused(content: dict[str, object], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        ReferenceEnergies.from_json(content)


def test_an_element_without_an_offset_is_named() -> None:
    reference = fit_reference([molecule("CH4")], [-40.0], [-39.0])
    with pytest.raises(DataError, match=r"frame 1 \(H2O\) holds 1 O, .* there are offsets for C, H"):
        reference.energies([molecule("CH4"), molecule("H2O")])


@pytest.mark.parametrize(
    ("frames", "labels", "sentence"),
    [
        ([], [], "at least one frame, got none"),
        ([molecule("CH4")], [1.0, 2.0], r"labels must have shape \(1,\), got \(2,\)"),
        ([molecule("CH4"), molecule("CH4")], [1.0, np.nan], "labels of frame 1 is nan eV"),
        ([molecule("CH4"), Atoms()], [1.0, 2.0], "frame 1 has no atoms"),
    ],
)
def test_bad_input_is_refused(frames: list[Atoms], labels: list[float], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        fit_reference(frames, labels, [0.0] * len(frames))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be auto, per_atom or per_element, got 'x'"):
        fit_reference([molecule("CH4")], [0.0], [0.0], "x")  # type: ignore[arg-type]
