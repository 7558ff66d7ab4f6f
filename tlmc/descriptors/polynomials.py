"""Chebyshev polynomials of many numbers at once, with few calls."""

from __future__ import annotations

import torch
from torch import Tensor


def chebyshev_polynomials(x: Tensor, degree: int) -> Tensor:
    """Return ``T_0 ... T_degree`` by doubling, ``T_{p+k} = 2 T_p T_k - T_{p-k}``.

    A recurrence from one degree to the next takes as many calls as there are degrees; this takes their logarithm.

    Parameters
    ----------
    x
        Numbers between -1 and 1, shape ``(..., n)``.
    degree
        Highest degree.

    Returns
    -------
    Tensor
        Shape ``(..., degree + 1, n)``.
    """
    rows = torch.stack([torch.ones_like(x), x], dim=-2) if degree else torch.ones_like(x)[..., None, :]
    while (top := rows.shape[-2] - 1) < degree:
        more = min(top, degree - top)
        known, mirrored = rows[..., 1 : more + 1, :], rows[..., top - more : top, :].flip(-2)
        rows = torch.cat([rows, torch.addcmul(-mirrored, rows[..., top:, :], known, value=2.0)], dim=-2)
    return rows
