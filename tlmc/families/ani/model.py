"""A start or fine-tuned model as plain arrays: descriptor constants, stacked networks, reference energies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.aev import AEVParameters
from tlmc.descriptors.enrichment import Enrichment
from tlmc.equality import equal_by_content
from tlmc.errors import ModelError
from tlmc.potentials.model import Evaluator, Potential
from tlmc.potentials.reference import ReferenceEnergies
from tlmc.units import HARTREE

if TYPE_CHECKING:
    from tlmc.potentials.borrowing import Borrowing

_ENRICHMENT: Final = ("shift", "projection")
"""Tensors of an enrichment, kept under these names."""


@equal_by_content
class Layer(NamedTuple):
    """One affine layer of an ensemble, ``z = a @ weight + bias``."""

    weight: Tensor
    """Shape ``(members, n_in, n_out)``."""
    bias: Tensor
    """Shape ``(members, 1, n_out)``."""


@equal_by_content
@dataclass(frozen=True)
class AniPotential(Potential):
    """Atomic energies from one small network per element, averaged over the members of an ensemble.

    ``E = sum_i [ scale * mean_m NN_m(G_i) + self_energy(Z_i) ] + reference``, with ``scale`` the eV per unit of network
    output (ANI networks speak Hartree) and hidden activations CELU(0.1).
    """

    family: ClassVar[str] = "ani"
    advice: ClassVar[str] = (
        ": map a new element onto one of them, e.g. relabel(model, {'Si': 'C'}), on the command line --map Si=C"
    )

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
    element_map: Mapping[str, str] = field(default_factory=dict)
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
    def r_cut(self) -> float:
        """Distance in Angstrom up to which the networks' own descriptor sees neighbours."""
        return self.aev.r_cut_radial

    @property
    def reach(self) -> float:
        """Distance in Angstrom up to which the energy of an atom depends on others."""
        own = self.aev.r_cut_radial
        return own if self.enrichment is None else max(own, self.enrichment.parameters.get("r_cut", own))

    @property
    def n_weights(self) -> int:
        """Number of weights of all networks."""
        return sum(part.numel() for layers in self.networks.values() for layer in layers for part in layer)

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

    def to(self, dtype: torch.dtype) -> AniPotential:
        """Return a copy with weights in another precision."""
        networks = {
            symbol: tuple(Layer(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in layers)
            for symbol, layers in self.networks.items()
        }
        return dataclasses.replace(self, networks=networks)

    def species(self, frame: Atoms) -> Tensor:
        """Return the network index of every atom of a frame, shape ``(n_atoms,)``, borrowed elements mapped.

        Raises
        ------
        ModelError
            If the frame holds an element with neither a network nor a donor; the sentence counts them.
        """
        self.check_elements(frame)
        index = {symbol: i for i, symbol in enumerate(self.symbols)}
        index |= {new: index[donor] for new, donor in self.element_map.items()}
        return torch.tensor([index[symbol] for symbol in frame.get_chemical_symbols()])

    def free_atoms(self, frame: Atoms) -> Tensor:
        """Return the energy of the free atom for every atom, of the donor for a borrowed one."""
        self_energies = torch.tensor([self.self_energies[symbol] for symbol in self.symbols], dtype=torch.float64)
        return self_energies[self.species(frame)]

    def with_elements(self, mapping: Mapping[str, str], borrowing: Borrowing = "relabel") -> AniPotential:
        """Let new elements borrow networks and channels (:func:`tlmc.families.ani.relabel`, ``extend``)."""
        from tlmc.families.ani.transfer import extend, relabel

        if not mapping or borrowing not in ("relabel", "extend"):
            return super().with_elements({}, borrowing)
        return (relabel if borrowing == "relabel" else extend)(self, mapping)

    def evaluator(self, device: torch.device) -> Evaluator:
        """Return what evaluates frames on a device."""
        from tlmc.families.ani.evaluation import AniEvaluator

        return AniEvaluator(self, device)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``<element>.<layer>.weight`` and ``.bias``, and the two tensors of an enrichment."""
        tensors = {
            f"{symbol}.{number}.{part}": tensor
            for symbol in self.symbols
            for number, layer in enumerate(self.networks[symbol])
            for part, tensor in zip(("weight", "bias"), layer, strict=True)
        }
        if self.enrichment is not None:
            tensors |= {f"enrichment.{name}": getattr(self.enrichment, name) for name in _ENRICHMENT}
        return tensors

    def to_json(self) -> dict[str, Any]:
        """Return all that is not a tensor."""
        return {
            "name": self.name,
            "symbols": self.symbols,
            "aev": dataclasses.asdict(self.aev),
            "self_energies": self.self_energies,
            "fingerprint": self.fingerprint,
            "element_map": dict(self.element_map),
            "reference": None if self.reference is None else self.reference.to_json(),
            "scale": self.scale,
            "enrichment": None if self.enrichment is None else self.enrichment.to_json(),
            "committee": self.committee,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AniPotential:
        """Put a model together again; see :meth:`tlmc.potentials.Potential.from_json`."""
        enrichment = None
        if content["enrichment"] is not None:
            extra: dict[str, Any] = {name: tensors[f"enrichment.{name}"] for name in _ENRICHMENT}
            enrichment = Enrichment(**content["enrichment"], **extra)
            _ = enrichment.descriptor  # an unknown one is said now
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if not name.startswith("enrichment."))
        networks = {
            symbol: tuple(
                Layer(tensors[f"{symbol}.{number}.weight"], tensors[f"{symbol}.{number}.bias"])
                for number in range(depth)
            )
            for symbol in content["symbols"]
        }
        constants: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["aev"].items()}
        reference = content["reference"]
        model = cls(
            name=content["name"],
            symbols=tuple(content["symbols"]),
            aev=AEVParameters(**constants),
            networks=networks,
            self_energies=content["self_energies"],
            fingerprint=content["fingerprint"],
            element_map=content["element_map"],
            reference=None if reference is None else ReferenceEnergies.from_json(reference),
            scale=content["scale"],
            enrichment=enrichment,
            committee=content["committee"] is True,
        )
        model._check_shapes()
        return model

    def _check_shapes(self) -> None:
        """Make sure that the tensors are the networks of the model, all of one precision."""
        members, dtype = self.members, self.dtype
        for symbol in self.symbols:
            n_in = self.n_columns
            for number, (weight, bias) in enumerate(self.networks[symbol]):
                n_out = weight.shape[-1] if number < len(self.networks[symbol]) - 1 else 1
                shapes = {"weight": (members, n_in, n_out), "bias": (members, 1, n_out)}
                for (part, shape), tensor in zip(shapes.items(), (weight, bias), strict=True):
                    name = f"{symbol}.{number}.{part}"
                    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
                n_in = n_out
