"""Low-rank updates (LoRA, Hu et al. 2021): the start weights stay, and what is learned is a product of thin matrices.

Every weight matrix is ``W = W_0 + A B`` with ``A`` (n_in, r) and ``B`` (r, n_out), for each member of an ensemble its
own. The learner gives the exact gradient of the whole ``W``, and the chain rule the rest: ``dA = dW B^T``,
``dB = A^T dW``. Biases, and matrices for which two factors would hold no fewer numbers than the matrix (the output
layer), learn a plain difference from the start. Weight decay shrinks factors and differences, so here it pulls towards
the start model instead of towards zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tlmc.training.learner import Learner


class _Part(NamedTuple):
    """One trainable array of the learner and what stands for its change; each entry has its view of the gradient."""

    where: slice
    """Its place in the learner's flat weights."""
    shape: torch.Size
    change: tuple[Tensor, ...]
    """``(A, B)``, or the plain difference alone."""
    slope: tuple[Tensor, ...]


class LowRank:
    """The factors of one learner's trainable weights, in one flat buffer.

    ``A`` starts at zero, so that nothing changes before the first step; input columns that are zero in the whole set
    then keep their start weights, as their rows of ``A`` get no gradient. ``B`` starts from N(0, 1/r): a first step of
    AdamW, which moves every entry of ``A`` by the rate, moves those of ``W`` by about the rate too, whatever the rank.

    Parameters
    ----------
    learner
        Its weights at this moment are the ones that stay.
    rank
        Columns of ``A``.
    seed
        Of the start values of ``B``.
    """

    def __init__(self, learner: Learner, rank: int, seed: int) -> None:
        self._learner = learner
        self._base = learner.flat.clone()
        shapes, first = [], 0
        for whole in learner.shapes:
            shapes.append((slice(first, first + whole.numel()), whole, _shapes(whole, rank)))
            first += whole.numel()
        size = sum(shape.numel() for _, _, change in shapes for shape in change)
        self.flat = learner.flat.new_zeros(size)
        """Factors and differences; an optimiser changes them in place."""
        self.gradient = torch.zeros_like(self.flat)
        """Loss gradient as flat as the factors, see :meth:`pull_back`."""
        self._parts = []
        first = 0
        for where, shape, pieces in shapes:
            views, slopes = [], []
            for one in pieces:
                last = first + one.numel()
                views.append(self.flat[first:last].view(one))
                slopes.append(self.gradient[first:last].view(one))
                first = last
            self._parts.append(_Part(where, shape, tuple(views), tuple(slopes)))
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for part in self._parts:
            if len(part.change) == 2:
                B = part.change[1]
                B.copy_(torch.randn(B.shape, generator=generator, dtype=torch.float64) / rank**0.5)

    def pull_back(self) -> None:
        """Fill :attr:`gradient` from the learner's gradient of the whole weights."""
        for where, shape, change, slope in self._parts:
            full = self._learner.gradient[where].view(shape)
            if len(change) == 1:
                slope[0].copy_(full)
                continue
            A, B = change
            slope[0].copy_(torch.bmm(full, B.mT))
            slope[1].copy_(torch.bmm(A.mT, full))

    def push(self) -> None:
        """Write the weights that the factors stand for into the learner."""
        self._learner.flat.copy_(self._base)
        for where, shape, change, _ in self._parts:
            weight = self._learner.flat[where].view(shape)
            if len(change) == 1:
                weight.add_(change[0])
            else:
                weight.baddbmm_(*change)


def _shapes(shape: torch.Size, rank: int) -> tuple[torch.Size, ...]:
    """Return the shapes of what stands for the change of an array; only ``(members, n_in, n_out)`` is worth factors."""
    if len(shape) != 3:
        return (shape,)
    members, n_in, n_out = shape
    if rank * (n_in + n_out) >= n_in * n_out:
        return (shape,)
    return torch.Size((members, n_in, rank)), torch.Size((members, rank, n_out))
