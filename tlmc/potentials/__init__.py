"""What every potential is and can do, whatever its family: start models, energies and forces, files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlmc.lazy import loaded_at_use
from tlmc.potentials.registry import load_start_model, reachable, start_models, weights_path

if TYPE_CHECKING:
    from tlmc.potentials.borrowing import THESIS_DONORS, Borrowing, parse_element_map
    from tlmc.potentials.calculator import TlmcCalculator, predict
    from tlmc.potentials.model import Potential, Predictions
    from tlmc.potentials.model_files import load_model, save_model
    from tlmc.potentials.reference import ReferenceEnergies, fit_reference

__all__ = [
    "THESIS_DONORS",
    "Borrowing",
    "Potential",
    "Predictions",
    "ReferenceEnergies",
    "TlmcCalculator",
    "fit_reference",
    "load_model",
    "load_start_model",
    "parse_element_map",
    "predict",
    "reachable",
    "save_model",
    "start_models",
    "weights_path",
]

__getattr__ = loaded_at_use(
    __name__,
    {
        "borrowing": (
            "THESIS_DONORS",
            "Borrowing",
            "parse_element_map",
        ),
        "calculator": (
            "TlmcCalculator",
            "predict",
        ),
        "model": (
            "Potential",
            "Predictions",
        ),
        "model_files": (
            "load_model",
            "save_model",
        ),
        "reference": (
            "ReferenceEnergies",
            "fit_reference",
        ),
    },
)
