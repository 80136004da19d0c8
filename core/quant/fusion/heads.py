"""Q and K of FLUX on their way from a packed product to attention: the host views, permutes, norms, joins text and image and turns them.

    Packed -> view, permute, unpack -> Head -> norm -> Normed -> cat -> Joint -> apply_rope: one kernel, qkv_rope

Attention itself and what patches it never see one: heads wait only where a block is called with positions and no such patch is there.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ....kernels.qkv_rope import MOST, qkv_rope
from .deferred import RULES, Deferred, pending
from .expressions import Expression, Packed
from .scope import FLOATS, Scope

VIEWED, PERMUTED = "viewed", "permuted"


@dataclass(eq=False)
class Heads(Expression):
    """q, k and v as the host sees them: [B, N, 3, H, D], then [3, B, H, N, D]."""

    like: Tensor
    product: Tensor         # [B, N, 3 H D]
    state: str

    def compute(self) -> Tensor:
        return self.like


@dataclass(eq=False)
class Head(Expression):
    like: Tensor            # [B, H, N, D]
    product: Tensor
    place: int              # 0 for q, 1 for k

    def compute(self) -> Tensor:
        return self.like


@dataclass(eq=False)
class Norms:
    """The RMS norms of q and of k of one product. weights: [D] of each, on the device and in the type of q."""

    weights: tuple[Tensor, ...]
    eps: float | None


@dataclass(eq=False)
class Normed(Head):
    norms: Norms

    def compute(self) -> Tensor:
        return F.rms_norm(self.like, self.like.shape[-1:], self.norms.weights[self.place], self.norms.eps)


@dataclass(eq=False)
class Joint(Expression):
    """[B, H, N of all, D]"""

    parts: tuple[Normed, ...]

    @property
    def like(self) -> Tensor:
        return self.parts[0].like

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, channels = self.like.shape
        return torch.Size((batch, heads, sum(part.shape[2] for part in self.parts), channels))

    def compute(self) -> Tensor:
        return torch.cat([part.compute() for part in self.parts], 2)


# rules -----------------------------------------------------------------------------------------------------------------
def viewed(scope: Scope, packed: Packed, sizes: tuple):
    """`view(B, N, 3, H, -1)`; None for any other."""
    if not scope.turning or len(sizes) != 5 or sizes[:3] != (*packed.shape[:2], 3) or sizes[4] != -1:
        return None
    return Deferred(scope, Heads(packed.like.view(sizes), packed.like, VIEWED))


def permuted(args: tuple, kwargs: dict):
    heads = pending(args[0], Heads)
    fits = heads and heads.state == VIEWED and args[1:] == (2, 0, 3, 1, 4) and not kwargs
    return Deferred(args[0].scope, Heads(heads.like.permute(2, 0, 3, 1, 4), heads.product, PERMUTED)) if fits else None


def unpacked(args: tuple, kwargs: dict):
    """`q, k, v = ...` asks for unbind(0)."""
    heads = pending(args[0], Heads)
    if not heads or heads.state != PERMUTED or args[1:] != (0,) or kwargs:
        return None
    q, k, v = heads.like.unbind(0)
    return (*(Deferred(args[0].scope, Head(part, heads.product, place)) for place, part in enumerate((q, k))), v)


def joined(parts) -> Deferred | None:
    """torch.cat of text's and image's q, or k."""
    normed = [pending(part, Normed) for part in parts]
    if not all(normed) or len({part.place for part in normed}) > 1 or len({(part.shape[:2], part.shape[3], part.dtype) for part in normed}) > 1:
        return None
    return Deferred(parts[0].scope, Joint(tuple(normed)))


def turned(args: tuple, kwargs: dict):
    """comfy_kitchen.apply_rope(q, k, positions)"""
    if len(args) != 3 or kwargs:
        return None
    (q, k), positions = (normed_parts(x) for x in args[:2]), args[2]
    if not q or not belong(q, k) or len({part.norms.eps for part in q}) > 1:
        return None
    if not turns(positions, q[0].shape[0], sum(part.shape[2] for part in q), q[0].shape[3]):
        return None
    weights = ([part.norms.weights[place] for part in q] for place in (0, 1))
    args[0].scope.record.fuse("norm+cat+rope of q and k" if len(q) > 1 else "norm+rope of q and k")
    return tuple(qkv_rope([part.product for part in q], *weights, positions, heads=q[0].shape[1], eps=q[0].norms.eps, with_v=False))


def normed_parts(x) -> tuple[Normed, ...]:
    """What x is joined of, or x alone; nothing where it is neither."""
    expression = pending(x, Normed, Joint)
    return expression.parts if isinstance(expression, Joint) else (expression,) if expression else ()


def belong(q: tuple[Normed, ...], k: tuple[Normed, ...]) -> bool:
    """Whether these are q and k of the same products, in one order."""
    return len(q) == len(k) and all(one.norms is other.norms and (one.place, other.place) == (0, 1) for one, other in zip(q, k, strict=True))


def turns(positions, batch: int, tokens: int, channels: int) -> bool:
    """[B or 1, 1, N, D/2, 2, 2] in fp32."""
    return (isinstance(positions, Tensor) and not isinstance(positions, Deferred) and positions.ndim == 6 and positions.dtype is torch.float32
            and positions.shape[0] in (1, batch) and positions.shape[1:] == (1, tokens, channels // 2, 2, 2))


RULES |= {Tensor.permute: permuted, Tensor.unbind: unpacked, "comfy_kitchen::apply_rope": turned}


# the module that norms both --------------------------------------------------------------------------------------------
def norms(scope: Scope, module, weight: Callable):
    """The host's QKNorm, from which nothing is wanted but to norm q and k and give both in the type of v."""
    both = [getattr(module, name, None) for name in ("query_norm", "key_norm")]
    if not all(isinstance(norm, torch.nn.RMSNorm) and norm.weight is not None for norm in both) or both[0].eps != both[1].eps:
        return None
    before = module.forward

    def forward(q, k, v):
        one, other = pending(q, Head), pending(k, Head)
        fits = type(one) is type(other) is Head and one.product is other.product and (one.place, other.place) == (0, 1)
        if not fits or v.dtype is not one.dtype or one.dtype not in FLOATS or one.shape[3] > MOST or one.shape[3] % 2:
            return before(q, k, v)
        made = Norms(tuple(weight(norm, one.like) for norm in both), both[0].eps)
        if not all(is_like(taken, one.like) for taken in made.weights):
            return before(q, k, v)
        return tuple(Deferred(scope, Normed(part.like, part.product, part.place, made)) for part in (one, other))
    return forward


def is_like(weight: Tensor, x: Tensor) -> bool:
    """Whether a norm's weight needs no cast for x, so that what it gives is of the type of x."""
    return weight.dtype is x.dtype and weight.device == x.device
