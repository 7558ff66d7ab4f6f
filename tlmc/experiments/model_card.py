"""What a model is, for people: where it comes from, what it was trained on, how far off it is, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tlmc.data.loading import available
from tlmc.potentials.model import Potential
from tlmc.potentials.model_files import load_model
from tlmc.potentials.registry import families, family_with, load_start_model, start_models, weights_path
from tlmc.training.config import FinetuneConfig
from tlmc.training.recipes import recipes

_TABLE: Final = {
    "force_rmse_vector": ("forces", 1.0, "eV/A (vector RMSE)", 4),
    "energy_rmse_per_atom": ("energies", 1000.0, "meV/atom (RMSE)", 2),
}


def model_facts(name: str) -> dict[str, Any]:
    """Return what is known of a start model or a model file, as JSON types.

    Parameters
    ----------
    name
        ``ani2x``, ``ani2xt`` or the path of a ``.safetensors`` file. Test errors are read from ``metrics.json`` beside
        a ``model.safetensors``, if they are of the same run.

    Returns
    -------
    dict
        ``file``, ``bytes``, ``model`` (what the weights are), ``metadata`` (what was written into the file), ``test``
        (errors by stage, as in ``metrics.json``) and ``test_missing``, the sentence about why there are none.

    Raises
    ------
    ModelError
        If there is no such model, or the file is not one.
    """
    is_file = name not in start_models()
    path = Path(name) if is_file else weights_path(name)
    if is_file:
        potential, metadata = load_model(path)
    else:
        potential, metadata = load_start_model(name), {}
    test, missing = _test_errors(path, metadata) if is_file else ({}, "")
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "model": _describe(potential),
        "metadata": metadata,
        "test": test,
        "test_missing": missing,
    }


def model_page(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the lines of the page about a model, heading to text.

    Parameters
    ----------
    facts
        Of `model_facts`.
    """
    model, metadata = facts["model"], facts["metadata"]
    page = {"name": facts["file"] if metadata else model["name"], "what it is": _kind(model, metadata)}
    if metadata:
        page |= _training(metadata)
        page |= _errors(facts)
    else:
        page["described in"] = f"doi:{family_with(model['name']).doi(model['name'])}"
    page["elements"] = ", ".join(model["symbols"])
    if model["element_map"]:
        listed = ", ".join(f"{new} from {donor}" for new, donor in model["element_map"].items())
        page["borrowed elements"] = f"{listed}: treated as their donors but for the reference energy"
    if model["reference"] is not None:
        offsets = ", ".join(f"{symbol} {value:+.5f}" for symbol, value in model["reference"]["offsets"].items())
        page["reference energies"] = f"{offsets} eV, fitted on the training part ({model['reference']['mode']})"
    if model["columns"] is not None:
        page["richer columns"] = f"{model['columns']['n_columns']} of {model['columns']['kind']} behind the AEV"
    page["committee"] = _committee(model)
    page["precision"] = f"{model['precision']}, {model['weights']:,} weights"
    page["file size"] = f"{facts['bytes'] / 1e6:.1f} MB"
    page["fingerprint"] = f"{model['fingerprint']} (of the start model)"
    page |= _made_by(metadata)
    page["how to use it"] = _usage(facts)
    page["what it does not know"] = "\n".join(f"- {line}" for line in _limits(model, bool(metadata)))
    return page


def _describe(potential: Potential) -> dict[str, Any]:
    """Return what the weights are."""
    return {
        "name": potential.name,
        "family": potential.family,
        "fingerprint": potential.fingerprint,
        "members": potential.members,
        "committee": potential.committee and potential.members > 1,
        "symbols": list(potential.elements),
        "element_map": dict(potential.element_map),
        "reference": None if potential.reference is None else potential.reference.to_json(),
        "columns": potential.to_json().get("enrichment"),
        "precision": str(potential.dtype).removeprefix("torch."),
        "weights": potential.n_weights,
        "r_cut": potential.reach,
    }


def _test_errors(path: Path, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the test errors of the run that a file lies in, or why there are none."""
    if path.name != "model.safetensors":
        return {}, "unknown: a run keeps those of its model.safetensors only"
    beside = path.with_name("metrics.json")
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
        run_key, test = content["run_key"], content["test"]
        _ = [float(stage[quantity]["value"]) for stage in test.values() for quantity in _TABLE]
    except FileNotFoundError:
        return {}, "unknown: there is no metrics.json beside the file; tlmc evaluate computes them"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"unknown: {beside} holds none ({type(error).__name__}: {error})"
    if run_key != metadata.get("run_key"):
        return {}, f"unknown: {beside} belongs to run {run_key}"
    return dict(test), ""


def _kind(model: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Say in a line what kind of model this is."""
    several = f"{model['members']} members" if model["members"] > 1 else "one member"
    if not metadata:
        return start_models().get(model["name"], f"a start model, {several}")
    if metadata.get("mean_of"):
        parts = metadata["mean_of"]
        return f"the mean of {len(parts)} models fine-tuned from {model['name']} ({several} in all)"
    if not isinstance(metadata.get("config"), Mapping):
        return f"a model that descends from {model['name']}, {several}; the file does not say how"
    if metadata["config"].get("init") == "scratch":
        return f"trained from random weights, in the architecture of {model['name']}, {several}"
    return f"fine-tuned from {model['name']}, {several}"


def _training(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Say what a model was trained on and how."""
    page: dict[str, str] = {}
    if metadata.get("mean_of"):
        page["mean of"] = ", ".join(map(str, metadata["mean_of"]))
    data, split, config = (_mapping(metadata.get(key)) for key in ("data", "split", "config"))
    if data:
        used = [f"{split[part]} to {verb}" for part, verb in (("train", "train"), ("validation", "validate"))
                if part in split]  # fmt: skip
        rest = f", {', '.join(used)}" if used else ""
        page["trained on"] = f"{data.get('name', 'unknown')}: {data.get('frames', 'unknown')} frames{rest}"
        page["level of theory"] = _level(metadata, str(data.get("name", "")))
    if config:
        page["recipe"] = _recipe(config)
    return page


def _level(metadata: Mapping[str, Any], dataset: str) -> str:
    """Return the level of theory of the labels, from the file or the registry of public sets."""
    said = metadata.get("level_of_theory") or available().get(dataset, {}).get("level_of_theory")
    return str(said or "unknown: neither the file nor the registry of public sets says")


def _recipe(config: Mapping[str, Any]) -> str:
    """Return name and main settings of a training, then all others that differ from the protocol of the thesis."""
    defaults = FinetuneConfig().model_dump()
    main = ("epochs", "batch_size", "lambda_", "lr", "schedule", "loss", "seed")
    shown = [f"{key.rstrip('_')} {config[key]}" for key in main if key in config]
    others = [
        f"{key} {value if not isinstance(value, Mapping) else value.get('kind', 'changed')}"
        for key, value in config.items()
        if key not in (*main, "recipe") and value != defaults.get(key)
    ]
    name = config.get("recipe", "unknown")
    known = "" if str(name).partition(",")[0] in recipes() else " (no recipe of this version)"
    return f"{name}{known}: {', '.join([*shown, *others])}"


def _errors(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return test errors by stage, and those of the validation part that the training saw."""
    lines = []
    for stage, metrics in facts["test"].items():
        values = [f"{what} {factor * metrics[key]['value']:.{n}f} {unit}" for key, (what, factor, unit, n) in
                  _TABLE.items()]  # fmt: skip
        lines.append(f"{stage}: {', '.join(values)}")
    page = {"test errors": "\n".join(lines) or facts["test_missing"]}
    row = _mapping(facts["metadata"].get("metrics"))
    try:
        values = [f"{what} {factor * float(row[f'validation_{key}']):.{n}f} {unit}"
                  for key, (what, factor, unit, n) in _TABLE.items()]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return page
    return page | {"validation errors": f"{', '.join(values)}, epoch {row.get('epoch', 0):g}"}


def _committee(model: Mapping[str, Any]) -> str:
    if model["members"] == 1:
        return "no: one member; several models trained one by one would be one"
    if model["committee"]:
        return f"yes: its {model['members']} members were trained each by itself, so that their spread means something"
    return (
        f"no: only the mean of its {model['members']} members is a prediction, so that their spread is no uncertainty "
        "and is refused"
    )


def _made_by(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Say which run and which versions made a file."""
    if not metadata:
        return {}
    versions = _mapping(metadata.get("versions"))
    listed = [f"{name} {versions[name]}" for name in ("tlmc", "torch", "python") if name in versions]
    run = [f"run {metadata['run_key']}"] if metadata.get("run_key") else []
    revision = [f"git revision {metadata['git_revision']}"] if metadata.get("git_revision") else []
    return {"made by": ", ".join([*run, *listed, *revision]) or "unknown"}


def _usage(facts: Mapping[str, Any]) -> str:
    """Return how to load a model in Python and on the command line."""
    name = facts["file"] if facts["metadata"] else facts["model"]["name"]
    if facts["metadata"]:
        load = "from tlmc.potentials.model_files import load_model\n" + f"model, _ = load_model({name!r})"
    else:
        load = "from tlmc.potentials import load_start_model\n" + f"model = load_start_model({name!r})"
    return (
        f"{load}\nfrom tlmc.potentials import TlmcCalculator\n"
        "atoms.calc = TlmcCalculator(model)  # any ASE atoms: energy, forces, stress\n"
        f"tlmc evaluate {name} DATA, tlmc finetune DATA --start-model {name}"
    )


def _limits(model: Mapping[str, Any], tuned: bool) -> list[str]:
    """Return what a model cannot answer, or answers without having learned it."""
    own = [*model["symbols"], *model["element_map"]]
    lines = [f"elements other than {', '.join(own)}: refused"]
    if model["reference"] is not None and set(model["reference"]["offsets"]) != set(own):
        lines = [
            f"elements other than {', '.join(model['reference']['offsets'])}, those of its training data: energies are "
            "refused"
        ]
    lines += [
        f"atoms more than {model['r_cut']:g} A apart: nothing acts at long range, neither charges nor dispersion"
        if isinstance(model["r_cut"], int | float)
        else "atoms beyond its cutoff: nothing acts at long range",
        "charge and unpaired electrons: every structure is taken as neutral and closed-shell",
    ]
    if tuned:
        lines += [
            "structures unlike its training data: it answers, and does not say how far off it is",
            "stress: it follows from energies and forces, and was not fitted to labels",
        ]
    else:
        lines += [families()[model["family"]].unlearned, "your level of theory: energies need an offset (--refit)"]
    return lines


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
