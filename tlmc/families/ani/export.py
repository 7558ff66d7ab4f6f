"""Hand a potential to torchani: as a model, or as a state dict on disk."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from tlmc.arguments import checked
from tlmc.errors import ModelError
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.families.ani.pretrained import ANI2X_SYMBOLS, registered
from tlmc.families.ani.transfer import extend
from tlmc.files import atomic_path

if TYPE_CHECKING:
    from torchani.arch import ANI


def to_torchani(model: AniPotential) -> ANI:
    """Build the torchani model that computes the same energies, in Hartree.

    Self energies and the fitted reference, per element, are in its energy shifter. An element that a fitted reference
    does not cover keeps its place with a self energy of NaN, so that its energies cannot be taken for aligned ones.

    torchani has no notion of a borrowed network, so a borrowed element becomes one of its own, as `extend` makes it:
    energies and forces stay the same, and training in torchani would let the copies part.

    Parameters
    ----------
    model
        A start or fine-tuned model. ``ani2x`` without borrowed elements gives the architecture of
        ``torchani.models.ANI2x()``, with the same keys in its state dict.

    Returns
    -------
    torchani.arch.ANI
        In the precision of `model`, on the CPU, without gradients; its elements are `model.elements`.

    Raises
    ------
    ModelError
        If the model has columns of a descriptor that torchani does not have (`enrich`).

    Notes
    -----
    torchani adds up in the precision of the model: in float32 the energy of a crystal of a hundred atoms is exact to
    about a meV only.
    """
    with warnings.catch_warnings():
        # said on first import, about optional CUDA kernels; this model does not use them
        warnings.filterwarnings("ignore", message="The extensions", category=UserWarning)
        from torchani.aev import AEVComputer, ANIAngular, ANIRadial
        from torchani.arch import ANI
        from torchani.nn import ANINetworks, AtomicNetwork, Ensemble
        from torchani.sae import SelfEnergy

    if model.enrichment is not None:
        raise ModelError(
            f"torchani knows nothing of the {model.enrichment.kind} columns of this model: keep it as .safetensors"
        )
    model = extend(model, model.element_map)
    symbols, p = model.symbols, model.aev
    computer = AEVComputer(
        ANIRadial(p.eta_radial, p.shifts_radial, p.r_cut_radial),
        ANIAngular(p.eta_angular, p.zeta, p.shifts_angular, p.sections, p.r_cut_angular),
        num_species=len(symbols),
    )

    def network(layers: tuple[Layer, ...], member: int) -> AtomicNetwork:
        widths = [layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in layers)]
        result = AtomicNetwork(widths, activation="celu", bias=True).to(model.dtype)
        for i, layer in enumerate(layers):
            result[i].load_state_dict({"weight": layer.weight[member].t(), "bias": layer.bias[member, 0]})
        return result

    members = [
        ANINetworks({symbol: network(model.networks[symbol], m) for symbol in symbols}) for m in range(model.members)
    ]
    shifts = [model.self_energies[symbol] for symbol in symbols]
    if model.reference is not None:
        shifts = [
            shift + model.reference.offsets.get(symbol, math.nan) for symbol, shift in zip(symbols, shifts, strict=True)
        ]
    shifts = [shift / model.scale for shift in shifts]
    shifter = SelfEnergy(symbols, shifts)
    # the constructor rounds to float32
    shifter.self_energies = torch.tensor(shifts, dtype=model.dtype)
    result = ANI(symbols, computer, members[0] if len(members) == 1 else Ensemble(members), shifter)
    return cast("ANI", result.to(model.dtype).requires_grad_(False))


@checked
def export_state_dict(model: AniPotential, path: Path | str) -> str:
    """Write the state dict of `to_torchani` atomically, and say which torchani model takes it.

    It holds tensors only: ``torch.load(path, weights_only=True)`` reads it. Cutoffs and activation are not in a state
    dict; they are those of the start model, and a model takes it only if elements and members are the same:

    - a fine-tuned ``ani2x`` of all eight members loads into ``torchani.models.ANI2x()``;
    - with one member (``members=1``), into ``torchani.models.ANI2x(model_index=0)``;
    - with two to seven, into ``ANI2x()`` whose ensemble was cut to as many, as the returned lines show;
    - everything else (elements that were borrowed, means of models, ``ani2xt``) into what `to_torchani` makes.

    Parameters
    ----------
    model
        AniPotential to export.
    path
        File to write, by convention ``.pt``.

    Returns
    -------
    str
        Lines of Python that end with ``network``, the torchani model with these weights. Those for models other than
        ``ani2x`` take ``model`` for granted, any of these elements and members.

    Raises
    ------
    ModelError
        As `to_torchani`.

    Notes
    -----
    torchani's ``energies_qbcs`` knows nothing of :attr:`AniPotential.committee`: of a fine-tuned ensemble it is a
    number without a meaning.
    """
    with atomic_path(path) as temporary:
        torch.save(to_torchani(model).state_dict(), temporary)
    return f"{_architecture(model)}\nnetwork.load_state_dict(torch.load({str(path)!r}, weights_only=True))\n"


def _architecture(model: AniPotential) -> str:
    """Return lines of Python that make a torchani model of these elements and members."""
    published = registered("ani2x")
    precision = "" if model.dtype == torch.float32 else f"dtype={model.dtype}"
    whole = model.fingerprint == published["fingerprint"] and model.symbols == ANI2X_SYMBOLS and not model.element_map
    if not whole or model.members > published["members"]:
        return "import torch\nfrom tlmc.families.ani import to_torchani\nnetwork = to_torchani(model)"
    one = "model_index=0" if model.members == 1 else ""
    lines = ["import torch", "import torchani"]
    lines += [f"network = torchani.models.ANI2x({', '.join(filter(None, (one, precision)))})"]
    if 1 < model.members < published["members"]:
        lines += [
            f"kept = network.neural_networks.members[:{model.members}]",
            "network.nnp.neural_networks = torchani.nn.Ensemble(kept)",
        ]
    return "\n".join(lines)
