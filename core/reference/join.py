"""A network's own tokens and those of entries in one attention:

    softmax([Q K^T + 0 ; Q K_1^T + log w_1 ; ...]) [V ; V_1 ; ...]

w_j weighs a reference: its tokens get w_j times the attention that they would get among the others. 1 needs no mask, and
0 leaves the tokens out. Own and entry tokens meet in one buffer per run that every block and every step writes anew.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .entry import Entry


class Mismatch(ValueError):
    """A block's attention is not laid out as its entries expect."""


@dataclass(frozen=True)
class Segment:
    """The tokens of one reference: for every row of the call its lent entry, and the weight that all rows share."""

    lent: Sequence
    weight: float = 1.0

    @property
    def entry(self) -> Entry:
        return self.lent[0].entry

    @property
    def shared(self) -> bool:
        return all(lent is self.lent[0] for lent in self.lent)

    def block(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """K and V of each row; of one row where all share it."""
        return [lent.block(name) for lent in (self.lent[:1] if self.shared else self.lent)]


@dataclass
class Buffers:
    """Room for own and entry tokens of one block, by role and shape, and the patches that use it; it lives as long as a run."""

    rooms: dict = field(default_factory=dict)
    patches: dict = field(default_factory=dict)

    def patch(self, segments: Sequence[Segment], make: Callable[[], object]):
        """The patch of these segments, the same one in every call of a run: a compiled block looks at which object it is."""
        key = tuple((segment.weight, *map(id, segment.lent)) for segment in segments)
        if key not in self.patches:
            self.patches[key] = make()
        return self.patches[key]

    def forget(self, lent) -> None:
        """No patch holds an entry that left the run."""
        self.patches = {key: patch for key, patch in self.patches.items() if not any(id(lent) in ids for _, *ids in key)}

    def room(self, role: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        key = (role, shape, like.dtype, like.device)
        if key not in self.rooms:
            self.rooms = {k: room for k, room in self.rooms.items() if (k[0], k[3]) != (role, like.device)}
            self.rooms[key] = like.new_empty(shape)
        return self.rooms[key]

    def joined(self, role: str, own: Tensor, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """own [R, H, N, D] and after it every part's tokens: one [1, H, T, D] for all rows, or one for each."""
        more = sum(part[0].shape[2] for part in parts)
        rows, heads, tokens, width = own.shape
        out = self.room(role, (rows, heads, tokens + more, width), own)
        out[:, :, :tokens] = own
        begin = tokens
        for part in parts:
            end = begin + part[0].shape[2]
            for row, tensor in enumerate(part):
                out[(slice(None) if len(part) == 1 else slice(row, row + 1)), :, begin:end] = tensor
            begin = end
        return out


def log_weights(own: int, segments: Sequence[Segment], mask: Tensor | None, rows: int, queries: int, like: Tensor, name: str) -> Tensor | None:
    """The mask for own and entry tokens of a block [R or 1, 1 or H, Q, N + T]: additive, or boolean where the host's is and no weight asks for more."""
    weights = [segment.weight for segment in segments]
    if mask is None and all(weight == 1 for weight in weights):
        return None
    biases = torch.cat([torch.full((segment.entry.tokens_of(name),), math.log(segment.weight), device=like.device) for segment in segments]).to(like.dtype)
    if mask is None:
        row = torch.cat([biases.new_zeros(own), biases])
        return row.expand(1, 1, queries, -1)
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    if mask.shape[-1] != own:
        raise Mismatch(f"an attention mask over {mask.shape[-1]} tokens came where the block has {own}")
    if mask.dtype == torch.bool and all(weight == 1 for weight in weights):
        return torch.cat([mask, mask.new_ones((*mask.shape[:-1], len(biases)))], dim=-1)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)
    return torch.cat([mask, biases.to(mask.dtype).expand(*mask.shape[:-1], -1)], dim=-1)


@dataclass
class AttentionPatch:
    """For the `attn1_patch` list of a model that rotates after it (FLUX and its kin): appends K, V and their position code.

    To be the last of the list: others may count tokens from the end.
    """

    segments: Sequence[Segment]
    buffers: Buffers
    embed: object       # the network's position embedder, ids [1, T, axes] -> [1, 1, T, D/2, 2, 2]
    positions: tuple | None = None      # the model's own code, and the one that was made of it

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **others):
        name = f"{extra_options['block_type']}.{extra_options['block_index']}"
        rows, own = k.shape[0], k.shape[2]
        if any(len(segment.lent) != rows for segment in self.segments):
            raise Mismatch(f"block {name} computes {rows} rows at once where the call has {len(self.segments[0].lent)}")
        pairs = [segment.block(name) for segment in self.segments]
        keys = self.buffers.joined("k", k, [[pair[0] for pair in part] for part in pairs])
        values = self.buffers.joined("v", v, [[pair[1] for pair in part] for part in pairs])
        return {"q": q, "k": keys, "v": values, "pe": self.position(pe), "attn_mask": log_weights(own, self.segments, attn_mask, rows, q.shape[2], q, name)}

    def position(self, pe: Tensor | None) -> Tensor | None:
        """The model's code and behind it the entries': their own, or turning by nothing for what is rotated already or never is."""
        if pe is None:
            if any(segment.entry.rope == "pre" for segment in self.segments):
                raise Mismatch("the model gives its attention no position code where a reference has positions")
            return None
        if self.positions is None or self.positions[0] is not pe:
            self.positions = (pe, torch.cat([pe, *(self.code(segment, pe) for segment in self.segments)], dim=2))
        return self.positions[1]

    def code(self, segment: Segment, pe: Tensor) -> Tensor:
        entries = [lent.entry for lent in (segment.lent[:1] if segment.shared else segment.lent)]
        codes = torch.cat([self.embed(entry.ids.to(pe.device)[None]).to(pe.dtype) if entry.rope == "pre" else still(entry.tokens, pe) for entry in entries])
        rows = max(pe.shape[0], len(codes))
        if pe.shape[0] != rows:
            raise Mismatch("rows with different reference positions share one position code")
        return codes.expand(rows, *codes.shape[1:])


def still(tokens: int, pe: Tensor) -> Tensor:
    """The position code that turns nothing: x * 1 + y * 0 is x, to the bit."""
    return torch.eye(2, dtype=pe.dtype, device=pe.device).expand(1, 1, tokens, pe.shape[3], 2, 2)
