"""What one evaluation of a network knows, and what a run tells afterwards."""
from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....kernels._triton import FLOATS


@dataclass(frozen=True)
class Int8:
    """A host int8 weight. codes: [N, K]; scales: fp32 [N, 1]; rotation: by 256 inputs."""

    codes: Tensor
    scales: Tensor
    rotation: bool


@dataclass
class Record:
    """What a run did, as data."""

    fused: Counter = field(default_factory=Counter)     # kernel -> calls in the run
    left: Counter = field(default_factory=Counter)      # why products were left alone -> how many in the run
    evaluations: int = 0        # of the network
    blocks: int = 0             # of the network that were looked at
    others: int = 0             # whose code is another node's
    reason: str = ""            # why nothing was done at all

    def fuse(self, what: str) -> None:
        self.fused[what] += 1

    def leave(self, why: str) -> None:
        self.left[why] += 1

    def each(self, count: int) -> str:
        """Of one evaluation; of the run where not all had the same, as with steps that are skipped."""
        if self.evaluations and count % self.evaluations == 0:
            return f"{count // self.evaluations}"
        return f"{count / max(self.evaluations, 1):.1f}"

    def line(self) -> str:
        if self.reason and not self.fused:
            return f"Fused Kernels is off: {self.reason}"
        if not self.evaluations and self.fused:
            return "Fused Kernels: the run ended within its first evaluation"
        done = ", ".join(f"{self.each(count)} {what}" for what, count in sorted(self.fused.items())) or "nothing fused"
        left = ", ".join(f"{self.each(count)} products {why}" for why, count in sorted(self.left.items()))
        others = f"{self.others} blocks left to the code of other nodes" if self.others else ""
        why = "; ".join(part for part in (f"left to the host: {left}" if left else "", others, self.reason) if part)
        return f"Fused Kernels: {self.blocks} blocks, in each evaluation {done}" + (f"; {why}" if why else "")


@dataclass
class Scope:
    """kernels: the pack's are used; kitchen: comfy_kitchen's int8 product with GELU inside is; every: weights that are not int8 too.

    open: a residual that is not computed may go from one block to the next, as nobody else looks at it in between.
    sealed: no patch stands around a block, which could read what the block was given after the host's code wrote into it.
    int8: what a weight is to an int8 product, or a few words on why it is nothing to it.
    """

    record: Record
    int8: Callable[[Tensor], Int8 | str]
    kernels: bool = True
    kitchen: bool = False
    every: bool = True
    open: bool = False
    sealed: bool = True
    turning: bool = False       # q and k may wait for their positions, in the block that runs
    streams: list[weakref.ref[Tensor]] = field(default_factory=list)    # what that block was given and what it has added to it

    def takes(self, x) -> bool:
        """Whether an expression may be made of x. Under torch.compile and where gradients are wanted all is plain."""
        return (isinstance(x, Tensor) and x.ndim == 3 and x.dtype in FLOATS and x.numel() > 0
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling())

    def enter(self, given) -> None:
        """A block begins, which was given these."""
        self.streams = [weakref.ref(thing) for thing in given if isinstance(thing, Tensor)]

    def is_stream(self, x) -> bool:
        return any(stream() is x for stream in self.streams)
