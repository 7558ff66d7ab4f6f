"""Independent references for potentials: torchani's models with an exact activation, and a small model made up here."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from ase.units import Hartree

from tlmc.descriptors.aev import AEVParameters
from tlmc.families.ani import Layer
from tlmc.families.ani.model import AniPotential as Potential
from tlmc.potentials.registry import weights_path

with warnings.catch_warnings():
    # said on first import, about optional CUDA kernels
    warnings.filterwarnings("ignore", message="The extensions", category=UserWarning)
    import torchani.aev
    import torchani.arch
    import torchani.models

# geometry and energy of torchani's documentation; the registry of data sets quotes the energy
METHANE = Atoms(
    "CH4",
    [
        [0.03192167, 0.00638559, 0.01301679],
        [-0.83140486, 0.39370209, -0.26395324],
        [-0.66518241, -0.84461308, 0.20759389],
        [0.45554739, 0.54289633, 0.81170881],
        [0.66091919, -0.16799635, -0.91037834],
    ],
)


class ExactCelu(torch.nn.Module):
    """CELU(0.1); autograd of torch.celu itself rounds 1/alpha to float32, a relative error of 1.5e-8."""

    def forward(self, x):
        return torch.where(x > 0, x, 0.1 * torch.expm1(x.clamp(max=0.0) / 0.1))


def with_exact_celu(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "activation", None), torch.nn.Module):
            module.activation = ExactCelu()
    return model


def ani2x_from_the_mirror():
    """Let torchani read the published file directly, as the hub's client writes beside what it reads."""

    def read(name: str, private: bool) -> dict[str, torch.Tensor]:
        return torch.load(weights_path("ani2x").with_name(name), weights_only=True)

    return mock.patch.object(torchani.models, "_fetch_state_dict", read)


def torchani_ani2x() -> torchani.arch.ANI:
    """torchani.models.ANI2x() itself."""
    with ani2x_from_the_mirror():
        return torchani.models.ANI2x()


class Auto3DAni2xt(torch.nn.Module):
    """ANI-2xt as in ``Auto3D/engines/models/ani2xt.py`` of auto3d 3.2.3, on the AEVs of torchani; Hartree, float64."""

    WIDTHS = (256, 192, 160), (224, 192, 160), *((192, 160, 128),) * 2, *((160, 128, 96),) * 3
    SYMBOLS = ("H", "C", "N", "O", "F", "S", "Cl")

    def __init__(self) -> None:
        super().__init__()
        radial = torchani.aev.ANIRadial(
            eta=1.6e1,
            shifts=[0.9, 1.16875, 1.4375, 1.70625, 1.975, 2.24375, 2.5125, 2.78125]
            + [3.05, 3.31875, 3.5875, 3.85625, 4.125, 4.39375, 4.6625, 4.93125],
            cutoff=5.2,
        )
        angular = torchani.aev.ANIAngular(
            eta=8.0,
            zeta=32.0,
            shifts=[0.9, 1.55, 2.2, 2.85],
            sections=[0.19634954, 0.58904862, 0.98174770, 1.3744468, 1.7671459, 2.1598449, 2.5525440, 2.9452431],
            cutoff=3.5,
        )
        self.computer = torchani.aev.AEVComputer(radial, angular, len(self.SYMBOLS))
        self.networks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(self.computer.out_dim, a),
                ExactCelu(),
                torch.nn.Linear(a, b),
                ExactCelu(),
                torch.nn.Linear(b, c),
                ExactCelu(),
                torch.nn.Linear(c, 1),
            )
            for a, b, c in self.WIDTHS
        )
        self.networks.load_state_dict(torch.load(weights_path("ani2xt"), map_location="cpu", weights_only=True))
        self.double()
        shifts = [-0.5984, -38.0826, -54.7031, -75.1901, -99.8006, -398.1224, -460.1387]
        self.shifts = torch.tensor(shifts, dtype=torch.float64)

    def forward(self, species_positions, cell=None, pbc=None):
        numbers, positions = species_positions
        order = {atomic_numbers[symbol]: k for k, symbol in enumerate(self.SYMBOLS)}
        species = torch.tensor([[order[int(z)] for z in numbers[0]]])
        aevs = self.computer(species, positions, cell, pbc)[0]
        parts = [self.networks[s](aev) + self.shifts[s] for s, aev in zip(species[0].tolist(), aevs, strict=True)]
        return SimpleNamespace(energies=torch.stack(parts).sum(0))


def torchani_energy_and_forces(model: torch.nn.Module, frame: Atoms) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/A) by autograd, in the precision of the model."""
    dtype = next(model.parameters()).dtype
    positions = torch.tensor(frame.positions, dtype=dtype)[None].requires_grad_()
    cell = torch.tensor(frame.cell.array, dtype=dtype) if frame.pbc.any() else None
    pbc = torch.tensor(frame.pbc) if frame.pbc.any() else None
    energy = model((torch.tensor(frame.numbers)[None], positions), cell, pbc).energies
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    return energy.item() * Hartree, -gradient[0].numpy() * Hartree


def toy_potential(symbols=("H", "C", "O", "S", "Cl"), members=3, seed=0, dtype=torch.float64) -> Potential:
    """A small ensemble with the structure of the ANI models and weights of no meaning."""
    generator = torch.Generator().manual_seed(seed)
    aev = AEVParameters(
        r_cut_radial=5.0,
        eta_radial=4.0,
        shifts_radial=tuple(0.75 + 0.25 * k for k in range(16)),
        r_cut_angular=3.5,
        eta_angular=2.0,
        zeta=8.0,
        shifts_angular=(0.75, 1.5, 2.25, 3.0),
        sections=(0.375, 1.125, 2.0, 2.75),
    )
    widths = (aev.length(len(symbols)), 12, 10, 8, 1)

    def layer(n_in: int, n_out: int) -> Layer:
        weight = torch.randn(members, n_in, n_out, generator=generator, dtype=torch.float64) / n_in**0.5
        return Layer(weight.to(dtype), 0.1 * torch.randn(members, 1, n_out, generator=generator).to(dtype))

    return Potential(
        name="toy",
        symbols=tuple(symbols),
        aev=aev,
        networks={s: tuple(layer(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)) for s in symbols},
        self_energies={s: -10.0 * (k + 1) for k, s in enumerate(symbols)},
        fingerprint="made up",
        committee=True,
    )
