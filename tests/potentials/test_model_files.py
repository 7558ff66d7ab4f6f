"""Models on disk: exact, explained, and refused when damaged."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from ase.build import molecule
from safetensors.torch import save_file

from helpers.potential_references import toy_potential
from tlmc.errors import ModelError
from tlmc.families.ani import relabel
from tlmc.potentials import predict
from tlmc.potentials.model_files import load_model, load_tensors, save_model, save_tensors
from tlmc.potentials.reference import ReferenceEnergies


def model():
    reference = ReferenceEnergies({"H": 0.1, "C": -0.25, "Si": 1 / 3, "O": 0.0}, "per_element")
    return relabel(toy_potential(dtype=torch.float32), {"Si": "C"}).with_reference(reference)


def test_a_model_comes_back_as_it_was(tmp_path):
    save_model(model(), tmp_path / "model.safetensors", {"config": {"lr": 1e-4}, "note": None})
    back, metadata = load_model(tmp_path / "model.safetensors")
    assert metadata["config"] == {"lr": 1e-4}
    assert metadata["note"] is None
    assert "torch" in metadata["versions"]
    assert "git_revision" in metadata
    frames = [molecule("CH3OH"), molecule("SiH4")]
    reference = ReferenceEnergies.from_json(model().reference.to_json())
    assert back.reference == reference
    for field in ("name", "symbols", "aev", "self_energies", "fingerprint", "element_map", "scale"):
        assert getattr(back, field) == getattr(model(), field), field
    assert predict(back, frames).energies.tolist() == predict(model(), frames).energies.tolist()


def test_no_reference_stays_none(tmp_path):
    save_model(toy_potential(), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors")[0].reference is None


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ModelError, match="nothing.safetensors does not exist"):
        load_model(tmp_path / "nothing.safetensors")
    save_model(model(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="short.safetensors is not a readable safetensors file"):
        load_model(tmp_path / "short.safetensors")
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(ModelError, match="text.safetensors is not a readable safetensors file"):
        load_model(tmp_path / "text.safetensors")


def test_pickles_never_execute(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_model(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_model(path)
    assert not (tmp_path / "executed").exists()


def test_files_of_others_and_other_versions(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="not one that tlmc wrote"):
        load_model(tmp_path / "other.safetensors")
    save_tensors(tmp_path / "future.safetensors", {"a": torch.zeros(2)}, {"format": "tlmc-model-9"})
    with pytest.raises(ModelError, match="holds 'tlmc-model-9', this version reads 'tlmc-model-2'"):
        load_model(tmp_path / "future.safetensors")


def test_a_model_that_lacks_a_part_is_refused(tmp_path):
    save_model(model(), tmp_path / "model.safetensors")
    tensors, metadata = load_tensors(tmp_path / "model.safetensors")
    del tensors["O.2.bias"]
    save_tensors(tmp_path / "part.safetensors", tensors, metadata)
    with pytest.raises(ModelError, match="part.safetensors lacks a part of the model.*O.2.bias"):
        load_model(tmp_path / "part.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_neither_written_nor_read(tmp_path, value):
    good, path = model(), tmp_path / "model.safetensors"
    save_model(good, path)
    tensors, metadata = load_tensors(path)
    tensors["O.2.bias"].view(-1)[0] = value
    save_tensors(path, tensors, metadata)
    with pytest.raises(ModelError, match="model.safetensors: O.2 are infinite or NaN"):
        load_model(path)
    good.networks["C"][1].weight.view(-1)[3] = value
    with pytest.raises(ModelError, match=r"new.safetensors: C.\d are infinite or NaN"):
        save_model(good, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(model(), path)
    before = path.read_bytes()
    broken = dataclasses.replace(model(), scale=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        save_model(broken, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_wrong_contents_get_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(model(), path)
    tensors, description = load_tensors(path)

    def refused(sentence, change_tensors=None, **changes):
        save_tensors(path, tensors | (change_tensors or {}), description | changes)
        with pytest.raises(ModelError, match=sentence):
            load_model(path)

    refused(
        r"lacks a part of the model or holds a wrong one: C.0.weight is .* not", {"C.0.weight": torch.zeros(3, 4, 12)}
    )
    refused("C.1.bias is .* not", {"C.1.bias": torch.zeros(3, 1, 9)})
    refused("C.1.bias is .*float64, not .*float32", {"C.1.bias": torch.zeros(3, 1, 10, dtype=torch.float64)})
    bias = tensors["O.2.bias"].clone()
    bias[0, 0, 0] = torch.nan
    refused("O.2 are infinite or NaN", {"O.2.bias": bias})
    refused("lacks a part of the model or holds a wrong one", metadata=3)
    refused("lacks a part of the model or holds a wrong one", versions=None)
    refused("lacks a part of the model or holds a wrong one", model=["x"])
    del description["git_revision"]
    refused("lacks a part of the model or holds a wrong one: 'git_revision'")
    for content in ([1], 3, "x"):
        save_tensors(path, tensors, content)
        with pytest.raises(ModelError, match="is a safetensors file, but not one that tlmc wrote"):
            load_model(path)
