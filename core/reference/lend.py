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
        self.blocks = {name: (k.to(device), v.to(device)) for name, (k, v) in entry.blocks.items()}

    def block(self, name: str) -> tuple[Tensor, Tensor]:
        return self.blocks[name]


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
        return tuple(pair)

    def send(self, name: str) -> None:
        if name not in self.under_way:
            self.under_way[name] = [self.fetch(tensor) for tensor in self.entry.blocks[name]]
