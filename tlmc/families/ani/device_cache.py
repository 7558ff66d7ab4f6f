"""Where training runs: on the processor, or on a GPU that keeps the descriptors of the set in its own memory."""

from __future__ import annotations

import math

import torch

from tlmc.families.ani.cache import DescriptorCache, Structure

_ON_HOST = ("species", "order")
"""Parts of a structure that steer the work rather than being computed with."""


class DeviceCache:
    """The structures of a cache on a device: each moves when first asked for and stays there while there is room.

    Parameters
    ----------
    cache
        Descriptors in host memory.
    device
        Where they are used.
    room
        Bytes that may stay on the device; structures beyond that are copied whenever asked for. By default half of
        what is free on a GPU, since weights, moments and one batch need the rest.
    """

    def __init__(self, cache: DescriptorCache, device: torch.device, room: float | None = None) -> None:
        self.columns, self.present, self.device = cache.columns, cache.present, device
        self._cache = cache
        if room is None:
            room = 0.5 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        self._room = room
        self._kept: dict[int, Structure] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> Structure:
        structure = self._kept.get(index)
        if structure is None:
            source = self._cache[index]
            moved = {name: part.to(self.device) for name, part in source._asdict().items() if name not in _ON_HOST}
            structure = source._replace(**moved)
            size = sum(part.nbytes for part in moved.values())
            if size <= self._room:
                self._room -= size
                self._kept[index] = structure
        return structure
