"""Work in fresh processes of one thread each."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import ase.io
from ase import Atoms

from tlmc.errors import ConfigError, DataError
from tlmc.labelling.frames import write_frames
from tlmc.progress import watched

logger = logging.getLogger(__name__)

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def structures_in_processes(
    work: Callable[[_Job], list[Atoms]], jobs: Sequence[_Job], paths: Sequence[Path | None], processes: int
) -> list[list[Atoms]]:
    """Return ``work(job)`` of every job, read from its file if that exists, else written there."""
    found = [list(ase.io.iread(path)) if path is not None and path.is_file() else None for path in paths]
    tasks = [(work, job, path) for job, path, frames in zip(jobs, paths, found, strict=True) if frames is None]
    new = iter(in_processes(_work_and_write, tasks, processes))
    return [next(new) if frames is None else frames for frames in found]


def _work_and_write(task: tuple[Callable[[_Job], list[Atoms]], _Job, Path | None]) -> list[Atoms]:
    work, job, path = task
    frames = work(job)
    if path is not None:
        write_frames(path, frames)
    return frames


def in_processes(
    work: Callable[[_Job], _Result], jobs: Sequence[_Job], processes: int, quiet: bool = False
) -> list[_Result]:
    """Return ``work(job)`` of every job, computed in fresh processes of one thread each.

    When this process is interrupted or killed, they end at once: what a calculation leaves that is cut short is no
    result.
    """
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, got {processes}")
    if not jobs:
        return []
    results: dict[int, _Result] = {}
    # spawned, not forked: a fork copies the parent's thread pools in whatever state they are
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with (
        lifeline,
        held,
        _one_thread(),
        ProcessPoolExecutor(
            min(processes, len(jobs)), context, initializer=_end_with_parent, initargs=(lifeline,)
        ) as pool,
    ):
        futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
        try:
            # who reads the log is told a line each
            told = logger.isEnabledFor(logging.INFO)
            done = as_completed(futures) if told else watched(as_completed(futures), "calculations", len(futures))
            for future in done:
                results[futures[future]] = future.result()
                if not quiet:
                    logger.info("%d of %d done", len(results), len(jobs))
        except (KeyboardInterrupt, SystemExit):
            held.close()
            raise
        except BrokenProcessPool as error:
            time.sleep(0.5)  # Ctrl-C ends the processes, and is then on its way to this one too
            raise DataError(
                f"a process died, perhaps for lack of memory, with {len(results)} of {len(jobs)} calculations done; "
                "run again to go on from there"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[index] for index in range(len(jobs))]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Set the thread counts that children inherit; libraries read them once, when they are loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_with_parent(lifeline: Connection) -> None:
    """End this process when its parent lets go of the pipe, or is killed, rather than wait for jobs that never come."""
    # Ctrl-C reaches all processes of a terminal. A code that is cut short by it looks like a failed calculation, so
    # this process must be gone before it can say so; and there is no use in one traceback from each
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell script
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
