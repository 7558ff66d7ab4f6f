r"""The exact training step on cached descriptors: energies, forces and the loss gradient without an autograd graph.

Notation for one element: ``a_0 = G`` (n, K) its active descriptor columns, ``M`` members, hidden layers
``z_l = a_{l-1} W_l + b_l``, ``a_l = celu(z_l)``, slope ``s_l``, curvature ``p_l``; atomic energy
``e = scale * mean_m(a_L w + b)``; ``J = dG/dx``.

1. Forward, then backward to the input: ``q_L = scale w / M``, ``d_l = s_l q_l``, ``q_{l-1} = d_l W_l^T``;
   ``g = q_0 = de/dG``.
2. ``F = -J^T g``; the loss gives ``r = dL/dF`` and ``c = dL/dE`` (handed to the atoms); ``v = dL/dg = -J r``.
3. For weights, the gradient of L is that of ``S = sum_i c_i e_i + <v, g>``, and ``<v, g>`` is the change of the energy
   along ``v``: the tangent ``t_1 = v W_1``, ``h_l = s_l t_l``, ``t_{l+1} = h_l W_{l+1}`` carries it.
4. One reverse sweep, since the adjoints of the tangents are the q and d of step 1:
   ``y_L = q_L (s_L c + p_L t_L)``, ``y_l = s_l (y_{l+1} W_{l+1}^T) + p_l t_l q_l``,
   ``dW_l = a_{l-1}^T y_l + h_{l-1}^T d_l`` (``h_0 = v``), ``db_l = sum y_l``,
   ``dw = (scale/M) sum (c a_L + h_L)``, ``db = (scale/M) sum c``.

For CELU of width ``alpha``: ``s = exp(min(z, 0)/alpha)``, ``a = max(z, 0) + alpha (s - 1)``, ``p = s/alpha`` where
``z < 0``, so that ``p t q = d t / alpha`` there: the exponential is evaluated once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tlmc.potentials.model import Layer, Potential
from tlmc.potentials.network import CELU_ALPHA
from tlmc.training.cache import DescriptorCache, Structure
from tlmc.training.loss import LossAndSlopes


class Batch(NamedTuple):
    """Several structures merged for the networks: atoms sorted by element over the whole batch."""

    structures: tuple[Structure, ...]
    sizes: list[int]
    """Atoms per structure."""
    G: Tensor
    """Shape ``(n_atoms, n_columns)``, merged order."""
    slices: tuple[tuple[int, slice], ...]
    """Network index and the merged atoms it serves."""
    merged: Tensor
    """Where each merged atom stands when structures follow one another."""
    separate: Tensor
    """Inverse of `merged`."""
    structure: Tensor
    """Structure of every atom, structures following one another, int64."""


class EnergiesForces(NamedTuple):
    """Result of one forward and backward sweep."""

    energies: Tensor
    """Network energies (no self energies, no reference), float64 eV, shape ``(n_structures,)``."""
    forces: Tensor
    """eV/A, shape ``(n_atoms, 3)``, structures following one another, atoms in cache order."""


class _Sweep(NamedTuple):
    """What the reverse sweep of one element needs from the forward one; lists run over hidden layers."""

    activations: list[Tensor]
    slopes: list[Tensor]
    d: list[Tensor]


def merge(structures: Sequence[Structure]) -> Batch:
    """Merge structures into one batch."""
    species = torch.cat([s.species for s in structures])
    merged = torch.argsort(species, stable=True)
    present, counts = torch.unique_consecutive(species[merged], return_counts=True)
    ends = torch.cumsum(counts, 0).tolist()
    slices = tuple(
        (k, slice(end - count, end)) for k, end, count in zip(present.tolist(), ends, counts.tolist(), strict=True)
    )
    separate = torch.empty_like(merged)
    separate[merged] = torch.arange(len(merged))
    sizes = [len(s.species) for s in structures]
    return Batch(
        structures=tuple(structures),
        sizes=sizes,
        G=torch.cat([s.G for s in structures])[merged],
        slices=slices,
        merged=merged,
        separate=separate,
        structure=torch.repeat_interleave(torch.arange(len(structures)), torch.tensor(sizes)),
    )


class Engine:
    """Networks of the elements of one cache, laid out for fast steps, trainable weights in one flat buffer.

    Elements that do not occur in the cache and descriptor columns that are zero in it stay out; :meth:`potential` puts
    everything back together.

    Parameters
    ----------
    model
        Model to start from; it is not changed.
    cache
        Descriptors of the frames; its columns and precision are used.
    trainable
        For each affine layer from first to last, whether it trains.
    """

    def __init__(self, model: Potential, cache: DescriptorCache, trainable: Sequence[bool]) -> None:
        self.model = model
        self.columns = cache.columns
        self.trainable = tuple(trainable)
        dtype = cache[0].G.dtype
        self._present = cache.present
        self._factor = model.scale / model.members
        laid_out = {
            k: [self._lay_out(number, layer, dtype) for number, layer in enumerate(model.networks[model.symbols[k]])]
            for k in self._present
        }
        for k, layers in laid_out.items():
            if len(layers) != len(self.trainable):
                raise ValueError(
                    f"{model.symbols[k]} has {len(layers)} layers, but {len(self.trainable)} schemes are given"
                )
        parts = [
            part
            for layers in laid_out.values()
            for layer, on in zip(layers, trainable, strict=True)
            if on
            for part in layer
        ]
        self.flat = torch.cat([part.reshape(-1) for part in parts])
        """Trainable weights; an optimiser changes them in place."""
        self.gradient = torch.zeros_like(self.flat)
        """Loss gradient of the last :meth:`loss_gradient`, as flat as the weights."""
        self._layers = self._views(self.flat, laid_out)
        self._slots = self._views(self.gradient, laid_out)

    def energies_forces(self, batch: Batch) -> EnergiesForces:
        """Return network energies and forces of a batch."""
        energies, g, _ = self._sweep(batch, keep=False)
        return EnergiesForces(energies, self._forces(batch, g))

    def loss_gradient(
        self,
        batch: Batch,
        energies: Tensor,
        forces: Tensor,
        loss: Callable[[Tensor, Tensor, Tensor, Tensor], LossAndSlopes],
    ) -> LossAndSlopes:
        """Fill :attr:`gradient` with the gradient of the loss of a batch.

        Parameters
        ----------
        batch
            Merged structures.
        energies
            Labels for the network energies, float64 eV, shape ``(n_structures,)``.
        forces
            Labels, eV/A, shape ``(n_atoms, 3)``, ordered as :class:`EnergiesForces` says.
        loss
            ``loss(energy_error, force_error, n_atoms, structure)``, see :func:`tlmc.training.loss.batch_loss`.
        """
        predicted, g, sweeps = self._sweep(batch, keep=True)
        force_error = self._forces(batch, g).sub_(forces)
        n_atoms = torch.tensor(batch.sizes, dtype=force_error.dtype)
        result = loss((predicted - energies).to(force_error.dtype), force_error, n_atoms, batch.structure)
        r = torch.split(result.force_slope, batch.sizes)
        v = torch.cat([s.along(part) for s, part in zip(batch.structures, r, strict=True)])[batch.merged].neg_()
        c = result.energy_slope[batch.structure][batch.merged]
        for k in set(self._present) - {k for k, _ in batch.slices}:
            for slot, on in zip(self._slots[k], self.trainable, strict=True):
                if on:
                    slot.weight.zero_()
                    slot.bias.zero_()
        for k, atoms in batch.slices:
            self._reverse(k, sweeps[k], batch.G[atoms], v[atoms], c[atoms])
        return result

    def potential(self, flat: Tensor | None = None, inactive: float = 1.0) -> Potential:
        """Return a model with the trained weights.

        Parameters
        ----------
        flat
            Weights laid out as :attr:`flat` (an average, say); the current ones by default.
        inactive
            Factor for first-layer weights of columns that are zero in the whole set. Their gradient is zero, so weight
            decay is all that happens to them: the product of ``1 - lr * weight_decay`` over the steps.
        """
        views = self._views(self.flat if flat is None else flat, self._layers)
        networks = dict(self.model.networks)
        for k in self._present:
            symbol = self.model.symbols[k]
            layers = list(networks[symbol])
            for number, on in enumerate(self.trainable):
                if on:
                    layers[number] = self._restore(number, views[k][number], layers[number], inactive)
            networks[symbol] = tuple(layers)
        return replace(self.model, networks=networks)

    def _lay_out(self, number: int, layer: Layer, dtype: torch.dtype) -> Layer:
        """First layer: active columns and all members side by side, ``(K, members * n_out)``; others as they are."""
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        if number == 0:
            weight, bias = weight[:, self.columns].transpose(0, 1).flatten(1), bias.reshape(-1)
        return Layer(weight.contiguous(), bias.contiguous())

    def _restore(self, number: int, trained: Layer, original: Layer, inactive: float) -> Layer:
        """Undo :meth:`_lay_out` into copies with the original precision."""
        weight, bias = trained.weight.to(original.weight.dtype), trained.bias.to(original.bias.dtype)
        if number == 0:
            full = original.weight * inactive
            full[:, self.columns] = weight.view(len(self.columns), *full.shape[::2]).transpose(0, 1)
            return Layer(full, bias.reshape(original.bias.shape).clone())
        return Layer(weight.clone(), bias.clone())

    def _views(self, flat: Tensor, like: Mapping[int, Sequence[Layer]]) -> dict[int, list[Layer]]:
        """Cut a flat buffer into the trainable layers; layers that do not train stay those of `like`."""
        offset = 0
        views: dict[int, list[Layer]] = {}
        for k, layers in like.items():
            views[k] = []
            for layer, on in zip(layers, self.trainable, strict=True):
                if not on:
                    views[k].append(layer)
                    continue
                parts = []
                for part in layer:
                    parts.append(flat[offset : offset + part.numel()].view(part.shape))
                    offset += part.numel()
                views[k].append(Layer(*parts))
        return views

    def _sweep(self, batch: Batch, keep: bool) -> tuple[Tensor, Tensor, dict[int, _Sweep]]:
        """Step 1 for all elements: energies per structure, g in merged order, and what the reverse sweep needs."""
        g = torch.empty_like(batch.G)
        atomic = batch.G.new_empty(len(batch.G), dtype=torch.float64)
        sweeps = {}
        for k, atoms in batch.slices:
            *hidden, (w, b) = self._layers[k]
            members, n = w.shape[0], atoms.stop - atoms.start
            first = torch.addmm(hidden[0].bias, batch.G[atoms], hidden[0].weight)
            z = first.view(n, members, -1).transpose(0, 1)
            activations: list[Tensor] = []
            slopes: list[Tensor] = []
            d: list[Tensor] = []
            for number in range(len(hidden)):
                if number > 0:
                    z = torch.baddbmm(hidden[number].bias, activations[-1], hidden[number].weight)
                slope = z.clamp(max=0.0).div_(CELU_ALPHA).exp_()
                slopes.append(slope)
                activations.append(z.clamp_(min=0.0).add_(slope, alpha=CELU_ALPHA).sub_(CELU_ALPHA))
            atomic[atoms] = torch.baddbmm(b, activations[-1], w).sum(0).squeeze(-1).double() * self._factor
            q = (w * self._factor).transpose(1, 2).expand(-1, n, -1)
            for number in range(len(hidden) - 1, -1, -1):
                d.append(slopes[number] * q)
                if number > 0:
                    q = torch.bmm(d[-1], hidden[number].weight.transpose(1, 2))
            torch.mm(d[-1].transpose(0, 1).reshape(n, -1), hidden[0].weight.t(), out=g[atoms])
            if keep:
                sweeps[k] = _Sweep(activations, slopes, d[::-1])
        separate = atomic[batch.separate]
        energies = separate.new_zeros(len(batch.structures)).index_add_(0, batch.structure, separate)
        return energies, g, sweeps

    def _forces(self, batch: Batch, g: Tensor) -> Tensor:
        """``F = -J^T g``, structures following one another."""
        parts = torch.split(g[batch.separate], batch.sizes)
        return torch.cat([s.forces(part) for s, part in zip(batch.structures, parts, strict=True)])

    def _reverse(self, k: int, sweep: _Sweep, G: Tensor, v: Tensor, c: Tensor) -> None:
        """Steps 3 and 4 for one element: tangent up, reverse sweep down to the lowest layer that trains."""
        *hidden, (w, _) = self._layers[k]
        slots, n, members = self._slots[k], len(G), w.shape[0]
        tangents: list[Tensor] = []
        lifted: list[Tensor] = []
        t = torch.mm(v, hidden[0].weight).view(n, members, -1).transpose(0, 1)
        for number, slope in enumerate(sweep.slopes):
            if number > 0:
                t = torch.bmm(lifted[-1], hidden[number].weight)
            tangents.append(t)
            lifted.append(slope * t)
        if self.trainable[-1]:
            summed = torch.einsum("mni,n->mi", sweep.activations[-1], c).add_(lifted[-1].sum(1))
            torch.mul(summed[:, :, None], self._factor, out=slots[-1].weight)
            slots[-1].bias.fill_(c.sum() * self._factor)
        lowest = self.trainable.index(True)
        upper: Tensor | None = None
        for number in range(len(hidden) - 1, lowest - 1, -1):
            # p t q = d t / alpha where z < 0, which is where a < 0, and zero elsewhere
            slope, d = sweep.slopes[number], sweep.d[number]
            y = (d * tangents[number]).div_(CELU_ALPHA)
            y.sub_(torch.ops.aten.threshold_backward(y, sweep.activations[number], 0.0))
            y.addcmul_(d, c[:, None]) if upper is None else y.addcmul_(slope, upper)
            if number > lowest:
                upper = torch.bmm(y, hidden[number].weight.transpose(1, 2))
            if not self.trainable[number]:
                continue
            if number > 0:
                torch.bmm(sweep.activations[number - 1].transpose(1, 2), y, out=slots[number].weight)
                slots[number].weight.baddbmm_(lifted[number - 1].transpose(1, 2), d)
                torch.sum(y, 1, keepdim=True, out=slots[number].bias)
            else:
                y, d = (x.transpose(0, 1).reshape(n, -1) for x in (y, d))
                # both products at once: this gradient is the largest array of the step and is written once
                torch.mm(torch.cat([G, v]).t(), torch.cat([y, d]), out=slots[0].weight)
                torch.sum(y, 0, out=slots[0].bias)
