"""Files that appear whole and are listed when they are, folders of others, and the folders that variables name."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tlmc import files, paths
from tlmc.errors import ConfigError
from tlmc.files import WRITTEN_LIST, atomic_path, claim, listed, write_text
from tlmc.potentials.model_files import save_tensors


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path, mask):
    """Whoever writes them, and without setting the umask, which all threads share."""
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "a")
        save_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)}, {})
        with atomic_path(tmp_path / "c") as temporary:
            temporary.unlink()
            temporary.write_text("made anew")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_the_umask_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_threads_may_write_the_same_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: write_text(tmp_path / "a.txt", str(k) * 1000), range(200)))
    text = (tmp_path / "a.txt").read_text()
    assert len(set(text)) <= 3
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_that_is_taken_is_not_written_to(tmp_path, monkeypatch):
    names = iter(["one", "one", "two"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(names))
    with atomic_path(tmp_path / "a.txt") as first, atomic_path(tmp_path / "a.txt") as second:
        assert [path.name for path in (first, second)] == [".a-one.txt", ".a-two.txt"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package in site-packages, beside a foreign folder of notebooks, used in an empty folder."""
    for name in ("TLMC_ROOT", "TLMC_REPORTS_DIR", "TLMC_CACHE_DIR", "TLMC_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site-packages" / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(paths, "PACKAGE_DIR", tmp_path / "site-packages" / "tlmc")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_an_installed_package_writes_beside_the_user(installed, monkeypatch):
    assert paths.reports_dir() == installed / "here" / "tlmc-runs"
    with pytest.raises(paths.NoCheckoutError, match="clone it and set TLMC_ROOT to it"):
        paths.data_dir()
    monkeypatch.setenv("TLMC_REPORTS_DIR", str(installed / "reports"))
    assert paths.reports_dir() == installed / "reports"
    monkeypatch.delenv("TLMC_REPORTS_DIR")
    (installed / "checkout" / "notebooks").mkdir(parents=True)
    monkeypatch.setenv("TLMC_ROOT", str(installed / "checkout"))
    assert paths.reports_dir() == installed / "checkout" / "reports"
    monkeypatch.setenv("TLMC_ROOT", str(installed / "here"))
    with pytest.raises(FileNotFoundError, match="holds no notebooks/ folder: set TLMC_ROOT to the checkout of tlmc"):
        paths.reports_dir()


def test_variables_name_folders(installed, monkeypatch):
    """An empty one is not the current folder, and ~ is the user's home."""
    default = paths.cache_dir()
    for name in ("TLMC_ROOT", "TLMC_REPORTS_DIR", "TLMC_CACHE_DIR", "TLMC_DATA_DIR"):
        monkeypatch.setenv(name, "")
    assert paths.reports_dir() == installed / "here" / "tlmc-runs"
    assert paths.cache_dir() == default != installed / "here"
    assert paths.mirror_dir() is None
    monkeypatch.setenv("HOME", str(installed))
    monkeypatch.setenv("TLMC_CACHE_DIR", "~/cache")
    assert paths.cache_dir() == installed / "cache"
    monkeypatch.setenv("TLMC_CACHE_DIR", "~nobody-of-this-name/cache")
    with pytest.raises(ConfigError, match="TLMC_CACHE_DIR is '~nobody-of-this-name/cache', but there is no such home"):
        paths.cache_dir()


def test_variables_that_name_no_folder_get_a_sentence(installed, monkeypatch):
    file = installed / "file"
    file.write_text("")
    for name, function in {
        "TLMC_ROOT": paths.project_root,
        "TLMC_REPORTS_DIR": paths.reports_dir,
        "TLMC_CACHE_DIR": paths.cache_dir,
        "TLMC_DATA_DIR": paths.mirror_dir,
    }.items():
        monkeypatch.setenv(name, str(file))
        with pytest.raises(ConfigError, match=f"{name} is '{file}', which is not a folder"):
            function()
    monkeypatch.setenv("TLMC_DATA_DIR", str(installed / "nowhere"))
    with pytest.raises(ConfigError, match=r"TLMC_DATA_DIR is '.*nowhere', which does not exist"):
        paths.mirror_dir()


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", "²", "", " "])
def test_a_number_of_threads_that_is_none_gets_a_sentence(threads):
    environment = os.environ | {"TLMC_THREADS": threads}
    command = [sys.executable, "-m", "tlmc.cli", "fetch", "--list"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path("/"))
    if threads.strip():
        assert answer.stderr.strip() == f"TLMC_THREADS must be a positive integer, got {threads!r}"
        assert answer.returncode == 2
    else:
        assert answer.returncode == 0, answer.stderr


def test_what_is_still_being_written_is_not_listed(tmp_path):
    write_text(tmp_path / "b.yml", "")
    write_text(tmp_path / "a.yml", "")
    with atomic_path(tmp_path / "c.yml") as temporary:
        assert temporary in tmp_path.glob("*.yml")
        assert [path.name for path in listed(tmp_path, "*.yml")] == ["a.yml", "b.yml"]
    assert [path.name for path in listed(tmp_path, "*.yml")] == ["a.yml", "b.yml", "c.yml"]
    assert listed(tmp_path / "none", "*") == []


def test_a_folder_is_taken_if_it_is_new_empty_or_ours(tmp_path):
    claim(tmp_path / "new" / "run", ["run.json"], "a run")
    (tmp_path / "new" / "run" / ".DS_Store").write_text("")
    claim(tmp_path / "new" / "run", ["run.json"], "a run")
    write_text(tmp_path / "new" / "run" / "run.json", "{}")
    write_text(tmp_path / "new" / "run" / "notes.txt", "mine")
    claim(tmp_path / "new" / "run", ["run.json"], "a run")
    with pytest.raises(ConfigError, match=r"new holds files that are not those of a run \(run\): name another folder"):
        claim(tmp_path / "new", ["run.json"], "a run")
    with pytest.raises(ConfigError, match=r"notes\.txt is a file, not a folder"):
        claim(tmp_path / "new" / "run" / "notes.txt", ["run.json"], "a run")


def test_new_files_are_noted_and_those_that_are_there_are_not(tmp_path, monkeypatch):
    write_text(tmp_path / "mine.txt", "a")
    monkeypatch.setenv(WRITTEN_LIST, str(tmp_path / "list"))
    write_text(tmp_path / "mine.txt", "b")
    write_text(tmp_path / "sub" / "new.txt", "c")
    write_text(tmp_path / "sub" / "new.txt", "d")
    monkeypatch.setenv(WRITTEN_LIST, str(tmp_path / "sub" / "list"))
    write_text(tmp_path / "cache.txt", "e")
    assert (tmp_path / "list").read_text() == "sub/new.txt\n"
    assert not (tmp_path / "sub" / "list").exists()
