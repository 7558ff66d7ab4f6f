"""Building C sources: once per machine and source, never half a file, and what is said where it cannot be done."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from tlmc import compiled
from tlmc.errors import ConfigError

SOURCE = """\
#include "compiled.h"
void exponentials(const real *x, long n, real *result) {
    for (long i = 0; i < n; i++) result[i] = exponential(x[i]);
}
"""
FUNCTIONS = {"exponentials": [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return a source of one function, whose library goes to a folder of its own."""
    monkeypatch.setenv("TLMC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "source.c"
    path.write_text(SOURCE)
    return path


def built(source, dtype=torch.float64):
    library = compiled.load(source, dtype, FUNCTIONS, "we go on without it")
    if library is None:
        pytest.skip("no C compiler here: everything falls back on torch, which other tests cover")
    return library


def libraries(source):
    return sorted((source.parent / "cache" / "kernels").iterdir())


@pytest.mark.parametrize(("dtype", "lowest", "error"), [(torch.float64, -690.0, 4e-16), (torch.float32, -80.0, 3e-7)])
def test_exponential_is_exact_to_rounding(source, dtype, lowest, error):
    x = torch.cat([torch.linspace(lowest, 0.0, 5001), -torch.logspace(-8, 0, 100)]).to(dtype)
    result = torch.empty_like(x)
    built(source, dtype).exponentials(x.data_ptr(), len(x), result.data_ptr())
    exact = x.double().exp()
    assert float(((result.double() - exact) / exact).abs().max()) < error


def test_exponential_of_far_numbers_is_tiny_and_nan_stays(source):
    x = torch.tensor([-1e9, -torch.inf, torch.nan], dtype=torch.float64)
    result = torch.empty_like(x)
    built(source).exponentials(x.data_ptr(), len(x), result.data_ptr())
    assert bool((result[:2] < 1e-300).all())
    assert bool(result[2].isnan())


def test_a_source_is_compiled_once_and_anew_when_it_changes(source, monkeypatch):
    built(source)
    before = libraries(source)
    assert [path.suffix for path in before] == [".so"]
    calls, run = [], subprocess.run
    monkeypatch.setattr(compiled.subprocess, "run", lambda *args, **kwargs: (calls.append(args), run(*args, **kwargs)))
    built(source)
    assert not calls
    built(source, torch.float32)
    source.write_text(SOURCE + "/* changed */\n")
    built(source)
    assert len(calls) == 2
    assert len(libraries(source)) == 3


def test_what_keeps_it_from_compiling_is_said(source, monkeypatch, caplog):
    built(source)
    source.write_text("void exponentials(")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert "we go on without it: " in caplog.text
    assert "error: " in caplog.text
    assert len(libraries(source)) == 1
    source.write_text("void other(void) {}\n")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert "exponentials" in caplog.records[-1].getMessage()
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert compiled.load(source, torch.float32, FUNCTIONS, "we go on without it") is None
    assert "/nonexistent/cc" in caplog.records[-1].getMessage()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled.load(source, torch.float32, FUNCTIONS, "we go on without it") is None
    assert "there is no C compiler: install one (gcc, clang) or set CC" in caplog.records[-1].getMessage()


def test_the_switch(source, monkeypatch, caplog):
    monkeypatch.setenv("TLMC_KERNELS", "off")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert not caplog.text
    assert not (source.parent / "cache").exists()
    monkeypatch.setenv("TLMC_KERNELS", "perhaps")
    with pytest.raises(ConfigError, match="TLMC_KERNELS must be on or off, got 'perhaps'"):
        compiled.load(source, torch.float64, FUNCTIONS, "we go on without it")
