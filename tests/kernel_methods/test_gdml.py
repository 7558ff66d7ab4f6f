"""GDML and sGDML against the package of the method's authors, and against physics."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from tlmc.data.loading import load_dataset
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.kernel_methods import GDML, Matern52, find_permutations
from tlmc.kernel_methods.gdml import inverse_distances, pair_permutations
from tlmc.kernel_methods.permutations import complete_group

with warnings.catch_warnings():
    # it looks for newer versions of itself and for packages that it could use
    warnings.simplefilter("ignore")
    from sgdml.predict import GDMLPredict
    from sgdml.train import GDMLTrain
    from sgdml.utils import perm
# it gives every logger made from now on a handler of its own, also those of other packages
logging.setLoggerClass(logging.Logger)


@pytest.fixture(scope="module")
def ethanol():
    return load_dataset("ethanol")


@pytest.fixture(scope="module")
def few(ethanol):
    return ethanol.subset(np.arange(5, 1000, 66))


@pytest.fixture(scope="module")
def field(few):
    return GDML(sigma=8.0, lambda_=1e-10).fit(few)


def reference(dataset, sigma, lambda_, permutations):
    """Return the sgdml package's force field."""
    positions = np.array([frame.positions for frame in dataset.frames])
    task = {
        "type": "t",
        "code_version": "0",
        "dataset_name": "ethanol",
        "dataset_theory": "GFN2-xTB",
        "z": dataset.frames[0].numbers,
        "R_train": positions,
        "F_train": np.array(dataset.forces),
        "E_train": dataset.energies,
        "idxs_train": np.arange(len(dataset)),
        "md5_train": "",
        "idxs_valid": np.arange(0),
        "md5_valid": "",
        "sig": sigma,
        "lam": lambda_,
        "use_E": True,
        "use_E_cstr": False,
        "use_sym": True,
        "perms": permutations,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            model = GDMLTrain(max_memory=4, max_processes=1).train(task)
            return GDMLPredict(model, max_processes=1)
        finally:
            logging.disable(logging.NOTSET)


@pytest.mark.parametrize("symmetric", [False, True])
def test_forces_and_energies_are_those_of_the_sgdml_package(ethanol, few, symmetric):
    permutations = perm.find_perms(np.array([f.positions for f in few.frames]), few.frames[0].numbers, max_processes=1)
    assert len(permutations) > 1
    group = permutations if symmetric else np.arange(9)[None]
    ours = GDML(sigma=12, lambda_=1e-9, permutations="find" if symmetric else "none").fit(few)
    assert {tuple(p) for p in ours.permutations_.tolist()} == {tuple(p) for p in group.tolist()}
    theirs = reference(few, 12, 1e-9, group)
    asked = ethanol.subset(np.arange(20, 1000, 97))
    energies, forces = theirs.predict(np.array([f.positions for f in asked.frames]).reshape(len(asked), -1))
    predicted = ours.predict(asked.frames)
    error = np.linalg.norm(np.array(predicted.forces).reshape(forces.shape) - forces) / np.linalg.norm(forces)
    assert error < 1e-6
    np.testing.assert_allclose(predicted.energies - ours.constant_, energies - theirs.c, atol=1e-6)
    assert predicted.energies == pytest.approx(energies, abs=1e-6)


class TestCovariance:
    def test_blocks_are_the_hessian_of_the_matern_kernel(self, few):
        """The written-out Hessian equals the derivative by automatic differentiation."""
        two = few.subset([0, 1])
        field = GDML(sigma=8.0, permutations="none").fit(two)
        i, j = np.tril_indices(9, -1)

        def kernel(a, b):
            descriptors = [1.0 / (x.view(9, 3)[i] - x.view(9, 3)[j]).norm(dim=1) for x in (a, b)]
            return Matern52(1.0, 8.0).shape((descriptors[0] - descriptors[1]).norm() / 8.0)

        a, b = (torch.from_numpy(frame.positions).flatten() for frame in two.frames)
        hessian = torch.autograd.functional.hessian(kernel, (a, b))
        torch.testing.assert_close(field.force_covariance()[:27, 27:], hessian[0][1], rtol=1e-9, atol=1e-12)

    def test_is_symmetric_and_positive_semidefinite(self, field):
        covariance = field.force_covariance()
        torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-13)
        values = torch.linalg.eigvalsh(covariance)
        assert float(values.min()) > -1e-12 * float(values.max())

    def test_descriptor_derivatives(self, few):
        frame = few.frames[3]
        x = torch.from_numpy(frame.positions)[None].requires_grad_()
        i, j = np.tril_indices(9, -1)
        descriptor = 1.0 / (x[:, i] - x[:, j]).norm(dim=-1)
        values, jacobian = inverse_distances([frame])
        torch.testing.assert_close(values, descriptor.detach())
        for k in (0, 7, 35):
            (row,) = torch.autograd.grad(descriptor[0, k], x, retain_graph=True)
            torch.testing.assert_close(jacobian[0, k], row.flatten())

    def test_exchanged_atoms_are_exchanged_pairs(self, few):
        order = np.array([0, 1, 2, 4, 5, 3, 7, 6, 8])
        frame = few.frames[0]
        expected = inverse_distances([frame[order]])[0]
        torch.testing.assert_close(inverse_distances([frame])[0][:, pair_permutations(order[None])[0]], expected)


class TestPhysics:
    def test_forces_are_the_negative_gradient_of_the_energy(self, field, ethanol):
        frame, step = ethanol.frames[500], 1e-4
        forces = field.predict([frame]).forces[0]
        for atom, axis in ((0, 0), (3, 1), (8, 2)):
            moved = [frame.copy(), frame.copy()]
            for sign, copy in zip((1, -1), moved, strict=True):
                copy.positions[atom, axis] += sign * step
            energies = field.predict(moved).energies
            assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-6)

    def test_no_work_is_done_around_a_closed_loop(self, field, ethanol):
        """The trapezoidal rule on a smooth closed path converges faster than any power of the step."""
        rng = np.random.default_rng(0)
        frame = ethanol.frames[100]
        a, b = 0.1 * rng.normal(size=(2, 9, 3))
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        path = []
        for angle in angles:
            path.append(frame.copy())
            path[-1].positions += np.cos(angle) * a + np.sin(2 * angle) * b
        forces = np.array(field.predict(path).forces)
        tangents = -np.sin(angles)[:, None, None] * a + 2 * np.cos(2 * angles)[:, None, None] * b
        power = (forces * tangents).sum((1, 2))
        assert abs(power.mean()) < 1e-8
        assert np.abs(power).mean() > 0.1

    def test_rotation_translation_and_exchange(self, field, ethanol):
        frame = ethanol.frames[321]
        energy, (forces,) = field.predict([frame])[:2]
        turned = frame.copy()
        turned.rotate(40, (1, 2, 3))
        turned.translate((3.0, -1.0, 0.5))
        energy_2, (forces_2,) = field.predict([turned])[:2]
        assert energy_2 == pytest.approx(energy, abs=1e-9)
        turn = Atoms("H", [[0, 0, 0]])
        rotation = np.array([_rotated(turn, axis) for axis in np.eye(3)])
        np.testing.assert_allclose(forces_2, forces @ rotation, atol=1e-8)
        for p in field.permutations_:
            energy_3, (forces_3,) = field.predict([frame[p]])[:2]
            assert energy_3 == pytest.approx(energy, abs=1e-9)
            np.testing.assert_allclose(forces_3, forces[p], atol=1e-8)

    def test_learns_what_it_is_taught(self, field, few, ethanol):
        learnt = field.predict(few.frames)
        assert np.abs(np.array(learnt.forces) - np.array(few.forces)).max() < 1e-3
        more = ethanol.subset(np.arange(30, 1000, 60))
        error = np.array(field.predict(more.frames).forces) - np.array(more.forces)
        # fifteen frames are enough to explain more than nine tenths of the variance
        assert (error**2).mean() < 0.1 * (np.array(more.forces) ** 2).mean()


def _rotated(atoms, axis):
    atoms.positions[0] = axis
    atoms.rotate(40, (1, 2, 3))
    return atoms.positions[0].copy()


class TestPermutations:
    def test_water_and_ammonia(self):
        rng = np.random.default_rng(0)
        for name, expected in (("H2O", 2), ("NH3", 6)):
            start = molecule(name)
            frames = []
            for _ in range(12):
                # equal atoms in any order, as a long trajectory would show them
                order = np.arange(len(start))
                hydrogen = np.flatnonzero(start.numbers == 1)
                order[hydrogen] = rng.permutation(hydrogen)
                frames.append(start[order])
                frames[-1].rattle(0.05, rng=rng)
            assert len(find_permutations(frames)) == expected

    def test_copies_of_one_frame_show_nothing(self):
        assert find_permutations([molecule("CH4")] * 3).tolist() == [[0, 1, 2, 3, 4]]

    def test_closure(self):
        group = complete_group(np.array([[1, 2, 0, 3], [1, 0, 2, 3]]))
        assert len(group) == 6
        assert group[0].tolist() == [0, 1, 2, 3]
        elements = {tuple(p) for p in group.tolist()}
        assert all(tuple(a[k] for k in b) in elements for a in elements for b in elements)

    def test_errors(self):
        with pytest.raises(DataError, match="frame 1 holds H2O, frame 0 OH2"):
            find_permutations([molecule("H2O"), molecule("H2O")[[1, 2, 0]]])
        with pytest.raises(DataError, match="at least one frame"):
            find_permutations([])
        with pytest.raises(ModelError, match="2 matchings of atoms generate more than 100 permutations"):
            complete_group(np.array([[1, 0, 2, 3, 4], [1, 2, 3, 4, 0]]))


class TestErrors:
    def test_crystals_are_refused(self):
        with pytest.raises(DataError, match=r"frame 0 is periodic .*use GAP for crystals"):
            GDML().fit(load_dataset("naphthalene").subset([0, 1]))

    def test_another_molecule(self, field):
        with pytest.raises(DataError, match="frame 0 holds OH2, not C2OH6 in this order"):
            field.predict([molecule("H2O")])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sigma": 0.0}, r"must be positive, got 0\.0 and 1e-10"),
            ({"permutations": "all"}, "must be 'none', 'find' or an array, got 'all'"),
            ({"permutations": np.zeros((1, 9), dtype=int)}, r"rows of the numbers 0 to 8, got shape \(1, 9\)"),
            ({"permutations": np.roll(np.arange(9), 1)[None]}, "atoms of one element only"),
        ],
    )
    def test_bad_arguments(self, few, arguments, message):
        with pytest.raises(ConfigError, match=message):
            GDML(**arguments).fit(few)

    def test_a_singular_covariance(self, few):
        with pytest.raises(ModelError, match="54 force components with sigma 8.* raise lambda_"):
            GDML(sigma=8.0, lambda_=1e-30, permutations="none").fit(few.subset([0, 0]))
