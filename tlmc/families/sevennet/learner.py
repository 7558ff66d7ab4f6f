"""The SevenNet family as a learner."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.pairs import neighbours
from tlmc.families.sevennet.model import SevenNetPotential, answer, collate, make_graph
from tlmc.training.learner import EnergiesForces
from tlmc.training.torch_learner import ModuleLearner


class SevenNetLearner(ModuleLearner):
    """The network of one model, and a graph for every frame."""

    def __init__(
        self, model: SevenNetPotential, frames: Sequence[Atoms], device: torch.device, report: Callable[[int], object]
    ) -> None:
        super().__init__(copy.deepcopy(model.network), [len(frame) for frame in frames], device)
        self._model, self._graphs = model, []
        for frame in frames:
            self._graphs.append(make_graph(frame, neighbours(frame, model.r_cut, model.dtype)))
            report(1)

    def inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Join the graphs of some frames."""
        return {name: part.to(self._device) for name, part in collate([self._graphs[i] for i in indices]).items()}

    def outputs(self, inputs: dict[str, Tensor]) -> EnergiesForces:
        """Evaluate the network."""
        return answer(self.module, inputs)

    def potential(self, flat: Tensor, unseen: float) -> SevenNetPotential:
        """Return a model with some weights."""
        network = copy.deepcopy(self._model.network)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        # cloned, since the parameters become views of what they are made from
        torch.nn.utils.vector_to_parameters(flat.detach().cpu().clone(), trained)
        return dataclasses.replace(self._model, network=network)
