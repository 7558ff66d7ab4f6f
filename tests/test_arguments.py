"""Arguments of wrong types, and counts of nothing, get a sentence wherever a user calls the package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule

from tlmc import potentials, sampling, training
from tlmc.arguments import checked
from tlmc.data import loading as datasets
from tlmc.data import splits
from tlmc.errors import ConfigError
from tlmc.experiments import experiment as experiments
from tlmc.experiments.run import make_run
from tlmc.families import ani
from tlmc.plots import views


@pytest.fixture(scope="module")
def dataset():
    return datasets.load_dataset("naphthalene").subset(range(20))


@checked
def example(
    n: int, x: float = 1.0, *, name: str | None = None, path: str | Path = "", names: Sequence[str] = (),
    several: Mapping[str, int] | None = None, many: tuple[float, ...] = (), flag: bool = False, **rest: str,
) -> int:  # fmt: skip
    """Return the number."""
    return n


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": np.int64(3)}, {"x": 2}, {"x": np.float32(2)}, {"name": None}, {"name": "a"}, {"path": Path("a")},
        {"names": ["a"]}, {"names": ("a", "b")}, {"names": np.array(["a"])}, {"several": {"a": 1}}, {"flag": np.True_},
        {"many": [1.0]}, {"other": 3},
    ],
)  # fmt: skip
def test_what_fits_is_passed_on(arguments):
    assert example(**{"n": 3} | arguments) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n": "3"}, "example: n must be of type int, got '3'"),
        ({"n": True}, "example: n must be of type int, got True"),
        ({"n": None}, "example: n must be of type int, got None"),
        ({"x": "1"}, "example: x must be of type float, got '1'"),
        ({"x": True}, "example: x must be of type float, got True"),
        ({"name": 27}, "example: name must be of type str | None, got 27"),
        ({"path": None}, "example: path must be of type str | Path, got None"),
        ({"names": "a,b"}, "example: names must be of type Sequence[str], got 'a,b'"),
        ({"names": [1]}, "example: names must be of type Sequence[str], got [1]"),
        ({"names": molecule("H2O")}, "example: names must be of type Sequence[str], got an object of type Atoms"),
        ({"several": "a=1"}, "example: several must be of type Mapping[str, int] | None, got 'a=1'"),
        ({"many": "abc"}, "example: many must be of type tuple[float, ...], got 'abc'"),
        ({"flag": 1}, "example: flag must be of type bool, got 1"),
    ],
)
def test_what_does_not_is_named_with_its_value(arguments, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        example(**{"n": 3} | arguments)


def test_python_says_what_is_missing_and_help_stays():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'n'"):
        example()
    assert example.__doc__ == "Return the number."


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d, m: datasets.load_dataset(27), "load_dataset: source must be of type str | Path, got 27"),
        (lambda d, m: datasets.read_frames(None), "read_frames: path must be of type str | Path, got None"),
        (lambda d, m: splits.split_dataset(d, seed="x"), "split_dataset: seed must be of type int, got 'x'"),
        (lambda d, m: splits.split_dataset(d, seed=1.5), "split_dataset: seed must be of type int, got 1.5"),
        (lambda d, m: splits.split_dataset("naphthalene"), "split_dataset: dataset must be of type Dataset, got 'na"),
        (lambda d, m: splits.split_dataset(d, 0.7), "split_dataset: fractions must be of type tuple"),
        (lambda d, m: training.recipe(["short"]), "recipe: name must be of type str, got ['short']"),
        (lambda d, m: training.recipe("short", epochs="many"), "recipe short: epochs = 'many': "),
        (lambda d, m: training.recipe("scratch", seed=2**64), f"recipe scratch: seed = {2**64}: Input should be less "),
        (lambda d, m: potentials.load_model(5), "load_model: path must be of type "),
        (lambda d, m: potentials.load_start_model("ani3"), "unknown start model 'ani3'"),
        (
            lambda d, m: potentials.predict(m, d.frames[0]),
            "predict: frames must be of type Sequence[Atoms], got an obj",
        ),
        (lambda d, m: potentials.predict(m, ["a.xyz"]), "predict: frames must be of type Sequence[Atoms], got ['a.xyz"),
        (lambda d, m: potentials.predict(m, d), "predict: frames must be of type Sequence[Atoms], got an object of ty"),
        (lambda d, m: ani.energy_spread(m, d.frames[0]), "energy_spread: frames must be of type Sequence[Atoms"),
        (lambda d, m: potentials.TlmcCalculator("ani2xt"), "TlmcCalculator: potential must be of type Potential, got"),
        (lambda d, m: potentials.TlmcCalculator((m, {})), "TlmcCalculator: potential must be of type Potential, got ("),
        (lambda d, m: potentials.TlmcCalculator(m, device=0), "TlmcCalculator: device must be of type str | torch.dev"),
        (lambda d, m: ani.average(m), "average: models must be of type Sequence[Potential], got an object of t"),
        (lambda d, m: ani.average(["a.safetensors", "b.safetensors"]), "average: models must be of type Sequen"),
        (lambda d, m: ani.export_state_dict(m, None), "export_state_dict: path must be of type Path | str, got"),
        (lambda d, m: potentials.save_model(m, None), "save_model: path must be of type Path | str, got None"),
        (lambda d, m: sampling.predict_committee([m, "b"], d.frames), "predict_committee: models must be of type Pote"),
        (lambda d, m: views.gallery(d.frames[0]), "gallery: structures must be of type Iterable[Atoms], got an object"),
        (lambda d, m: views.gallery(["a.xyz"]), "gallery: structures must be of type Iterable[Atoms], got ['a.xyz']"),
        (lambda d, m: ani.relabel(m, "Si=C"), "relabel: mapping must be of type Mapping[str, str], got 'Si=C'"),
        (lambda d, m: experiments.run_recipes(m, d, ["short"], 0), "n_seeds must be at least 1, got 0"),
        (lambda d, m: experiments.run_recipes(m, d, ["short"], -1), "n_seeds must be at least 1, got -1"),
        (lambda d, m: experiments.run_recipes(m, d, "short", 1), "run_recipes: recipes must be of type Sequence[str]"),
        (lambda d, m: experiments.run_recipes(m, d, [], 1), "recipes must not be empty"),
        (lambda d, m: experiments.run_experiment(m, d, "short"), "run_experiment: config must be of type FinetuneCon"),
        (lambda d, m: experiments.convergence(m, [d], 0), "n_seeds must be at least 1, got 0"),
        (lambda d, m: experiments.convergence(m, [], 1), "datasets must not be empty"),
        (lambda d, m: experiments.convergence(m, [d], 1, share=-1.0), "share must be above 0, got -1.0"),
        (lambda d, m: training.finetune(m, d, "random"), "finetune: split must be of type Split, got 'random'"),
        (lambda d, m: views.show("naphthalene"), "show: atoms must be of type Atoms, got 'naphthalene'"),
        (lambda d, m: make_run({"dataset": 27}, "here"), "here: dataset = 27: "),
    ],
)
def test_functions_of_the_package(call, sentence, dataset, ani2xt):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as caught:
        call(dataset, ani2xt)
    assert "\n" not in str(caught.value)
    assert hasattr(caught.value, "_render_traceback_")


def test_what_users_have_at_hand_is_taken(dataset, ani2xt):
    """Numbers of numpy, devices of torch, frames in an array or still in their file."""
    assert ani.scratch(ani2xt, np.int64(3)) == ani.scratch(ani2xt, 3)
    two = dataset.frames[:2]
    array = np.empty(2, dtype=object)
    array[:] = two
    expected = potentials.predict(ani2xt, two)
    assert potentials.predict(ani2xt, array, torch.device("cpu")) == expected
    assert potentials.TlmcCalculator(ani2xt, torch.device("cpu")).device == torch.device("cpu")


def test_a_sequence_that_reads_its_items_is_not_read_for_the_check(ani2xt):
    class Frames:
        read: list[int] = []

        def __len__(self):
            return 1

        def __getitem__(self, k):
            if k:
                raise IndexError
            self.read.append(k)
            return molecule("H2O")

    assert len(potentials.predict(ani2xt, Frames()).energies) == 1
    reads = len(Frames.read)
    Frames.read.clear()
    _ = potentials.predict.__wrapped__(ani2xt, Frames())
    assert len(Frames.read) == reads
