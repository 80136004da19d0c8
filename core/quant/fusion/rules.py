"""Which operations turn one expression into another. A rule takes what the operation was called with and gives a Deferred, or None: then the value is computed.

A rule holds where the host's result would have the shape and the type of the expression, and nowhere else.
"""
from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn import functional as F

from . import heads
from .deferred import RULES, Deferred, pending
from .expressions import Activation, Joined, Norm, Once, Packed, Product, Residual, Scaled, Silu
from .products import product


def is_plain(thing) -> bool:
    return isinstance(thing, Tensor) and not isinstance(thing, Deferred)


def is_row(row, of) -> bool:
    """[B or 1, 1, C] in the type of `of`, [B, N, C]."""
    return (is_plain(row) and row.ndim == 3 and row.dtype is of.dtype and row.device == of.device
            and row.shape[0] in (1, of.shape[0]) and row.shape[1:] == (1, of.shape[2]))


def both(args: tuple, kwargs: dict) -> tuple:
    return args if len(args) == 2 and not kwargs else (None, None)


def multiplied(args: tuple, kwargs: dict):
    for one, other in (both(args, kwargs), both(args, kwargs)[::-1]):
        if (inner := pending(one, Norm, Product)) and type(inner) in (Norm, Product) and is_row(other, inner):
            return Deferred(one.scope, Scaled(inner, other))
        if (silu := pending(one, Silu)) and (gate := factor(other, silu)) is not None:
            return Deferred(one.scope, Activation(silu.like, gate, lambda: silu.compute() * gate))
    return None


def factor(other, silu: Silu) -> Tensor | None:
    known = pending(other, Product)
    other = known.like if known else other
    return other if is_plain(other) and other.shape == silu.shape and other.dtype is silu.dtype else None


def scaled_and_shifted(args: tuple, kwargs: dict):
    """torch.addcmul(shift, norm, 1 + scale)"""
    if len(args) != 3 or kwargs:
        return None
    shift, deferred, row = args
    norm = pending(deferred, Norm)
    return Deferred(deferred.scope, Scaled(norm, row, shift)) if norm and is_row(row, norm) and is_row(shift, norm) else None


def added(args: tuple, kwargs: dict):
    """x + gate * y"""
    x, term = both(args, kwargs)
    scaled = pending(term, Scaled)
    if scaled is None or scaled.shift is not None or not isinstance(x, Tensor) or x.shape != scaled.shape or x.dtype is not scaled.dtype:
        return None
    return Deferred(term.scope, Residual(x.plain() if isinstance(x, Deferred) else x, scaled))


def added_in_place(args: tuple, kwargs: dict):
    """x += gate * y, which torch tells as x.add_(gate * y): what was x before is not written to.

    That is seen by nobody where x is one of the block's streams, as the host's blocks go on with the result; any other x is written to,
    and the streams too where a patch or a hook may look at them afterwards.
    """
    term = args[-1]
    made = added(args, kwargs) if isinstance(term, Deferred) and term.scope.is_stream(args[0]) else None
    if made is not None:
        term.scope.streams.append(weakref.ref(made))
    return made


def joined(args: tuple, kwargs: dict):
    """torch.cat((attention, activation), 2)"""
    given = dict(zip(("parts", "dim"), args, strict=False)) | kwargs
    if given.keys() != {"parts", "dim"} or len(given["parts"]) != 2:
        return None
    beside, deferred = given["parts"]
    if given["dim"] == 2 and pending(beside, heads.Normed):
        return heads.joined(given["parts"])
    if given["dim"] not in (2, -1):
        return None
    activation = pending(deferred, Activation)
    fits = activation and is_plain(beside) and beside.ndim == 3 and beside.dtype is activation.dtype and beside.shape[:-1] == activation.shape[:-1]
    return Deferred(deferred.scope, Joined(beside, activation)) if fits else None


def silu(args: tuple, kwargs: dict):
    known = pending(args[0], Product) if len(args) == 1 and not kwargs.get("inplace") else None
    return Deferred(args[0].scope, Silu(known.like, F.silu)) if type(known) is Product else None


def linear(args: tuple, kwargs: dict):
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    deferred, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if not isinstance(deferred, Deferred) or deferred.expression is None or isinstance(weight, Deferred) or isinstance(bias, Deferred):
        return None
    return product(deferred, weight, bias)


# packed q, k and v: Z-Image's keys and values, which the host copies once for each head of q that shares them, also where none does --------
def split(args: tuple, kwargs: dict):
    """FLUX splits what is not q, k and v off first."""
    packed = pending(args[0], Packed)
    sizes = args[1] if len(args) == 2 else ()
    if packed is None or set(kwargs) != {"dim"} or kwargs["dim"] != -1 or not isinstance(sizes, (list, tuple)) or len(sizes) not in (2, 3):
        return None
    if len(sizes) == 2:
        first, second = packed.like.split(tuple(sizes), -1)
        return [Deferred(args[0].scope, Packed(first)), second]
    q, k, v = packed.like.split(tuple(sizes), -1)
    return [q, *(Deferred(args[0].scope, Once(part)) for part in (k, v))]


def viewed(args: tuple, kwargs: dict):
    if (packed := pending(args[0], Packed)) and not kwargs:
        return heads.viewed(args[0].scope, packed, args[1:])
    once = pending(args[0], Once)
    return Deferred(args[0].scope, Once(once.like.view(*args[1:]))) if once and not kwargs and not once.unsqueezed else None


def unsqueezed(args: tuple, kwargs: dict):
    once = pending(args[0], Once)
    fits = once and not once.unsqueezed and args[1:] == (3,) and not kwargs and once.like.ndim == 4
    return Deferred(args[0].scope, Once(once.like.unsqueeze(3), unsqueezed=True)) if fits else None


def repeated(args: tuple, kwargs: dict):
    once = pending(args[0], Once)
    fits = once and once.unsqueezed and args[1:] == (1, 1, 1, 1, 1) and not kwargs
    return Deferred(args[0].scope, Once(once.like, True, True)) if fits else None


def flattened(args: tuple, kwargs: dict):
    once = pending(args[0], Once)
    if not (once and once.repeated and args[1:] == (2, 3) and not kwargs):
        return None
    args[0].scope.record.fuse("K or V not copied")
    return once.like.squeeze(3)


def normed_and_turned(args: tuple, kwargs: dict):
    """comfy_kitchen.rms_rope(q, k, ...): k is the host's and goes on to be repeated."""
    if len(args) < 2 or pending(args[1], Once) is None:
        return None
    scope, k = args[1].scope, args[1].plain()
    q, k = torch.ops.comfy_kitchen.rms_rope(args[0], k, *args[2:], **kwargs)
    return q, Deferred(scope, Once(k))


RULES |= {
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), multiplied),
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add), added), **dict.fromkeys((Tensor.add_, Tensor.__iadd__), added_in_place),
    torch.addcmul: scaled_and_shifted, torch.cat: joined, F.silu: silu, F.linear: linear,
    "comfy_kitchen::rms_rope": normed_and_turned, torch.split: split, torch.functional.split: split, Tensor.view: viewed,
    Tensor.unsqueeze: unsqueezed, Tensor.repeat: repeated, Tensor.flatten: flattened,
}
