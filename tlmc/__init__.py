"""Transfer learning of interatomic potentials, from molecules to crystals."""

from __future__ import annotations
