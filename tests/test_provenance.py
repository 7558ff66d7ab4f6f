"""Versions, revision and code fingerprint."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from tlmc import provenance


def test_versions_are_those_of_the_running_packages():
    versions = provenance.package_versions()
    # a build tag such as +cpu stays part of the version: it can change a number
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"python", *provenance.PACKAGES}


def test_revision_is_the_commit_of_the_checkout():
    head = subprocess.run(
        ["git", "-C", str(provenance.PACKAGE_DIR), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("not a git checkout")
    assert re.fullmatch(head.stdout.strip() + r"\+?", provenance.git_revision())


def test_revision_is_empty_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE_DIR", tmp_path)
    assert provenance.git_revision() == ""
    # installed into the repository of something else
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(provenance, "PACKAGE_DIR", tmp_path / "site-packages" / "tlmc")
    provenance.PACKAGE_DIR.mkdir(parents=True)
    assert provenance.git_revision() == ""


def test_code_hash_follows_names_and_content(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE_DIR", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    first = provenance.code_hash()
    assert provenance.code_hash() == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = provenance.code_hash()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, provenance.code_hash()}) == 3


def test_code_hash_sees_files_of_every_kind_but_those_of_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE_DIR", tmp_path)
    (tmp_path / "training").mkdir()
    seen = {provenance.code_hash()}
    for name in ("training/sweeps.c", "compiled.h", "registry.json", "report.html", "py.typed"):
        for text in ("a", "b"):
            (tmp_path / name).write_text(text)
            seen.add(provenance.code_hash())
    assert len(seen) == 11
    (tmp_path / "__pycache__").mkdir()
    for name in ("__pycache__/a.cpython-311.pyc", ".sweeps.c.swp"):
        (tmp_path / name).write_text("a")
    assert provenance.code_hash() in seen


def test_code_hash_of_the_package_changes_with_its_c_code(tmp_path, monkeypatch):
    package = tmp_path / "tlmc"
    shutil.copytree(provenance.PACKAGE_DIR, package)
    monkeypatch.setattr(provenance, "PACKAGE_DIR", package)
    seen = {provenance.code_hash()}
    for source in (*package.rglob("*.c"), *package.rglob("*.h"), package / "registry.json"):
        source.write_text(source.read_text() + "\n")
        seen.add(provenance.code_hash())
    assert len(seen) >= 5
