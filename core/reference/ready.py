"""An entry that is there already, as a recipe: made by a node, or read from a file."""
from dataclasses import dataclass

import torch
from torch import Tensor

from .entry import Entry, Key
from .handle import Facts
from .prefill import Put

NAMES = {"flux": "FLUX.1", "flux2": "FLUX.2"}


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
    def tokens(self) -> int:
        return self.entry.tokens

    def unfit(self, network) -> str:
        has = {f"{kind}.{i}" for kind in ("double", "single") for i in range(len(getattr(network, f"{kind}_blocks", ())))}
        kind = "flux2" if getattr(getattr(network, "params", None), "global_modulation", False) else "flux"
        if has and self.family in NAMES and self.family != kind:
            return f"{self.source} was made for {NAMES[self.family]} and the model is {NAMES[kind]}; use it with the model that it was made for"
        if has != set(self.entry.blocks):
            return (f"{self.source} was made for {len(self.entry.blocks)} blocks and {type(network).__name__} has {len(has)} of the kind; "
                    f"use it with the {self.entry.family} model that it was made for")
        heads, width = (next(iter(self.entry.blocks.values()))[0].shape[i] for i in (1, 3))
        if (network.num_heads, network.hidden_size // network.num_heads) != (heads, width):
            return (f"{self.source} has {heads} heads of {width} channels and the model {network.num_heads} of {network.hidden_size // network.num_heads}; "
                    f"use it with the {self.entry.family} model that it was made for")
        return ""

    def bytes(self, network, dtype: torch.dtype) -> int:
        return self.entry.bytes

    def key(self, facts: Facts) -> Key:
        return self.entry.key

    def fill(self, facts: Facts, put: Put) -> Tensor | None:
        for name, (k, v) in self.entry.blocks.items():
            put(name, k, v)
        return self.entry.ids

    def other_side(self) -> "Ready | None":
        return None if self.null is None else Ready(self.null, self.seam, self.null)
