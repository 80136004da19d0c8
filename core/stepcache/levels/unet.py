"""What the levels of a UNet share: blocks that others stand in for, patches kept to the blocks that run, and the flow of a call.

Nothing of the host's forward is copied. For the length of one call, the containers of blocks are exchanged; patches
go into a shallow copy of transformer_options. A computed step differs from the host's by one patch, which only looks.
"""
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from ...families import Unfamiliar
from ...families.unet import costs
from .base import Seam

INDEX = "transformer_index"     # the host counts attention blocks, and patches may go by that number
CONTAINERS = ("input_blocks", "middle_block", "output_blocks")
BLOCK_PATCHES = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")


class UnetLevel:
    """A level that keeps something at a computed call of the UNet, and runs a part of it at a skipped one."""

    seam = Seam.NETWORK
    gates = False
    serves = "unet"

    def resolve(self, policy):
        return self

    def evaluate(self, cache, call, compute):
        check(call)
        n, options = len(call.rows), call.arguments["transformer_options"]
        if "middle_block_after_patch" in options.get("patches", {}):
            cache.give_up("a patch behind the middle block counts on every block, as SUPIR's does, so everything is computed; choose guided output")
        if cache.broken:
            cache.ran(n, 1.0)
            return compute()
        if cache.skips() and all(cache.ready(row) for row in call.rows):
            entered, result = self.skip(cache, call, compute)
            if entered:
                cache.ran(n, self.share(cache, call))
                return result
            result = compute()
        else:
            entered, result = self.watch(cache, call, compute)
        if not entered:
            cache.give_up(f"the UNet did not pass its output blocks as expected, so level '{self.name}' cannot skip; choose guided output")
        cache.ran(n, 1.0)
        return result

    def skip(self, cache, call, compute) -> tuple[bool, Tensor]:
        """Run a part; whether what stands in for the rest was asked for, and the result."""
        raise NotImplementedError

    def watch(self, cache, call, compute) -> tuple[bool, Tensor]:
        """Run everything and learn from it; whether there was something to learn, and the result."""
        raise NotImplementedError

    def running(self, call) -> tuple[int, int]:
        """How many of the first input blocks and of the last output blocks run on a skip."""
        raise NotImplementedError

    def share(self, cache, call) -> float:
        pixels = call.x.shape[-2] * call.x.shape[-1]
        if ("costs", pixels) not in cache.notes:
            cache.notes["costs", pixels] = costs(call.network, pixels)
        return cache.notes["costs", pixels].share(*self.running(call))


def check(call) -> None:
    """Whether what is to be changed is there; an update of the host may have moved it."""
    if "transformer_options" not in call.arguments:
        raise Unfamiliar("its forward does not tell its arguments by name")
    for name in CONTAINERS:
        if not hasattr(call.network, name):
            raise Unfamiliar(f"{type(call.network).__name__} has no {name}")


@contextmanager
def standing_in(network, inputs: list, outputs: list):
    """The given blocks in place of the network's and nothing in the middle; then exactly what was there."""
    containers = {"input_blocks": torch.nn.ModuleList(inputs), "output_blocks": torch.nn.ModuleList(outputs)}
    if network.middle_block is not None:
        containers["middle_block"] = torch.nn.Sequential()
    before = {name: getattr(network, name) for name in containers}
    try:
        for name, container in containers.items():
            setattr(network, name, container)
        yield
    finally:
        for name, container in before.items():
            setattr(network, name, container)


def nothing(blocks: int) -> list:
    """So many blocks that hand on what they are given: the host runs the layers of a block one by one."""
    return [torch.nn.Sequential() for _ in range(blocks)]


class Recalled(torch.nn.Module):
    """A layer that gives a kept tensor, whatever goes in."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, h):
        return self.value


def recalled(value: Tensor) -> torch.nn.Module:
    """A block that gives a kept tensor."""
    return torch.nn.Sequential(Recalled(value))


def patched(options: dict, patch: Callable, runs: Callable[[str, int], bool] | None = None) -> dict:
    """transformer_options with `patch` before the output patches of others, which fire only where their block runs."""
    patches = dict(options.get("patches", {}))
    if runs is not None:
        patches |= {name: [kept_to(runs, other) for other in patches[name]] for name in BLOCK_PATCHES if name in patches}
    patches["output_block_patch"] = [patch, *patches.get("output_block_patch", ())]
    return {**options, "patches": patches}


def kept_to(runs: Callable[[str, int], bool], patch: Callable) -> Callable:
    def guarded(*arguments):
        *streams, options = arguments       # h of an input block; h and its skip connection of an output block
        if runs(*options["block"]):
            return patch(*arguments)
        return streams[0] if len(streams) == 1 else tuple(streams)
    return guarded


def joined(parts: list[Tensor]) -> Tensor:
    """Rows in one batch."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
