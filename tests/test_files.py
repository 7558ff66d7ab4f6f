"""Files that appear whole, are listed when they are whole, and folders that are somebody else's."""

from __future__ import annotations

import pytest

from tlmc.errors import ConfigError
from tlmc.files import WRITTEN_LIST, atomic_path, claim, listed, write_text


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
