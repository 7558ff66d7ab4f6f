"""Building C sources: once per machine and source, never half a file, and what is said where it cannot be done."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from pathlib import Path

import psutil
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = tmp_path / "source.c"
    path.write_text(SOURCE)
    return path


def built(source, dtype=torch.float64):
    library = compiled.load(source, dtype, FUNCTIONS, "we go on without it")
    if library is None:
        pytest.skip("no C compiler here: everything falls back on torch, which other tests cover")
    return library


def libraries(source):
    return sorted((source.parent / "cache" / "compiled").glob("*.so"))


@pytest.fixture
def compiler(source, monkeypatch):
    """Return a function that makes CC a script of some lines before the real compiler, and one that reads its calls."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if real is None:
        pytest.skip("no C compiler here: everything falls back on torch, which other tests cover")
    script, log = source.parent / "fake cc", source.parent / "calls"

    def write(lines=""):
        script.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\n{lines}\nexec {real} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if "--version" not in line]

    return write, calls


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


def test_a_source_is_compiled_once_and_anew_when_it_changes(source, compiler):
    write, calls = compiler
    write()
    built(source)
    assert len(calls()) == len(libraries(source)) == 1
    built(source)
    assert not calls()
    built(source, torch.float32)
    source.write_text(SOURCE + "/* changed */\n")
    built(source)
    assert len(calls()) == 2
    assert len(libraries(source)) == 3
    # nothing half-made is left
    assert {path.suffix for path in libraries(source)[0].parent.iterdir()} == {".so"}


def test_what_keeps_it_from_compiling_is_said(source, monkeypatch, caplog):
    built(source)
    source.write_text("void exponentials(")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert "we go on without it: " in caplog.text
    assert "error: " in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
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
    monkeypatch.setenv("TLMC_COMPILED", "off")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert not caplog.text
    assert not (source.parent / "cache").exists()
    monkeypatch.setenv("TLMC_COMPILED", "perhaps")
    with pytest.raises(ConfigError, match="TLMC_COMPILED must be on or off, got 'perhaps'"):
        compiled.load(source, torch.float64, FUNCTIONS, "we go on without it")


def test_the_compiler_may_have_arguments_and_spaces(source, compiler, monkeypatch, caplog):
    write, calls = compiler
    write()
    path = os.environ["CC"]
    for number, command in enumerate([path, f"'{path}'", f'env A=1 "{path}" -DB=2', f'  "{path}" -g  ']):
        monkeypatch.setenv("CC", command)
        source.write_text(SOURCE + f"/* {number} */\n")
        assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is not None, command
        assert len(calls()) == 1
    monkeypatch.setenv("CC", f"'{path}")
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert "which is no command: No closing quotation" in caplog.records[-1].getMessage()


THREADS = """\
#include "compiled.h"
void exponentials(const real *x, long n, real *result) {
#pragma omp parallel for num_threads(2)
    for (long i = 0; i < n; i++) result[i] = exponential(x[i]) + omp_get_thread_num();
}
"""


def test_without_openmp_it_works_on_one_thread(source, compiler, caplog):
    """As with Apple's compiler; and the flag is tried again as soon as the compiler is another, or in an hour."""
    write, calls = compiler
    refuse = (
        """for word; do [ "$word" = -fopenmp ] && echo "cc: error: unsupported option '-fopenmp'" && exit 1; done"""
    )
    write(refuse)
    source.write_text(THREADS)
    caplog.set_level("INFO", "tlmc")
    x, result = torch.zeros(4, dtype=torch.float64), torch.empty(4, dtype=torch.float64)

    def threads():
        compiled.load(source, torch.float64, FUNCTIONS, "we go on").exponentials(x.data_ptr(), 4, result.data_ptr())
        return (result - 1).tolist()

    for n_calls in (3, 0):
        caplog.clear()
        assert threads() == [0, 0, 0, 0]
        assert len(calls()) == n_calls
        assert "does without what the compiler refused" in caplog.text
        assert "unsupported option '-fopenmp'" in caplog.text
    [failure] = libraries(source)[0].parent.glob("*.failed")
    os.utime(failure, (time.time() - 4000,) * 2)
    assert threads() == [0, 0, 0, 0]
    assert len(calls()) == 3
    write("# updated")
    assert threads() == [0, 0, 1, 1]


def test_without_knowing_the_processor_it_works(source, compiler, caplog):
    write, calls = compiler
    write('for word; do [ "$word" = -march=native ] && exit 1; done')
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on") is not None
    assert "-fopenmp" in calls()[-1]


def test_a_failure_is_remembered_until_the_compiler_is_repaired(source, compiler, caplog, monkeypatch):
    write, calls = compiler
    write("echo 'cc: error: no room' >&2; exit 1")

    def works():
        return compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is not None

    assert not works()
    assert len(calls()) == 4
    assert caplog.records[-1].getMessage() == "we go on without it: cc: error: no room"
    assert not works()
    assert not calls()
    assert "cc: error: no room (tried within the hour; remove " in caplog.records[-1].getMessage()
    # a source of its own, another search path, another hour
    source.write_text(SOURCE + "/* changed */\n")
    assert not works()
    assert calls()
    monkeypatch.setenv("CPATH", "/somewhere")
    assert not works()
    assert calls()
    for failure in (source.parent / "cache" / "compiled").glob("*.failed"):
        os.utime(failure, (0, 0))
    assert not works()
    assert calls()
    write()
    assert works()


def test_a_compiler_that_hangs_is_ended(source, compiler, monkeypatch, caplog):
    """With what it started; and it is not tried again by every process."""
    write, calls = compiler
    monkeypatch.setattr(compiled, "SECONDS", 0.3)
    monkeypatch.setattr(compiled, "_SECONDS_TO_ANSWER", 0.1)
    pids = source.parent / "pids"
    write(f'sleep 100 & echo $! >> "{pids}"; wait')
    started = time.monotonic()
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert time.monotonic() - started < 20
    assert "did not end within 0.3 s" in caplog.records[-1].getMessage()
    assert len(calls()) == 1
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, numbers := [int(text) for text in pids.read_text().split()])):
        if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in numbers if psutil.pid_exists(pid)):
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert not calls()


def test_every_compiler_version_and_processor_has_its_own_library(source, compiler, monkeypatch):
    """A home folder may be shared by machines that differ."""
    write, _ = compiler
    write('[ "$1" = --version ] && echo 1 && exit')
    for _ in range(2):
        built(source)
    assert len(libraries(source)) == 1
    write('[ "$1" = --version ] && echo 2 && exit')
    built(source)
    assert len(libraries(source)) == 2
    monkeypatch.setattr(compiled, "_processor", lambda: "another one")
    built(source)
    assert len(libraries(source)) == 3


def test_a_library_that_others_can_write_is_not_loaded(source, caplog):
    """Code in it would run with the user's rights."""
    built(source)
    [library] = libraries(source)
    built_at = library.stat().st_ino
    library.chmod(0o666)
    caplog.clear()
    built(source)
    assert f"other users can write to {library}: it is compiled anew" in caplog.text
    assert library.stat().st_ino != built_at
    assert library.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("which", ["cache", "cache/compiled"])
def test_a_folder_that_others_can_write_is_left(source, caplog, which):
    folder = source.parent / "cache" / "compiled"
    folder.mkdir(parents=True)
    (source.parent / which).chmod(0o777)
    library = built(source)
    assert f"compiled code is not taken from {folder}: other users can write to" in caplog.text
    assert not libraries(source)
    assert Path(library._name).is_relative_to(source.parent / "home")
    # open to others, but each may change only what is their own
    (source.parent / which).chmod(0o1777)
    assert Path(built(source)._name).is_relative_to(folder)


def test_files_of_another_user_are_not_loaded(source, caplog, monkeypatch):
    built(source)
    [library] = libraries(source)
    if os.geteuid() == 0:
        os.chown(library, 12345, -1)
        built(source)
        assert f"other users can write to {library}: it is compiled anew" in caplog.text
        os.chown(library.parent, 12345, -1)
        assert Path(built(source)._name).is_relative_to(source.parent / "home")
    else:
        monkeypatch.setattr(compiled.os, "geteuid", lambda: 4_000_000_000)
        assert compiled.load(source, torch.float64, FUNCTIONS, "we go on without it") is None
    assert "and what it holds would run in your name" in caplog.text


def test_without_a_cache_it_is_compiled_for_the_machine_or_the_process(source, monkeypatch, caplog):
    """As where the home folder is read-only, or belongs to a group."""
    (source.parent / "cache").mkdir()
    (source.parent / "cache" / "compiled").write_text("a file")
    (source.parent / "home").write_text("a file")
    temporary = source.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(temporary))
    folder = temporary / f"tlmc-compiled-{os.geteuid()}"
    for _ in range(2):
        assert Path(built(source)._name).parent == folder
    assert caplog.text.count("compiled code is not taken from") == 2
    # somebody else was there first
    folder.chmod(0o777)
    compiled._folder_of_this_process.cache_clear()
    try:
        library = built(source)
        assert Path(library._name).parent.parent == temporary
        assert Path(library._name).parent != folder
    finally:
        compiled._folder_of_this_process.cache_clear()


def test_a_damaged_library_is_compiled_anew(source, caplog, compiler, monkeypatch):
    write, calls = compiler
    write()
    built(source)
    [library] = libraries(source)
    # elsewhere, since a process knows the files that it has loaded
    monkeypatch.setenv("TLMC_CACHE_DIR", str(source.parent / "other"))
    damaged = source.parent / "other" / "compiled" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:40])
    calls()
    assert built(source)._name == str(damaged)
    assert len(calls()) == 1
    assert f"{damaged} is damaged and is compiled anew" in caplog.text


def test_sizes_that_c_and_python_share_are_compared(source):
    source.write_text(SOURCE + "const int64_t layout[] = {16, 8};\n")
    assert compiled.load(source, torch.float64, FUNCTIONS, "", [16, 8]) is not None
    with pytest.raises(RuntimeError, match=r"was written for the sizes \[16, 8\], but Python has \[16, 9\]"):
        compiled.load(source, torch.float64, FUNCTIONS, "", [16, 9])
