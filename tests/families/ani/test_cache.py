"""The descriptor cache: exact, found again, rebuilt when damaged, whole or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule

from helpers.descriptor_structures import small_cell
from helpers.potential_references import toy_potential
from tlmc.data.loading import load_dataset
from tlmc.descriptors.aev import aev, aev_jacobian
from tlmc.descriptors.pairs import neighbours
from tlmc.errors import ConfigError, DataError, ModelError
from tlmc.families.ani import cache as module
from tlmc.families.ani.cache import build_cache


def frames():
    return [small_cell(), molecule("CH3CH2OH"), molecule("CH4")]


def test_columns_and_products_equal_the_descriptor(tmp_path):
    model = toy_potential()
    cache = build_cache(model, frames(), torch.float64, tmp_path)
    generator = torch.Generator().manual_seed(0)
    for frame, structure in zip(frames(), cache.structures, strict=True):
        ordered = frame[structure.order.numpy()]
        species = model.species(ordered)
        assert species.tolist() == structure.species.tolist() == sorted(species.tolist())
        pairs = neighbours(ordered, model.aev.r_cut_radial)
        full = aev(model.aev, len(model.symbols), species, pairs)
        torch.testing.assert_close(structure.G, full[:, cache.columns], rtol=0, atol=0)
        blocks = aev_jacobian(model.aev, len(model.symbols), species, pairs)
        dense = torch.zeros(full.numel() // 16, 16, len(frame), 3, dtype=torch.float64)
        dense[blocks.rows, :, blocks.atoms] += blocks.values
        dense = dense.view(*full.shape, len(frame), 3)[:, cache.columns]
        direction = torch.randn(len(frame), 3, generator=generator, dtype=torch.float64)
        cotangent = torch.randn(structure.G.shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(structure.along(direction), torch.einsum("nkax,ax->nk", dense, direction))
        torch.testing.assert_close(structure.forces(cotangent), -torch.einsum("nkax,nk->ax", dense, cotangent))


def test_second_opening_reads_the_same_numbers_without_computing(tmp_path, monkeypatch):
    first = build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("computed again"))
    second = build_cache(toy_potential(seed=5), frames(), torch.float32, tmp_path)  # weights play no part
    assert torch.equal(first[1].values, second[1].values)
    assert torch.equal(first[1].G, second[1].G)


def test_geometry_precision_and_constants_have_their_own_caches(tmp_path):
    base = build_cache(toy_potential(), frames(), torch.float32, tmp_path).folder
    moved = frames()
    moved[0].positions[0, 0] += 1e-6
    others = {
        build_cache(toy_potential(), moved, torch.float32, tmp_path).folder,
        build_cache(toy_potential(), frames(), torch.float64, tmp_path).folder,
        build_cache(toy_potential(), frames()[:2], torch.float32, tmp_path).folder,
        build_cache(toy_potential(symbols=("H", "O", "C")), frames(), torch.float32, tmp_path).folder,
    }
    assert len(others) == 4
    assert base not in others


@pytest.mark.parametrize("damage", ["short", "absent", "meta", "layout"])
def test_damaged_cache_is_computed_again(tmp_path, damage, caplog):
    first = build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    expected = first[0].values.clone()
    if damage == "short":
        content = (first.folder / "values.bin").read_bytes()
        (first.folder / "values.bin").write_bytes(content[:-4])
    elif damage == "absent":
        (first.folder / "G.bin").unlink()
    elif damage == "meta":
        (first.folder / "meta.json").write_text("{")
    else:
        meta = json.loads((first.folder / "meta.json").read_text())
        (first.folder / "meta.json").write_text(json.dumps(meta | {"layout": 0}))
    with caplog.at_level(logging.WARNING):
        again = build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    assert torch.equal(again[0].values, expected)
    assert damage == "absent" or "damaged" in caplog.text


def test_killed_build_leaves_nothing_behind(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(toy_potential(), frames(), torch.float32, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_it_fills(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        DataError, match=r"the descriptor cache needs about .* MB in .*, but 0 MB are free.*TLMC_CACHE_DIR"
    ):
        build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_oldest_caches_make_room(tmp_path, monkeypatch):
    def build(seed):
        frame = small_cell()
        frame.positions += 0.01 * seed
        return build_cache(toy_potential(), [frame], torch.float32, tmp_path).folder

    first, second = build(0), build(1)
    os.utime(first, (2e9, 2e9))  # opened last
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setenv("TLMC_CACHE_GB", str(2.5 * size / 1e9))
    third = build(2)
    assert {path.name for path in tmp_path.iterdir()} == {first.name, third.name}
    assert not second.exists()


def one(tmp_path, seed=0):
    frame = small_cell()
    frame.positions += 0.01 * seed
    return build_cache(toy_potential(), [frame], torch.float32, tmp_path)


@pytest.mark.parametrize("moment", ["open", "utime", "rename"])
def test_a_cache_that_another_process_removes_is_computed_again(tmp_path, monkeypatch, moment):
    """Between any two looks at it."""
    first = one(tmp_path)
    expected = first[0].values.clone()
    removed = []

    def after(function, path_of=lambda *arguments: arguments[0]):
        def call(*arguments, **keywords):
            result = function(*arguments, **keywords)
            if Path(path_of(*arguments)) == first.folder and not removed:
                removed.append(shutil.rmtree(first.folder))
            return result

        return call

    if moment == "open":
        monkeypatch.setattr(module, "_is_complete", after(module._is_complete))
    elif moment == "utime":
        real = module.DescriptorCache
        monkeypatch.setattr(module, "DescriptorCache", after(real))
    else:
        shutil.rmtree(first.folder)
        monkeypatch.setattr(Path, "rename", after(Path.rename, lambda _, target: target))
    again = one(tmp_path)
    assert removed
    assert torch.equal(again[0].values, expected)


@pytest.mark.parametrize("moment", ["while listing", "before removing"])
def test_two_processes_may_make_room_at_once(tmp_path, monkeypatch, moment):
    first, second = one(tmp_path, 0).folder, one(tmp_path, 1).folder
    monkeypatch.setenv("TLMC_CACHE_GB", "0")
    if moment == "while listing":
        is_cache = module._is_cache
        monkeypatch.setattr(module, "_is_cache", lambda path: is_cache(path) and (shutil.rmtree(first, True) or True))
    else:
        remove = module._remove
        monkeypatch.setattr(module, "_remove", lambda path: shutil.rmtree(path) or remove(path))
    third = one(tmp_path, 2).folder
    assert set(tmp_path.iterdir()) == {third}
    assert not second.exists()


def test_many_threads_share_a_folder_that_holds_one_cache(tmp_path, monkeypatch):
    """Everybody removes what the others have just built, and reads what was removed."""
    expected = [one(tmp_path, seed)[0].values.clone() for seed in range(3)]
    monkeypatch.setenv("TLMC_CACHE_GB", "0")
    start = threading.Barrier(6)

    def work(number):
        start.wait()
        return all(torch.equal(one(tmp_path, k % 3)[0].values, expected[k % 3]) for k in range(number, number + 30))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("room", [float("inf"), 0.0])
def test_a_removed_cache_can_be_read_on(tmp_path, monkeypatch, room):
    """Mapped as a whole, or structure by structure."""
    monkeypatch.setattr(module, "_free_address_space", lambda: room)
    cache = build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    expected = [part.values.clone() for part in build_cache(toy_potential(), frames(), torch.float32, tmp_path)]
    monkeypatch.setenv("TLMC_CACHE_GB", "0")
    one(tmp_path)
    assert not cache.folder.exists()
    for structure, values in zip(cache, expected, strict=True):
        assert torch.equal(structure.values, values)


def test_only_caches_are_removed(tmp_path, monkeypatch):
    """TLMC_CACHE_DIR may be a folder that holds other things."""
    cache = one(tmp_path)
    meta = (cache.folder / "meta.json").read_text()
    kept = []
    for number, (name, files) in enumerate(
        {
            "my runs": {"meta.json": meta, "G.bin": "0"},
            "0" * 32: {"meta.json": meta, "G.bin": "0", "notes.txt": "mine"},
            "1" * 32: {"meta.json": '{"mine": 1}', "G.bin": "0"},
            "2" * 32: {"meta.json": meta, "mine": None},
            "3" * 32: {"G.bin": "0"},
            "4" * 32: {"meta.json": "[]"},
            "5" * 32: {"meta.json": "{"},
            ".partial-01234567": {"notes.txt": "mine"},
            ".partial-work": {"meta.json": "mine"},
        }.items()
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            path = folder / file
            if text is None:
                path.mkdir()
            else:
                path.write_text(text)
            os.utime(path, (number, number))
            kept.append(path)
        os.utime(folder, (number, number))
    outside = tmp_path.with_name("outside")
    outside.mkdir()
    kept += [outside / "meta.json", tmp_path / ("6" * 32), tmp_path / ("7" * 32)]
    kept[-3].write_text(meta)
    kept[-2].symlink_to(outside)
    kept[-1].write_text("a file")
    monkeypatch.setenv("TLMC_CACHE_GB", "0")
    one(tmp_path, 1)
    assert not cache.folder.exists()
    assert all(path.exists() for path in kept)


def test_a_foreign_file_in_the_place_of_a_cache_is_named(tmp_path):
    folder = one(tmp_path).folder
    (folder / "meta.json").write_text("{")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds notes.txt, which is no part of a descriptor cache: move it away"):
        one(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_removed_after_a_week(tmp_path):
    old, new = tmp_path / ".partial-0123456789abcdef", tmp_path / ".partial-fedcba9876543210"
    for folder in (old, new):
        folder.mkdir()
        (folder / "G.bin").write_bytes(b"0")
    for path in (old / "G.bin", old):
        os.utime(path, (0, 0))
    one(tmp_path)
    assert new.exists()
    assert not old.exists()


@pytest.mark.parametrize("size", ["ten", "nan", "-1", "1,5", "10GB"])
def test_a_size_that_is_none_is_refused_before_anything_is_computed(tmp_path, monkeypatch, size):
    monkeypatch.setenv("TLMC_CACHE_GB", size)
    with pytest.raises(ConfigError, match=f"TLMC_CACHE_GB must be a number of gigabytes, 0 or more, got '{size}'"):
        one(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cache_needs_no_module_of_unix_only(tmp_path):
    """As on Windows: no resource, no SIGHUP."""
    code = """
import signal, sys
sys.modules["resource"] = None
del signal.SIGHUP
import tlmc.training, tlmc.training.distributed, tlmc.experiments.experiment, tlmc.cli
from tlmc.families.ani import cache
assert cache._free_address_space() == float("inf")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_progress_counts_frames(tmp_path):
    seen = []
    build_cache(toy_potential(), frames(), torch.float32, tmp_path, seen.append)
    assert seen == [1, 1, 1]


def test_bad_frames(tmp_path):
    with pytest.raises(DataError, match="no frames"):
        build_cache(toy_potential(), [], torch.float32, tmp_path)
    with pytest.raises(ModelError, match=r"no network for Si \(1 atoms\) in H4Si"):
        build_cache(toy_potential(), [molecule("SiH4")], torch.float32, tmp_path)


def test_maps_cannot_write_to_the_cache(tmp_path):
    cache = build_cache(toy_potential(), frames(), torch.float32, tmp_path)
    before = (cache.folder / "G.bin").read_bytes()
    cache[0].G.zero_()
    assert (cache.folder / "G.bin").read_bytes() == before
    assert np.frombuffer(before, dtype=np.float32).any()


STREAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import pathlib, torch
import test_cache as t
from tlmc.families.ani.batch import merge
from tlmc.families.ani.engine import Engine
from tlmc.training.loss import batch_loss
from tlmc.training.optimizer import Update
from functools import partial

torch.set_num_threads(1)
model, loss = t.toy_potential(dtype=torch.float32), partial(batch_loss, lambda_=0.5)

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])

def epoch(engine, cache, moments):
    for i in range(0, len(cache), 2):
        batch = merge([cache[i], cache[i + 1]])
        zeros = torch.zeros(sum(batch.sizes), 3)
        update = Update(engine.flat, *moments, engine.gradient, 1e-4, 0.1, 1)
        engine.loss_gradient(batch, torch.zeros(2, dtype=torch.float64), zeros, loss, update)

warm = t.build_cache(model, t.frames()[:2], torch.float32, pathlib.Path(sys.argv[2]))
engine = Engine(model, warm, (True,) * 4)
epoch(engine, warm, [torch.zeros_like(engine.flat) for _ in range(2)])
size = sum(file.stat().st_size for file in pathlib.Path(sys.argv[3]).iterdir())
limit = status("VmSize") + size // 4
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cache = t.module.DescriptorCache(pathlib.Path(sys.argv[3]))
engine = Engine(model, cache, (True,) * 4)
moments = [torch.zeros_like(engine.flat) for _ in range(2)]
peaks = []
for _ in range(3):
    epoch(engine, cache, moments)
    peaks.append(status("VmSize"))
print(size, *peaks)
"""


@pytest.mark.slow
def test_set_four_times_larger_than_the_memory_left_streams(tmp_path):
    """Under a real limit of the address space; and no epoch needs more than the one before."""
    model = toy_potential(dtype=torch.float32)
    cache = build_cache(model, [small_cell().repeat((3, 3, 2))], torch.float32, tmp_path / "one")
    large = tmp_path / "large"
    large.mkdir()
    copies = 240
    for file in cache.folder.glob("*.bin"):
        (large / file.name).write_bytes(file.read_bytes() * copies)
    meta = json.loads((cache.folder / "meta.json").read_text())
    (large / "meta.json").write_text(json.dumps(meta | {"frames": meta["frames"] * copies}))
    run = subprocess.run(
        [sys.executable, "-c", STREAM, str(Path(__file__).parent), str(tmp_path / "warm"), str(large)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    size, first, *later = map(int, run.stdout.split())
    assert size > 150e6
    assert max(later) <= first + 2e6


def test_bytes_per_atom(tmp_path):
    """At most 60 kB on disk in the densest of the embedded crystals."""
    frame = load_dataset("naphthalene").crystals().frames[0]
    cache = build_cache(toy_potential(dtype=torch.float32), [frame], torch.float32, tmp_path)
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) / len(frame) < 60e3
