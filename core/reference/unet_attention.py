"""Self-attention of the host's UNet, replaced: by one that reads K and V, or by one that sees those of entries too.

    Attn(Q(X), [K(X); K_1; ...; K_n], [V(X); V_1; ...; V_n])        no position code, so the order of references is nothing

Both stand in patches_replace["attn1"], where the host calls them with the projected q, k, v [B, T, C].
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .join import Buffers, Mismatch, Segment, log_weights
from .prefill import Put


def split(x: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [B, H, T, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, C]"""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class CapturedAttention:
    """Self-attention as it is, whose K and V are handed out."""

    name: str
    put: Put

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads = extra_options["n_heads"]
        self.put(self.name, split(k, heads), split(v, heads))
        return optimized_attention(q, k, v, heads, attn_precision=extra_options["attn_precision"], transformer_options=extra_options)


@dataclass(frozen=True)
class JoinedAttention:
    """Self-attention over own and entry tokens, own ones first. `chained`: the replacement that was there, called with the larger k and v."""

    name: str
    segments: Sequence[Segment]
    buffers: Buffers
    chained: Callable | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads, (rows, own, width) = extra_options["n_heads"], k.shape
        if q.shape[0] != rows:
            raise Mismatch(f"block {self.name} attends in {q.shape[0] // rows} tiles, as HyperTile makes them, and references are seen as a whole; "
                           "take HyperTile off the model")
        if any(len(segment.lent) != rows for segment in self.segments):
            raise Mismatch(f"block {self.name} computes {rows} rows at once where the call has {len(self.segments[0].lent)}")
        pairs = [segment.block(self.name) for segment in self.segments]
        level = f"{own} x {width}"     # every resolution keeps a buffer of its own
        keys = self.buffers.joined(f"k {level}", split(k, heads), [[pair[0] for pair in part] for part in pairs])
        values = self.buffers.joined(f"v {level}", split(v, heads), [[pair[1] for pair in part] for part in pairs])
        bias = log_weights(own, self.segments, None, rows, q.shape[1], q, self.name)
        if self.chained is None:
            return optimized_attention(split(q, heads), keys, values, heads, mask=bias, attn_precision=extra_options["attn_precision"],
                                       skip_reshape=True, transformer_options=extra_options)
        if bias is not None:
            raise Mismatch(f"another node replaces the self-attention of block {self.name} and cannot weigh references; "
                           "set the weight of every reference to 1, or take that node off the model")
        # One that returns v, as perturbed attention does, gives back more tokens than it was asked for; its own are the first.
        return self.chained(q, flat(keys), flat(values), extra_options)[:, :q.shape[1]]
