"""Start models, what fine-tuning may change in them, and what they compute."""

from __future__ import annotations

from tlmc.potentials.average import average
from tlmc.potentials.calculator import Predictions, TlmcCalculator, energy_spread, member_energies, predict
from tlmc.potentials.export import export_state_dict, to_torchani
from tlmc.potentials.model import Layer, Potential
from tlmc.potentials.pretrained import load_start_model, reachable, start_models, weights_path
from tlmc.potentials.transfer import (
    THESIS_DONORS,
    Borrowing,
    enrich,
    extend,
    parse_element_map,
    relabel,
    scratch,
    trainable_layers,
    with_elements,
)

__all__ = [
    "THESIS_DONORS",
    "Borrowing",
    "Layer",
    "Potential",
    "Predictions",
    "TlmcCalculator",
    "average",
    "energy_spread",
    "enrich",
    "export_state_dict",
    "extend",
    "load_start_model",
    "member_energies",
    "parse_element_map",
    "predict",
    "reachable",
    "relabel",
    "scratch",
    "start_models",
    "to_torchani",
    "trainable_layers",
    "weights_path",
    "with_elements",
]
