"""Choosing data: which structures are worth a label."""

from __future__ import annotations

from tlmc.sampling.diversity import cur, farthest_points, leverage_scores
from tlmc.sampling.normal_modes import (
    NormalModes,
    Samples,
    draw_fractions,
    exact_hessian,
    hessian,
    normal_modes,
    rigid_motions,
    sample,
)

__all__ = [
    "NormalModes",
    "Samples",
    "cur",
    "draw_fractions",
    "exact_hessian",
    "farthest_points",
    "hessian",
    "leverage_scores",
    "normal_modes",
    "rigid_motions",
    "sample",
]
