"""C code of the package: the ready-made libraries of a wheel, or, in a checkout, what the machine's compiler makes.

What it computes is also written with torch operations, which serve machines with neither and which the tests compare
with. ``TLMC_COMPILED=off`` asks for those.

A wheel has a library for each of several kinds of processors (:mod:`tlmc.shipped`), beside the source. Where there is
none, as in a checkout, the source is compiled at first use, in about a second, once per machine. Such a
library is code that runs with the user's rights, so it is loaded only from where no other user can put one. It is
known by all that went into it: the sources, the compiler (``CC``, which may have arguments) with its version, and the
processor that ``-march=native`` stands for, since machines of different kinds may share a home. A compiler without
OpenMP, as Apple's is, gives a library that works on one thread. That a compiler failed is remembered for an hour, so
that not every process of a sweep tries again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tlmc import paths, shipped
from tlmc.errors import ConfigError
from tlmc.files import write_text

SECONDS = 120.0
"""What a compiler may take for one source; it needs one or two."""
_SECONDS_TO_ANSWER = 5.0
_MEMORY = 3600.0
"""Seconds for which a failure is remembered: headers or a linker may come without the compiler itself changing."""
_FLAGS = (*shipped.FLAGS, "-march=native", "-fopenmp", "-fPIC", "-shared")
_REPLACED: tuple[Mapping[str, str], ...] = (
    {},
    {"-march=native": ""},
    {"-fopenmp": "-fopenmp-simd"},
    {"-march=native": "", "-fopenmp": ""},
)
"""What is put up with in turn, where a compiler refuses flags."""
_SEARCHED = ("PATH", "CPATH", "C_INCLUDE_PATH", "LIBRARY_PATH", "SDKROOT", "TMPDIR")
"""Variables that may mend a compiler."""
_PLAIN = "the compiled code does without what the compiler refused, perhaps several threads: %s"
_LOG = logging.getLogger(__name__)


class _CompilerError(Exception):
    """Why there is no library."""


def load(
    source: Path, dtype: torch.dtype, functions: Mapping[str, Sequence[Any]], loss: str, layout: Sequence[int] = ()
) -> ctypes.CDLL | None:
    """Return the functions of a C source, or None, with a warning, where they cannot be had.

    Parameters
    ----------
    source
        A file that includes ``compiled.h``.
    dtype
        float32 or float64: what its ``real`` numbers are.
    functions
        The argument types of every function; none returns anything.
    loss
        What the warning says first: what goes on without them.
    layout
        Sizes that C and Python must agree on; the source has the same numbers, 64-bit integers, as ``layout``.

    Raises
    ------
    ConfigError
        If ``TLMC_COMPILED`` is neither ``on`` nor ``off``.
    RuntimeError
        If the source has other sizes.
    """
    wanted = os.environ.get("TLMC_COMPILED") or "on"
    if wanted not in ("on", "off"):
        raise ConfigError(f"TLMC_COMPILED must be on or off, got {wanted!r}")
    if wanted == "off":
        return None
    try:
        library = _ready_made(source, dtype) or _open(source, dtype)
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, _CompilerError, AttributeError) as error:
        _LOG.warning("%s: %s", loss, error)
        return None
    if layout:
        found = list((ctypes.c_int64 * len(layout)).in_dll(library, "layout"))
        if found != list(layout):
            raise RuntimeError(f"{source} was written for the sizes {found}, but Python has {list(layout)}")
    return library


def _ready_made(source: Path, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the best library for this processor that lies beside a source, or return None."""
    precision = str(dtype).removeprefix("torch.")
    for capability in shipped.usable(torch.backends.cpu.get_cpu_capability()):
        path = shipped.library(source, precision, capability)
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                _say_once(f"{path} cannot be loaded: {error}")
    return None


def _open(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """Load the library of a source from the first folder that can hold it, compiling it if need be."""
    compiler = _compiler()
    command = [*compiler, f"-DIS_DOUBLE={int(dtype == torch.float64)}"]
    parts = [shipped.HEADER.read_bytes(), source.read_bytes(), repr((_FLAGS, _REPLACED, dtype)).encode()]
    parts += [text.encode() for text in (*_identity(compiler), _processor(), repr(platform.libc_ver()))]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    last: OSError | None = None
    for folder in _folders():
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _check_private(folder)
            return ctypes.CDLL(str(_library(folder, key, command, source)))
        except OSError as error:
            # read-only, full, of others, or mounted so that nothing in it can be executed
            _say_once(f"compiled code is not taken from {folder}: {error}")
            last = error
    assert last is not None
    raise last


def _library(folder: Path, key: str, command: Sequence[str], source: Path) -> Path:
    """Return the library in a folder, compiling it unless that was done, or failed lately."""
    whole, plain = folder / f"{key}.so", folder / f"{key}-plain.so"
    if _is_whole(whole):
        return whole
    searched = repr([os.environ.get(name) for name in _SEARCHED])
    failure = folder / f"{key}-{hashlib.sha256(searched.encode()).hexdigest()[:8]}.failed"
    if failure.exists() and abs(time.time() - failure.stat().st_mtime) < _MEMORY:
        reason = failure.read_text(encoding="utf-8", errors="replace")
        if _is_whole(plain):
            _LOG.info(_PLAIN, reason)
            return plain
        raise _CompilerError(f"{reason} (tried within the hour; remove {failure} to try again at once)")
    reasons = []
    for replaced in _REPLACED:
        flags = [flag for flag in (replaced.get(flag, flag) for flag in _FLAGS) if flag]
        target = plain if replaced else whole
        status, answer = _compile([*command, *flags, f"-I{shipped.HEADER.parent}", str(source), "-lm"], target)
        if status == 0:
            break
        reasons.append(answer)
        if status is None:
            break  # what hangs once would hang again
    if not reasons:
        return whole
    with contextlib.suppress(OSError):
        write_text(failure, reasons[0])
    if status != 0:
        raise _CompilerError(reasons[0])
    _LOG.info(_PLAIN, reasons[0])
    return plain


def _compile(command: Sequence[str], target: Path) -> tuple[int | None, str]:
    """Let a compiler write a file, whole or not at all; return its status, None for too slow, and a line it says."""
    # nobody else can write to the file at any time
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as private:
        made = Path(private, target.name)
        status, answer = _run([*command, "-o", str(made)], SECONDS)
        if status == 0:
            made.chmod(0o755)
            made.replace(target)
    lines = answer.strip().splitlines() or [f"{command[0]} ended with status {status}"]
    return status, next((line for line in lines if "error" in line), lines[-1])


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Return the status of a program, None where it took too long, and what it said."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise _CompilerError(f"the C compiler {command[0]} does not start: {error.strerror}") from error
    with process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return None, f"the C compiler {command[0]} did not end within {seconds:g} s"
        except BaseException:
            _kill(process)
            raise
    return process.returncode, text


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those it started, which would otherwise go on."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _compiler() -> list[str]:
    """Return the command of the C compiler."""
    named = os.environ.get("CC", "").strip()
    if named and shutil.which(named) is None:
        try:
            return shlex.split(named)
        except ValueError as error:
            raise _CompilerError(f"CC is {named!r}, which is no command: {error}") from error
    found = named or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        raise _CompilerError("there is no C compiler: install one (gcc, clang) or set CC")
    return [found]


def _identity(compiler: Sequence[str]) -> list[str]:
    """Return what tells one compiler from another, or from itself after an update or a repair."""
    files = [repr(compiler)]
    for word in compiler:
        program = shutil.which(word)
        if program is not None:
            path = Path(program).resolve()
            facts = path.stat()
            files.append(f"{path} {facts.st_size} {facts.st_mtime_ns}")
    return [*files, _version(tuple(compiler), tuple(files))]


@functools.cache
def _version(compiler: tuple[str, ...], files: tuple[str, ...]) -> str:
    """Return what a compiler says of itself; the files are there for the cache."""
    return _run([*compiler, "--version"], _SECONDS_TO_ANSWER)[1]


def _processor() -> str:
    """Return what ``-march=native`` depends on: a cache folder may be shared by different machines."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        text = platform.processor()
        if platform.system() == "Darwin":
            names = [f"machdep.cpu.{name}" for name in ("brand_string", "features", "leaf7_features")]
            text += _run(["/usr/sbin/sysctl", "-n", *names], _SECONDS_TO_ANSWER)[1]
    else:
        text = "".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{platform.system()} {platform.machine()} {text}"


def _folders() -> Iterator[Path]:
    """Yield where libraries may be kept: the cache, the user's own, one for temporary files, one of this process."""
    named, own = paths.cache_dir(), paths.user_cache_dir()
    for cache in dict.fromkeys((named, own)):
        yield (cache / "compiled").resolve()
    if os.name == "posix":
        yield Path(tempfile.gettempdir(), f"tlmc-compiled-{os.geteuid()}").resolve()
    yield _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tlmc-compiled-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _check_private(folder: Path) -> None:
    """Raise a PermissionError if another user could put files, or another folder, in the place of this folder's."""
    for place in (folder, *folder.parents):
        if _open_to_others(place):
            raise PermissionError(f"other users can write to {place}, and what it holds would run in your name")


def _is_whole(library: Path) -> bool:
    """Tell whether a library is there, is ours, and can be loaded; what is not is compiled anew."""
    if not library.is_file():
        return False
    if _open_to_others(library):
        _say_once(f"other users can write to {library}: it is compiled anew")
        return False
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        _say_once(f"{library} is damaged and is compiled anew: {error}")
        return False
    return True


def _open_to_others(place: Path) -> bool:
    """Tell whether a file, or which entries a folder has, can be changed by somebody else than the user and root."""
    if os.name != "posix":
        return False
    facts = place.stat()
    if facts.st_uid not in (0, os.geteuid()):
        return True
    if stat.S_ISDIR(facts.st_mode) and facts.st_mode & stat.S_ISVTX:
        return False  # as in /tmp, everybody may add entries but change only their own
    by_group = bool(facts.st_mode & stat.S_IWGRP) and not _is_own_group(facts.st_gid)
    return by_group or bool(facts.st_mode & stat.S_IWOTH)


def _is_own_group(number: int) -> bool:
    """Tell whether a group has no members but the user, as many systems make one for each."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


@functools.cache
def _say_once(sentence: str) -> None:
    _LOG.warning("%s", sentence)
