"""Start models: where their weights come from, how they are checked, and how they become a `AniPotential`.

A model is fetched once and kept; a model that cannot be reached is an error that says where to put which file. One
start model never stands in for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import requests
import torch
import torchani.paths
from torch import Tensor

from tlmc.descriptors.aev import AEVParameters
from tlmc.downloads import describe, first_to_answer
from tlmc.errors import ModelError
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.files import atomic_path, sha256_file
from tlmc.paths import PACKAGE_DIR, cache_dir
from tlmc.units import HARTREE

logger = logging.getLogger(__name__)

PROBE_SECONDS: Final = 5.0
"""How long an unreachable host may hold a caller up."""

ANI2X_SOURCES: Final = (
    "https://huggingface.co/roitberg-group/ani2x/resolve/main/ani2x_state_dict.pt",
    "https://github.com/roitberg-group/torchani_model_zoo/releases/download/v0.1/ani2x_state_dict.pt",
)
"""The two places from which torchani itself downloads the file."""

# torchani's species order of ANI-2x; columns of the AEV and keys of the state dict follow it
ANI2X_SYMBOLS: Final = ("H", "C", "N", "O", "S", "F", "Cl")
# the other model has F before S, and its checkpoint counts networks instead of naming them
_ANI2XT_SYMBOLS: Final = ("H", "C", "N", "O", "F", "S", "Cl")
_ANI2XT_SELF_ENERGIES: Final = (-0.5984, -38.0826, -54.7031, -75.1901, -99.8006, -398.1224, -460.1387)

_FORMAT_ERRORS: Final = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError)


def load_start_model(name: str) -> AniPotential:
    """Load a published model, fetching its weights on first use.

    Parameters
    ----------
    name
        ``"ani2x"``: 8 members, read from ``StateDicts/ani2x_state_dict.pt`` in torchani's data folder
        (``TORCHANI_DATA_DIR``, else torchani's own), downloaded there if it is missing.
        ``"ani2xt"``: 1 member, taken out of the wheel ``auto3d==3.2.3`` that pip fetches from the package index, kept
        in ``start-models/`` of `tlmc.paths.cache_dir`.

    Raises
    ------
    ModelError
        As :func:`tlmc.potentials.load_start_model`.
    """
    return _load_ani2x() if name == "ani2x" else _load_ani2xt()


def weights_path(name: str) -> Path:
    """Return where the weights of a start model are kept, present or not."""
    entry = registered(name)
    if name == "ani2x":
        # torchani.models.ANI2x() would find it here too, but it answers any trouble with the file (a mirror that is not
        # writable is enough) by downloading over it, with retries; and state_dicts_dir() creates the folder
        return Path(torchani.paths.data_dir()) / cast(str, entry["file"])
    return cache_dir() / "start-models" / Path(entry["file"]).name


def reachable(name: str) -> bool:
    """Tell within seconds whether a start model is on this machine or its source answers; downloads nothing.

    Raises
    ------
    ModelError
        If the name is unknown.
    """
    if weights_path(name).is_file():
        return True
    if name == "ani2x":
        return first_to_answer(ANI2X_SOURCES, PROBE_SECONDS)[0] is not None
    project = registered(name)["wheel"].split("==")[0]
    return _pip("index", "versions", project, seconds=2 * PROBE_SECONDS).returncode == 0


def parameter_fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all network parameters of a torchani state dict.

    Over the keys that contain ``neural_networks``, sorted: the key in UTF-8, then the float32 values in C order. It
    does not depend on how the file was written, unlike a hash of the file.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in state_dict if "neural_networks" in key):
        digest.update(key.encode())
        digest.update(state_dict[key].detach().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def registered(name: str) -> dict[str, Any]:
    """Return the registry's entry of a start model."""
    models = json.loads((PACKAGE_DIR / "registry.json").read_text(encoding="utf-8"))["start_models"]
    if name not in models:
        raise ModelError(f"unknown start model {name!r}: choose one of {', '.join(models)}")
    return cast(dict[str, Any], models[name])


def _load_ani2x() -> AniPotential:
    path = weights_path("ani2x")
    if not path.is_file():
        _download_ani2x(path)
    state, fingerprint = _read_ani2x(path)
    members = range(registered("ani2x")["members"])

    def layer(symbol: str, name: str) -> Layer:
        key = "potentials.nnp.neural_networks.members.{}.atomics." + f"{symbol}.{name}"
        # torch keeps (n_out, n_in)
        weight = torch.stack([state[f"{key.format(m)}.weight"].t() for m in members])
        return Layer(weight, torch.stack([state[f"{key.format(m)}.bias"][None] for m in members]))

    names = ("layers.0", "layers.1", "layers.2", "final_layer")
    aev = {key.rpartition("aev_computer.")[2]: value for key, value in state.items() if "aev_computer." in key}
    self_energies = state["energy_shifter.self_energies"].to(torch.float64) * HARTREE
    return AniPotential(
        name="ani2x",
        symbols=ANI2X_SYMBOLS,
        aev=AEVParameters(
            r_cut_radial=5.1,
            eta_radial=aev["radial.eta"].item(),
            shifts_radial=tuple(aev["radial.shifts"].tolist()),
            r_cut_angular=3.5,
            eta_angular=aev["angular.eta"].item(),
            zeta=aev["angular.zeta"].item(),
            shifts_angular=tuple(aev["angular.shifts"].tolist()),
            sections=tuple(aev["angular.sections"].tolist()),
        ),
        networks={symbol: tuple(layer(symbol, name) for name in names) for symbol in ANI2X_SYMBOLS},
        self_energies=dict(zip(ANI2X_SYMBOLS, self_energies.tolist(), strict=True)),
        fingerprint=fingerprint,
        committee=True,
    )


def _read_ani2x(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict of ANI-2x and its fingerprint, or say why it is not that."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _FORMAT_ERRORS as error:
        raise ModelError(
            f"{path} is not a readable state dict ({type(error).__name__}): delete it, the next run fetches it again"
        ) from error
    expected = registered("ani2x")["fingerprint"]
    found = parameter_fingerprint(state) if isinstance(state, dict) else f"{type(state).__name__} instead of a dict"
    if found != expected:
        raise ModelError(f"{path} does not hold the weights of ANI-2x: parameter fingerprint {found}, not {expected}")
    return dict(state), found


def _download_ani2x(path: Path) -> None:
    """Fetch the state dict from where torchani gets it; the file appears only once its fingerprint is right."""
    source, reasons = first_to_answer(ANI2X_SOURCES, PROBE_SECONDS)
    if source is not None:
        logger.info("downloading %s to %s", source, path)
        try:
            with requests.get(source, stream=True, timeout=(PROBE_SECONDS, 30.0)) as answer:
                answer.raise_for_status()
                with atomic_path(path) as temporary:
                    with open(temporary, "wb") as stream:
                        for chunk in answer.iter_content(1 << 20):
                            stream.write(chunk)
                    _read_ani2x(temporary)
            return
        except requests.RequestException as error:
            reasons[source] = describe(error)
    tried = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise ModelError(
        f"ani2x is not at {path} and could not be downloaded ({tried}): put {path.name} there by hand, or point "
        f"TORCHANI_DATA_DIR at a folder that holds StateDicts/{path.name}; the other start model, ani2xt, comes from "
        'the package index and has to be asked for by name, load_start_model("ani2xt")'
    )


def _load_ani2xt() -> AniPotential:
    entry = registered("ani2xt")
    path = weights_path("ani2xt")
    if not path.is_file():
        _extract_ani2xt(path, entry)
    found = sha256_file(path)
    if found != entry["sha256"]:
        raise ModelError(
            f"{path} does not hold the weights of ANI-2xt: SHA-256 {found}, not {entry['sha256']}: "
            "delete it, the next run fetches it again"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    self_energies = [energy * HARTREE for energy in _ANI2XT_SELF_ENERGIES]
    return AniPotential(
        name="ani2xt",
        symbols=_ANI2XT_SYMBOLS,
        aev=AEVParameters(
            r_cut_radial=5.2,
            eta_radial=16.0,
            shifts_radial=_float32([0.9 + 0.26875 * k for k in range(16)]),
            r_cut_angular=3.5,
            eta_angular=8.0,
            zeta=32.0,
            shifts_angular=_float32([0.9, 1.55, 2.2, 2.85]),
            # as printed in Auto3D: odd multiples of pi/16 to eight digits
            sections=_float32(
                [0.19634954, 0.58904862, 0.9817477, 1.3744468, 1.7671459, 2.1598449, 2.552544, 2.9452431]
            ),
        ),
        # linear layers sit at even places of each Sequential, between the activations
        networks={
            symbol: tuple(
                Layer(state[f"{i}.{place}.weight"].t()[None].contiguous(), state[f"{i}.{place}.bias"][None, None])
                for place in (0, 2, 4, 6)
            )
            for i, symbol in enumerate(_ANI2XT_SYMBOLS)
        },
        self_energies=dict(zip(_ANI2XT_SYMBOLS, self_energies, strict=True)),
        fingerprint=found,
    )


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    """Round to float32, in which both models were trained, so that float64 runs use the very same constants."""
    return tuple(torch.tensor(values, dtype=torch.float32).tolist())


def _extract_ani2xt(path: Path, entry: Mapping[str, Any]) -> None:
    """Let pip fetch the wheel, take one member out of it and keep that if its SHA-256 is right."""
    wheel, member = entry["wheel"], entry["file"]
    by_hand = (
        f"put {path.name}, the member {member} of the wheel {wheel}, at {path} by hand; the other start model, ani2x, "
        'comes through torchani and has to be asked for by name, load_start_model("ani2x")'
    )
    logger.info("fetching the wheel %s for the start model ani2xt", wheel)
    with tempfile.TemporaryDirectory() as folder:
        # pip keeps to the user's index settings and proxies
        done = _pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, wheel, seconds=300.0)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ModelError(
                f"ani2xt is not at {path} and pip could not fetch the wheel {wheel} ({lines[-1]}): {by_hand}"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                content = archive.read(member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheels[0].name} as fetched does not hold {member} ({error}): {by_hand}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise ModelError(f"{member} of {wheel} has SHA-256 {found}, not {entry['sha256']}: {by_hand}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _pip(*arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run this interpreter's pip so that a dead network ends it within seconds; output captured, never raises."""
    command = [sys.executable, "-m", "pip", *arguments]
    command += ["--retries", "0", "--timeout", f"{PROBE_SECONDS:.0f}", "--no-input", "--disable-pip-version-check"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end within {seconds:.0f} s")
