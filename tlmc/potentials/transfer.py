"""Ways to start from a model: borrow networks for new elements, choose what trains, or forget the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import torch
from ase.data import atomic_numbers
from torch import Tensor

from tlmc.errors import ConfigError, ModelError
from tlmc.potentials.model import Layer, Potential

LayerScheme = Literal["all", "hidden", "last"]

THESIS_DONORS: Final[Mapping[str, str]] = MappingProxyType({"Si": "C", "I": "Cl", "Cu": "S"})
"""The elements that the thesis adds to ANI-2x, each with the element whose network and channels it borrows."""

SCRATCH_STANDARD_DEVIATION: Final = 0.1
"""Of the normal distribution that `scratch` draws from, in the networks' own units (Hartree at the output)."""


def relabel(model: Potential, mapping: Mapping[str, str]) -> Potential:
    """Let new elements borrow the networks and descriptor channels of elements the model knows (thesis 3.3).

    A borrowed atom is treated as its donor, as a centre and as a neighbour, self energy included; only a reference
    fitted later tells the two apart.

    Parameters
    ----------
    model
        Potential to extend; it is not changed.
    mapping
        New element to donor, such as `THESIS_DONORS`. Added to what the model borrows already.

    Raises
    ------
    ModelError
        If a new element is no chemical symbol, has a network of its own or borrows from another donor already, or a
        donor has no network of its own.
    """
    native = ", ".join(model.symbols)
    for new, donor in mapping.items():
        if new not in atomic_numbers or new == "X":
            raise ModelError(f"cannot map {new!r} onto {donor!r}: {new!r} is not a chemical symbol")
        if new in model.symbols:
            raise ModelError(f"cannot map {new} onto {donor}: {model.name} has a network of its own for {new}")
        if donor not in model.symbols:
            raise ModelError(f"cannot map {new} onto {donor!r}: {model.name} has networks for {native} only")
        if model.element_map.get(new, donor) != donor:
            raise ModelError(f"cannot map {new} onto {donor}: it borrows from {model.element_map[new]} already")
    return dataclasses.replace(model, element_map={**model.element_map, **mapping})


def parse_element_map(text: str) -> dict[str, str]:
    """Read a mapping for `relabel` from one line of text, ``"Si=C, I=Cl"``; an empty line maps nothing.

    Raises
    ------
    ConfigError
        If a part is not ``NEW=DONOR``, or an element is named twice.
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        new, separator, donor = (side.strip() for side in part.partition("="))
        if not (separator and new and donor) or new in mapping:
            raise ConfigError(f"an element map reads 'Si=C, I=Cl', each new element once; got {part!r} in {text!r}")
        mapping[new] = donor
    return mapping


def trainable_layers(scheme: LayerScheme, n_layers: int) -> tuple[bool, ...]:
    """Return which layers of every network train, first to last.

    Parameters
    ----------
    scheme
        ``"all"``; ``"hidden"``, what the thesis calls frozen: all but the first and the last layer, which for the four
        layers of the ANI networks are the two in the middle; or ``"last"``, the output layer only.
    n_layers
        Affine layers of a network, output layer included.

    Raises
    ------
    ConfigError
        If the scheme is unknown or leaves nothing to train.
    """
    if n_layers < 1:
        raise ConfigError(f"a network has at least one layer, got {n_layers}")
    if scheme == "all":
        return (True,) * n_layers
    if scheme == "last":
        return (False,) * (n_layers - 1) + (True,)
    if scheme == "hidden":
        if n_layers < 3:
            raise ConfigError(f"layers = 'hidden' trains all but the first and last layer: none is left of {n_layers}")
        return (False,) + (True,) * (n_layers - 2) + (False,)
    raise ConfigError(f"layers must be all, hidden or last, got {scheme!r}")


def scratch(model: Potential, seed: int) -> Potential:
    """Return the same architecture with every weight and bias drawn anew from N(0, 0.1), the thesis' "from scratch".

    The 0.1 is the standard deviation. Descriptor, self energies and borrowed elements stay; a fitted reference goes, as
    it belonged to the old weights. Numbers are drawn in float64 on the CPU from a generator of their own and rounded to
    the precision of the model, so that every machine gets the same ones.

    Parameters
    ----------
    model
        Potential whose shapes are kept; it is not changed.
    seed
        Of the generator, any integer of 64 bits.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (SCRATCH_STANDARD_DEVIATION * normal).to(like.dtype)

    networks = {
        symbol: tuple(Layer(draw(layer.weight), draw(layer.bias)) for layer in model.networks[symbol])
        for symbol in model.symbols
    }
    return dataclasses.replace(model, networks=networks, reference=None)
