"""What a reference comes to after its one encoding, and everything that depends on.

An entry may stand in for another exactly when their keys are equal: a key has a field for all that the numbers hang on
(content, adapter, base weights, position, modulation, numerics) and none for what they do not (seed, step, sampler).
"""
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXACT = "exact"
ROPES = ("none", "pre", "post")
CARRIERS = ("kv", "lora", "text")
FP8 = torch.float8_e4m3fn
OF_REFERENCE = ("system", "content", "adapter", "slot", "class")


@dataclass(frozen=True)
class Key:
    """`fields` as {what: text}. `lasting` is False where a text means something in this process alone for as long as it runs."""

    fields: Mapping[str, str]
    lasting: bool = True

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dict(sorted(self.fields.items()))).encode()).hexdigest()

    @property
    def reference(self) -> tuple:
        """Which reference it is, whatever model, prompt or size it was encoded for."""
        return tuple(self.fields.get(name) for name in OF_REFERENCE)

    def differing(self, other: "Key") -> list[str]:
        """The fields in which two keys are not the same."""
        names = sorted({*self.fields, *other.fields})
        return [name for name in names if self.fields.get(name) != other.fields.get(name)]


@dataclass(frozen=True)
class Entry:
    """Keys and values of a reference's T tokens, block by block; T may differ between blocks. Nobody writes into it.

    blocks: {"double.0": (K, V)}, each [1, H, T, D].
    rope: how K is positioned: "pre", not yet rotated, with `ids` [T, axes] to be rotated by; "post", rotated; "none", never.
    exactness: "exact", or in words how it departs from computing anew.
    scales: of blocks that are kept in 8 bits, {"double.0": (of K, of V)}, each [1, H, 1, 1] fp32: K is blocks' times it.
    source: for the user: the adapter's file, the kind, the size.
    """

    family: str
    blocks: Mapping[str, tuple[Tensor, Tensor]]
    key: Key
    source: str
    rope: str = "none"
    ids: Tensor | None = None
    exactness: str = EXACT
    carrier: str = "kv"
    scales: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int | tuple[int, ...]:
        """One number where all blocks have as many, as in a transformer; in a UNet one for every block."""
        counts = tuple(k.shape[2] for k, _ in self.blocks.values())
        return counts[0] if len(set(counts)) == 1 else counts

    def tokens_of(self, block: str) -> int:
        return self.blocks[block][0].shape[2]

    @property
    def bytes(self) -> int:
        tensors = [tensor for pairs in (self.blocks, self.scales) for pair in pairs.values() for tensor in pair]
        tensors += [self.ids] if self.ids is not None else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_eight_bits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """x = s e4m3(x / s), s = max|x| / 448, one per head: the 8-bit values and s. A head of zeros keeps s = 1."""
    scale = tensor.abs().amax(dim=(2, 3), keepdim=True).float() / torch.finfo(FP8).max
    scale = torch.where(scale > 0, scale, 1.0)
    return (tensor.float() / scale).to(FP8), scale


def fingerprint(*tensors: Tensor | None) -> str:
    """Of the values, their types and shapes, wherever they lie."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        kept = tensor.detach().to("cpu").contiguous()
        digest.update(f"{kept.dtype} {tuple(kept.shape)}".encode())
        digest.update(kept.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
