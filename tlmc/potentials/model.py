"""A start or fine-tuned model as plain arrays: descriptor constants, stacked networks, reference energies."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.aev import AEVParameters
from tlmc.descriptors.enrichment import Enrichment
from tlmc.equality import equal_by_content
from tlmc.errors import ModelError
from tlmc.reference import ReferenceEnergies
from tlmc.units import HARTREE


@equal_by_content
class Layer(NamedTuple):
    """One affine layer of an ensemble, ``z = a @ weight + bias``."""

    weight: Tensor
    """Shape ``(members, n_in, n_out)``."""
    bias: Tensor
    """Shape ``(members, 1, n_out)``."""


@equal_by_content
@dataclass(frozen=True)
class Potential:
    """Atomic energies from one small network per element, averaged over the members of an ensemble.

    ``E = sum_i [ scale * mean_m NN_m(G_i) + self_energy(Z_i) ] + reference``, with ``scale`` the eV per unit of network
    output (ANI networks speak Hartree) and hidden activations CELU(0.1).
    """

    name: str
    """Start model this one descends from, ``ani2x`` or ``ani2xt``."""
    symbols: tuple[str, ...]
    """Elements with descriptor channels, in the order of those channels."""
    aev: AEVParameters
    networks: dict[str, tuple[Layer, ...]] = field(repr=False)
    """Per element of `symbols`, the affine layers from first to last."""
    self_energies: dict[str, float]
    """Energy of the free atom per element, eV."""
    fingerprint: str
    """SHA-256 that identifies the start model's weights."""
    element_map: dict[str, str] = field(default_factory=dict)
    """Borrowed networks, new element -> donor (``{"Si": "C"}``)."""
    reference: ReferenceEnergies | None = None
    """Offset fitted on training labels, added to every energy."""
    scale: float = HARTREE
    enrichment: Enrichment | None = None
    """Columns of another descriptor behind the AEV (:func:`tlmc.potentials.enrich`)."""
    committee: bool = False
    """Whether the members were trained each by itself, as those of the published ANI-2x, so that each is a model and
    their spread means something. A fine-tuning looks at the mean of the members only and ends this."""

    @property
    def n_columns(self) -> int:
        """Number of inputs of every network."""
        extra = 0 if self.enrichment is None else self.enrichment.n_columns
        return self.aev.length(len(self.symbols)) + extra

    @property
    def members(self) -> int:
        """Number of ensemble members."""
        return int(next(iter(self.networks.values()))[0].weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(iter(self.networks.values()))[0].weight.dtype

    @property
    def elements(self) -> tuple[str, ...]:
        """Every element the model accepts, borrowed ones included."""
        return self.symbols + tuple(e for e in self.element_map if e not in self.symbols)

    def check_committee(self) -> None:
        """Refuse an ensemble whose members are no models of their own; a single network passes.

        Raises
        ------
        ModelError
            If there are several members, and they are not known to have been trained each by itself.
        """
        if self.members > 1 and not self.committee:
            raise ModelError(
                f"the {self.members} members of this model, which descends from {self.name}, are no committee: they "
                "were trained or put together so that only their mean is a prediction, and their spread says nothing "
                "about its error; take the published ani2x, or models trained one by one, "
                "predict_committee([one, other])"
            )

    def columns(self, present: Sequence[int]) -> Tensor:
        """Return the inputs that can differ from zero where only these networks' elements occur, ascending, int64."""
        own = self.aev.columns(list(present), len(self.symbols))
        return torch.cat([own, torch.arange(self.aev.length(len(self.symbols)), self.n_columns)])

    def to(self, dtype: torch.dtype) -> Potential:
        """Return a copy with weights in another precision."""
        networks = {
            symbol: tuple(Layer(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in layers)
            for symbol, layers in self.networks.items()
        }
        return dataclasses.replace(self, networks=networks)

    def with_reference(self, reference: ReferenceEnergies | None) -> Potential:
        """Return a copy that adds these reference energies."""
        return dataclasses.replace(self, reference=reference)

    def species(self, frame: Atoms) -> Tensor:
        """Return the network index of every atom of a frame, shape ``(n_atoms,)``, borrowed elements mapped.

        Raises
        ------
        ModelError
            If the frame holds an element with neither a network nor a donor; the sentence counts them.
        """
        index = {symbol: i for i, symbol in enumerate(self.symbols)}
        index |= {new: index[donor] for new, donor in self.element_map.items()}
        symbols = frame.get_chemical_symbols()
        missing = Counter(symbol for symbol in symbols if symbol not in index)
        if missing:
            listed = ", ".join(f"{symbol} ({count} atoms)" for symbol, count in sorted(missing.items()))
            raise ModelError(
                f"{self.name} has no network for {listed} in {frame.get_chemical_formula()}; it knows "
                f"{', '.join(self.elements)}: map a new element onto one of them, e.g. relabel(model, {{'Si': 'C'}}), "
                "on the command line --map Si=C"
            )
        return torch.tensor([index[symbol] for symbol in symbols])

    def offsets(self, frame: Atoms) -> Tensor:
        """Return self energy plus fitted reference of every atom, float64 eV, shape ``(n_atoms,)``.

        Raises
        ------
        ModelError
            If the model, or its fitted reference, does not cover an element of the frame.
        """
        species = self.species(frame)
        self_energies = torch.tensor([self.self_energies[symbol] for symbol in self.symbols], dtype=torch.float64)
        total = self_energies[species]
        if self.reference is not None:
            fitted, symbols = self.reference.offsets, frame.get_chemical_symbols()
            missing = sorted(set(symbols) - set(fitted))
            if missing:
                raise ModelError(
                    f"the reference energies of this model were fitted for {', '.join(sorted(fitted))} only, not for "
                    f"{', '.join(missing)} in {frame.get_chemical_formula()}: fit them on frames of this composition"
                )
            total += torch.tensor([fitted[symbol] for symbol in symbols], dtype=torch.float64)
        return total

    def atomic_reference(self, frames: Sequence[Atoms]) -> Tensor:
        """Return `offsets` summed per frame, float64 eV, shape ``(n_frames,)``."""
        return torch.tensor([float(self.offsets(frame).sum()) for frame in frames], dtype=torch.float64)
