"""Total charge and spin of a frame, as users state them, and how a calculator is given them.

A geometry alone is no molecule: acetate and the acetoxy radical may have the same atoms in the same places. Charge and
spin are stated in ``info`` or on the atoms, under the names below. Statements that contradict each other, or the number
of electrons, are refused: a label of the wrong state is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from tlmc.data.dataset import CHARGE_WORDS, MULTIPLICITY_WORDS, SPIN_WORDS, UNPAIRED_WORDS, key_word
from tlmc.errors import ConfigError, DataError

_STATE_WORDS = frozenset(CHARGE_WORDS + MULTIPLICITY_WORDS + UNPAIRED_WORDS + SPIN_WORDS)

_ROUNDING = 0.01
"""Charges and moments of atoms, written with few digits, may miss a whole number by so much."""


class State(NamedTuple):
    """What a frame says of its electrons; None for what it does not."""

    charge: float | None = None
    """Elementary charges; a whole number if ``info`` states it."""
    unpaired: float | None = None
    """Number of unpaired electrons, the multiplicity less one; moments of atoms may be a guess, and no whole number."""
    convention: str = ""
    """``2S+1`` or ``2S``, as which ``spin`` was read."""

    def words(self) -> str:
        """Return the state for a message."""
        parts = [] if self.charge is None else [f"charge {self.charge:+g}"]
        parts += [] if self.unpaired is None else [f"{self.unpaired:g} unpaired electrons"]
        return ", ".join(parts) or "no charge or spin"


class _Statement(NamedTuple):
    words: str
    value: float


def state_of(frame: Atoms, where: str) -> State:
    """Return the total charge and spin that a frame states.

    Parameters
    ----------
    frame
        ``info`` may hold any of the keys of `tlmc.data.dataset`, however they are written; atoms may have initial
        charges and initial magnetic moments, which then count with their sums.
    where
        Begin of error messages, ``"frame 3"``.

    Raises
    ------
    DataError
        If a statement is no number, two of them contradict each other, or they do not fit the number of electrons.
    """
    charges = [*_from_info(frame, CHARGE_WORDS, where), *_charges_of_atoms(frame, where)]
    charge = _agreed(charges, "charge", where)
    electrons = float(frame.numbers.sum()) - (charge or 0.0)
    if electrons < -_ROUNDING:
        raise DataError(f"{where}: {charges[0].words}, but its nuclei have {frame.numbers.sum()} protons in all")
    whole = abs(electrons - round(electrons)) < _ROUNDING
    spins = [
        _Statement(words, value - 1) for words, value in _from_info(frame, MULTIPLICITY_WORDS, where, least=1)
    ] + list(_from_info(frame, UNPAIRED_WORDS, where, least=0))
    convention = ""
    for words, value in _from_info(frame, SPIN_WORDS, where, least=0):
        as_multiplicity = value > 0 and (value - 1 - round(electrons)) % 2 == 0
        convention = "2S+1" if as_multiplicity else "2S"
        spins.append(_Statement(words, value - 1 if as_multiplicity else value))
    moments, vectors = _moments_of_atoms(frame, where)
    unpaired = _agreed(spins + moments, "spin", where)
    if spins and vectors:
        raise DataError(f"{where}: {spins[0].words}, but its initial magnetic moments are vectors, which have no total")
    if spins and unpaired is not None:
        if not whole or (unpaired - round(electrons)) % 2:
            raise DataError(
                f"{where}: {spins[0].words}, which {electrons:g} electrons (charge {charge or 0:+g}) cannot have"
            )
        if unpaired > electrons:
            raise DataError(f"{where}: {spins[0].words}, more unpaired electrons than its {electrons:g}")
    return State(charge, unpaired, convention)


def states_of(frames: Sequence[Atoms], names: Sequence[str] = ()) -> list[State]:
    """Return the states of frames, which must mean the same by ``spin``; names begin the messages.

    Raises
    ------
    DataError
        As `state_of`, with the number of the frame.
    """
    names = names or [f"frame {k}" for k in range(len(frames))]
    states = [state_of(frame, name) for frame, name in zip(frames, names, strict=True)]
    first: dict[str, int] = {}
    for k, state in enumerate(states):
        if state.convention:
            first.setdefault(state.convention, k)
    if len(first) > 1:
        k, other = (first[convention] for convention in ("2S+1", "2S"))
        keys = [next(_from_info(frames[which], SPIN_WORDS, "")).words for which in (k, other)]
        raise DataError(
            f"{names[k]} has {keys[0]}, which by its number of electrons is 2S+1, and frame {other} has {keys[1]}, "
            "which can only be a number of unpaired electrons: state info['multiplicity'] or "
            "info['unpaired_electrons'] instead"
        )
    return states


def stated(frame: Atoms) -> str:
    """Return what a frame says of charge and spin as it says it, "" for nothing."""
    info = {str(key).lower(): str(value) for key, value in frame.info.items() if key_word(str(key)) in _STATE_WORDS}
    atoms = {key: frame.arrays[key].tolist() for key in ("initial_charges", "initial_magmoms") if frame.has(key)}
    return repr((sorted(info.items()), sorted(atoms.items()))) if info or atoms else ""


def without_state(info: dict[str, Any]) -> dict[str, Any]:
    """Return ``info`` less what it says of charge and spin."""
    return {key: value for key, value in info.items() if key_word(str(key)) not in _STATE_WORDS}


def given_to(calculator: BaseCalculator, frame: Atoms, where: str) -> Atoms:
    """Return a copy of a frame for a calculator to work on, free of constraints, with the state that it shall have.

    ``info``, initial charges and moments stay. Calculators of tblite read the sums of initial charges and moments
    only, so what ``info`` states alone is written there.

    Raises
    ------
    DataError
        As `state_of`; a charge or spin that is no whole number, or moments that are vectors, with tblite.
    ConfigError
        If a parameter of the calculator contradicts the frame.
    """
    state = state_of(frame, where)
    check_parameters(calculator, state, where)
    copy: Atoms = frame.copy()
    copy.set_constraint()
    if type(calculator).__module__.partition(".")[0] == "tblite":
        for_tblite(copy, state, where)
    return copy


def for_tblite(frame: Atoms, state: State, where: str) -> None:
    """Write what ``info`` states into initial charges and moments, in place.

    Raises
    ------
    DataError
        If an element, the charge or the spin is none that tblite computes.
    """
    unknown = np.flatnonzero((frame.numbers < 1) | (frame.numbers > 86))
    if unknown.size:
        k = int(unknown[0])
        raise DataError(f"{where}: atom {k} is {frame.symbols[k]}, and tblite knows the elements H to Rn")
    electrons = float(frame.numbers.sum()) - (state.charge or 0.0)
    for name, value in (("charge", state.charge), ("number of unpaired electrons", state.unpaired)):
        if value is not None and abs(value - round(value)) > _ROUNDING:
            raise DataError(f"{where}: tblite needs a whole {name}, got {value:g} from its atoms")
    if frame.get_initial_magnetic_moments().ndim > 1:
        raise DataError(f"{where}: tblite cannot take initial magnetic moments that are vectors")
    if state.unpaired is not None and np.any(frame.get_initial_magnetic_moments()) | (round(state.unpaired) != 0):
        if round(state.unpaired) % 2 != round(electrons) % 2:
            raise DataError(
                f"{where}: {state.unpaired:g} unpaired electrons by its initial magnetic moments, which "
                f"{electrons:g} electrons (charge {state.charge or 0:+g}) cannot have"
            )
        if np.any((frame.numbers > 57) & (frame.numbers < 71)):
            raise DataError(f"{where}: states a spin, but tblite keeps the 4f electrons of lanthanides in their cores")
    if state.charge is not None:
        frame.set_initial_charges(_all_on_first(frame, round(state.charge)))
    if state.unpaired is not None:
        frame.set_initial_magnetic_moments(_all_on_first(frame, round(state.unpaired)))


def check_parameters(calculator: BaseCalculator, state: State, where: str) -> None:
    """Refuse a calculator whose own parameters say another charge or spin than the frame.

    Raises
    ------
    ConfigError
        With both values.
    """
    parameters = getattr(calculator, "parameters", None) or {}
    for words, value, shift in ((CHARGE_WORDS, state.charge, 0), (MULTIPLICITY_WORDS, state.unpaired, 1)):
        for key, given in dict(parameters).items():
            if value is None or key_word(str(key)) not in words:
                continue
            if not isinstance(given, int | float | np.number) or isinstance(given, bool):
                continue
            lowest = shift == 1 and given == 0 and value < 2  # CP2K's word for the lowest multiplicity
            if abs(float(given) - shift - value) > _ROUNDING and not lowest:
                raise ConfigError(
                    f"{where} has {state.words()}, but {type(calculator).__name__} is set to {key}={given}: let the "
                    "function that makes it take the frame, def calculator(atoms), and set what the frame states"
                )


def _all_on_first(frame: Atoms, value: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.zeros(len(frame))
    values[0] = value
    return values


def _from_info(frame: Atoms, keys: Sequence[str], where: str, least: float | None = None) -> Iterator[_Statement]:
    """Yield the statements of ``info``, and of the key-value pairs that ASE's databases keep inside it."""
    pairs = frame.info.get("key_value_pairs")
    for info in (frame.info, pairs if isinstance(pairs, dict) else {}):
        for key, value in info.items():
            if not isinstance(key, str) or key_word(key) not in keys or value is None:
                continue
            words = f"{key} = {value}"
            try:
                number = float(np.asarray(value).item())
            except (TypeError, ValueError):
                number = np.nan
            if isinstance(value, bool | np.bool_) or not np.isfinite(number) or number != round(number):
                raise DataError(f"{where}: {words} in its info is no whole number")
            if least is not None and number < least:
                raise DataError(f"{where}: {words} in its info must be at least {least:g}")
            yield _Statement(words, number)


def _charges_of_atoms(frame: Atoms, where: str) -> list[_Statement]:
    if not frame.has("initial_charges"):
        return []
    total = float(frame.get_initial_charges().sum())
    if not np.isfinite(total):
        raise DataError(f"{where}: its initial charges are not finite")
    return [_Statement(f"initial charges sum to {total:+g}", _to_whole(total))]


def _moments_of_atoms(frame: Atoms, where: str) -> tuple[list[_Statement], bool]:
    """Return what collinear moments say, and whether they are vectors."""
    if not frame.has("initial_magmoms"):
        return [], False
    moments = frame.get_initial_magnetic_moments()
    if not np.isfinite(moments).all():
        raise DataError(f"{where}: its initial magnetic moments are not finite")
    if moments.ndim > 1:
        return [], True
    total = float(moments.sum())
    # the mirror image of a spin has the same energy
    return [_Statement(f"initial magnetic moments sum to {total:+g}", _to_whole(abs(total)))], False


def _to_whole(value: float) -> float:
    return float(round(value)) if abs(value - round(value)) < _ROUNDING else value


def _agreed(statements: Sequence[_Statement], what: str, where: str) -> float | None:
    """Return the value that all statements have."""
    for other in statements[1:]:
        if other.value != statements[0].value:
            raise DataError(
                f"{where} states its {what} twice and differently: {statements[0].words} and {other.words}; keep one"
            )
    return statements[0].value if statements else None
