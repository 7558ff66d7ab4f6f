r"""Training by several processes: each takes its share of every batch, and the gradients are added up.

The loss is a mean over the structures of a batch, so its gradient is a sum over shares when every share is weighted by
the size of the whole batch (``n_structures`` of :func:`tlmc.training.loss.batch_loss`). All processes hold all weights
and moments and take the same step of AdamW with the same reduced gradient: the run is that of one process with the
same batch size, to rounding, whatever their number. It may be stopped and go on with another number of processes.

Only the first process writes files and logs and computes descriptors; the others read the descriptors from the cache
folder, or compute them too where that folder is another machine's. ``torchrun`` starts the processes, on one machine or
several, or ``tlmc finetune --processes``, on one; a notebook calls the latter and is never forked.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tlmc.devices import find_device
from tlmc.errors import ConfigError, TlmcError

PATIENCE = timedelta(hours=12)
"""How long a process waits for another; long, since the first one may compute descriptors or validate alone."""
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_HANDLED = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals to a launcher that it hands on to its processes; Windows has no SIGHUP."""
_LAUNCHER = "torch.distributed.elastic"
T = TypeVar("T")


class ContactError(TlmcError):
    """Another process of the training stopped; the run goes on from its last checkpoint when started again."""


@dataclass(frozen=True)
class Group:
    """The processes of one training; one by itself by default. Every method is called by all of them, in step."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""
    device: torch.device = torch.device("cpu")
    """Device of this process."""
    parent: int | None = None
    """Process that started this one and is watched, since a launcher that is killed does not end its processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def share(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this process' part of a batch; empty where there are fewer indices than processes."""
        return indices[self.rank :: self.size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes; return it."""
        if self.size > 1:
            with self._contact():
                dist.all_reduce(tensor)
        return tensor

    def follow_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of the first process; return it."""
        if self.size > 1:
            with self._contact():
                dist.broadcast(tensor, 0)
        return tensor

    def from_first(self, content: T) -> T:
        """Return what the first process gave, anything that JSON can hold."""
        if self.size == 1:
            return content
        text = np.frombuffer(json.dumps(content, allow_nan=False).encode(), dtype=np.uint8).copy()
        length = int(self.follow_(torch.tensor(len(text), device=self.device)).item())
        data = torch.from_numpy(text) if self.is_first else torch.empty(length, dtype=torch.uint8)
        result: T = json.loads(self.follow_(data.to(self.device)).cpu().numpy().tobytes())
        return result

    def check_same(self, value: str, what: str) -> None:
        """Raise a ConfigError unless this process has what the first has."""
        if self.from_first(value) != value:
            raise ConfigError(f"{what} of process {self.rank} are not those of process 0")

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process pass the block before the others enter it."""
        if not self.is_first:
            self._wait()
        yield
        if self.is_first:
            self._wait()

    def _wait(self) -> None:
        self.sum_(torch.zeros((), device=self.device)).item()

    @contextmanager
    def _contact(self) -> Iterator[None]:
        if self.parent is not None and os.getppid() != self.parent:
            raise ContactError("the launcher of this training is gone: the same command goes on")
        try:
            yield
        except RuntimeError as error:  # of gloo and NCCL alike
            raise ContactError(
                f"no contact with the other processes, one of them has probably stopped ({str(error).splitlines()[0]})"
            ) from error


@contextmanager
def processes(device: str = "cpu") -> Iterator[Group]:
    """Join the processes that a launcher started, as the variables of ``torchrun`` tell; alone without them.

    Parameters
    ----------
    device
        ``cpu`` (backend gloo) or ``cuda`` (NCCL): the GPU with the number that the process has on its machine.

    Raises
    ------
    ConfigError
        If a variable is missing, a process has no GPU, or torch was built without the backend.
    """
    size = _variable("WORLD_SIZE", 1, 1)
    if size == 1:
        yield Group(device=find_device(device))
        return
    rank, local_rank = _variable("RANK", 0), _variable("LOCAL_RANK", 0)
    if device == "cuda":
        device = f"cuda:{local_rank}"
    elif device != "cpu":
        raise ConfigError(f"of several processes each has its own GPU: device must be cpu or cuda, got {device!r}")
    own = find_device(device)
    check_backend(own.type)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group(_BACKENDS[own.type], timeout=PATIENCE, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {rank} of {size} cannot reach the others: {error}") from error
    try:
        yield Group(rank, size, own, os.getppid())
    finally:
        dist.destroy_process_group()


def check_backend(device_type: str) -> None:
    """Raise a ConfigError if processes on this type of device (``cpu``, ``cuda``) cannot work together."""
    backend = _BACKENDS[device_type]
    available = dist.is_available() and (dist.is_gloo_available() if backend == "gloo" else dist.is_nccl_available())
    if not available:
        raise ConfigError(
            f"training with several processes on {device_type} needs the backend {backend}, which torch "
            f"{torch.__version__} was built without"
        )


def launched_processes() -> int:
    """Return how many processes a launcher started together with this one; 1 without a launcher."""
    return _variable("WORLD_SIZE", 1, 1)


def launch(n_processes: int, arguments: Sequence[str]) -> int:
    """Run ``python ARGUMENTS`` in several processes on this machine, with torchrun's launcher, until they end.

    They share the cores, or as many threads as ``TLMC_THREADS`` or ``OMP_NUM_THREADS`` allow.

    Returns
    -------
    int
        Exit status: 0, or that of a process that failed, 130 after Ctrl-C.

    Raises
    ------
    ContactError
        If a process was killed.
    """
    # not at the top, since the processes themselves do without it
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # who started this with nohup wants it to outlive the terminal
    handled = [number for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
    share = max(1, torch.get_num_threads() // n_processes)
    with _surroundings(share), tempfile.TemporaryDirectory(prefix="tlmc-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in handled),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            ended = {rank: int(failure.exitcode) for rank, failure in error.failures.items()}
            # the first that fails makes the launcher end the others
            ended_by_it = (-signal.SIGTERM, 128 + signal.SIGTERM)
            by_itself = {rank: status for rank, status in ended.items() if status not in ended_by_it}
            rank, status = min((by_itself or ended).items())
            if status < 0:
                killer = signal.Signals(-status).name
                raise ContactError(f"process {rank} ended with {killer}: the same command goes on") from error
            return status
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


@contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """Tell the processes how many threads they have, and put back at the end what they and torch's launcher need."""
    # torch counts what either of the first two allows; the launcher sets the last
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TLMC_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE")
    variables = {name: os.environ.get(name) for name in names}
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_LAUNCHER)]
    levels = [logger.level for logger in loggers]
    os.environ.update(dict.fromkeys(names[:3], str(threads)))
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what ended is said once, by the process or by us
    try:
        yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():  # elsewhere the launcher leaves them alone
            for number, handler in handlers.items():
                if handler is not None:  # or it was set by a C library, and cannot be put back
                    signal.signal(number, handler)


def _variable(name: str, least: int, default: int | None = None) -> int:
    text = os.environ.get(name) or default
    try:
        value = int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = least - 1
    if value < least:
        raise ConfigError(
            f"{name} must be an integer of at least {least}, as torchrun sets it in every process, but is "
            f"{'not set' if text is None else repr(text)}"
        )
    return value
