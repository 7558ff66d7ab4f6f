"""The names of what can be computed on."""

from __future__ import annotations

import torch

from tlmc.errors import ConfigError


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of this name.

    Parameters
    ----------
    name
        ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.backends.cuda.is_built():
        raise ConfigError(f"device {name!r} is not there: torch {torch.__version__} was built without CUDA")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device {name!r} is not there: torch sees {count} GPUs")
    return torch.device("cuda", index)
