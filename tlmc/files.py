"""Files that appear whole or not at all, and their fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from tlmc.errors import ConfigError, DataError

WRITTEN_LIST: Final = "TLMC_WRITTEN_LIST"
"""Environment variable with the path of a list that every file written by this package is added to: what a run may
remove later is what stands there, and nothing else."""


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it when the block ends without an error.

    The temporary name keeps the target's suffix, which many writers look at. A block that raises, or is killed,
    leaves ``target`` as it was. The temporary name begins with a dot: :func:`listed` leaves it out.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file(target)
    try:
        # as readable as the umask says, also where a writer makes the file anew
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        note_written(target)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(target: Path) -> Path:
    """Make an empty file beside a target; unlike mkstemp's, it is not private: the umask decides."""
    while True:
        path = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path


def note_written(target: Path) -> None:
    """Add a file that is about to be written to the list that :data:`WRITTEN_LIST` names, if it lies beside or below.

    A file that is there already is not added: it stands there, or is somebody else's.
    """
    notes = os.environ.get(WRITTEN_LIST)
    if notes and not target.exists():
        name = os.path.relpath(target, Path(notes).parent)
        if not name.startswith(os.pardir):
            with open(notes, "a", encoding="utf-8") as stream:
                stream.write(f"{name}\n")


def listed(folder: Path | str, pattern: str) -> list[Path]:
    """Return the files in a folder that match a pattern, by name; hidden ones, and those still being written, are not.

    Other processes may write into the folder at the same time: what :func:`atomic_path` has not finished is nobody's
    result yet, and is gone the next moment.
    """
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def claim(folder: Path, marker: Collection[str], what: str) -> None:
    """Make a folder for results, or go on in one; a folder that holds somebody's files is refused.

    Parameters
    ----------
    folder
        Where results are to go.
    marker
        Names of files of which one is there if this package began the folder.
    what
        What is to be written, for the sentence: ``"a run"``.

    Raises
    ------
    ConfigError
        If it is a file, or holds files but none of the `marker`.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder: name a folder for {what}")
    folder.mkdir(parents=True, exist_ok=True)
    there = listed(folder, "*")
    if there and not any((folder / name).is_file() for name in marker):
        names = ", ".join(path.name for path in there[:3]) + (", ..." if len(there) > 3 else "")
        raise ConfigError(
            f"{folder} holds files that are not those of {what} ({names}): name another folder, new or empty"
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, by a file ``.lock`` in it; where files cannot be locked, do not.

    Raises
    ------
    DataError
        If one does.
    """
    from filelock import FileLock, Timeout  # slow to import, and --help does without it

    path = folder / ".lock"
    note_written(path)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(f"another process is at work in {folder}: wait for it, or choose another output") from error
    except NotImplementedError:  # some network file systems
        yield
        return
    try:
        yield
    finally:
        lock.release()


def write_text(target: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path | str, content: Any) -> None:
    """Write a JSON file atomically; NaN and infinity are refused rather than written as invalid JSON."""
    write_text(target, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
