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

For CELU of width ``alpha``: ``a = max(z, 0) + alpha (exp(min(z, 0)/alpha) - 1)``, so that ``s = min(a, 0)/alpha + 1``;
``p = s/alpha`` where ``z < 0``, so that ``p t q = d t / alpha`` there: one exponential per unit is all. With G above v,
a above h and y above d in memory, each ``dW_l`` is a single product.

Flops per atom, with ``w_1`` weights in the first layer and ``w`` in the others: ``10 w_1 + 12 w`` (z, g, t, dW twice;
for the others the adjoint too). Steps 1, 3 and 4 exist twice: :class:`TorchSweeps` here, on any device, and
:class:`tlmc.families.ani.compiled_sweeps.CompiledSweeps`, which fuses all that lies between two matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from tlmc.families.ani.batch import Batch
from tlmc.families.ani.cache import DescriptorCache, Structure
from tlmc.families.ani.compiled_sweeps import CompiledSweeps, library
from tlmc.families.ani.device_cache import DeviceCache
from tlmc.families.ani.model import AniPotential, Layer
from tlmc.families.ani.network import CELU_ALPHA
from tlmc.training.learner import EnergiesForces, Loss
from tlmc.training.loss import LossAndSlopes
from tlmc.training.optimizer import Update, apply


def _as_one(structures: Sequence[Structure]) -> Structure:
    """Return structures as a single one, species ascending within each: one Jacobian product for all of them."""
    if len(structures) == 1:
        return structures[0]
    atoms = accumulate((len(s.species) for s in structures), initial=0)
    blocks = list(accumulate((len(s.atoms) for s in structures), initial=0))
    starts = [s.starts[:-1] + block for s, block in zip(structures, blocks, strict=False)]
    return Structure(
        species=torch.cat([s.species for s in structures]),
        order=torch.cat([s.order for s in structures]),
        G=torch.cat([s.G for s in structures]),
        values=torch.cat([s.values for s in structures]),
        atoms=torch.cat([s.atoms + atom for s, atom in zip(structures, atoms, strict=False)]),
        starts=torch.cat([*starts, structures[-1].starts[-1:] + blocks[-2]]),
    )


class TorchSweeps:
    """Steps 1 to 4 of one engine as torch operations.

    Parameters
    ----------
    layers, slots
        Per element, the layers and where their gradients go, trained or not.
    trainable
        For each affine layer, whether it trains.
    factor
        Energy per unit of a member's output.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[Layer]],
        slots: Mapping[int, Sequence[Layer]],
        trainable: Sequence[bool],
        factor: float,
    ) -> None:
        self._layers, self._slots, self._trainable, self._factor = layers, slots, trainable, factor
        self._kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._whole: Structure | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return energies ``(members, n_atoms)`` per unit of factor, and g ``(n_atoms, n_columns)``, merged order."""
        energies, g = [], []
        for k, atoms in batch.slices:
            *hidden, (w, b) = self._layers[k]
            a, activations = batch.X[2 * atoms.start : atoms.start + atoms.stop], []
            for weight, bias in hidden:
                a = torch.celu(torch.matmul(a, weight) + bias, CELU_ALPHA)
                activations.append(a)
            energies.append((torch.matmul(a, w) + b).squeeze(-1))
            q, d = (w * self._factor).transpose(1, 2), []
            for (weight, _), a in zip(reversed(hidden), reversed(activations), strict=True):
                d.append(q * _slope(a))
                q = torch.bmm(d[-1], weight.transpose(1, 2))
            g.append(q.sum(0))
            self._kept[k] = (activations, d[::-1])
        self._whole = _as_one(batch.structures)
        return torch.cat(energies, 1), torch.cat(g)

    def forces(self, batch: Batch, g: Tensor) -> Tensor:
        """Return ``-J^T g``, structures following one another."""
        assert self._whole is not None
        return self._whole.forces(g[batch.separate])

    def along(self, batch: Batch, r: Tensor) -> None:
        """Write ``v = -J r`` into the batch."""
        assert self._whole is not None
        batch.X[batch.v_rows] = self._whole.along(r).neg_()

    def reverse(self, batch: Batch, c: Tensor, update: Update | None) -> None:
        """Fill the slots from `c` per merged atom and update the weights; `forward` and `along` came before."""
        for k, atoms in batch.slices:
            hidden, slots, n = self._layers[k][:-1], self._slots[k], atoms.stop - atoms.start
            X = batch.X[2 * atoms.start : 2 * atoms.stop]
            activations, d = self._kept[k]
            slopes = [_slope(a) for a in activations]
            h, tangents, lifted = X[n:], [], []
            for (weight, _), slope in zip(hidden, slopes, strict=True):
                tangents.append(torch.matmul(h, weight))
                h = slope * tangents[-1]
                lifted.append(h)
            if self._trainable[-1]:
                summed = torch.einsum("mni,n->mi", activations[-1], c[atoms]) + h.sum(1)
                slots[-1].weight.copy_(summed[:, :, None] * self._factor)
                slots[-1].bias.fill_(c[atoms].sum() * self._factor)
            upper = h  # replaced before it is used: the top layer has nothing above it
            for number in range(len(hidden) - 1, self._trainable.index(True) - 1, -1):
                # p t q = d t / alpha where z < 0, which is where a < 0, and zero elsewhere
                bend = torch.where(activations[number] < 0, d[number] * tangents[number] / CELU_ALPHA, 0.0)
                top = number == len(hidden) - 1
                y = bend + (d[number] * c[atoms, None] if top else slopes[number] * upper)
                upper = torch.bmm(y, hidden[number].weight.transpose(1, 2)) if number > 0 else y
                if self._trainable[number]:
                    both = torch.cat([activations[number - 1], lifted[number - 1]], 1) if number > 0 else X
                    torch.sum(y, 1, keepdim=True, out=slots[number].bias)
                    slots[number].weight.copy_(torch.matmul(both.mT, torch.cat([y, d[number]], 1)))
        if update is not None:
            apply(update)


def _slope(a: Tensor) -> Tensor:
    """Slope of CELU from its value."""
    return a.clamp(max=0.0) / CELU_ALPHA + 1.0


class Engine:
    """Networks of the elements of one cache, laid out for fast steps, trainable weights in one flat buffer.

    Elements that do not occur in the cache and descriptor columns that are zero in it stay out; :meth:`potential` puts
    everything back together.

    Parameters
    ----------
    model
        Model to start from; it is not changed.
    cache
        Descriptors of the frames; its columns, precision and device are used.
    trainable
        For each affine layer from first to last, whether it trains.
    """

    def __init__(self, model: AniPotential, cache: DescriptorCache | DeviceCache, trainable: Sequence[bool]) -> None:
        self.model = model
        self.columns = cache.columns
        self.trainable = tuple(trainable)
        like = cache[0].G
        self._present = cache.present
        self.factor = model.scale / model.members
        """Energy in eV per unit of a member's output."""
        laid_out = {
            k: [self._lay_out(number, layer, like) for number, layer in enumerate(model.networks[model.symbols[k]])]
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
        self.shapes = [part.shape for part in parts]
        """Of the arrays that follow one another in `flat`."""
        self.flat = torch.cat([part.reshape(-1) for part in parts])
        """Trainable weights; an optimiser changes them in place."""
        self.gradient = torch.zeros_like(self.flat)
        """Loss gradient of the last :meth:`loss_gradient`, as flat as the weights."""
        self.layers = self._views(self.flat, laid_out)
        """Per element, its layers; those that train are views of `flat`."""
        self._slots = self._views(self.gradient, laid_out)
        compiled = library(like.dtype) if like.device.type == "cpu" else None
        self._sweeps = (
            TorchSweeps(self.layers, self._slots, self.trainable, self.factor)
            if compiled is None
            else CompiledSweeps(compiled, self.layers, self._slots, self.trainable, self.factor)
        )

    def energies_forces(self, batch: Batch) -> EnergiesForces:
        """Return network energies and forces of a batch."""
        atomic, g = self._sweeps.forward(batch)
        per_atom = (atomic.sum(0, dtype=torch.float64) * self.factor).index_select(0, batch.separate)
        energies = per_atom.new_zeros(len(batch.structures)).index_add_(0, batch.structure, per_atom)
        return EnergiesForces(energies, self._sweeps.forces(batch, g))

    def loss_gradient(
        self,
        batch: Batch,
        energies: Tensor,
        forces: Tensor,
        loss: Loss,
        update: Update | None = None,
    ) -> LossAndSlopes:
        """Fill :attr:`gradient` with the gradient of the loss of a batch, or take a step with it.

        Parameters
        ----------
        batch
            Merged structures.
        energies
            Labels for the network energies, float64 eV, shape ``(n_structures,)``.
        forces
            Labels, eV/A, shape ``(n_atoms, 3)``, ordered as :class:`EnergiesForces` says.
        loss
            ``loss(energy_error, force_error, n_atoms, structure)``, see :func:`tlmc.training.loss.batch_loss`. An
            exception that it raises leaves the weights as they are.
        update
            A step of AdamW on :attr:`flat`, whose `slope` is :attr:`gradient`. The gradient need not be there
            afterwards: the compiled sweeps use every part of it up while it is in the cache.
        """
        predicted = self.energies_forces(batch)
        force_error = predicted.forces.sub_(forces)
        energy_error = (predicted.energies - energies).to(force_error.dtype)
        result = loss(energy_error, force_error, batch.n_atoms, batch.structure)
        self._sweeps.along(batch, result.force_slope)
        slopes = result.energy_slope.index_select(0, batch.structure)
        c = torch.empty_like(slopes).index_copy_(0, batch.separate, slopes)
        for k in set(self._present).difference(k for k, _ in batch.slices):
            for slot, on in zip(self._slots[k], self.trainable, strict=True):
                if on:
                    slot.weight.zero_()
                    slot.bias.zero_()
        self._sweeps.reverse(batch, c, update)
        return result

    def potential(self, flat: Tensor | None = None, inactive: float = 1.0) -> AniPotential:
        """Return a model with the trained weights.

        Parameters
        ----------
        flat
            Weights laid out as :attr:`flat` (an average, say); the current ones by default.
        inactive
            Factor for first-layer weights of columns that are zero in the whole set. Their gradient is zero, so weight
            decay is all that happens to them: the product of ``1 - lr * weight_decay`` over the steps.
        """
        views = self._views(self.flat if flat is None else flat, self.layers)
        networks = dict(self.model.networks)
        for k in self._present:
            symbol = self.model.symbols[k]
            layers = list(networks[symbol])
            for number, on in enumerate(self.trainable):
                if on:
                    layers[number] = self._restore(number, views[k][number], layers[number], inactive)
            networks[symbol] = tuple(layers)
        # the loss saw the mean of the members only
        return replace(self.model, networks=networks, committee=False)

    def _lay_out(self, number: int, layer: Layer, like: Tensor) -> Layer:
        """Bring a layer to the engine's precision and device, the first one without its inactive columns."""
        weight, bias = layer
        if number == 0:
            weight = weight[:, self.columns]
        weight, bias = weight.to(like), bias.to(like)
        return Layer(weight.contiguous(), bias.contiguous())

    def _restore(self, number: int, trained: Layer, original: Layer, inactive: float) -> Layer:
        """Undo :meth:`_lay_out` into copies with the original precision."""
        weight, bias = trained.weight.to(original.weight), trained.bias.to(original.bias)
        if number == 0:
            full = original.weight * inactive
            full[:, self.columns] = weight
            return Layer(full, bias.clone())
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
