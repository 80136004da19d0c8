"""Entries from a file as a recipe: the one among them that was made for what a call is, or an error that says what differs.

In memory a key names the base weights by a token of this process. In a file stands their print: SHA-256 over names, types,
shapes and samples of the unpatched weights, and over the patches (LoRA) on them.
"""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .entry import Entry, Key, fingerprint
from .handle import Facts
from .ready import Ready

ELEMENTS = 16       # of every tensor, spread over it


def weights_print(patcher) -> str:
    """Of a model's weights and patches, the same whether they are loaded, offloaded or patched at the moment."""
    parts = patcher.get_key_patches("diffusion_model.")
    digest = hashlib.sha256()
    for key in sorted(parts):
        weight, patches = parts[key][0][0], parts[key][1:]
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        for patch in patches:
            digest.update(f"{patch[0]} {patch[2]}".encode())
            update(digest, getattr(patch[1], "weights", patch[1]))
        update(digest, weight)
    return digest.hexdigest()[:32]


def update(digest, value) -> None:
    """Some elements of every tensor in a nest of tuples and lists; a quantized one by its codes."""
    if torch.is_tensor(value):
        value = getattr(value, "_qdata", value).detach()
        some = value.flatten()[::max(1, value.numel() // ELEMENTS)]
        digest.update(some.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for part in value:
            update(digest, part)
    else:
        digest.update(repr(value).encode())


def lasting(entry: Entry, patcher) -> Entry:
    """The entry with a key that means the same in another process."""
    fields = dict(entry.key.fields)
    if "base" in fields:
        fields["base"] = weights_print(patcher)
    return replace(entry, key=Key(fields))


SAME, NULL, NONE = OTHERS = ("same", "null", "none")


@dataclass(frozen=True, eq=False)
class Stored:
    """One reference of the file `name`. entries: for the prompts and sizes that it was encoded for.

    other: what the negative gets where the user gives it nothing of its own: the same, the `nulls`, or none.
    """

    name: str
    seam: str
    entries: Sequence[Entry]
    other: str = SAME
    nulls: Sequence[Entry] = ()

    @property
    def family(self) -> str:
        return self.entries[0].family

    @property
    def source(self) -> str:
        return f"saved reference '{self.name}' ({self.entries[0].source})"

    @property
    def exactness(self) -> str:
        return self.entries[0].exactness

    @property
    def rope(self) -> str:
        return self.entries[0].rope

    @property
    def tokens(self):
        return self.entries[0].tokens

    def unfit(self, network) -> str:
        """Blocks and their sizes; what else an entry hangs on is told by the first call."""
        return Ready(self.entries[0], self.seam).unfit(network)

    def bytes(self, network, dtype: torch.dtype) -> int:
        return max(entry.bytes for entry in self.entries) * len(self.entries)

    def key(self, facts: Facts) -> Key:
        return self.ready(facts).key

    def ready(self, facts: Facts) -> Entry:
        """The entry that was made for this row."""
        if not any("base" in entry.key.fields for entry in self.entries):
            return self.entries[0]      # hangs on nothing that a run could change
        if not facts.lasting:
            raise ValueError(f"{self.source} was made for another model: this one's weights are changed by hooks, a bypass LoRA or replaced layers, which a "
                             "file cannot be compared with; take these away, or encode the reference anew")
        now = {
            "pooled": lambda: fingerprint(facts.pooled), "guidance": lambda: repr(facts.guidance), "size": lambda: "x".join(map(str, facts.shape)),
            "numerics": lambda: str(facts.dtype), "base": lambda: weights_print(facts.model.current_patcher),
        }
        fitting = list(self.entries)
        for field, told in now.items():
            if not any(field in entry.key.fields and entry.key.fields[field] for entry in fitting):
                continue
            value = told()
            left = [entry for entry in fitting if entry.key.fields.get(field, value) == value]
            if not left:
                raise ValueError(f"{self.source} was made for another {WORDS[field]} ({field}: {fitting[0].key.fields[field][:40]}, now {value[:40]}); "
                                 "sample with what it was made for, or encode the reference anew")
            fitting = left
        return fitting[0]

    def fill(self, facts: Facts, put) -> None:
        raise TypeError("a saved entry is lent as it is")

    def other_side(self) -> "Stored | None":
        return {SAME: self, NULL: self.nothing, NONE: None}[self.other]

    @cached_property
    def nothing(self) -> "Stored | None":
        return Stored(self.name, self.seam, self.nulls) if self.nulls else None


WORDS = {"pooled": "prompt", "guidance": "guidance", "size": "picture size", "numerics": "number type", "base": "model, or the model with other LoRAs"}
