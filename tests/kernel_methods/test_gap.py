"""GAP against gap_fit of the QUIP package, against a dense Gaussian process, and against physics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quippy.descriptors import Descriptor as QuippyDescriptor
from quippy.potential import Potential

from tlmc.data.loading import load_dataset
from tlmc.descriptors.base import LocalDescriptor, SparseJacobian
from tlmc.descriptors.soap import SOAP
from tlmc.errors import ConfigError, DataError
from tlmc.kernel_methods import GAP
from tlmc.kernel_methods import gap as module
from tlmc.potentials.reference import ReferenceEnergies


@pytest.fixture(scope="module")
def ethanol():
    return load_dataset("ethanol")


@pytest.fixture(scope="module")
def naphthalene():
    return load_dataset("naphthalene")


def small_soap(species=("H", "C"), r_cut=3.5):
    return SOAP(species, r_cut=r_cut, n_max=3, l_max=2, sigma=0.5, cutoff="cosine")


@pytest.fixture(scope="module")
def crystal(naphthalene):
    """Return a potential of naphthalene, crystal and molecule."""
    return GAP(small_soap(), n_sparse=25).fit(naphthalene.subset([0, 20, 45, 60, 100, 121, 125]))


SOAP_TEXT = "cutoff=4.0 cutoff_transition_width=1.0 atom_sigma=0.5 n_max=4 l_max=3 add_species=F n_Z=1 n_species=3"
ENERGIES = {"H": -13.0, "C": -48.0, "O": -110.0}


class QuippySOAP(LocalDescriptor):
    """The SOAP of QUIP, whose radial functions are not ours, so that the two potentials see the same numbers."""

    def __init__(self):
        super().__init__(["H", "C", "O"])
        self.engines = [QuippyDescriptor(f"soap {SOAP_TEXT} Z={number} species_Z={{1 6 8}}") for number in (1, 6, 8)]

    @property
    def reach(self):
        return 4.0

    n_features = 313
    feature_names = ()

    def environments(self, structures, centers=None):
        self.frames = [structures] if not isinstance(structures, list | tuple) else list(structures)
        return super().environments(structures, centers)

    def values(self, environments):
        return self._calculate()[0]

    def jacobian(self, environments):
        return self._calculate()[1]

    def _calculate(self):
        values = torch.zeros(sum(map(len, self.frames)), self.n_features, dtype=torch.float64)
        rows, atoms, slopes, first = [], [], [], 0
        for frame in self.frames:
            for engine in self.engines:
                result = engine.calc(frame, grad=True)
                centre = result["ci"] - 1 + first
                values[centre] = torch.from_numpy(result["data"])
                row, atom = result["grad_index_0based"].T
                rows.append(row + first)
                atoms.append(atom + first)
                slopes.append(result["grad_data"].transpose(0, 2, 1))
            first += len(frame)
        columns = (torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in (rows, atoms))
        return values, SparseJacobian(*columns, torch.from_numpy(np.concatenate(slopes)))


@pytest.mark.slow
def test_energies_and_forces_are_those_of_gap_fit(ethanol, tmp_path):
    train, asked = ethanol.subset(np.arange(3, 1000, 140)), ethanol.subset([40, 333])
    written = []
    for frame, energy, forces in zip(train.frames, train.energies, train.forces, strict=True):
        copy = frame.copy()
        copy.info = {"energy": energy}
        copy.arrays["force"] = forces
        copy.set_cell([20.0, 20.0, 20.0])
        copy.pbc = True
        written.append(copy)
    ase.io.write(tmp_path / "train.xyz", written, format="extxyz", columns=["symbols", "positions", "force"])
    terms = [
        f"soap {SOAP_TEXT} Z={number} species_Z={{{{1 6 8}}}} zeta=4 delta=0.5 covariance_type=dot_product "
        f"sparse_method=cur_points n_sparse={n}"
        for number, n in ((1, 20), (6, 10), (8, 6))
    ]
    command = [
        str(Path(sys.executable).with_name("gap_fit")),
        "atoms_filename=train.xyz",
        f"gap={{{' : '.join(terms)}}}",
        "default_kernel_regularisation={0.002 0.08 0.0 0.0}",
        "force_parameter_name=force",
        f"e0={{{':'.join(f'{symbol}:{energy}' for symbol, energy in ENERGIES.items())}}}",
        f"sparse_jitter={module.JITTER * 0.5**2}",
        "gp_file=gp.xml",
        "do_copy_atoms_file=F",
        "rnd_seed=1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

    points = {}
    for path, (symbol, n) in zip(
        sorted(tmp_path.glob("gp.xml.sparseX.*")), (("H", 20), ("C", 10), ("O", 6)), strict=True
    ):
        points[symbol] = torch.from_numpy(np.loadtxt(path).reshape(n, 313))
    ours = GAP(
        QuippySOAP(),
        delta=0.5,
        energy_sigma=0.002,
        force_sigma=0.08,
        reference=ReferenceEnergies(ENERGIES, "per_element"),
    )
    predicted = ours.fit(train, points).predict(asked.frames)

    potential = Potential(param_filename=str(tmp_path / "gp.xml"))
    for k, frame in enumerate(asked.frames):
        copy = frame.copy()
        copy.set_cell([20.0, 20.0, 20.0])
        copy.pbc = True
        copy.calc = potential
        forces = copy.get_forces()
        assert np.linalg.norm(predicted.forces[k] - forces) < 1e-6 * np.linalg.norm(forces)
        assert predicted.energies[k] == pytest.approx(copy.get_potential_energy(), abs=1e-6)
    # and both have learnt something
    error, label = (np.concatenate(part) for part in (predicted.forces, asked.forces))
    assert ((error - label) ** 2).sum() < 0.8 * (label**2).sum()


class TestAgainstADenseProcess:
    """Covariances by automatic differentiation, and the posterior from the labels' own covariance matrix."""

    @staticmethod
    def energy(soap, positions, frame, points, point_species):
        """Return k(E(x), point) for all points by plain sums, differentiable in the positions."""
        environments = soap.environments(frame)
        vectors = positions[environments.neighbour] - positions[environments.atoms[environments.centre]]
        rows = torch.nn.functional.normalize(soap.values(environments._replace(vectors=vectors)))
        same = environments.species[:, None] == point_species
        return torch.where(same, (rows @ points.T) ** 4, 0.0).sum(0)

    @pytest.mark.slow
    def test_covariances_predictions_and_uncertainty(self, ethanol):
        soap = small_soap(("H", "C", "O"))
        train, asked = ethanol.subset([10, 800]), ethanol.subset([600])
        potential = GAP(soap, n_sparse=1000, delta=1.0).fit(train)
        points = torch.cat(list(potential.representatives_.values()))
        species = torch.cat([torch.full((len(p),), c) for c, p in enumerate(potential.representatives_.values())])
        blocks_e, blocks_f = [], []
        for frame in (*train.frames, *asked.frames):
            x = torch.from_numpy(frame.positions)
            blocks_e.append(self.energy(soap, x, frame, points, species)[None])
            slope = torch.autograd.functional.jacobian(lambda p, f=frame: self.energy(soap, p, f, points, species), x)
            blocks_f.append(-slope.flatten(1).T)
        covariances = potential._covariances(train.frames)
        torch.testing.assert_close(covariances.energies, torch.cat(blocks_e[:2]), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(covariances.forces, torch.cat(blocks_f[:2]), rtol=1e-9, atol=1e-10)

        # Bayesian linear regression on the features L^-1 k, by the covariance of the labels: no representatives left
        half = [
            torch.linalg.solve_triangular(potential.prior_factor_, torch.cat(b).T, upper=False)
            for b in (blocks_e[:2] + blocks_f[:2], blocks_e[2:] + blocks_f[2:])
        ]
        y = torch.cat(
            [
                torch.from_numpy(train.energies - potential.reference_.energies(train.frames)),
                torch.from_numpy(np.concatenate(train.forces)).flatten(),
            ]
        )
        noise = torch.cat([torch.full((2,), 9e-6), torch.full((54,), 0.05**2)]).double()
        labels = half[0].T @ half[0] + torch.diag(noise)
        answer = half[1].T @ half[0] @ torch.linalg.solve(labels, y)
        predicted = potential.predict(asked.frames)
        energy = predicted.energies - potential.reference_.energies(asked.frames)
        np.testing.assert_allclose(energy, answer[:1].numpy(), atol=1e-6)
        np.testing.assert_allclose(predicted.forces[0].flatten(), answer[1:].numpy(), atol=1e-5)

        cross = half[0].T @ half[1][:, :1]
        own = torch.cat([soap(frame) for frame in asked.frames])
        rows = torch.nn.functional.normalize(own)
        kinds = soap.environments(asked.frames).species
        prior = torch.where(kinds[:, None] == kinds, (rows @ rows.T) ** 4, 0.0).sum()
        variance = prior - (cross.T @ torch.linalg.solve(labels, cross))[0, 0]
        assert potential.energy_std(asked.frames)[0] == pytest.approx(float(variance) ** 0.5, rel=1e-4)


class TestPhysics:
    @pytest.mark.parametrize("frame_number", [30, 122])
    def test_forces_are_the_negative_gradient(self, crystal, naphthalene, frame_number):
        frame, step = naphthalene.frames[frame_number], 1e-4
        forces = crystal.predict([frame]).forces[0]
        for atom, axis in ((0, 0), (17, 2)):
            moved = [frame.copy(), frame.copy()]
            for sign, copy in zip((1, -1), moved, strict=True):
                copy.positions[atom, axis] += sign * step
            energies = crystal.predict(moved).energies
            assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-6)

    def test_is_extensive_and_periodic(self, crystal, naphthalene):
        frame = naphthalene.frames[50]
        energy, (forces,) = crystal.predict([frame])[:2]
        larger = frame.repeat((1, 2, 1))
        energy_2, (forces_2,) = crystal.predict([larger])[:2]
        assert energy_2 == pytest.approx(2 * energy, abs=1e-8)
        np.testing.assert_allclose(forces_2, np.concatenate([forces, forces]), atol=1e-9)

    @settings(max_examples=5, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_rotation_translation_wrapping_and_order(self, crystal, naphthalene, seed):
        rng = np.random.default_rng(seed)
        frame = naphthalene.frames[80]
        energy, (forces,) = crystal.predict([frame])[:2]
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        order = rng.permutation(len(frame))
        changed = frame[order]
        changed.set_cell(frame.cell.array @ rotation)
        changed.positions = (frame.positions[order] + rng.normal(size=3)) @ rotation
        changed.wrap()
        energy_2, (forces_2,) = crystal.predict([changed])[:2]
        assert energy_2 == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(forces_2, forces[order] @ rotation, atol=1e-8)

    def test_local_energies_add_up(self, crystal, naphthalene):
        frame = naphthalene.frames[10]
        local = crystal.local_energies(frame)
        assert local.shape == (36,)
        assert local.sum() == pytest.approx(crystal.predict([frame]).energies[0], abs=1e-8)

    def test_molecules_far_apart_do_not_see_each_other(self, crystal, naphthalene):
        one = naphthalene.frames[123].copy()
        one.pbc = False
        both = one.copy()
        both.extend(one)
        both.positions[len(one) :] += [60.0, 0.0, 0.0]
        energies = crystal.predict([one, both]).energies
        assert energies[1] == pytest.approx(2 * energies[0], abs=1e-9)


class TestFit:
    def test_more_representatives_fit_better_and_know_more(self, ethanol):
        train, asked = ethanol.subset(np.arange(0, 1000, 60)), ethanol.subset(np.arange(30, 1000, 120))
        soap = small_soap(("H", "C", "O"))
        errors, stds = [], []
        for n in (3, 15, 60):
            potential = GAP(soap, n_sparse=n).fit(train)
            learnt = potential.predict(train.frames)
            errors.append(np.mean((np.array(learnt.forces) - np.array(train.forces)) ** 2))
            stds.append(potential.energy_std(asked.frames).mean())
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.05 * np.mean(np.array(train.forces) ** 2)

    def test_the_uncertainty_grows_away_from_the_data(self, ethanol):
        potential = GAP(small_soap(("H", "C", "O")), n_sparse=40).fit(ethanol.subset(np.arange(0, 1000, 60)))
        frame = ethanol.frames[0]
        far = frame.copy()
        far.positions *= 1.15
        std = potential.energy_std([frame, far])
        assert std[1] > 3 * std[0]

    @pytest.mark.parametrize("selection", ["cur", "farthest"])
    def test_representatives_are_environments_of_the_frames(self, ethanol, selection):
        train = ethanol.subset([0, 300, 600])
        soap = small_soap(("H", "C", "O"))
        potential = GAP(soap, n_sparse=5, selection=selection).fit(train)
        assert {symbol: len(rows) for symbol, rows in potential.representatives_.items()} == {"H": 5, "C": 5, "O": 3}
        rows = torch.nn.functional.normalize(soap(train.frames))
        for points in potential.representatives_.values():
            assert float(torch.cdist(points, rows).amin(1).max()) < 1e-6

    def test_batches_make_no_difference(self, ethanol, monkeypatch):
        train = ethanol.subset(np.arange(0, 1000, 100))
        soap = small_soap(("H", "C", "O"))
        whole = GAP(soap, n_sparse=20).fit(train).predict(train.frames)
        monkeypatch.setattr(module, "ATOMS_AT_ONCE", 20)
        parts = GAP(soap, n_sparse=20).fit(train).predict(train.frames)
        np.testing.assert_allclose(parts.energies, whole.energies, rtol=0, atol=1e-6)
        np.testing.assert_allclose(parts.forces, whole.forces, atol=1e-5)

    def test_errors(self, ethanol, crystal):
        soap = small_soap(("H", "C", "O"))
        train = ethanol.subset([0, 1])
        with pytest.raises(ConfigError, match="selection must be one of"):
            GAP(soap, selection="random").fit(train)
        with pytest.raises(ConfigError, match=r"force_sigma must be positive, got 0\.0"):
            GAP(soap, force_sigma=0.0).fit(train)
        with pytest.raises(ConfigError, match="must not be averaged"):
            GAP(SOAP(["H"], 3.0, 2, 2, average="inner")).fit(train)
        with pytest.raises(DataError, match="at least one training frame"):
            GAP(soap).fit(ethanol.subset([]))
        without = GAP(soap, n_sparse=4).fit(
            train, {"H": soap(train.frames[0], [5]), "C": soap(train.frames[0], [0]), "O": soap(train.frames[0], [2])}
        )
        del without.representatives_["O"]
        with pytest.raises(DataError, match="no environment of O was learnt from"):
            without.predict(train.frames)
