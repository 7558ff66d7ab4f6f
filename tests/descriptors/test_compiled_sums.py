"""The compiled sums over neighbours against the same written with torch operations."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from helpers import descriptor_structures as ds
from tlmc.descriptors import compiled_sums as kernels
from tlmc.descriptors.soap import SOAP
from tlmc.descriptors.symmetry_functions import SymmetryFunctions

pytestmark = pytest.mark.skipif(
    kernels.kernels() is None, reason="no C compiler here: descriptors are torch operations, which other tests cover"
)

RADIAL = [(0.0, 0.0), (1.0, 0.5), (4.0, 2.0)]
ANGULAR = [(0.01, 1.0, 1.0), (0.01, 4.0, -1.0), (0.05, 16.0, 1.0), (0.05, 2.5, -1.0), (0.01, 80.0, 1.0)]
WIDE = [(0.02, 2.0, 1.0), (0.1, 1.0, -1.0)]
FRAMES = {
    "molecule": lambda: ds.structure("acetamide"),
    "crystal": lambda: ds.structure("naphthalene"),
    "cell shorter than the cutoff": ds.small_cell,
    "one atom and its images": lambda: ds.structure("Cu"),
    "slab": lambda: Atoms("CO", [[0, 0, 0], [0.4, 0.5, 1.0]], cell=[2.5, 2.6, 0], pbc=[True, True, False]),
    "lonely atoms": lambda: Atoms("HCO", [[0, 0, 0], [0, 0, 30.0], [0, 1.1, 30.0]]),
    "no neighbours": lambda: Atoms("H2", [[0, 0, 0], [0, 0, 30.0]]),
}
# what rounding leaves of the digits when nearly dependent orbitals are made orthonormal, 8 of them in the worst case
ORBITALS, OTHERS = 2e-12, 2e-14


def with_torch(monkeypatch, function):
    """Return what a function gives without the compiled sums."""
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "can_serve", lambda environments: False)
        return function()


def counted(monkeypatch, name):
    """Count the calls of a compiled function; return the list that they are written to."""
    calls, library = [], kernels.kernels()
    function = getattr(library, name)

    class Counting:
        def __getattr__(self, other):
            return getattr(library, other)

    counting = Counting()
    setattr(counting, name, lambda *arguments: (calls.append(name), function(*arguments)))
    monkeypatch.setattr(kernels, "_library", lambda: counting)
    return calls


def assert_same(ours, reference, tolerance):
    """Compare with the largest number of the reference; a reference of zeros must be met."""
    assert ours.shape == reference.shape
    assert float((ours - reference).abs().max()) <= tolerance * float(reference.abs().max())


def elements(frame, more):
    return sorted(set(frame.symbols) | set(more))


class TestSoap:
    @pytest.mark.parametrize("cutoff", ["none", "cosine"])
    @pytest.mark.parametrize("basis", ["gto", "polynomial"])
    @pytest.mark.parametrize("name", FRAMES)
    def test_values_and_derivatives(self, name, basis, cutoff, monkeypatch):
        frame = FRAMES[name]()
        soap = SOAP(elements(frame, "N"), 3.6, 5, 4, sigma=0.4, basis=basis, cutoff=cutoff)
        tolerance = ORBITALS if basis == "gto" else OTHERS
        assert_same(soap(frame), with_torch(monkeypatch, lambda: soap(frame)), tolerance)
        centers = range(0, len(frame), 5)
        slopes = soap.derivatives(frame, centers)
        assert_same(slopes, with_torch(monkeypatch, lambda: soap.derivatives(frame, centers)), tolerance)

    @pytest.mark.parametrize("more", ["", "N", "NOFS"])
    @pytest.mark.parametrize(("n_max", "l_max"), [(1, 0), (1, 3), (2, 1), (4, 0), (8, 6), (7, 11)])
    def test_sizes(self, n_max, l_max, more, monkeypatch):
        """Numbers of functions below, at and above a multiple of four; elements that are absent."""
        frame = ds.small_cell()
        for basis, tolerance in (("gto", ORBITALS), ("polynomial", OTHERS)):
            soap = SOAP(elements(frame, more), 4.0, n_max, l_max, sigma=0.5, basis=basis)
            assert_same(soap(frame), with_torch(monkeypatch, lambda soap=soap: soap(frame)), tolerance)
            slopes = soap.derivatives(frame)
            assert_same(slopes, with_torch(monkeypatch, lambda soap=soap: soap.derivatives(frame)), tolerance)

    def test_degrees_up_to_twenty(self, monkeypatch):
        """Nothing overflows or loses digits; the series of the torch operations loses three at degree 20."""
        frame = ds.structure("ethanol")
        soap = SOAP(["H", "C", "O"], 4.0, 3, 20, basis="polynomial")
        assert_same(soap(frame), with_torch(monkeypatch, lambda: soap(frame)), 1e-11)

    @pytest.mark.parametrize("average", ["off", "inner", "outer"])
    def test_averages_of_several_structures(self, average, monkeypatch):
        frames = [ds.structure("ethanol"), ds.small_cell(), ds.structure("methane")]
        soap = SOAP(["H", "C", "O"], 3.0, 3, 2, average=average)
        for centers in (None, [[3, 0], [1, 1], [4]]):
            values = soap(frames, centers)
            assert_same(values, with_torch(monkeypatch, lambda c=centers: soap(frames, c)), ORBITALS)
            for ours, reference in zip(
                soap.derivatives(frames, centers),
                with_torch(monkeypatch, lambda c=centers: soap.derivatives(frames, c)),
                strict=True,
            ):
                assert_same(ours, reference, ORBITALS)

    def test_averaged_derivatives_in_pieces(self, monkeypatch):
        frame = ds.structure("naphthalene")
        soap = SOAP(["H", "C"], 3.0, 3, 2, average="outer")
        at_once = soap.derivatives(frame)
        monkeypatch.setattr("tlmc.descriptors.soap.PLACES_AT_ONCE", 100)
        calls = counted(monkeypatch, "soap_slopes")
        torch.testing.assert_close(soap.derivatives(frame), at_once)
        assert len(calls) > 10

    def test_sparse_jacobian(self, monkeypatch):
        """Of several structures: the atoms that act on a row, and no others."""
        frames = [ds.structure("ethanol"), ds.small_cell(), FRAMES["lonely atoms"]()]
        soap = SOAP(["H", "C", "O"], 3.0, 3, 2)
        environments = soap.environments(frames)
        ours = soap.jacobian(environments)
        reference = with_torch(monkeypatch, lambda: soap.jacobian(environments))
        assert torch.equal(ours.rows, reference.rows)
        assert torch.equal(ours.atoms, reference.atoms)
        assert_same(ours.values, reference.values, ORBITALS)


class TestSymmetryFunctions:
    @pytest.mark.parametrize("name", FRAMES)
    @pytest.mark.parametrize(
        ("radial", "angular", "wide"),
        [(RADIAL, ANGULAR, WIDE), (RADIAL, [], []), ([], ANGULAR, []), ([], [], WIDE)],
        ids=["all", "G2", "G4", "G5"],
    )
    def test_values(self, name, radial, angular, wide, monkeypatch):
        frame = FRAMES[name]()
        functions = SymmetryFunctions(elements(frame, "N"), 3.6, radial, angular, wide)
        assert_same(functions(frame), with_torch(monkeypatch, lambda: functions(frame)), OTHERS)

    def test_several_structures_and_chosen_centres(self, monkeypatch):
        frames, centers = [ds.structure("ethanol"), ds.small_cell()], [[3, 0], [1, 1]]
        functions = SymmetryFunctions(["H", "C", "O"], 4.0, RADIAL, ANGULAR, WIDE)
        ours = functions(frames, centers)
        assert_same(ours, with_torch(monkeypatch, lambda: functions(frames, centers)), OTHERS)

    def test_atoms_in_a_line(self):
        """Cosines of 1 and -1, whose halves rounding may put below zero, where a broken power is not defined."""
        frame = Atoms("C7", np.outer(np.arange(7), [0.7, 0.5, 0.3]))
        values = SymmetryFunctions(["C"], 5.0, [], [(0.01, 2.5, 1.0), (0.01, 1.5, -1.0)])(frame)
        assert bool(torch.isfinite(values).all())


DESCRIPTORS = {
    "SOAP gto": (SOAP(["H", "C", "O"], 3.2, 4, 3, sigma=0.5, cutoff="cosine"), ORBITALS),
    "SOAP polynomial": (SOAP(["H", "C", "O"], 3.2, 3, 5, sigma=0.5, basis="polynomial"), OTHERS),
    "symmetry functions": (SymmetryFunctions(["H", "C", "O"], 3.2, RADIAL, ANGULAR, WIDE), OTHERS),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
class TestBoth:
    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(seed=st.integers(0, 2**32 - 1), periodic=st.booleans())
    def test_random_structures(self, name, seed, periodic):
        descriptor, tolerance = DESCRIPTORS[name]
        rng = np.random.default_rng(seed)
        n_atoms = int(rng.integers(1, 9))
        cell = np.diag(rng.uniform(2.0, 6.0, 3)) + rng.uniform(-0.4, 0.4, (3, 3))
        frame = Atoms(rng.choice(["H", "C", "O"], n_atoms), rng.random((n_atoms, 3)) @ cell, cell=cell, pbc=periodic)
        with pytest.MonkeyPatch.context() as patch:
            assert_same(descriptor(frame), with_torch(patch, lambda: descriptor(frame)), tolerance)

    def test_number_of_threads_does_not_change_a_bit(self, name, monkeypatch):
        frame, before, results, used = ds.structure("benzene"), torch.get_num_threads(), [], []
        # also of those that small structures are not worth
        for least in ("VALUE_PAIRS", "SLOPE_PAIRS", "TRIPLES"):
            monkeypatch.setattr(kernels, least, 1)
        threads_of = kernels._threads
        monkeypatch.setattr(kernels, "_threads", lambda *sizes: (used.append(threads_of(*sizes)), used[-1])[1])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((DESCRIPTORS[name][0](frame), DESCRIPTORS[name][0].derivatives(ds.small_cell())))
        torch.set_num_threads(before)
        assert set(used) == {1, 2, 3}
        for values, slopes in results[1:]:
            assert torch.equal(values, results[0][0])
            if name.startswith("SOAP"):
                assert torch.equal(slopes, results[0][1])

    @pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")  # torch's own, in dual_level
    def test_differentiable_ones_are_torch_operations(self, name):
        descriptor, tolerance = DESCRIPTORS[name]
        environments = descriptor.environments(ds.small_cell())
        value = descriptor.values(environments)
        assert not value.requires_grad
        vectors = environments.vectors.clone().requires_grad_()
        with_history = descriptor.values(environments._replace(vectors=vectors))
        assert with_history.requires_grad
        assert_same(value, with_history.detach(), tolerance)
        with torch.no_grad():
            assert torch.equal(descriptor.values(environments._replace(vectors=vectors)), value)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(environments.vectors, torch.ones_like(environments.vectors))
            tangent = forward_ad.unpack_dual(descriptor.values(environments._replace(vectors=dual))).tangent
        assert tangent is not None
        expected = torch.autograd.functional.jvp(
            lambda v: descriptor.values(environments._replace(vectors=v)), vectors.detach(), torch.ones_like(vectors)
        )[1]
        torch.testing.assert_close(tangent, expected)

    def test_vectors_need_not_follow_each_other(self, name):
        descriptor = DESCRIPTORS[name][0]
        environments = descriptor.environments(ds.small_cell())
        apart = environments.vectors.repeat_interleave(2, 0)[::2]
        assert not apart.is_contiguous()
        turned = environments._replace(vectors=apart)
        assert torch.equal(descriptor.values(turned), descriptor.values(environments))

    def test_compiled_functions_are_used(self, name, monkeypatch):
        calls = counted(monkeypatch, "soap_values" if name.startswith("SOAP") else "symmetry_values")
        DESCRIPTORS[name][0](ds.small_cell())
        assert len(calls) == 1


@pytest.mark.parametrize("setting", [{"TLMC_KERNELS": "off"}, {"CC": "/nonexistent/cc"}])
def test_without_compiled_functions(setting, tmp_path):
    """In a process of its own: the same numbers, and a warning unless one asked for it."""
    program = (
        "import logging; logging.basicConfig()\n"
        "from ase.build import molecule\n"
        "from tlmc.descriptors import SOAP, compiled_sums\n"
        "print(SOAP(['H', 'O'], 3.0, 3, 2)(molecule('H2O')).sum().item(), compiled_sums.kernels())\n"
    )
    environment = os.environ | {"TLMC_CACHE_DIR": str(tmp_path)} | setting
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    total, found = answer.stdout.split()
    frame = Atoms("OH2", [[0, 0, 0.119262], [0, 0.763239, -0.477047], [0, -0.763239, -0.477047]])
    assert float(total) == pytest.approx(float(SOAP(["H", "O"], 3.0, 3, 2)(frame).sum()), rel=1e-11)
    assert found == "None"
    assert ("descriptors go on without the compiled kernels" in answer.stderr) == ("CC" in setting)
