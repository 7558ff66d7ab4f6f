"""Labels checked by physics: compared with what a start model predicts for the same frames.

Labels can be whole, finite and consistent with each other and still belong to other geometries: shifted by a frame,
turned, in another order or unit. A start model knows the forces of ordinary frames well enough to tell: right labels
correlate with it by 0.8 to 0.99, all these by 0.0 to 0.3, and what is wrong shows when the mistake is undone.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tlmc.data.dataset import Dataset
from tlmc.data.geometry import by_composition, contacts, element_counts
from tlmc.errors import DataError, Interrupted
from tlmc.evaluation.stress_check import StressReport, check_stresses
from tlmc.potentials.calculator import CLOSE, predict
from tlmc.potentials.model import Potential, Predictions
from tlmc.units import BOHR, HARTREE, KCAL_PER_MOL, parse_unit

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

# Frames to compare, how many of each composition at least, and atoms beyond which no frame is added: a second or two.
_FRAMES, _PER_COMPOSITION, _ATOMS, _COMPOSITIONS = 24, 3, 6000, 16
# eV/A (rms): the forces of calmer frames are the start model's error, mostly.
_CALM = 0.25
# Force components without which nothing is decided, and frames without which nothing is certain.
_COMPONENTS, _CERTAIN_FRAMES = 24, 3
# Correlations: of labels that belong to their frames; below which they are doubted; of an explanation, and by how
# much it must be better. Right labels of 16 sets have 0.80 to 0.99; where a model fails, other frames have up to 0.65.
_AGREES, _DOUBTFUL, _EXPLAINS, _BETTER = 0.6, 0.5, 0.72, 0.25
# So many frames with such forces (eV/A, rms, median frame) have 0.7 at least.
_CLEAR_FRAMES, _CLEAR_FORCES, _CLEARLY_DOUBTFUL = 8, 1.0, 0.66
# Right labels have 0.7 to 1.05 times the size of the start model's forces: sizes that are unusual, and impossible.
_UNUSUAL_SCALE, _WRONG_SCALE, _USUAL_BIAS, _UNIT_FRAMES = (0.5, 1.55), (1 / 3, 3.0), 0.85, 5
# Of 2400 right frames, one by one: none correlates less than -0.25 or has a size outside 0.37 to 1.21 where it fits.
_ODD_CORRELATION, _ODD_SCALE, _ODD_COMPONENTS = 0.8, (0.2, 5.0), 12
# eV/A: forces that are none, and forces of the model that show them to be zeroed; in how many places.
_NO_FORCE, _SURE_FORCE, _ZEROED, _ZEROED_FRAMES = 1e-6, 0.5, 3, 8
# eV/A (rms, median frame): below this a start model's own error may look like a mistake, unless it fits like that.
_LIVELY, _FITS_WELL = 0.5, 0.9
# Reversed forces must fit like this: a start model can be wrong enough about one bond to pull the other way.
_REVERSED = 0.8

# name -> eV, eV/A
_FORCE_UNITS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "eV/Angstrom": (1.0, 1.0),
        "Hartree/Bohr": (HARTREE, HARTREE / BOHR),
        "Hartree/Angstrom": (HARTREE, HARTREE),
        "kcal/mol/Angstrom": (KCAL_PER_MOL, KCAL_PER_MOL),
        "Rydberg/Bohr": (units.Rydberg, units.Rydberg / BOHR),
        "Rydberg/Angstrom": (units.Rydberg, units.Rydberg),
        "eV/Bohr": (1.0, 1.0 / BOHR),
        "kJ/mol/Angstrom": (units.kJ / units.mol, units.kJ / units.mol),
        "kJ/mol/nm": (units.kJ / units.mol, 0.1 * units.kJ / units.mol),
        "kcal/mol/Bohr": (KCAL_PER_MOL, KCAL_PER_MOL / BOHR),
        "meV/Angstrom": (1e-3, 1e-3),
    }
)
# What `tlmc.data.loading.load_dataset` takes as units.
_OPTIONS: Final = ("eV/Angstrom", "Hartree/Bohr", "Hartree/Angstrom", "kcal/mol/Angstrom")
# Elements that both start models were trained on; networks of others are copies of theirs.
_OWN_ELEMENTS: Final = ("H", "C", "N", "O", "F", "S", "Cl")
# Factors by which positions in other units are too large, and the lengths, relative to covalent bonds, of real matter.
_LENGTH_UNITS: Final[Mapping[str, float]] = MappingProxyType(
    {"Bohr": BOHR, "pm": 0.01, "Angstrom divided by 1.88973": 1 / BOHR}
)
_BOND_LENGTHS, _VOLUMES_PER_ATOM = (0.75, 1.45), (2.0, 1000.0)
# How far labels are looked for from their frame, for a shift and at all, and how much less of them a shift may miss.
_SHIFTS, _REACH, _SHIFT_RESIDUAL = 5, 2500, 0.6
# A frame whose forces fit another one like this, and its own like that, has the other's labels.
_FOREIGN_FIT, _FOREIGN_OWN = 0.8, 0.35
# Frames of one composition that tell whether energies are shifted, and how sure that must be, in standard deviations.
_ENERGY_FRAMES, _ENERGY_DEVIATIONS, _ENERGY_DOUBT = 10, 3.5, 0.8
# Changes of right energies have 0.3 to 1.7 times the model's size, and differ from them by 0.09 eV/atom at most,
# without gaps of more than 0.09 eV/atom or 3.5 times what is left on either side: factors, and eV/atom for a word and
# for certain.
_ENERGY_SCALE, _ENERGY_SCATTER, _ENERGY_GAPS, _RELATIVE_GAP = (0.2, 5.0), 0.15, (0.15, 0.5), 8.0
_BORROWED_ENERGY_SCALE = (0.1, 10.0)
# eV: by which predicted energies must change for more than a start model's error.
_ENERGY_CHANGES = 0.3


@dataclass(frozen=True)
class LabelReport:
    """What a start model says about labels."""

    model: str
    """Name of the start model."""
    n_frames: int
    """Frames that were compared."""
    correlation: float
    """Of the forces with the model's, over all components; NaN where no frame decides."""
    slope: float
    """Of the forces on the model's: 0.5 to 1.0 for right labels."""
    finding: str
    """A sentence about what is wrong or undecided, empty if nothing is."""
    certain: bool
    """Whether the finding is proven: the labels cannot belong to these frames as they stand."""
    stress: StressReport
    """The same for the stresses, and these in ASE's form where they clearly were in another."""

    @property
    def line(self) -> str:
        """Say it in a line, for a table."""
        if not self.n_frames:
            return "no frame that decides anything"
        return f"correlation {self.correlation:.2f}, slope {self.slope:.2g} ({self.n_frames} frames)"


def check_labels(dataset: Dataset, model: Potential, *, trust: bool = False) -> LabelReport:
    """Compare labels with what a start model predicts for some of the frames, before a training starts from it.

    Forces are compared as given first, then with what is likely undone: those of other frames, gradients, positions in
    other units, forces turned against positions, atoms in another order, other units. What explains the forces names
    the mistake. A start model may be poor (borrowed elements, metals, frames at rest): labels that nothing explains are
    doubted in a warning, not refused. Atoms bound to borrowed elements do not count. Once per data set and model and
    process; the answer is kept.

    Parameters
    ----------
    dataset, model
        All frames, and the model to start from, borrowed elements included.
    trust
        Go on with a warning where labels would be refused; so does the variable ``TLMC_TRUST_LABELS``.

    Raises
    ------
    DataError
        If the labels cannot belong to the frames as they stand: what was found, the likely cause and what to do.
    ModelError
        If the model lacks an element.
    Interrupted
        On Ctrl-C.
    """
    key = (dataset.hash, dataset.units, _identity(model))
    first = key not in _REPORTS
    if first:
        try:
            _REPORTS[key] = _compare(dataset, model)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted while the labels of {dataset.source} were compared with {model.name}: what was trained "
                "before is kept, the same call goes on from there"
            ) from None
    report = _REPORTS[key]
    trust = trust or os.environ.get("TLMC_TRUST_LABELS", "") not in ("", "0")
    if report.certain and not trust:
        raise DataError(f"{report.finding}; --trust-labels (trust_labels=True) goes on all the same")
    if first:
        if report.finding:
            logger.warning("%s", report.finding)
        else:
            logger.info("%s: forces against %s: %s", dataset.source, model.name, report.line)
        if report.stress.finding:
            logger.log(logging.WARNING if report.stress.is_wrong else logging.INFO, "%s", report.stress.finding)
    return report


def with_checked_stresses(dataset: Dataset, model: Potential) -> Dataset:
    """Return the data set with the stresses of :attr:`LabelReport.stress`; it has another hash if they differ."""
    return replace(dataset, stresses=check_labels(dataset, model, trust=True).stress.stresses)


_REPORTS: dict[tuple[str, str, str], LabelReport] = {}


def _identity(model: Potential) -> str:
    """Return what tells models apart whose predictions differ; a fine-tuned one has the fingerprint of its start."""
    return f"{model.weights_hash()} {sorted(model.element_map.items())}"


class _Sample(NamedTuple):
    """Frames to compare, what the model says about them, and which atoms count."""

    indices: NDArray[np.int64]
    predicted: Predictions
    counted: tuple[NDArray[np.bool_], ...]
    labels: tuple[Floats, ...]

    def among(self, chosen: NDArray[np.int64]) -> _Sample:
        """Return some of it."""
        stresses = self.predicted.stresses
        return _Sample(
            self.indices[chosen],
            Predictions(
                self.predicted.energies[chosen],
                tuple(self.predicted.forces[k] for k in chosen),
                tuple(stresses[k] for k in chosen),
            ),
            tuple(self.counted[k] for k in chosen),
            tuple(self.labels[k] for k in chosen),
        )

    def lively(self) -> _Sample:
        """Return the frames whose forces are more than a start model's error."""
        forces = zip(self.predicted.forces, self.counted, strict=True)
        sizes = [_rms(force[counted]) for force, counted in forces]
        return self.among(np.flatnonzero(np.array(sizes) >= _CALM))

    @property
    def is_lively(self) -> bool:
        """Whether the forces of most frames are much more than a start model's error."""
        return float(np.median([_rms(force) for force in self.predicted.forces] or [0.0])) >= _LIVELY

    @property
    def n_components(self) -> int:
        """Force components that carry information: a molecule's are tied by six laws, a crystal's by three."""
        return sum(max(0, 3 * int(counted.sum()) - 6) for counted in self.counted)


class _Match(NamedTuple):
    """How well labels fit predictions, as given or with something undone."""

    correlation: float
    slope: float
    cause: str = ""
    remedy: str = ""

    @property
    def scale(self) -> float:
        """Size of the labels relative to the predictions."""
        return abs(self.slope / self.correlation) if self.correlation else 0.0


def _compare(dataset: Dataset, model: Potential) -> LabelReport:
    indices = _chosen(dataset)
    sample = _sampled(dataset, model, indices)
    overall = _match(sample.lively() if len(sample.lively().indices) else sample)
    finding, certain = _finding(dataset, model, sample)
    compositions = by_composition(dataset.frames[k] for k in indices)
    if len(compositions) > 1:
        # one molecule's labels may be wrong among those of many, which says more than what is wrong on average
        parts = [sample.among(members) for members in compositions if len(members) >= _CERTAIN_FRAMES]
        found = [_finding(dataset, model, part) for part in parts]
        proven = [one for one in found if one[1]]
        if proven and (not certain or any(not sentence for sentence, _ in found)):
            finding, certain = proven[0]
    for further in (_zeroed, _odd_frames, _energy_finding, _energy_units, _energy_zeros):
        if not certain:
            more, sure = further(dataset, model, sample)
            if sure or not finding:
                finding, certain = more, sure
    if finding:
        finding = f"{dataset.source}: {finding}"
    stress = check_stresses(dataset, sample.indices, sample.predicted.stresses, model.name, _declared(dataset.units)[2])
    n_frames = len(indices) if math.isfinite(overall.correlation) else 0
    return LabelReport(model.name, n_frames, overall.correlation, overall.slope, finding, certain, stress)


def _chosen(dataset: Dataset) -> NDArray[np.int64]:
    """Return the frames to compare, one from each stretch of the file, compositions in proportion."""
    groups = sorted(by_composition(dataset.frames), key=len, reverse=True)
    groups = [members for members in groups if len(dataset.frames[members[0]]) > 1]
    if len(groups) > _COMPOSITIONS:
        groups = [groups[k] for k in np.linspace(0, len(groups) - 1, _FRAMES).round().astype(int)]
    rng, total, chosen = np.random.default_rng(0), sum(map(len, groups)), list[int]()
    for members in groups:
        count = min(len(members), max(_PER_COMPOSITION, round(_FRAMES * len(members) / total)))
        chosen += [int(rng.choice(stretch)) for stretch in np.array_split(members, count)]
    # frames are left out evenly where they are large
    keep = max(_CERTAIN_FRAMES, int(len(chosen) * min(1.0, _ATOMS / max(1, sum(dataset.n_atoms[chosen])))))
    kept: Sequence[int] | NDArray[np.int64] = (
        np.unique(np.linspace(0, len(chosen) - 1, min(keep, len(chosen))).round().astype(int)) if chosen else []
    )
    # frames with atoms without a force are looked at in any case
    zero = [k for k, forces in enumerate(dataset.forces) if len(forces) > 1 and (forces == 0).all(axis=1).any()]
    few = [zero[k] for k in np.linspace(0, len(zero) - 1, min(len(zero), _ZEROED_FRAMES)).round().astype(int)]
    return np.unique(np.array([*(chosen[k] for k in kept), *few], dtype=np.int64))


def _sampled(
    dataset: Dataset, model: Potential, indices: NDArray[np.int64], frames: Sequence[Atoms] | None = None
) -> _Sample:
    own = [dataset.frames[k] for k in indices]
    return _Sample(
        indices,
        predict(model, own if frames is None else frames),
        tuple(_far_from_borrowed(frame, model) for frame in own),
        tuple(dataset.forces[k] for k in indices),
    )


def _far_from_borrowed(frame: Atoms, model: Potential) -> NDArray[np.bool_]:
    """Tell the atoms that are of an element of the model's own and not bound to one that borrows its network."""
    borrowed = ~np.isin(frame.symbols, _OWN_ELEMENTS)
    if not borrowed.any():
        return ~borrowed
    radii = covalent_radii[frame.numbers]
    first, second, _, distance = contacts(frame, 2.4 * radii.max())
    bound = distance < 1.2 * (radii[first] + radii[second])
    far = ~borrowed
    far[first[bound & borrowed[second]]] = False
    far[second[bound & borrowed[first]]] = False
    return far


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def _match(sample: _Sample, labels: Sequence[Floats] | None = None, cause: str = "", remedy: str = "") -> _Match:
    """Compare forces, by default the labels as given, with the predictions."""
    counted = sample.counted
    given = sample.labels if labels is None else labels
    a = np.concatenate([f[c].ravel() for f, c in zip(given, counted, strict=True)] or [np.empty(0)])
    b = np.concatenate([f[c].ravel() for f, c in zip(sample.predicted.forces, counted, strict=True)] or [np.empty(0)])
    aa, ab, bb = float(a @ a), float(a @ b), float(b @ b)
    if not aa or not bb:
        return _Match(math.nan, math.nan)
    return _Match(ab / math.sqrt(aa * bb), ab / bb, cause, remedy)


def _finding(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Say what is wrong with the forces of some frames, and whether that is certain; nothing if they are right."""
    judged = sample.lively()
    if len(by_composition(dataset.frames[k] for k in sample.indices)) == 1:
        for named in (_zeroed, _odd_frames):
            sentence, sure = named(dataset, model, sample)
            if sure:
                return sentence, sure
    given = best = _match(judged if judged.n_components >= _COMPONENTS else sample)
    if not given.correlation >= _AGREES:
        best, judged = _undone(dataset, model, sample, given)
    elif foreign := _foreign_frames(dataset, model, judged):
        return foreign, True
    elif shift := _finer_shift(dataset, judged, given):
        best = shift
    elif given.correlation < _FITS_WELL:
        for cause, remedy, other in _with_turned_cells(dataset, model, sample):
            match = _match(other.lively(), cause=cause, remedy=remedy)
            if 1 - match.correlation**2 < _SHIFT_RESIDUAL * (1 - given.correlation**2):
                best, judged = match, other.lively()
    if judged.n_components < _COMPONENTS or not abs(best.correlation) >= (_EXPLAINS if best.slope > 0 else _REVERSED):
        return _doubt(model, sample, given), False
    lively = judged.is_lively
    if not lively and abs(best.correlation) < _FITS_WELL:
        return "", False
    certain = len(judged.indices) >= _CERTAIN_FRAMES
    mistakes = [(best.cause, best.remedy)] if best.cause else []
    if best.slope < 0:
        mistakes.append(("their sign is reversed, as that of gradients is", "multiply the forces by -1"))
    limits = _UNUSUAL_SCALE if len(judged.indices) >= _UNIT_FRAMES else _ODD_SCALE
    if not limits[0] < best.scale < limits[1]:
        if not mistakes:
            certain = certain and lively and not _WRONG_SCALE[0] < best.scale < _WRONG_SCALE[1]
        mistakes.append(_unit(dataset, sample, best))
    if not mistakes:
        return "", False
    undone = f", {abs(best.correlation):.2f} with that undone" if best.cause else ""
    causes, remedies = zip(*mistakes, strict=True)
    return (
        f"the forces do not fit the frames (correlation {given.correlation:.2f}, slope {given.slope:.2g} against "
        f"{model.name}{undone}; {len(judged.indices)} frames, the first is frame "
        f"{dataset.frame_numbers[judged.indices[0]]}): {', and '.join(causes)}; {', and '.join(remedies)}"
    ), certain


def _doubt(model: Potential, sample: _Sample, given: _Match) -> str:
    """Say that labels fit the model badly for no reason that is known; nothing where that is no wonder."""
    sizes = [_rms(force) for force in sample.predicted.forces]
    few = len(sizes) < _CERTAIN_FRAMES or sample.n_components < _COMPONENTS
    borrowing = any(not counted.all() for counted in sample.counted)
    clear = len(sizes) >= _CLEAR_FRAMES and np.median(sizes) >= _CLEAR_FORCES
    limit = _CLEARLY_DOUBTFUL if clear else _DOUBTFUL
    if few or borrowing or given.correlation >= limit or np.median(sizes) < _LIVELY:
        return ""
    return (
        f"the forces correlate only {given.correlation:.2f} (slope {given.slope:.2g}, {len(sample.indices)} frames) "
        f"with those of {model.name}, where right labels of ordinary frames have 0.8 or more, and none of the usual "
        "mistakes explains it: either the start model does not know such matter, or the labels belong to other frames"
    )


def _undone(dataset: Dataset, model: Potential, sample: _Sample, given: _Match) -> tuple[_Match, _Sample]:
    """Return the first mistake that, when undone, makes the forces fit, and the frames that it was seen on."""
    own = given.correlation if math.isfinite(given.correlation) else 0.0
    candidates = chain(_in_other_lengths(dataset, model, sample), _with_turned_cells(dataset, model, sample))
    for cause, remedy, candidate in candidates:
        lively = candidate.lively()
        if lively.n_components < _COMPONENTS:
            continue
        # one mistake is likelier than two: other lengths go together with a shift only; frames near rest are so alike
        # that what turns or reorders the forces of one fits all
        rearranged = _rearranged(dataset, lively) if not cause and lively.is_lively else ()
        for match in chain([_match(lively)], _shifts(dataset, lively), rearranged):
            if match.correlation >= max(_EXPLAINS, own + _BETTER) or match.correlation <= -_REVERSED:
                causes = ", and ".join(filter(None, (cause, match.cause)))
                return match._replace(cause=causes, remedy=", and ".join(filter(None, (remedy, match.remedy)))), lively
    return given, sample.lively()


def _in_other_lengths(dataset: Dataset, model: Potential, sample: _Sample) -> Iterator[tuple[str, str, _Sample]]:
    """Yield the frames as given, and with other units of length where these give ordinary distances."""
    yield "", "", sample
    frames = [dataset.frames[k] for k in sample.indices]
    if not frames:
        return
    periodic = any(frame.pbc.any() for frame in frames)
    changes = {"positions and cell": (True, True), "positions": (True, False), "cell": (False, True)}
    for name, factor in _LENGTH_UNITS.items():
        for what, (moves, grows) in changes.items() if periodic else [("positions", (True, False))]:
            scaled = [frame.copy() for frame in frames]
            for frame in scaled:
                frame.info.clear()  # its charge is no matter of a warning once more
                frame.positions *= factor if moves else 1.0
                frame.cell *= factor if grows else 1.0
            if _BOND_LENGTHS[0] < _bond_length(scaled) < _BOND_LENGTHS[1]:
                verb, it = ("is", "it") if what == "cell" else ("are", "them")
                words = f"{what} {verb} in {name}", f"multiply {it} by {factor:.6g}"
                yield *words, _sampled(dataset, model, sample.indices, scaled)


def _with_turned_cells(dataset: Dataset, model: Potential, sample: _Sample) -> Iterator[tuple[str, str, _Sample]]:
    """Yield the frames with rows and columns of their cells exchanged, where that makes a difference."""
    frames = [dataset.frames[k].copy() for k in sample.indices]
    if not any(frame.pbc.any() and not np.allclose(frame.cell.array, frame.cell.array.T) for frame in frames):
        return
    for frame in frames:
        frame.info.clear()
        frame.set_cell(frame.cell.array.T)
    if _BOND_LENGTHS[0] < _bond_length(frames) < _BOND_LENGTHS[1]:
        yield (
            "rows and columns of the cells are exchanged",
            "write cell vectors as rows",
            _sampled(dataset, model, sample.indices, frames),
        )


def _bond_length(frames: Sequence[Atoms]) -> float:
    """Return the median distance of an atom from its nearest neighbour, in sums of covalent radii.

    NaN if atoms are closer than a model knows or the density is that of no matter, which would also take a long list of
    neighbours.
    """
    nearest = []
    for frame in frames:
        if frame.pbc.all() and not _VOLUMES_PER_ATOM[0] < frame.cell.volume / len(frame) < _VOLUMES_PER_ATOM[1]:
            return math.nan
        radii = covalent_radii[frame.numbers]
        first, second, _, distance = contacts(frame, 4.0 * radii.max())
        if distance.min(initial=np.inf) < CLOSE:
            return math.nan
        ratio = distance / (radii[first] + radii[second])
        shortest = np.full(len(frame), 10.0)
        np.minimum.at(shortest, first, ratio)
        np.minimum.at(shortest, second, ratio)
        nearest.append(shortest)
    return float(np.median(np.concatenate(nearest)))


def _rearranged(dataset: Dataset, sample: _Sample) -> Iterator[_Match]:
    """Compare predictions with the labels of any other frames, turned, and in another order of the atoms."""
    yield from _shuffled(dataset, sample)
    yield from _turned(sample)
    yield from _reordered(dataset, sample)


def _shifts(dataset: Dataset, sample: _Sample) -> Iterator[_Match]:
    """Compare with the labels of the frames before and after, nearest first."""
    for distance in range(1, _SHIFTS + 1):
        for step in (-distance, distance):
            pairs = _partners(dataset, sample, step)
            if len(pairs) < max(_CERTAIN_FRAMES, len(sample.indices) // 2):
                continue
            positions, others = np.array(pairs).T
            example, other = dataset.frame_numbers[[sample.indices[positions[0]], others[0]]]
            yield _match(
                sample.among(positions),
                [dataset.forces[k] for k in others],
                f"labels are shifted by {distance} frame{'s' if distance > 1 else ''}, those of frame {example} stand "
                f"at frame {other}",
                "write every frame with its own labels",
            )


def _partners(dataset: Dataset, sample: _Sample, step: int) -> list[tuple[int, int]]:
    """Return the places in the sample that have a frame so far away in the file with the same atoms, and that frame."""
    place = {int(number): k for k, number in enumerate(dataset.frame_numbers)}
    found = [(k, place.get(int(dataset.frame_numbers[index]) + step)) for k, index in enumerate(sample.indices)]
    return [
        (k, other)
        for k, other in found
        if other is not None
        and np.array_equal(dataset.frames[other].numbers, dataset.frames[sample.indices[k]].numbers)
    ]


class _Fits(NamedTuple):
    """How a frame's predicted forces fit the labels of all frames with the same atoms."""

    own: float
    best: float
    frame: int
    opposite: float
    """Best correlation of the reversed forces: what chance achieves among so many frames."""


def _fits(dataset: Dataset, sample: _Sample) -> list[_Fits]:
    groups = {dataset.frames[members[0]].numbers.tobytes(): members for members in by_composition(dataset.frames)}
    result = []
    for index, force, counted in zip(sample.indices, sample.predicted.forces, sample.counted, strict=True):
        members = groups[dataset.frames[index].numbers.tobytes()]
        members = members[np.abs(members - index) <= _REACH]
        labels = np.array([dataset.forces[k][counted].ravel() for k in members])
        predicted = force[counted].ravel()
        norms = np.linalg.norm(labels, axis=1) * np.linalg.norm(predicted)
        fits = np.divide(labels @ predicted, norms, out=np.zeros(len(members)), where=norms > 0)
        best = int(fits.argmax())
        own = float(fits[np.flatnonzero(members == index)[0]])
        result.append(_Fits(own, float(fits[best]), int(members[best]), float(-fits.min())))
    return result


def _shuffled(dataset: Dataset, sample: _Sample) -> Iterator[_Match]:
    """Compare with the labels of whichever frames fit best, if they fit better than chance finds."""
    fits = _fits(dataset, sample)
    best = _match(sample, [dataset.forces[fit.frame] for fit in fits])
    chance = float(np.mean([fit.opposite for fit in fits]))
    if best.correlation > chance + 0.2:
        moved = next((k for k, fit in enumerate(fits) if fit.frame != sample.indices[k]), 0)
        number, other = dataset.frame_numbers[[sample.indices[moved], fits[moved].frame]]
        yield best._replace(
            cause=f"labels are in another order than frames, those of frame {number} stand at frame {other}",
            remedy="write every frame with its own labels",
        )


def _foreign_frames(dataset: Dataset, model: Potential, sample: _Sample) -> str:
    """Name single frames whose forces are those of others, in a set where most are right."""
    wrong = [
        (index, fit)
        for index, fit in zip(sample.indices, _fits(dataset, sample), strict=True)
        if fit.own < _FOREIGN_OWN and fit.best > max(_FOREIGN_FIT, fit.opposite + 0.2)
    ]
    if len(wrong) < _CERTAIN_FRAMES:
        return ""
    index, fit = wrong[0]
    number, other = dataset.frame_numbers[[index, fit.frame]]
    return (
        f"the forces of {len(wrong)} frames among {len(sample.indices)} are those of others: the labels of frame "
        f"{number} stand at frame {other} (correlation with {model.name} there {fit.best:.2f}, of its own "
        f"{fit.own:.2f}); write every frame with its own labels"
    )


def _zeroed(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Find forces that are exactly zero on atoms where the model's are not: symmetry would make both zero."""
    places = [
        np.flatnonzero(
            counted & (np.abs(label).max(axis=1) < _NO_FORCE) & (np.linalg.norm(force, axis=1) > _SURE_FORCE)
        )
        for force, label, counted in zip(sample.predicted.forces, sample.labels, sample.counted, strict=True)
    ]
    count = sum(map(len, places))
    if count < _ZEROED:
        return "", False
    k = max(range(len(places)), key=lambda k: len(places[k]))
    atom = int(places[k][np.linalg.norm(sample.predicted.forces[k][places[k]], axis=1).argmax()])
    return (
        f"the forces of frame {dataset.frame_numbers[sample.indices[k]]} are exactly zero on {len(places[k])} of "
        f"{len(sample.labels[k])} atoms where those of {model.name} are not, e.g. "
        f"{np.linalg.norm(sample.predicted.forces[k][atom]):.3g} eV/A on atom {atom} "
        f"({dataset.frames[sample.indices[k]].symbols[atom]}), and so in {sum(map(bool, map(len, places)))} of "
        f"{len(places)} frames: constraints have changed them, or they were not computed; train on the forces as "
        "computed, with all atoms free"
    ), True


def _odd_frames(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Name frames whose forces are reversed or in another unit beside others whose forces are not."""
    judged = sample.lively()
    matches = [_match(judged.among(np.array([k]))) for k in range(len(judged.indices))]
    enough = [judged.among(np.array([k])).n_components >= _ODD_COMPONENTS for k in range(len(matches))]

    def named(k: int) -> str:
        if not enough[k] or not abs(matches[k].correlation) > _ODD_CORRELATION:
            return ""
        if matches[k].slope < 0:
            return "of reversed sign, as gradients are"
        return "" if _ODD_SCALE[0] < matches[k].scale < _ODD_SCALE[1] else "in another unit"

    odd = {k: words for k in range(len(matches)) if (words := named(k))}
    if not odd or len(odd) == sum(enough):
        return "", False
    first = next(iter(odd))
    return (
        f"the forces of {len(odd)} of {len(matches)} frames that were compared are {odd[first]}: of frame "
        f"{dataset.frame_numbers[judged.indices[first]]} they correlate {matches[first].correlation:.2f} with those of "
        f"{model.name} and are {matches[first].scale:.3g} times as large; of the other frames they fit; write all "
        "frames alike"
    ), len(odd) >= _CERTAIN_FRAMES


def _finer_shift(dataset: Dataset, sample: _Sample, given: _Match) -> _Match | None:
    """Return the shift of a trajectory in small steps, where labels fit their frames, but those beside them better."""
    if len(sample.indices) < 8:
        return None
    fits = [match for match in _shifts(dataset, sample) if match.correlation > given.correlation]
    best = max(fits, key=lambda match: match.correlation, default=given)
    if 1 - best.correlation**2 > _SHIFT_RESIDUAL * (1 - given.correlation**2):
        return None
    return best


def _turned(sample: _Sample) -> Iterator[_Match]:
    """Compare after turning the labels of each frame to fit (Kabsch), mirrored too, if that does more than chance."""

    def turned(scrambled: bool) -> _Match:
        rng, labels = np.random.default_rng(0), []
        for force, label, counted in zip(sample.predicted.forces, sample.labels, sample.counted, strict=True):
            mine = label.copy()
            if scrambled:
                mine[counted] = rng.permutation(mine[counted])
            u, _, vt = np.linalg.svd(force[counted].T @ mine[counted])
            labels.append(mine @ (u @ vt).T)
        return _match(sample, labels)

    match = turned(False)
    if match.correlation > turned(True).correlation + 0.2:
        yield match._replace(
            cause="positions and forces are turned against each other, as in an output that prints positions in a "
            "standard orientation",
            remedy="take both from one frame of axes (of Gaussian the input orientation, nosymm)",
        )


def _reordered(dataset: Dataset, sample: _Sample) -> Iterator[_Match]:
    """Compare after a reordering of the atoms that is found on one half of the frames and judged on the other."""
    judged, labels, example = list[int](), [], ""
    for members in by_composition(dataset.frames[k] for k in sample.indices):
        if len(members) < 4:
            continue
        for found_on, judged_on in ((members[::2], members[1::2]), (members[1::2], members[::2])):
            affinity = sum(sample.predicted.forces[k] @ sample.labels[k].T for k in found_on)
            order = linear_sum_assignment(-affinity)[1]
            judged += judged_on.tolist()
            labels += [sample.labels[k][order] for k in judged_on]
            moved = np.flatnonzero(order != np.arange(len(order)))
            if len(moved) and not example:
                example = f", that of atom {moved[0]} stands at atom {order[moved[0]]}"
    if len(judged) >= _CERTAIN_FRAMES:
        yield _match(
            sample.among(np.array(judged)),
            labels,
            f"forces are in another order of the atoms{example}",
            "write positions and forces in one order",
        )


def _unit(dataset: Dataset, sample: _Sample, match: _Match) -> tuple[str, str]:
    """Name the units that give the labels their size, the likeliest first."""
    declared = _declared(dataset.units)
    energy = _energy_scale(dataset, sample)

    def miss(name: str) -> float:
        of_energy, of_force = _FORCE_UNITS[name]
        off = abs(math.log(match.scale * of_force / declared[1] / _USUAL_BIAS))
        if energy is not None:
            # energies may be in the unit that is declared, and forces alone in another
            off += min(abs(math.log(energy * unit / declared[0] / _USUAL_BIAS)) for unit in (of_energy, declared[0]))
        return off

    near = sorted((name for name in _FORCE_UNITS if abs(_off(match, name, declared[1])) < math.log(1.6)), key=miss)
    said = f"they are {match.scale:.3g} times as large as those of the model"
    if not near:
        return said, "find their unit"
    option = next((f", e.g. --units {name} (units='{name}')" for name in near[:1] if name in _OPTIONS), "")
    return f"{said}, as if in {' or '.join(near[:2])}", f"give their units{option}"


def _declared(words: str) -> tuple[float, float, float]:
    """Return what the units that labels were read in are worth: of energies, forces and stresses."""
    labels, *rest = words.split("; ")
    parts = labels.split(", ")
    energy = next((found for part in parts if (found := parse_unit(part, 1, 0)) is not None), None)
    force = next((found for part in parts if (found := parse_unit(part, 1, -1)) is not None), None)
    if energy is None:
        energy = force if force is not None else 1.0
    if force is None:
        force = energy
    said = next((part.removeprefix("stress in ") for part in rest if part.startswith("stress in ")), "")
    return energy, force, parse_unit(said, 1, -3) or energy / (energy / force) ** 3


def _off(match: _Match, name: str, declared: float) -> float:
    return math.log(match.scale * _FORCE_UNITS[name][1] / declared / _USUAL_BIAS)


def _energies(dataset: Dataset, sample: _Sample) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Yield, for every composition of the sample, its places and the predicted energies relative to their mean."""
    for places in by_composition(dataset.frames[k] for k in sample.indices):
        energies = sample.predicted.energies[places]
        yield places, energies - energies.mean()


def _energy_scale(dataset: Dataset, sample: _Sample) -> float | None:
    """Return the size of the energy differences relative to the predicted ones; None if they are not alike."""
    labels, predicted = [np.empty(0)], [np.empty(0)]
    for places, energies in _energies(dataset, sample):
        given = dataset.energies[sample.indices[places]]
        labels.append(given - given.mean())
        predicted.append(energies)
    a, b = np.concatenate(labels), np.concatenate(predicted)
    if len(a) < 5 or not a.any() or not b.any():
        return None
    return float(np.linalg.norm(a) / np.linalg.norm(b)) if a @ b > 0.7 * np.linalg.norm(a) * np.linalg.norm(b) else None


def _energy_finding(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Say whether energies are shifted against forces that are right, or their sign is reversed."""
    for places, energies in _energies(dataset, sample):
        part = sample.among(places)
        if len(places) < _ENERGY_FRAMES or not _tells(part, energies):
            continue
        given = _correlation(energies, dataset.energies[part.indices])
        number = dataset.frame_numbers[part.indices[0]]
        if given < -_FITS_WELL:
            return (
                f"the energies rise where those of {model.name} fall (correlation {given:.2f} over {len(places)} "
                f"frames, the first is frame {number}): their sign is reversed"
            ), True
        for step in (step for distance in range(1, _SHIFTS + 1) for step in (-distance, distance)):
            pairs = _partners(dataset, part, step)
            if len(pairs) < _ENERGY_FRAMES:
                continue
            positions, others = np.array(pairs).T
            shifted = _correlation(energies[positions], dataset.energies[others])
            # frames that are sorted, or of a relaxation, have alike energies beside each other, and the ratio of two
            # residuals of n frames varies by a factor of exp(sqrt(4 / n)) by chance
            less = math.exp(-_ENERGY_DEVIATIONS * math.sqrt(4 / len(pairs)))
            if given < _ENERGY_DOUBT and shifted > _FITS_WELL and 1 - shifted**2 < less * (1 - given**2):
                return (
                    f"the energies are shifted by {abs(step)} frame{'s' if abs(step) > 1 else ''} against the forces "
                    f"(correlation with {model.name} {given:.2f}, {shifted:.2f} with that undone; {len(pairs)} "
                    f"frames): the energy of frame {number} stands at frame {number + step}; write every frame with "
                    "its own labels"
                ), True
    return "", False


def _known(frame: Atoms) -> bool:
    """Tell whether all elements are the model's own."""
    return {*frame.symbols} <= {*_OWN_ELEMENTS}


def _tells(part: _Sample, energies: Floats) -> bool:
    """Tell whether the model's energies of some frames say anything: they change, and its forces fit the labels."""
    return bool(np.ptp(energies) > _ENERGY_CHANGES and _match(part).correlation >= _AGREES)


def _energy_units(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Say whether energies change from frame to frame by another measure than eV, or not at all."""
    energy = _declared(dataset.units)[0]
    for places, predicted in chain(_energies(dataset, sample), _beyond_composition(dataset, sample)):
        given = dataset.energies[sample.indices[places]]
        same = len(by_composition(dataset.frames[k] for k in sample.indices[places])) == 1
        changes = given - (given.mean() if same else _of_composition(dataset, sample, given))
        count = len(places)
        # of molecules with borrowed elements a start model knows less
        known = all(_known(dataset.frames[k]) for k in sample.indices[places])
        if count < (_UNIT_FRAMES if known else _ENERGY_FRAMES) or not _tells(sample.among(places), predicted):
            continue
        number = dataset.frame_numbers[sample.indices[places[0]]]
        size = float(np.linalg.norm(changes) / np.linalg.norm(predicted))
        low, high = _ENERGY_SCALE if known else _BORROWED_ENERGY_SCALE
        if same and not np.ptp(given) > 1e-6 * np.ptp(predicted):
            return (
                f"the energies of {count} frames, the first is frame {number}, are all {given[0]:.6g} eV, where those "
                f"of {model.name} change by {np.ptp(predicted):.3g} eV: they are no labels"
            ), True
        if _correlation(predicted, changes) < _FITS_WELL or low < size < high:
            continue
        scales = {
            name.partition("/")[0]: unit for name, (unit, _) in _FORCE_UNITS.items() if name[:2] not in ("kc", "kJ")
        }
        scales |= {"kcal/mol": KCAL_PER_MOL, "kJ/mol": units.kJ / units.mol}
        if same:
            scales["eV per atom"] = float(len(dataset.frames[sample.indices[places[0]]]))
        near = min(scales, key=lambda name: abs(math.log(size * scales[name] / energy)))
        likely = f", as if in {near}" if abs(math.log(size * scales[near] / energy)) < math.log(1.6) else ""
        return (
            f"the energies change from frame to frame {size:.3g} times as much as those of {model.name} ({count} "
            f"frames, the first is frame {number}), and the forces do not{likely}: write both in the units that the "
            "file or --units says"
        ), count >= _ENERGY_FRAMES
    return "", False


def _beyond_composition(dataset: Dataset, sample: _Sample) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Yield all places and predicted energies less a sum over elements, for sets of many substances."""
    counts = _counts(dataset, sample)
    if len(by_composition(dataset.frames[k] for k in sample.indices)) > 1 and len(counts) >= counts.shape[1] + 10:
        energies = sample.predicted.energies
        yield np.arange(len(counts)), energies - _of_composition(dataset, sample, energies)


def _counts(dataset: Dataset, sample: _Sample) -> Floats:
    frames = [dataset.frames[k] for k in sample.indices]
    elements = [*element_counts(frames)]
    return np.array([[float((frame.symbols == element).sum()) for element in elements] for frame in frames])


def _of_composition(dataset: Dataset, sample: _Sample, energies: Floats) -> Floats:
    counts = _counts(dataset, sample)
    fitted: Floats = counts @ np.linalg.lstsq(counts, energies, rcond=None)[0]
    return fitted


def _energy_zeros(dataset: Dataset, model: Potential, sample: _Sample) -> tuple[str, bool]:
    """Say whether energies of one substance have two zeros, as those of two codes or methods, or scatter."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for k, index in enumerate(sample.indices):
        groups[dataset.frames[index].symbols.formula.reduce()[0].format("hill")].append(k)
    fitting = _match(sample).correlation >= _AGREES
    for formula, members in groups.items():
        indices = sample.indices[members]
        if not fitting and np.ptp(sample.predicted.energies[members] / dataset.n_atoms[indices]) > _ENERGY_GAPS[0]:
            continue  # what the model says of the energies is no better than of the forces
        known = _known(dataset.frames[indices[0]])
        off = (dataset.energies[indices] - sample.predicted.energies[members]) / dataset.n_atoms[indices]
        order = off.argsort()
        gaps = np.diff(off[order])[_CERTAIN_FRAMES - 1 : 1 - _CERTAIN_FRAMES]
        if len(gaps):
            cut = int(gaps.argmax()) + _CERTAIN_FRAMES
            low, high = order[:cut], order[cut:]
            gap, within = float(gaps.max()), max(float(off[low].std()), float(off[high].std()))
            if gap > max(_ENERGY_GAPS[0], _RELATIVE_GAP * within):
                one, other = (dataset.frame_numbers[indices[part.min()]] for part in (low, high))
                return (
                    f"the energies of {formula} have two zeros, {off[high].mean() - off[low].mean():.4g} eV/atom apart "
                    f"against {model.name}: in {len(low)} frames as in frame {one}, in {len(high)} as in frame "
                    f"{other}; take labels of one code, method and charge"
                ), known and gap > _ENERGY_GAPS[1]
        if known and len(members) >= _UNIT_FRAMES and off.std() > _ENERGY_SCATTER:
            worst = int(np.abs(off - np.median(off)).argmax())
            return (
                f"the energies of {formula} scatter by {off.std():.3g} eV/atom about those of {model.name}, where "
                f"right labels do by 0.1 at most ({len(members)} frames; frame {dataset.frame_numbers[indices[worst]]} "
                f"is off by {off[worst] - np.median(off):.3g}): do they belong to these frames?"
            ), False
    return "", False


def _correlation(a: Floats, b: Floats) -> float:
    """Return the correlation of two columns or tables of numbers, 0 where one of them is constant."""
    x, y = (a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size else 0.0
