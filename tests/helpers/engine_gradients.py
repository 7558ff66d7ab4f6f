"""The gradient of a loss by the exact engine."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.engine import Engine
from tlmc.training.loss import batch_loss

LAMBDA = 0.6


def labels(frames, seed=1):
    """Energies and forces far enough from any model that nothing cancels."""
    rng = np.random.default_rng(seed)
    return rng.normal(-2.0, 1.0, len(frames)) * [len(f) for f in frames], [rng.normal(size=(len(f), 3)) for f in frames]


def engine_gradient(model, frames, dtype, folder, trainable=(True,) * 4):
    """Engine after one loss gradient on all frames as one batch, and the loss."""
    cache = build_cache(model, frames, dtype, folder)
    engine = Engine(model.to(dtype), cache, trainable)
    energies, forces = labels(frames)
    ordered = torch.cat([torch.from_numpy(f)[cache[i].order] for i, f in enumerate(forces)]).to(dtype)
    loss = partial(batch_loss, lambda_=LAMBDA)
    result = engine.loss_gradient(merge(cache.structures), torch.from_numpy(energies), ordered, loss)
    return engine, result.loss.item()
