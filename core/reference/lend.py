"""An entry on the GPU for the length of a run: whole, or one block at a time with the next one on its way.

A block of an EasyControl condition of 512 x 512 is 12 MiB, half a millisecond over PCIe, and FLUX.1-dev computes about
19 ms on a block at 1024 x 1024; what does not fit beside the weights is therefore streamed.
"""
import math
from collections import OrderedDict
from collections.abc import Callable, Collection

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


class Loans:
    """What is lent to a run, by place (key, device), in no more than `limit` bytes on each device, the least recently used leaving first."""

    def __init__(self):
        self.limit: float = math.inf
        self.held: OrderedDict[tuple, tuple[int, Resident | Streamed]] = OrderedDict()      # place -> bytes, what is lent

    def get(self, place: tuple | None) -> Resident | Streamed | None:
        if place not in self.held:
            return None
        self.held.move_to_end(place)
        return self.held[place][1]

    def put(self, place: tuple, lent: Resident | Streamed, size: int) -> None:
        self.held[place] = (size, lent)

    def make_room(self, size: int, device: str, using: Collection[tuple]) -> dict[tuple, Resident | Streamed]:
        """Let go of what one more of `size` bytes asks for, and return it; what a call is `using` stays, even above the limit."""
        gone = {}
        for place in [place for place in self.held if place[1] == device and place not in using]:
            if self.bytes(device) + size <= self.limit:
                break
            gone[place] = self.held.pop(place)[1]
        return gone

    def bytes(self, device: str) -> int:
        return sum(size for place, (size, _) in self.held.items() if place[1] == device)


def scaled(pair: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """K and V as they are used: kept in 8 bits they come back in 32."""
    return tuple(tensor.float() * scale for tensor, scale in zip(pair, scales, strict=True)) if scales else pair
