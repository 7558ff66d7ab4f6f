"""Fine-tuning on cached descriptors: cache, exact engine, protocol, checkpoints."""

from __future__ import annotations
