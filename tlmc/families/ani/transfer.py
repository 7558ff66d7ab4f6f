"""Ways to start from a model: new elements from networks it has, what trains, or none of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Final, Literal

import torch
from ase.data import atomic_numbers
from torch import Tensor

from tlmc.arguments import checked
from tlmc.descriptors.enrichment import Enrichment
from tlmc.errors import ConfigError, ModelError
from tlmc.families.ani.model import AniPotential, Layer

LayerScheme = Literal["all", "hidden", "last"]

SCRATCH_STANDARD_DEVIATION: Final = 0.1
"""Of the normal distribution that `scratch` draws from, in the networks' own units (Hartree at the output)."""


@checked
def relabel(model: AniPotential, mapping: Mapping[str, str]) -> AniPotential:
    """Let new elements borrow the networks and descriptor channels of elements the model knows (thesis 3.3).

    A borrowed atom is treated as its donor, as a centre and as a neighbour, self energy included; only a reference
    fitted later tells the two apart.

    Parameters
    ----------
    model
        AniPotential to extend; it is not changed.
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


@checked
def extend(model: AniPotential, mapping: Mapping[str, str]) -> AniPotential:
    r"""Give new elements networks and descriptor channels of their own, which start as copies of their donors'.

    The new element gets a radial block, an angular block with every element and its own network. In all networks the
    rows of the first layer that belong to a new block repeat those of the donor's block. A first layer is linear in the
    columns, and with its donor ``d`` a relabelled atom ``e`` adds to the donor's columns what it now adds to its own,
    :math:`w_d (G_d + G_e) = w_d G_d + w_d G_e`, so energies and forces start as those of `relabel`. In training the
    copies part, and the model learns to tell the element from its donor, as a centre, a neighbour and in pairs.

    Parameters
    ----------
    model
        AniPotential to extend; it is not changed. An element that it borrows already gets what it borrowed.
    mapping
        New element to donor, such as `THESIS_DONORS`.

    Returns
    -------
    AniPotential
        With the new elements at the end of `AniPotential.symbols`.

    Raises
    ------
    ModelError
        As `relabel`.
    """
    borrowing = relabel(model, mapping)
    symbols = (*model.symbols, *mapping)
    donors = [model.symbols.index(mapping.get(symbol, symbol)) for symbol in symbols]
    rows = _donated_columns(model, donors)

    def network(symbol: str) -> tuple[Layer, ...]:
        first, *rest = model.networks[symbol]
        return (
            Layer(first.weight[:, rows], first.bias.clone()),
            *(Layer(*(t.clone() for t in layer)) for layer in rest),
        )

    return dataclasses.replace(
        model,
        symbols=symbols,
        networks={symbol: network(mapping.get(symbol, symbol)) for symbol in symbols},
        self_energies={symbol: model.self_energies[mapping.get(symbol, symbol)] for symbol in symbols},
        element_map={new: donor for new, donor in borrowing.element_map.items() if new not in mapping},
    )


def enrich(model: AniPotential, enrichment: Enrichment) -> AniPotential:
    """Give the networks the columns of another descriptor behind the AEV; their first-layer weights start at zero.

    Energies and forces stay as they are until the model is trained. Elements are best added first (`extend`).

    Parameters
    ----------
    model
        AniPotential to enrich; it is not changed.
    enrichment
        What :func:`tlmc.descriptors.enrichment.fit_enrichment` returns.

    Raises
    ------
    ModelError
        If the model has such columns already.
    """
    if model.enrichment is not None:
        raise ModelError(f"{model.name} has richer columns already ({model.enrichment.kind})")
    _ = enrichment.descriptor
    networks = {}
    for symbol, (first, *rest) in model.networks.items():
        members, _, width = first.weight.shape
        zeros = first.weight.new_zeros(members, enrichment.n_columns, width)
        networks[symbol] = (Layer(torch.cat([first.weight, zeros], dim=1), first.bias), *rest)
    return dataclasses.replace(model, networks=networks, enrichment=enrichment)


@checked
def first_members(model: AniPotential, n_members: int) -> AniPotential:
    """Return the ensemble of the first few members, under a name of its own (``ani2x-first2``).

    Raises
    ------
    ModelError
        If the model has not so many members, none are asked for, or only the mean of all is a model, as after a
        fine-tuning (:attr:`AniPotential.committee`).
    """
    if not 1 <= n_members <= model.members:
        raise ModelError(f"{model.name} has {model.members} member(s), cannot take the first {n_members}")
    if n_members == model.members:
        return model
    model.check_committee()
    networks = {
        symbol: tuple(Layer(weight[:n_members].clone(), bias[:n_members].clone()) for weight, bias in layers)
        for symbol, layers in model.networks.items()
    }
    return dataclasses.replace(model, name=f"{model.name}-first{n_members}", networks=networks)


def _donated_columns(model: AniPotential, donors: Sequence[int]) -> Tensor:
    """Return, for every descriptor column of elements with these donors, the column of the model that it copies."""
    n_species, p = len(model.symbols), model.aev
    starts = torch.tensor([donor * p.n_radial for donor in donors])
    radial = starts[:, None] + torch.arange(p.n_radial)
    # pairs of elements follow the upper triangle of a matrix, row by row
    place = {pair: k for k, pair in enumerate(combinations_with_replacement(range(n_species), 2))}
    pairs = [place[min(pair), max(pair)] for pair in combinations_with_replacement(donors, 2)]
    angular = torch.tensor(pairs)[:, None] * p.n_angular + torch.arange(p.n_angular) + n_species * p.n_radial
    # columns of another descriptor know elements by themselves
    richer = torch.arange(p.length(n_species), model.n_columns)
    return torch.cat([radial.flatten(), angular.flatten(), richer])


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


@checked
def scratch(model: AniPotential, seed: int) -> AniPotential:
    """Return the same architecture with every weight and bias drawn anew from N(0, 0.1), the thesis' "from scratch".

    The 0.1 is the standard deviation. Descriptor, self energies and borrowed elements stay; a fitted reference goes, as
    it belonged to the old weights, and members that nobody has trained are no committee. Numbers are drawn in float64
    on the CPU from a generator of their own and rounded to the precision of the model, so that every machine gets the
    same ones.

    Parameters
    ----------
    model
        AniPotential whose shapes are kept; it is not changed.
    seed
        Of the generator, any integer of 64 bits.
    """
    generator = torch.Generator(device="cpu").manual_seed(int(seed))

    def draw(like: Tensor) -> Tensor:
        normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (SCRATCH_STANDARD_DEVIATION * normal).to(like.dtype)

    networks = {
        symbol: tuple(Layer(draw(layer.weight), draw(layer.bias)) for layer in model.networks[symbol])
        for symbol in model.symbols
    }
    return dataclasses.replace(model, networks=networks, reference=None, committee=False)
