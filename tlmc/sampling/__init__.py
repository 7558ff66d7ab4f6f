"""Choosing data: which structures are worth a label."""

from __future__ import annotations

from tlmc.sampling.diversity import cur, farthest_points, leverage_scores

__all__ = ["cur", "farthest_points", "leverage_scores"]
