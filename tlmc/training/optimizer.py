"""AdamW on one flat buffer (Loshchilov and Hutter 2019): ``p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps)``."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tlmc.equality import equal_by_content

BETA1: Final = 0.9
BETA2: Final = 0.999
EPS: Final = 1e-8


@equal_by_content
class Update(NamedTuple):
    """One step of AdamW, whose tensors are changed in place; all have the shape of the flat weights."""

    weight: Tensor
    exp_avg: Tensor
    """First moment, an average of the gradient."""
    exp_avg_sq: Tensor
    """Second moment, an average of its square."""
    slope: Tensor
    """Gradient of the loss."""
    rate: float
    weight_decay: float
    step: int
    """Number of this step, from 1."""


def apply(update: Update) -> None:
    """Take the step with torch; the compiled sweeps do the same array by array, without another pass over memory."""
    adamw(
        [update.weight],
        [update.slope],
        [update.exp_avg],
        [update.exp_avg_sq],
        [],
        [torch.full((), float(update.step - 1), device=update.weight.device)],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=update.rate,
        weight_decay=update.weight_decay,
        eps=EPS,
        maximize=False,
    )
