from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchani.aev
from ase.units import Hartree

import helpers.potential_references  # noqa: F401 (imports torchani without its warning)
from helpers.potential_references import METHANE
from tlmc.errors import ModelError
from tlmc.families.ani import pretrained
from tlmc.files import sha256_file
from tlmc.paths import PACKAGE_DIR
from tlmc.potentials import load_start_model, predict, reachable, start_models
from tlmc.potentials.registry import weights_path

REGISTRY = json.loads((PACKAGE_DIR / "registry.json").read_text())["start_models"]
DEAD_HOST = "http://127.0.0.1:9"
MEMBER = "Auto3D/engines/models/ani2xt_no_repulsion.pt"


@pytest.fixture
def published_file():
    return weights_path("ani2x")


@pytest.fixture
def no_ani2x(monkeypatch, tmp_path):
    """torchani's data folder is empty and the two download addresses refuse the connection."""
    monkeypatch.setenv("TORCHANI_DATA_DIR", str(tmp_path / "torchani"))
    monkeypatch.setattr(pretrained, "ANI2X_SOURCES", (f"{DEAD_HOST}/a.pt", f"{DEAD_HOST}/b.pt"))
    return tmp_path / "torchani" / "StateDicts" / "ani2x_state_dict.pt"


@pytest.fixture
def cached_file(ani2xt):
    return weights_path("ani2xt")


@pytest.fixture
def no_ani2xt(monkeypatch, tmp_path):
    """The cache is empty and pip knows no index but a folder."""
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache" / "start-models" / "ani2xt_no_repulsion.pt"


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serve a folder over HTTP as the second download address; the first one refuses the connection."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, directory=str(folder), **keywords)

        def log_message(self, format, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/ani2x_state_dict.pt"
        monkeypatch.setattr(pretrained, "ANI2X_SOURCES", (f"{DEAD_HOST}/a.pt", address))
        yield folder
        server.shutdown()
        thread.join()


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    info = "auto3d-3.2.3.dist-info"
    with zipfile.ZipFile(folder / "auto3d-3.2.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: auto3d\nVersion: 3.2.3\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            wheel.writestr(name, content)


def test_start_models_are_those_of_the_registry():
    assert set(REGISTRY) == {"ani2x", "ani2xt"}
    assert set(start_models()) == {"ani2x", "ani2xt", "sevennet"}


@pytest.mark.parametrize("call", [load_start_model, reachable, weights_path])
def test_unknown_name(call):
    with pytest.raises(ModelError, match="unknown start model 'ani1x': choose one of ani2x, ani2xt"):
        call("ani1x")


@pytest.mark.needs_mirror
def test_ani2x(ani2x):
    assert ani2x.members == REGISTRY["ani2x"]["members"] == 8
    assert ani2x.symbols == ("H", "C", "N", "O", "S", "F", "Cl")
    assert ani2x.fingerprint == REGISTRY["ani2x"]["fingerprint"]
    assert ani2x.dtype == torch.float32
    shapes = [tuple(layer.weight.shape) for layer in ani2x.networks["C"]]
    assert shapes == [(8, 1008, 224), (8, 224, 192), (8, 192, 160), (8, 160, 1)]
    assert ani2x.aev.length(7) == 1008
    assert reachable("ani2x")
    # the energy that the registry of data sets gives for checking
    assert predict(ani2x, [METHANE]).energies[0] / Hartree == pytest.approx(-40.4598, abs=5e-5)


@pytest.mark.needs_mirror
def test_ani2x_has_torchanis_descriptor(ani2x):
    radial, angular = torchani.aev.ANIRadial.like_2x(), torchani.aev.ANIAngular.like_2x()
    p = ani2x.aev
    assert (p.r_cut_radial, p.eta_radial) == (radial.cutoff, radial.eta.item())
    assert (p.r_cut_angular, p.eta_angular, p.zeta) == (angular.cutoff, angular.eta.item(), angular.zeta.item())
    assert p.shifts_radial == tuple(radial.shifts.tolist())
    assert p.shifts_angular == tuple(angular.shifts.tolist())
    assert p.sections == tuple(angular.sections.tolist())


def test_ani2xt(ani2xt):
    assert ani2xt.members == REGISTRY["ani2xt"]["members"] == 1
    assert ani2xt.symbols == ("H", "C", "N", "O", "F", "S", "Cl")
    assert ani2xt.fingerprint == REGISTRY["ani2xt"]["sha256"] == sha256_file(weights_path("ani2xt"))
    shapes = [tuple(layer.weight.shape) for layer in ani2xt.networks["S"]]
    assert shapes == [(1, 1008, 160), (1, 160, 128), (1, 128, 96), (1, 96, 1)]
    assert reachable("ani2xt")
    # the two start models were trained on the same level of theory: methane agrees to 0.2 eV
    assert predict(ani2xt, [METHANE]).energies[0] / Hartree == pytest.approx(-40.4598, abs=0.2 / Hartree)


def test_ani2x_out_of_reach(no_ani2x):
    assert not reachable("ani2x")
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_start_model("ani2x")
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert f"ani2x is not at {no_ani2x}" in message
    assert "/a.pt: ConnectionError" in message
    assert "/b.pt: ConnectionError" in message
    assert 'load_start_model("ani2xt")' in message
    assert not no_ani2x.parent.exists()


def test_a_silent_host_is_given_up(no_ani2x, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(pretrained, "ANI2X_SOURCES", (f"http://127.0.0.1:{silent.getsockname()[1]}/a.pt",))
        monkeypatch.setattr(pretrained, "PROBE_SECONDS", 0.5)
        start = time.monotonic()
        assert not reachable("ani2x")
        with pytest.raises(ModelError, match="ReadTimeout|no answer within"):
            load_start_model("ani2x")
        assert time.monotonic() - start < 5


@pytest.mark.needs_mirror
def test_ani2x_is_downloaded_once(published_file, no_ani2x, serve, ani2x):
    shutil.copyfile(published_file, serve / "ani2x_state_dict.pt")
    assert reachable("ani2x")
    first = load_start_model("ani2x")
    assert first.fingerprint == ani2x.fingerprint
    assert sorted(path.name for path in no_ani2x.parent.iterdir()) == ["ani2x_state_dict.pt"]
    (serve / "ani2x_state_dict.pt").unlink()
    assert torch.equal(load_start_model("ani2x").networks["H"][0].weight, ani2x.networks["H"][0].weight)


def test_other_weights_are_not_accepted_as_ani2x(no_ani2x, serve):
    torch.save({"neural_networks.weight": torch.zeros(3)}, serve / "ani2x_state_dict.pt")
    with pytest.raises(ModelError, match=f"fingerprint [0-9a-f]{{64}}, not {REGISTRY['ani2x']['fingerprint']}"):
        load_start_model("ani2x")
    assert list(no_ani2x.parent.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 and then nothing"])
def test_a_damaged_ani2x_file_is_named(no_ani2x, content):
    no_ani2x.parent.mkdir(parents=True)
    no_ani2x.write_bytes(content)
    with pytest.raises(ModelError, match=f"{no_ani2x} is not a readable state dict"):
        load_start_model("ani2x")
    assert no_ani2x.read_bytes() == content


def test_no_pickle_is_ever_run(no_ani2x):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code in a weight file was run",))

    no_ani2x.parent.mkdir(parents=True)
    torch.save({"neural_networks": Bomb()}, no_ani2x)
    with pytest.raises(ModelError, match="not a readable state dict"):
        load_start_model("ani2x")


def test_ani2xt_out_of_reach(no_ani2xt):
    assert not reachable("ani2xt")
    with pytest.raises(ModelError) as caught:
        load_start_model("ani2xt")
    message = str(caught.value)
    assert f"ani2xt is not at {no_ani2xt} and pip could not fetch the wheel auto3d==3.2.3" in message
    assert (
        f"put ani2xt_no_repulsion.pt, the member {MEMBER} of the wheel auto3d==3.2.3, at {no_ani2xt} by hand" in message
    )
    assert 'load_start_model("ani2x")' in message
    assert not no_ani2xt.parent.exists()


def test_a_dead_index_is_given_up_within_seconds(no_ani2xt, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"{DEAD_HOST}/simple")
    start = time.monotonic()
    assert not reachable("ani2xt")
    with pytest.raises(ModelError, match="pip could not fetch the wheel"):
        load_start_model("ani2xt")
    assert time.monotonic() - start < 15


def test_ani2xt_is_taken_from_the_wheel_and_kept(cached_file, no_ani2xt, ani2xt, tmp_path):
    write_wheel(tmp_path / "wheels", {MEMBER: cached_file.read_bytes()})
    first = load_start_model("ani2xt")
    assert [path.name for path in no_ani2xt.parent.iterdir()] == [no_ani2xt.name]
    (tmp_path / "wheels" / "auto3d-3.2.3-py3-none-any.whl").unlink()
    again = load_start_model("ani2xt")
    for model in (first, again):
        np.testing.assert_array_equal(model.networks["Cl"][0].weight, ani2xt.networks["Cl"][0].weight)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({MEMBER: b"other weights"}, f"has SHA-256 [0-9a-f]{{64}}, not {REGISTRY['ani2xt']['sha256']}: put ani2xt"),
        ({"Auto3D/__init__.py": b""}, f"auto3d-3.2.3-py3-none-any.whl as fetched does not hold {MEMBER}"),
    ],
)
def test_another_wheel_is_refused(no_ani2xt, tmp_path, members, sentence):
    write_wheel(tmp_path / "wheels", members)
    with pytest.raises(ModelError, match=sentence):
        load_start_model("ani2xt")
    assert not no_ani2xt.parent.exists()


def test_a_changed_ani2xt_file_is_named(no_ani2xt):
    no_ani2xt.parent.mkdir(parents=True)
    no_ani2xt.write_bytes(b"other weights")
    found = sha256_file(no_ani2xt)
    with pytest.raises(ModelError, match=f"{no_ani2xt} .* SHA-256 {found}, not {REGISTRY['ani2xt']['sha256']}"):
        load_start_model("ani2xt")
