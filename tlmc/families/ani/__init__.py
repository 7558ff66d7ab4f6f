"""The ANI family: atomic environment vectors and one small network per element; ANI-2x and ANI-2xt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlmc.lazy import loaded_at_use

if TYPE_CHECKING:
    from tlmc.families.ani.averaging import average
    from tlmc.families.ani.batch import merge
    from tlmc.families.ani.cache import DescriptorCache, build_cache
    from tlmc.families.ani.engine import Engine
    from tlmc.families.ani.evaluation import energy_spread, member_energies
    from tlmc.families.ani.export import export_state_dict, to_torchani
    from tlmc.families.ani.model import AniPotential, Layer
    from tlmc.families.ani.transfer import enrich, extend, relabel, scratch, trainable_layers

__all__ = [
    "AniPotential",
    "DescriptorCache",
    "Engine",
    "Layer",
    "average",
    "build_cache",
    "energy_spread",
    "enrich",
    "export_state_dict",
    "extend",
    "member_energies",
    "merge",
    "relabel",
    "scratch",
    "to_torchani",
    "trainable_layers",
]

__getattr__ = loaded_at_use(
    __name__,
    {
        "averaging": ("average",),
        "batch": ("merge",),
        "cache": (
            "DescriptorCache",
            "build_cache",
        ),
        "engine": ("Engine",),
        "evaluation": (
            "energy_spread",
            "member_energies",
        ),
        "export": (
            "export_state_dict",
            "to_torchani",
        ),
        "model": (
            "AniPotential",
            "Layer",
        ),
        "transfer": (
            "enrich",
            "extend",
            "relabel",
            "scratch",
            "trainable_layers",
        ),
    },
)
