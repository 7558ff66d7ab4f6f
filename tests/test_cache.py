"""The descriptor cache: exact, found again, rebuilt when damaged, whole or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from ase.build import molecule
from potential_references import toy_potential
from test_aev import small_cell

from tlmc.descriptors.aev import aev, aev_jacobian, neighbours
from tlmc.errors import DataError, ModelError
from tlmc.training import cache as module
from tlmc.training.cache import build_cache


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
