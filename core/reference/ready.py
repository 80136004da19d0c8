"""An entry that is there already, as a recipe: made by a node, or read from a file."""
from dataclasses import dataclass
from functools import cached_property

import torch
from comfy.ldm.flux.model import Flux
from torch import Tensor

from .entry import Entry, Key
from .handle import Facts
from .prefill import Put
from .seams import LAYOUTS

NAMES = {"flux": "FLUX.1", "flux2": "FLUX.2"}


def family(network) -> str:
    """Of a network of the class that FLUX.1 and FLUX.2 share; nothing of one that only names its blocks so, as Chroma does."""
    if not isinstance(network, Flux):
        return ""
    return "flux2" if network.params.global_modulation else "flux"


@dataclass(frozen=True, eq=False)
class Ready:
    """entry: lent as it is, so `fill` is asked of nobody. null: what the negative gets where the user gives it nothing of its own."""

    entry: Entry
    seam: str = "flux"
    null: Entry | None = None

    @property
    def family(self) -> str:
        return self.entry.family

    @property
    def source(self) -> str:
        return self.entry.source

    @property
    def exactness(self) -> str:
        return self.entry.exactness

    @property
    def rope(self) -> str:
        return self.entry.rope

    @property
    def tokens(self) -> int | tuple[int, ...]:
        return self.entry.tokens

    def unfit(self, network) -> str:
        has, wants = LAYOUTS[self.seam](network), {name: (k.shape[1], k.shape[3]) for name, (k, _) in self.entry.blocks.items()}
        if has and self.family in NAMES and self.family != (kind := family(network)):
            return (f"{self.source} was made for {NAMES[self.family]} and the model is {NAMES.get(kind, type(network).__name__)}; "
                    "use it with the model that it was made for")
        if has.keys() != wants.keys():
            return (f"{self.source} was made for {len(wants)} blocks and {type(network).__name__} has {len(has)} of the kind; "
                    f"use it with the {self.entry.family} model that it was made for")
        for name, (heads, width) in wants.items():
            if has[name] != (heads, width):
                return (f"{self.source} has {heads} heads of {width} channels in block {name} and the model {has[name][0]} of {has[name][1]}; "
                        f"use it with the {self.entry.family} model that it was made for")
        return ""

    def bytes(self, network, dtype: torch.dtype) -> int:
        return self.entry.bytes

    def key(self, facts: Facts) -> Key:
        return self.entry.key

    def ready(self, facts: Facts) -> Entry:
        return self.entry

    def fill(self, facts: Facts, put: Put) -> Tensor | None:
        raise TypeError("a ready entry is lent as it is")

    def other_side(self) -> "Ready | None":
        return self.nothing

    @cached_property
    def nothing(self) -> "Ready | None":
        return None if self.null is None else Ready(self.null, self.seam, self.null)
