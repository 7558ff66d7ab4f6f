"""Devices: what cannot be had is refused, structures move once, and a step never reads from the device."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import molecule

from helpers.descriptor_structures import small_cell
from helpers.engine_gradients import engine_gradient, labels
from helpers.potential_references import toy_potential
from helpers.training import interrupted_after, labelled, quick, same_weights, student, teacher, trainer_of
from tlmc.data.splits import split_dataset
from tlmc.devices import find_device
from tlmc.errors import ConfigError
from tlmc.families.ani import engine as engine_module
from tlmc.families.ani.batch import merge
from tlmc.families.ani.cache import build_cache
from tlmc.families.ani.device_cache import DeviceCache
from tlmc.families.ani.engine import Engine, TorchSweeps
from tlmc.potentials import predict
from tlmc.training.distributed import Group
from tlmc.training.fine_tuning import finetune
from tlmc.training.loss import batch_loss
from tlmc.training.optimizer import Update

META = torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:N, got"):
        find_device(name)


def test_missing_gpus_are_named():
    assert find_device("cpu") == torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"device 'cuda:{n_gpus}' is not there: torch .*(without CUDA|sees {n_gpus})"):
        find_device(f"cuda:{n_gpus}")
    if n_gpus == 0:
        data = labelled(8)
        with pytest.raises(ConfigError, match="device 'cuda' is not there"):
            finetune(student(), data, split_dataset(data, seed=0), quick(), device="cuda")


def test_structures_move_once_as_far_as_there_is_room(tmp_path):
    cache = build_cache(toy_potential(), [small_cell(), molecule("CH4"), molecule("H2O")], torch.float32, tmp_path)
    everything = DeviceCache(cache, META)
    assert all(everything[i] is everything[i] for i in range(len(everything)))
    assert everything[0].values.device == META
    assert everything[0].species.device.type == "cpu"
    some = DeviceCache(cache, META, room=everything[0].values.nbytes)
    assert some[0] is not some[0]  # larger than what is left with its other arrays
    assert some[2] is some[2]


def meta_step(cache, frames):
    """One step of an engine whose tensors have a device but no data."""
    moved = DeviceCache(cache, META)
    engine = Engine(toy_potential(members=3), moved, (True,) * 4)
    assert isinstance(engine._sweeps, TorchSweeps)
    batch = merge([moved[i] for i in range(len(frames))])
    for tensor in (batch.X, batch.separate, batch.v_rows, batch.structure, batch.n_atoms, engine.flat):
        assert tensor.device == META
    moments = [torch.zeros_like(engine.flat) for _ in range(2)]
    n_atoms = sum(map(len, frames))
    return engine.loss_gradient(
        batch,
        torch.zeros(len(frames), dtype=torch.float64, device=META),
        torch.zeros(n_atoms, 3, dtype=torch.float64, device=META),
        partial(batch_loss, lambda_=0.5),
        Update(engine.flat, *moments, engine.gradient, 1e-3, 0.1, 1),
    )


def test_a_step_needs_nothing_from_the_device(tmp_path):
    """Tensors of the meta device have no data: whatever reads a number, or mixes in a host array, raises."""
    frames = [small_cell(), molecule("CH3OH"), molecule("CH4")]
    cache = build_cache(toy_potential(), frames, torch.float64, tmp_path)
    assert meta_step(cache, frames).loss.device == META
    for read in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"meta tensor"):
            read(torch.zeros(1, device=META))


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.1, "ema_decay": 0.9, "loss": "huber"}], ids=["plain", "all"])
def test_an_epoch_reads_from_the_device_once_per_part_whatever_the_number_of_steps(monkeypatch, changes):
    """Counted on the processor, with the operations that a GPU would run."""
    monkeypatch.setattr(engine_module, "library", lambda dtype: None)
    data = labelled()
    parts = split_dataset(data, seed=0)
    counts = []
    for batch_size in (1, 7):
        reads = []
        config = quick(batch_size=batch_size, **changes)
        trainer = trainer_of(student(), data, parts, config)
        state = trainer.start()
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__"):
                original = getattr(torch.Tensor, name)

                def counted(self, *args, _original=original, _name=name, _reads=reads, **kwargs):
                    _reads.append(_name)
                    return _original(self, *args, **kwargs)

                patch.setattr(torch.Tensor, name, counted)
            trainer.epoch(state)
        assert state.step == -(-len(parts.train) // batch_size)
        counts.append(sorted(reads))
    assert counts[0] == counts[1] == ["tolist"] * 3  # losses and errors of both parts, and whether all is finite


def test_operations_of_a_gpu_train_to_the_same_weights(monkeypatch):
    """The path of a GPU, on the processor, against the compiled sweeps; several structures go as one Jacobian."""
    data = labelled()
    parts, config = split_dataset(data, seed=0), quick(epochs=3, batch_size=4, precision="float64")
    compiled = finetune(student(), data, parts, config)
    monkeypatch.setattr(engine_module, "library", lambda dtype: None)
    plain = finetune(student(), data, parts, config)
    columns = [c for c in compiled.history if c not in ("seconds", "cpu_seconds")]
    pd.testing.assert_frame_equal(compiled.history[columns], plain.history[columns], rtol=1e-8)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_on_a_gpu_equals_that_on_the_processor(dtype, tmp_path):
    frames, model = [small_cell(), molecule("CH3OH"), molecule("CH4")], toy_potential(members=3)
    expected, loss = engine_gradient(model, frames, dtype, tmp_path)
    cache = DeviceCache(build_cache(model, frames, dtype, tmp_path), torch.device("cuda"))
    engine = Engine(model.to(dtype), cache, (True,) * 4)
    energies, forces = labels(frames)
    ordered = torch.cat([torch.from_numpy(f)[cache[i].order] for i, f in enumerate(forces)]).to(dtype)
    batch = merge([cache[i] for i in range(len(cache))])
    result = engine.loss_gradient(
        batch, torch.from_numpy(energies).cuda(), ordered.cuda(), partial(batch_loss, lambda_=0.6)
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert result.loss.item() == pytest.approx(loss, rel=tolerance)
    difference = (engine.gradient.cpu() - expected.gradient).norm() / expected.gradient.norm()
    assert difference.item() <= tolerance


@needs_cuda
@pytest.mark.parametrize("warm_start", ["none", "ridge"])
def test_training_on_a_gpu_equals_that_on_the_processor_and_goes_on_there(tmp_path, warm_start):
    data = labelled()
    parts = split_dataset(data, seed=0)
    config = quick(epochs=4, batch_atoms=20, precision="float64", ema_decay=0.9, warm_start=warm_start)
    runs = [finetune(student(), data, parts, config, device=device) for device in ("cpu", "cuda")]
    columns = [c for c in runs[0].history if c not in ("seconds", "cpu_seconds")]
    pd.testing.assert_frame_equal(runs[0].history[columns], runs[1].history[columns], rtol=1e-6)
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        run = tmp_path / first
        with interrupted_after(2):
            finetune(student(), data, parts, config, run, checkpoint_seconds=0.0, device=first)
        resumed = finetune(student(), data, parts, config, run, device=second)
        assert resumed.resumed_from == 2
        assert resumed.run_key == runs[0].run_key
        pd.testing.assert_frame_equal(resumed.history[columns], runs[0].history[columns], rtol=1e-6)
        assert all(part.device.type == "cpu" for layer in resumed.potential.networks["C"] for part in layer)


@needs_cuda
def test_steps_on_a_gpu_do_not_wait(tmp_path):
    """CUDA's own watch: an operation that waits for the device is an error meanwhile."""
    data, config = labelled(), quick(batch_size=4, clip_norm=1.0)
    group = Group(device=torch.device("cuda", 0))
    trainer = trainer_of(student(), data, split_dataset(data, seed=0), config, group)
    state = trainer.start()
    trainer.restore(state)
    trainer.epoch(state)  # structures move, libraries load
    step, waiting = trainer._step, torch.cuda.get_sync_debug_mode()

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode(waiting)

    trainer._step = watched
    trainer.epoch(state)


def mixed():
    """Rattled molecules of 3 to 18 atoms, labelled as `labelled` does."""
    rng = np.random.default_rng(1)
    pair = molecule("CH3CH2OH") + molecule("CH3CH2OH", positions=molecule("CH3CH2OH").positions + 4.0)
    frames = [
        frame.copy() for frame in [molecule("H2O"), molecule("CH4"), molecule("CH3CH2OH"), pair] for _ in range(6)
    ]
    for frame in frames:
        frame.positions += rng.normal(scale=0.05, size=(len(frame), 3))
    answer = predict(teacher(), frames)
    changes = {"frames": tuple(frames), "energies": answer.energies, "forces": answer.forces, "name": "mixed"}
    return dataclasses.replace(labelled(len(frames)), **changes)


def test_batches_by_atoms_are_filled_and_drawn_by_the_seed(tmp_path):
    """Unequal structures: no batch above the limit but for a structure alone, all of them once, anew every epoch."""
    data = mixed()
    parts = split_dataset(data, seed=0)
    trainers = [trainer_of(student(), data, parts, quick(batch_atoms=14, seed=seed)) for seed in (0, 0, 1)]
    sizes = np.array([len(f) for f in data.frames])
    first, again, other = ([b.tolist() for b in t._batches(0)] for t in trainers)
    assert first == again != other
    assert first != [b.tolist() for b in trainers[0]._batches(1)]
    assert sorted(i for batch in first for i in batch) == sorted(parts.train.tolist())
    totals = [int(sizes[batch].sum()) for batch in first]
    assert all(total <= 14 or len(batch) == 1 for total, batch in zip(totals, first, strict=True))
    for batch, following, total in zip(first, first[1:], totals, strict=False):
        assert total + sizes[following[0]] > 14, (batch, following)
    assert len({len(batch) for batch in first}) > 1
    assert trainers[0].steps == sum(len(list(trainers[0]._batches(epoch))) for epoch in range(4))


def test_a_batch_by_atoms_has_the_mean_over_its_structures_as_loss():
    """One step on everything: as many atoms as there are against as many structures as there are."""
    data = mixed()
    parts = split_dataset(data, seed=0)
    by_atoms = finetune(student(), data, parts, quick(epochs=2, batch_atoms=10_000))
    by_structures = finetune(student(), data, parts, quick(epochs=2, batch_size=len(parts.train)))
    assert same_weights(by_atoms.potential, by_structures.potential)
    assert by_atoms.run_key != by_structures.run_key


def test_the_schedule_of_batches_by_atoms_ends_with_the_last_step():
    data = mixed()
    parts = split_dataset(data, seed=0)
    history = finetune(student(), data, parts, quick(epochs=6, batch_atoms=14, warmup_epochs=1.0)).history
    assert history["lr"].idxmax() in (0, 1)
    assert history["lr"].iloc[-1] < 0.01 * history["lr"].max()
