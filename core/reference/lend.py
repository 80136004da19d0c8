"""An entry on the GPU for the length of a run: whole, or one block at a time with the next one on its way.

A block of an EasyControl condition of 512 x 512 is 12 MiB, half a millisecond over PCIe, and FLUX.1-dev computes about
19 ms on a block at 1024 x 1024; what does not fit beside the weights is therefore streamed.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .entry import Entry


class Resident:
    """All blocks on the device."""

    def __init__(self, entry: Entry, device: torch.device):
        self.entry = entry
        self.blocks, self.scales = (
            {name: tuple(tensor.to(device) for tensor in pair) for name, pair in pairs.items()} for pairs in (entry.blocks, entry.scales))

    def block(self, name: str) -> tuple[Tensor, Tensor]:
        return scaled(self.blocks[name], self.scales.get(name))


class Streamed:
    """The block that is asked for, and the next one on its way.

    fetch: copies a tensor to the device beside the work that is queued there, and returns it with a call that waits for it.
    """

    def __init__(self, entry: Entry, fetch: Callable[[Tensor], tuple[Tensor, Callable[[], None]]]):
        self.entry, self.fetch = entry, fetch
        names = list(entry.blocks)
        self.following = dict(zip(names, names[1:] + names[:1], strict=True))
        self.under_way: dict[str, list] = {}

    def block(self, name: str) -> tuple[Tensor, Tensor]:
        self.send(name)
        pair = []
        for tensor, wait in self.under_way.pop(name):
            wait()
            pair.append(tensor)
        self.under_way = {key: value for key, value in self.under_way.items() if key == self.following[name]}
        self.send(self.following[name])
        return scaled(tuple(pair[:2]), tuple(pair[2:]))

    def send(self, name: str) -> None:
        if name not in self.under_way:
            self.under_way[name] = [self.fetch(tensor) for tensor in (*self.entry.blocks[name], *self.entry.scales.get(name, ()))]


def scaled(pair: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """K and V as they are used: kept in 8 bits they come back in 32."""
    return tuple(tensor.float() * scale for tensor, scale in zip(pair, scales, strict=True)) if scales else pair
