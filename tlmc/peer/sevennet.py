"""SevenNet-0: its published weights, and its energies and forces of our frames.

SevenNet (Park, Kim, Hwang and Han, J. Chem. Theory Comput. 20, 4857 (2024), doi 10.1021/acs.jctc.4c00190) is an
equivariant message-passing network after NequIP. SevenNet-0 (11 July 2024) was trained on relaxations of inorganic
crystals of the Materials Project (PBE, PBE+U). Code and weights come inside the wheel ``sevenn`` (MIT licence).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn

from tlmc.descriptors.aev import Neighbours, neighbours
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError, ModelError
from tlmc.files import sha256_file
from tlmc.labelled import Dataset
from tlmc.potentials.calculator import Predictions
from tlmc.reference import ReferenceEnergies, fit_reference

NAME: Final = "sevennet-0"
"""Name of the start model in records."""
CHECKPOINT: Final = "pretrained_potentials/SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth"
"""Of SevenNet-0, inside the installed package."""
SHA256: Final = "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36"
"""Of that file in sevenn 0.13.0."""
_BATCH: Final = 4


@dataclass(frozen=True, eq=False)
class SevenNet:
    """A network of the SevenNet architecture and how its energies become those of the labels."""

    network: nn.Module
    """Takes the tensors of :func:`collate`. Fine-tuning changes its weights in place."""
    r_cut: float
    """Radius in which atoms send messages, Angstrom; five layers see five times as far."""
    numbers: frozenset[int]
    """Atomic numbers of the elements it knows."""
    fingerprint: str
    """SHA-256 of the checkpoint it came from."""
    reference: ReferenceEnergies | None = None
    """Offset to the labels' energies."""

    def offsets(self, frames: Sequence[Atoms]) -> Tensor:
        """Return the energies to be added to the network's, eV, float64, shape ``(n_frames,)``."""
        if self.reference is None:
            return torch.zeros(len(frames), dtype=torch.float64)
        return torch.from_numpy(self.reference.energies(frames))


@equal_by_content
class Graph(NamedTuple):
    """What the network needs to know of one frame."""

    numbers: Tensor
    """Atomic numbers, int64, shape ``(n_atoms,)``."""
    pairs: Neighbours
    volume: float
    """Angstrom^3; used for a stress that nobody asks for."""


@equal_by_content
class Answer(NamedTuple):
    """Energies and forces of a batch, parts of torch's graph while the network is in training mode."""

    energies: Tensor
    """Without the reference, eV, float64, shape ``(n_frames,)``."""
    forces: Tensor
    """eV/Angstrom, float32, shape ``(n_atoms_total, 3)``."""


def is_installed() -> bool:
    """Tell whether the package ``sevenn`` can be imported, without importing it."""
    return importlib.util.find_spec("sevenn") is not None


def load_sevennet() -> SevenNet:
    """Build SevenNet-0 with its published weights, float32, on the CPU.

    The checkpoint is a pickle. Its SHA-256 is checked before it is opened, and torch's restricted reader opens it,
    which makes tensors, plain Python values and numpy arrays and calls nothing else.

    Raises
    ------
    ConfigError
        If ``sevenn`` is not installed.
    ModelError
        If its checkpoint is not the published one.
    """
    if not is_installed():
        raise ConfigError("SevenNet-0 needs the package sevenn: pip install 'tlmc[peer]'")
    with _quiet_torchscript():
        from sevenn import _const, model_build
        from sevenn.scripts import backward_compatibility

        path = Path(_const.__file__).parent / CHECKPOINT
        content = read_checkpoint(path)
        config = _const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG | backward_compatibility.patch_old_config(content["config"])
        network = model_build.build_E3_equivariant_model(config)
        # modules have been renamed, and paths of the tensor products sorted, since the weights were published
        weights = backward_compatibility.patch_state_dict_if_old(content["model_state_dict"], config, network)
    network.load_state_dict(weights, strict=True)
    return SevenNet(network.eval(), float(config["cutoff"]), frozenset(config["_type_map"]), SHA256)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read the published checkpoint; nothing in it is executed.

    Raises
    ------
    ModelError
        If the file is missing, or its SHA-256 is another than that of SevenNet-0.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist: tlmc knows the layout of sevenn 0.13.0, pip install 'tlmc[peer]'")
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


def make_graph(model: SevenNet, frame: Atoms) -> Graph:
    """Return the tensors of one frame.

    Raises
    ------
    ModelError
        If it holds an element that the model does not know.
    """
    unknown = sorted(set(frame.numbers.tolist()) - model.numbers)
    if unknown:
        names = ", ".join(chemical_symbols[number] for number in unknown)
        raise ModelError(f"frame ({frame.get_chemical_formula()}): SevenNet-0 does not know {names}")
    numbers = torch.from_numpy(frame.numbers.astype(np.int64))
    return Graph(numbers, neighbours(frame, model.r_cut, torch.float32), abs(float(frame.cell.volume)))


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
        # the network takes gradients by this one: a copy, so that graphs stay as they are
        "edge_vec": torch.cat([graph.pairs.vectors for graph in graphs]).clone(),
        "num_atoms": sizes,
        "batch": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        "cell_volume": torch.tensor([graph.volume for graph in graphs]),
    }


def answer(model: SevenNet, graphs: Sequence[Graph]) -> Answer:
    """Evaluate frames together."""
    data = collate(graphs)
    batch = data["batch"]
    result = model.network(data)
    # summed in float64, since the energies of a crystal are large beside their differences
    energies = torch.zeros(len(graphs), dtype=torch.float64)
    energies = energies.index_add(0, batch, result["atomic_energy"].squeeze(-1).to(torch.float64))
    return Answer(energies, result["inferred_force"])


def predict(model: SevenNet, frames: Sequence[Atoms]) -> Predictions:
    """Return energies and forces of frames, in the shape that `tlmc.evaluation.evaluate` takes.

    Raises
    ------
    ModelError
        If a frame holds an element that the model does not know.
    DataError
        If it holds one for which no reference energy was fitted.
    """
    return predict_graphs(model, frames, [make_graph(model, frame) for frame in frames])


def predict_graphs(model: SevenNet, frames: Sequence[Atoms], graphs: Sequence[Graph]) -> Predictions:
    """Do as :func:`predict` does, with graphs that are there already."""
    model.network.eval()
    energies, forces = [], []
    for start in range(0, len(frames), _BATCH):
        part = graphs[start : start + _BATCH]
        result = answer(model, part)
        energies.append(result.energies.detach())
        forces += result.forces.detach().to(torch.float64).split([len(graph.numbers) for graph in part])
    return Predictions((torch.cat(energies) + model.offsets(frames)).numpy(), tuple(force.numpy() for force in forces))


def refit_offset(model: SevenNet, dataset: Dataset) -> SevenNet:
    """Return the model with reference energies fitted to all labels of a data set, weights as they are."""
    bare = replace(model, reference=None)
    predicted = predict(bare, dataset.frames).energies
    return replace(bare, reference=fit_reference(dataset.frames, dataset.energies, predicted))


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    """Keep to ourselves that sevenn uses a part of torch that will go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*`torch\.jit", category=DeprecationWarning)
        yield
