"""What the parameters of the notebooks may be: one table for all of them, checked before anything long begins.

A notebook asks in its first cell after the parameters, whoever set them; the study asks for all its notebooks at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Final, NoReturn

import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model

from tlmc.data.dataset import Dataset
from tlmc.data.loading import load_dataset, local_file
from tlmc.data.splits import SplitMethod, split_dataset
from tlmc.descriptors.soap import SOAP
from tlmc.devices import find_device
from tlmc.errors import ConfigError, TlmcError, nearest_first, problems_of
from tlmc.experiments.run import make_run
from tlmc.potentials.borrowing import THESIS_DONORS, Borrowing, parse_element_map
from tlmc.potentials.model import Potential
from tlmc.potentials.registry import load_start_model, start_models
from tlmc.thesis.ablations import ABLATIONS
from tlmc.thesis.casestudy import CaseStudy, load_crystals, short_name, sources
from tlmc.training.config import recipe

Loader = Callable[[str], Dataset]
_Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Sets:
    """What a notebook wants of the data that a parameter names."""

    several: bool = False
    """Names and files parted by commas, or a folder; otherwise one name or file."""
    optional: bool = False
    """May be empty."""
    crystals: bool = False
    """Each set must hold a crystal, and molecules are left out."""
    predicted: bool = True
    """The start model, if the notebook has one, must have a network for every element."""

    def names(self, text: str) -> list[str]:
        return sources(text) if self.several else [text] if text else []

    def check(self, text: str) -> str:
        """Refuse names that nothing has, without reading the files."""
        names = self.names(text)
        if not (names or self.optional):
            raise ValueError("must name a data set")
        for name in names:
            local_file(name)
        return text


def _set(**wanted: bool) -> Any:
    sets = _Sets(**wanted)
    return Annotated[str, AfterValidator(sets.check), sets]


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> str:
    """Refuse a text that is not one of rising whole numbers."""
    numbers = [int(part) if part.isascii() and part.isdigit() else 0 for part in _listed(text)]
    if min(numbers) < 1 or not all(smaller < larger for smaller, larger in pairwise(numbers)):
        raise ValueError("must be whole numbers from 1 on, in rising order, parted by commas")
    return text


def _at_least_two(text: str) -> str:
    if len(_listed(text)) < 2:
        raise ValueError("must be two numbers at least, for a slope")
    return text


def _names_of(known: Callable[[str], object]) -> Callable[[str], str]:
    """Return a check of names parted by commas, each once; `known` raises for one that there is not."""

    def check(text: str) -> str:
        names = _listed(text)
        if "" in names or len(set(names)) < len(names):
            raise ValueError("must be names parted by commas, each once")
        for name in names:
            known(name)
        return text

    return check


def _start_model(name: str) -> str:
    if name not in start_models():
        raise ValueError(
            f"there is no such start model: choose one of {', '.join(nearest_first(name, start_models()))}"
        )
    return name


def _recipe(name: str) -> str:
    _ = recipe(name)
    return name


def _ablation(name: str) -> None:
    if name not in ABLATIONS:
        raise ConfigError(f"there is no ablation {name!r}: choose of {', '.join(ABLATIONS)}")


def _element_map(text: str) -> str:
    _ = parse_element_map(text)
    return text


def _settings(text: str) -> str:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError("must be YAML of names and values, such as '{epochs: 4}'")
    return text


def _device(name: str) -> str:
    _ = find_device(name)
    return name


_Name = Annotated[str, Field(min_length=1)]
_NotNegative = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]
# above this, a calculation would not end; the thesis stays far below
_Few = Annotated[int, Field(ge=1, le=20)]
_Degree = Annotated[int, Field(ge=0, le=20)]
_Length = Annotated[float, Field(gt=0.0, le=20.0, allow_inf_nan=False)]
_PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_Numbers = Annotated[str, AfterValidator(_numbers)]
_TwoNumbers = Annotated[str, AfterValidator(_numbers), AfterValidator(_at_least_two)]
_Recipe = Annotated[str, AfterValidator(_recipe)]
_ElementMap = Annotated[str, AfterValidator(_element_map)]


def _at_least(least: int) -> Any:
    return Annotated[int, Field(ge=least)]


# what the generators of torch take
_Seed = Annotated[int, Field(ge=0, lt=2**63)]

_ALL: Final[dict[str, Any]] = {"profile_name": _Name, "seed": _Seed}
_MODEL: Final[dict[str, Any]] = _ALL | {"start_model": Annotated[str, AfterValidator(_start_model)]}
_RUN: Final[dict[str, Any]] = _MODEL | {"dataset": _set(), "element_map": _ElementMap, "interactive": bool}

PARAMETERS: Final[Mapping[str, _Values]] = {
    "00_start_here": _MODEL
    | {"dataset": _set(), "recipe_name": _Recipe, "epochs": _Positive, "interactive": bool},
    "01_descriptors": _ALL
    | {
        "dataset": _set(crystals=True), "frame_number": _NotNegative, "r_cut": _Length, "n_max": _Few, "l_max": _Degree,
        "sigma": _Length, "largest_repeat": _Few,
    },
    "02_kernel_methods": _ALL
    | {
        "molecule": _set(), "crystal": _set(crystals=True), "molecule_sizes": _TwoNumbers,
        "crystal_sizes": _Numbers, "cost_sizes": _TwoNumbers, "n_judged": _at_least(4), "n_seeds": _Positive,
        "n_sparse": _Positive, "n_max": _Few, "l_max": _Degree,
    },
    "03_neural_networks": _MODEL
    | {
        "molecule_set": _set(), "dataset": _set(crystals=True), "n_molecule": _NotNegative,
        "n_crystal": _NotNegative, "sizes_molecule": _Numbers, "sizes_crystal": _Numbers,
        "epochs_molecule": _Positive, "epochs_crystal": _Positive, "epochs_start_model": _Positive,
        "n_passes": _Few, "r_cut": Annotated[float, Field(gt=1.4, le=20.0, allow_inf_nan=False)], "n_seeds": _Positive,
    },
    "04_sampling": _MODEL
    | {
        "molecule": _set(), "crystals": _set(several=True, crystals=True), "n_frames": _at_least(6),
        "largest": _Positive, "temperature": _PositiveNumber, "n_draws": _at_least(100), "n_train": _Positive,
        "n_calibration": _at_least(9), "n_test": _Positive, "n_seeds": _Positive, "interactive": bool,
    },
    "05_data_analysis": _MODEL
    | {
        "dataset": _set(predicted=False), "split_method": SplitMethod, "n_sd": _PositiveNumber,
        "others": _set(several=True, optional=True, crystals=True, predicted=False), "interactive": bool,
    },
    "06_start_models": _RUN,
    "07_fine_tuning": _RUN
    | {
        "recipes": Annotated[str, AfterValidator(_names_of(_recipe))], "n_seeds": _Positive, "epochs": _NotNegative,
        "convergence_sets": _set(several=True, crystals=True), "convergence_seeds": _Positive,
        "convergence_share": Annotated[float, Field(gt=0.0, le=1.0)],
    },
    "08_ablations": _MODEL
    | {
        "dataset": _set(), "crystals_only": bool, "tables": Annotated[str, AfterValidator(_names_of(_ablation))],
        "borrow_dataset": _set(optional=True), "n_seeds": _Positive, "epochs": _NotNegative, "interactive": bool,
    },
    "09_evaluation": _RUN
    | {
        "recipe_name": _Recipe, "epochs": _NotNegative, "n_seeds": _Positive, "max_frames": _NotNegative,
        "crystals": _set(several=True, crystals=True, predicted=False), "crystal_epochs": _NotNegative,
        "sizes": Annotated[str, AfterValidator(lambda text: text and _numbers(text))], "shared_train": _NotNegative,
        "left_out": str,
    },
    "10_single_run": _RUN
    | {
        "crystals_only": bool, "recipe_name": _Recipe, "settings": Annotated[str, AfterValidator(_settings)],
        "label": str, "n_train": _NotNegative, "borrow": Borrowing, "split": SplitMethod,
        "device": Annotated[str, AfterValidator(_device)], "trust_labels": bool,
    },
}  # fmt: skip
"""Notebook to parameter to what it may be, as pydantic reads it."""


def check(notebook: str, values: _Values, load: Loader = load_dataset) -> None:
    """Refuse wrong parameters of a notebook, before it begins, in one sentence that names each with its value.

    Looked at are types and ranges, names of recipes, data sets and tables, and what the data must have for the notebook
    to reach its end: crystals, elements that the start model knows or borrows, enough frames. The data sets are read
    for it.

    Parameters
    ----------
    notebook
        Such as ``07_fine_tuning``; for a notebook that is none of the study's nothing is checked.
    values
        Its parameters; other names are ignored, so that a notebook can give its ``globals()``.
    load
        What reads the data sets.

    Raises
    ------
    ConfigError
        If a parameter is missing or wrong.
    """
    check_values(notebook, values)
    with _warnings_are_for_later():
        check_data(notebook, values, load)


def check_values(notebook: str, values: _Values) -> None:
    """Do that part of :func:`check` that reads no data.

    Raises
    ------
    ConfigError
        As there.
    """
    kinds = PARAMETERS.get(notebook)
    if kinds is None:
        return
    fields: Any = {name: (kind, ...) for name, kind in kinds.items()}
    model = create_model(notebook, __config__=ConfigDict(strict=True), **fields)
    try:
        model.model_validate({name: values[name] for name in kinds if name in values})
    except ValidationError as error:
        missing = [str(problem["loc"][0]) for problem in error.errors() if problem["type"] == "missing"]
        if missing:
            raise ConfigError(f"{notebook}: the parameters cell does not set {', '.join(missing)}") from error
        raise ConfigError(f"{notebook}: {problems_of(error)}") from error


def check_data(notebook: str, values: _Values, load: Loader = load_dataset) -> None:
    """Do that part of :func:`check` that reads the data, for values that passed the other.

    Raises
    ------
    ConfigError
        As there.
    """
    kinds = PARAMETERS.get(notebook)
    if kinds is None:
        return
    try:
        model = load_start_model(values["start_model"]) if "start_model" in kinds else None
        sets = {name: _loaded(name, kind, values, model, load) for name, kind in kinds.items() if _sets_of(kind)}
        if notebook in _RULES:
            _RULES[notebook](values, sets)
    except TlmcError as error:
        raise ConfigError(f"{notebook}: {error}") from error


def _sets_of(kind: Any) -> _Sets | None:
    return next((part for part in getattr(kind, "__metadata__", ()) if isinstance(part, _Sets)), None)


@contextmanager
def _warnings_are_for_later() -> Iterator[None]:
    """Keep warnings about data back: the notebook reads it again, and they are said then."""
    log = logging.getLogger("tlmc")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _loaded(name: str, kind: Any, values: _Values, model: Potential | None, load: Loader) -> list[Dataset]:
    """Read the sets that a parameter names, and check them as far as all notebooks want the same."""
    sets = _sets_of(kind)
    assert sets is not None
    found = []
    for source in sets.names(values[name]):
        try:
            dataset = load(source)
        except TlmcError as error:
            _refuse(values, name, str(error))
        if sets.crystals or values.get("crystals_only"):
            dataset = dataset.crystals()
            if not len(dataset):
                _refuse(values, name, f"{source} holds no crystal")
        if model is not None and sets.predicted:
            _check_elements(name, values, model, dataset)
        found.append(dataset)
    return found


def _check_elements(name: str, values: _Values, model: Potential, dataset: Dataset) -> None:
    """Refuse a set with elements that the start model neither has nor borrows.

    Where a notebook has no element map, elements are borrowed as in the thesis.
    """
    mapping = dict(THESIS_DONORS)
    if "element_map" in values:
        mapping = parse_element_map(values["element_map"])
        try:
            model.with_elements(mapping)
        except TlmcError as error:
            _refuse(values, "element_map", str(error))
    lacking = [element for element in dataset.elements if element not in model.elements and element not in mapping]
    if not lacking:
        return
    own = mapping if "element_map" in values else {}
    wanted = own | {element: THESIS_DONORS.get(element, "C") for element in lacking}
    example = ", ".join(f"{new}={donor}" for new, donor in wanted.items())
    why = f"{dataset.name} holds {' and '.join(lacking)}, for which {model.name} has no network"
    if "element_map" in values:
        _refuse(values, name, f"{why}: set element_map (-p on the command line), such as '{example}'")
    borrowed = ", ".join(f"{new}={donor}" for new, donor in THESIS_DONORS.items())
    _refuse(
        values,
        name,
        f"{why}, and none that the thesis borrows ({borrowed}): take the notebooks 06, 07, 09 and 10 with "
        f"element_map = '{example}', or the command line with --map",
    )


def _refuse(values: _Values, name: str, why: str) -> NoReturn:
    raise ConfigError(f"{name} = {values[name]!r}: {why}")


def _check_sizes(values: _Values, name: str, n_train: int, where: str) -> None:
    largest = int(_listed(values[name])[-1])
    if largest > n_train:
        _refuse(values, name, f"the training part of {where} has {n_train} frames only")


def _rule_descriptors(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    [crystals] = sets["dataset"]
    if values["frame_number"] >= len(crystals):
        _refuse(values, "frame_number", f"{crystals.name} has {len(crystals)} crystals, counted from 0")
    for basis in ("gto", "polynomial"):
        SOAP(crystals.elements, values["r_cut"], values["n_max"], values["l_max"], values["sigma"], basis=basis)


def _rule_kernels(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    methods: dict[str, SplitMethod] = {"molecule": "blocks", "crystal": "random"}
    for name, method in methods.items():
        [data] = sets[name]
        parts = split_dataset(data, (0.6, 0.2, 0.2), method=method, seed=values["seed"])
        _check_sizes(values, f"{name}_sizes", len(parts.train), data.name)
        if name == "molecule" and values["n_judged"] > len(parts.test):
            _refuse(values, "n_judged", f"the test part of {data.name} has {len(parts.test)} frames only")
    SOAP(sets["crystal"][0].elements, 4.0, values["n_max"], values["l_max"], 0.4, cutoff="cosine")
    if int(_listed(values["cost_sizes"])[0]) < 50:
        _refuse(values, "cost_sizes", "the smallest must be 50, the number of points that Nyström's method takes")


def _rule_networks(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    for kind, name in (("molecule", "molecule_set"), ("crystal", "dataset")):
        [data] = sets[name]
        if values[f"n_{kind}"] > len(data):
            _refuse(values, f"n_{kind}", f"{data.name} has {len(data)} frames for this notebook, 0 takes all of them")
        used = data.subset(range(values[f"n_{kind}"] or len(data)))
        _check_sizes(values, f"sizes_{kind}", len(split_dataset(used, seed=values["seed"]).train), data.name)


def _rule_sampling(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    [data] = sets["molecule"]
    if (data.frames[0].numbers == 6).sum() < 2:
        _refuse(values, "molecule", f"{data.frames[0].get_chemical_formula()} has no two carbon atoms to pull apart")
    if any(frame.numbers.tolist() != data.frames[0].numbers.tolist() for frame in data.frames):
        _refuse(values, "molecule", "the frames must be of one molecule, its atoms in one order")
    needed = values["n_train"] + values["n_calibration"] + values["n_test"]
    if needed > len(data):
        three = "n_train + n_calibration + n_test"
        _refuse(values, "molecule", f"{data.name} has {len(data)} frames, {three} are {needed}")
    for crystals in sets["crystals"]:
        small = int((crystals.n_atoms <= values["largest"]).sum())
        if small < 6:
            _refuse(values, "largest", f"{crystals.name} has {small} crystals of so many atoms at most, 6 are needed")


def _rule_analysis(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    if not sets["others"] and not sets["dataset"][0].is_crystal.any():
        _refuse(values, "others", f"must name a set with crystals, since {values['dataset']} holds none")


def _rule_ablations(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    names = _listed(values["tables"])
    if names == ["borrow"]:
        _refuse(values, "tables", "must name one more, for the elements that the start model knows")
    if "borrow" in names and not sets["borrow_dataset"]:
        _refuse(values, "tables", "the table 'borrow' needs a borrow_dataset")


def _rule_evaluation(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    read = dict(zip(sources(values["crystals"]), sets["crystals"], strict=True))
    names = [short_name(crystal) for crystal in read.values()]
    unknown = [name for name in _listed(values["left_out"]) if name and name not in (*names, "all")]
    if unknown:
        _refuse(values, "left_out", f"{unknown[0]!r} is not one of the crystals {', '.join(names)}, nor 'all'")
    try:
        CaseStudy(
            load_start_model(values["start_model"]),
            load_crystals(sources(values["crystals"]), max_frames=values["max_frames"], load=read.__getitem__),
            values["recipe_name"],
            seeds=(values["seed"],),
        )
    except TlmcError as error:
        _refuse(values, "crystals", str(error))


def _rule_single_run(values: _Values, sets: Mapping[str, Sequence[Dataset]]) -> None:
    [data] = sets["dataset"]
    run = make_run(
        {
            "dataset": values["dataset"],
            "start_model": values["start_model"],
            "recipe": values["recipe_name"],
            "settings": yaml.safe_load(values["settings"]),
            "seed": values["seed"],
        },
        f"settings = {values['settings']!r}",
    )
    parts = split_dataset(data, method=values["split"], seed=run.seed)
    if values["n_train"] > len(parts.train):
        _refuse(values, "n_train", f"the training part of {data.name} has {len(parts.train)} frames, 0 takes them all")


_RULES: Final[Mapping[str, Callable[[_Values, Mapping[str, Sequence[Dataset]]], None]]] = {
    "01_descriptors": _rule_descriptors,
    "02_kernel_methods": _rule_kernels,
    "03_neural_networks": _rule_networks,
    "04_sampling": _rule_sampling,
    "05_data_analysis": _rule_analysis,
    "08_ablations": _rule_ablations,
    "09_evaluation": _rule_evaluation,
    "10_single_run": _rule_single_run,
}
