"""Records with arrays, tensors or tables compare by content and can be hashed; `==` never raises."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import molecule

import tlmc
from helpers.potential_references import toy_potential
from tlmc.data.splits import Split
from tlmc.descriptors.enrichment import fit_enrichment
from tlmc.equality import equal_by_content, same
from tlmc.families.ani import Layer, enrich, relabel
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.potentials import Predictions, predict
from tlmc.potentials.model_files import load_model, save_model
from tlmc.potentials.reference import ReferenceEnergies
from tlmc.sampling import predict_committee

HOLDS_ARRAYS = re.compile(r"Tensor|NDArray|\w*Array\b|DataFrame|Potential|Dataset|Predictions|Layer|Structure\b|Stage")


def soap():
    return fit_enrichment([molecule("CH3OH")], "soap", {"r_cut": 3.0, "n_max": 2, "l_max": 2})


def test_models_are_equal_if_their_content_is(tmp_path):
    model = enrich(toy_potential(), soap()).with_reference(ReferenceEnergies({"H": 0.1, "C": 0.2}, "per_element"))
    save_model(model, tmp_path / "model.safetensors")
    back, _ = load_model(tmp_path / "model.safetensors")
    assert back == model
    assert not back != model  # noqa: SIM202 - both operators are asked
    assert hash(back) == hash(model)
    assert {model: "first", back: "second"} == {back: "second"}
    assert back in [toy_potential(seed=3), model]
    nudged = dict(model.networks)
    first, *rest = nudged["C"]
    bias = first.bias.clone()
    bias[0, 0, 0] += 1e-12
    nudged["C"] = (Layer(first.weight, bias), *rest)
    for other in (
        dataclasses.replace(model, networks=nudged),
        relabel(model, {"Si": "C"}),
        model.with_reference(None),
        model.to(torch.float32),
        dataclasses.replace(model, committee=False),
        dataclasses.replace(model, enrichment=dataclasses.replace(model.enrichment, shift=model.enrichment.shift + 1)),
        toy_potential(members=2),
        "model",
        None,
    ):
        assert model != other
        assert not model == other  # noqa: SIM201 - both operators are asked


def test_a_hash_stays_when_weights_change_in_place():
    model = toy_potential()
    known = {model: 1}
    model.networks["C"][0].weight.add_(1.0)
    assert known[model] == 1


def test_predictions_and_other_tuples():
    frames = [molecule("H2O"), molecule("CH3OH")]
    said, again, other = (predict(m, frames) for m in (toy_potential(), toy_potential(), toy_potential(seed=3)))
    assert said == again
    assert said != other
    assert hash(said) == hash(again)
    assert said != tuple(other.energies)  # a plain tuple is another thing
    assert Predictions(np.array([np.nan]), ()) == Predictions(np.array([np.nan]), ())
    assert Predictions(np.array([1.0]), ()) != Predictions(np.array([1.0], dtype=np.float32), ())
    assert predict_committee(toy_potential(), frames) == predict_committee(toy_potential(), frames)


def test_splits_and_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path))
    one, two, three = (Split(np.array([0, k]), np.array([2]), np.array([3]), "random", 0) for k in (1, 1, 4))
    assert one == two != three
    assert len({one, two, three}) == 2
    cache = build_cache(toy_potential(), [molecule("H2O"), molecule("CH3OH")], torch.float32)
    assert cache[0] == cache[0] != cache[1]
    batch, other = merge([cache[0], cache[1]]), merge([cache[0], cache[1]])
    # a workspace, in which not all is meant
    assert batch == batch != other
    assert len({batch, batch, other}) == 2


def test_numbers_of_another_kind_hash_alike():
    @equal_by_content
    class Pair(NamedTuple):
        value: object
        table: pd.DataFrame

    table = pd.DataFrame({"a": [1.0, np.nan]})
    one, two = Pair(1, table), Pair(1.0, table.copy())
    assert one == two
    assert hash(one) == hash(two)
    assert Pair(float("nan"), table) == Pair(float("nan"), table)
    assert Pair(1, table) != Pair("1", table)
    assert Pair(1, table) != Pair(1, table.fillna(0.0))
    assert same({"a": [np.zeros(2)]}, {"a": [np.zeros(2)]})
    assert not same({"a": [np.zeros(2)]}, {"b": [np.zeros(2)]})
    assert not same(np.zeros(2), [0.0, 0.0])


def records():
    """All public dataclasses and named tuples of the package that hold arrays, tensors or tables."""
    for found in pkgutil.walk_packages(tlmc.__path__, "tlmc."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue  # of an optional package
        for name, value in vars(module).items():
            if not inspect.isclass(value) or value.__module__ != module.__name__ or name.startswith("_"):
                continue
            named_tuple = issubclass(value, tuple) and hasattr(value, "_fields")
            if name == "Dataset":
                continue  # has tests of its own
            if not (named_tuple or dataclasses.is_dataclass(value)):
                continue
            if any(HOLDS_ARRAYS.search(str(a)) and "Callable" not in str(a) for a in value.__annotations__.values()):
                yield pytest.param(value, named_tuple, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize(("record", "named_tuple"), list(records()))
def test_no_record_has_an_equality_that_raises(record, named_tuple):
    """What Python writes itself compares arrays by ``==``; decorate with `tlmc.equality.equal_by_content`."""
    if named_tuple:
        assert record.__eq__ is not tuple.__eq__
        assert record.__hash__ is not tuple.__hash__
    else:
        written_by_dataclass = getattr(record.__eq__, "__code__", None)
        assert written_by_dataclass is None or written_by_dataclass.co_filename != "<string>"


def test_a_model_prints_on_a_line():
    assert len(repr(toy_potential())) < 2000
