"""Transfer learning of interatomic potentials, from molecules to crystals."""

from __future__ import annotations

import os

# OpenMP threads that spin while they wait make a training on a shared machine up to ten times slower; the runtime reads
# this once, when torch is imported, and a value that the user has set stays
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
