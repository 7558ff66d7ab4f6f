"""SevenNet-0: its published weights, and its energies and forces of our frames.

SevenNet (Park, Kim, Hwang and Han, J. Chem. Theory Comput. 20, 4857 (2024), doi 10.1021/acs.jctc.4c00190) is an
equivariant message-passing network after NequIP. SevenNet-0 (11 July 2024) was trained on relaxations of inorganic
crystals of the Materials Project (PBE, PBE+U). Code and weights come inside the wheel ``sevenn`` (MIT licence).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn

from tlmc.descriptors.pairs import Neighbours
from tlmc.equality import equal_by_content
from tlmc.errors import ModelError
from tlmc.families.sevennet.family import FAMILY
from tlmc.files import sha256_file
from tlmc.potentials.model import Evaluation, Potential
from tlmc.potentials.reference import ReferenceEnergies
from tlmc.training.learner import EnergiesForces

SHA256: Final = "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36"
"""Of the checkpoint of SevenNet-0 in sevenn 0.13.0."""


@equal_by_content
@dataclass(frozen=True)
class SevenNetPotential(Potential):
    """A network of the SevenNet architecture and how its energies become those of the labels."""

    family: ClassVar[str] = "sevennet"

    name: str
    """``sevennet``, the start model this one descends from."""
    network: nn.Module = field(repr=False)
    """Takes the tensors of :func:`collate`; never changed in place."""
    cutoff: float
    """Radius in which atoms send messages, Angstrom; five layers see five times as far."""
    symbols: tuple[str, ...] = field(repr=False)
    """Elements it knows."""
    fingerprint: str
    """SHA-256 of the checkpoint it came from."""
    reference: ReferenceEnergies | None = None
    """Offset to the labels' energies."""
    element_map: Mapping[str, str] = field(default_factory=dict, init=False, repr=False)
    """Empty: with 89 elements none has to borrow."""
    committee: bool = field(default=False, init=False, repr=False)
    """One network is no committee."""

    @property
    def elements(self) -> tuple[str, ...]:
        """The elements it knows."""
        return self.symbols

    @property
    def r_cut(self) -> float:
        """Distance up to which neighbours count, Angstrom."""
        return self.cutoff

    @property
    def reach(self) -> float:
        """Distance in Angstrom up to which the energy of an atom depends on others: each layer passes messages on."""
        layers = sum(name.endswith("_convolution") for name, _ in self.network.named_children())
        return layers * self.cutoff

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.network.parameters()).dtype

    def to(self, dtype: torch.dtype) -> SevenNetPotential:
        """Return the model itself: its compiled parts compute in float32 only.

        Raises
        ------
        ModelError
            If another precision is asked for.
        """
        if dtype != torch.float32:
            raise ModelError(f"{self.name} computes in float32 only, not in {dtype}")
        return self

    def evaluator(self, device: torch.device) -> Callable[[Atoms, Neighbours], Evaluation]:
        """Return what evaluates frames on a device."""
        network = self.network if device.type == "cpu" else copy.deepcopy(self.network).to(device)
        network.eval()

        def evaluate(frame: Atoms, pairs: Neighbours) -> Evaluation:
            result = network({name: part.to(device) for name, part in collate([make_graph(frame, pairs)]).items()})
            energies = result["atomic_energy"].detach().squeeze(-1).to("cpu", torch.float64)
            forces = result["inferred_force"].detach().to("cpu", torch.float64)
            # of a cell of one cubic Angstrom, and with the opposite sign
            xx, yy, zz, xy, yz, zx = -result["inferred_stress"][0].detach().to("cpu", torch.float64)
            rows = [torch.stack(row) for row in ((xx, xy, zx), (xy, yy, yz), (zx, yz, zz))]
            return Evaluation(energies, forces, torch.stack(rows))

        return evaluate

    def tensors(self) -> dict[str, Tensor]:
        """Return the network's parameters; all else is the architecture's."""
        return {name: weight.detach() for name, weight in self.network.named_parameters() if weight.numel()}

    def to_json(self) -> dict[str, Any]:
        """Return all that is not a tensor and not part of the published model."""
        reference = None if self.reference is None else self.reference.to_json()
        return {"name": self.name, "fingerprint": self.fingerprint, "reference": reference}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SevenNetPotential:
        """Put a model together again: the published architecture with these weights."""
        published = load_sevennet()
        if content["fingerprint"] != published.fingerprint:
            raise ModelError(f"it descends from {content['fingerprint']}, which is not SevenNet-0")
        own = published.tensors()
        wrong = sorted(set(own) ^ set(tensors)) + [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
        if wrong:
            raise ModelError(f"{wrong[0]} is not as in SevenNet-0")
        published.network.load_state_dict(dict(tensors), strict=False)
        reference = content["reference"]
        fitted = None if reference is None else ReferenceEnergies.from_json(reference)
        return dataclasses.replace(published, name=content["name"], reference=fitted)


@equal_by_content
class Graph(NamedTuple):
    """What the network needs to know of one frame."""

    numbers: Tensor
    """Atomic numbers, int64, shape ``(n_atoms,)``."""
    pairs: Neighbours


def load_sevennet() -> SevenNetPotential:
    """Build SevenNet-0 with its published weights, float32, on the CPU.

    The checkpoint is a pickle. Its SHA-256 is checked before it is opened, and torch's restricted reader opens it,
    which makes tensors, plain Python values and numpy arrays and calls nothing else.

    Raises
    ------
    ModelError
        If the checkpoint of the installed package is not the published one.
    """
    with _quiet_torchscript():
        from sevenn import _const, model_build
        from sevenn.scripts import backward_compatibility

        content = read_checkpoint(FAMILY.weights_path("sevennet"))
        config = _const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG | backward_compatibility.patch_old_config(content["config"])
        network = model_build.build_E3_equivariant_model(config)
        # modules have been renamed, and paths of the tensor products sorted, since the weights were published
        weights = backward_compatibility.patch_state_dict_if_old(content["model_state_dict"], config, network)
    network.load_state_dict(weights, strict=True)
    symbols = tuple(chemical_symbols[number] for number in sorted(config["_type_map"]))
    return SevenNetPotential("sevennet", network.eval(), float(config["cutoff"]), symbols, SHA256)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read the published checkpoint; nothing in it is executed.

    Raises
    ------
    ModelError
        If the file is missing, or its SHA-256 is another than that of SevenNet-0.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist: tlmc knows the layout of sevenn 0.13.0, pip install 'tlmc[sevennet]'")
    found = sha256_file(path)
    if found != SHA256:
        raise ModelError(f"{path} does not hold the weights of SevenNet-0: SHA-256 {found}, not {SHA256}")
    arrays: list[Any] = [
        # the function that makes an empty array, under the name that numpy 1 gave it
        (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float32)),
    ]
    with torch.serialization.safe_globals(arrays):
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def make_graph(frame: Atoms, pairs: Neighbours) -> Graph:
    """Return the tensors of one frame."""
    return Graph(torch.from_numpy(frame.numbers.astype(np.int64)), pairs)


def collate(graphs: Sequence[Graph]) -> dict[str, Tensor]:
    """Join frames into one graph without edges between them, under the names that the network's modules use."""
    sizes = torch.tensor([len(graph.numbers) for graph in graphs])
    first = torch.cumsum(sizes, 0) - sizes
    centres = [graph.pairs.centre + k for graph, k in zip(graphs, first, strict=True)]
    others = [graph.pairs.neighbour + k for graph, k in zip(graphs, first, strict=True)]
    numbers = torch.cat([graph.numbers for graph in graphs])
    return {
        "x": numbers,
        "atomic_numbers": numbers,
        "edge_index": torch.stack([torch.cat(centres), torch.cat(others)]),
        "edge_vec": torch.cat([graph.pairs.vectors for graph in graphs]),
        "num_atoms": sizes,
        "batch": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        # of one cubic Angstrom, so that what the network calls a stress is the virial
        "cell_volume": torch.ones(len(graphs), dtype=graphs[0].pairs.vectors.dtype),
    }


def answer(network: nn.Module, inputs: Mapping[str, Tensor]) -> EnergiesForces:
    """Evaluate frames together; parts of torch's graph while the network is in training mode."""
    # the network takes gradients by the vectors and adds to the mapping: copies, so that the inputs stay as they are
    result = network({**inputs, "edge_vec": inputs["edge_vec"].clone()})
    batch = inputs["batch"]
    # summed in float64, since the energies of a crystal are large beside their differences
    energies = torch.zeros(len(inputs["num_atoms"]), dtype=torch.float64, device=batch.device)
    energies = energies.index_add(0, batch, result["atomic_energy"].squeeze(-1).to(torch.float64))
    return EnergiesForces(energies, result["inferred_force"])


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    """Keep to ourselves that sevenn uses a part of torch that will go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*`torch\.jit", category=DeprecationWarning)
        yield
