"""Files that appear whole or not at all, and their fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it when the block ends without an error.

    The temporary name keeps the target's suffix, which many writers look at. A block that raises, or is killed,
    leaves ``target`` as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file(target)
    try:
        # as readable as the umask says, also where a writer makes the file anew
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
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
